"""float16 and bfloat16 rounding against numpy, ml_dtypes and the C library, at every place where it could go wrong."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

from smolexport.quant import FORMATS
from tests.core.quant import libggml

ALL_WORDS = np.arange(65536, dtype=np.uint16)


def around_every_midpoint(dtype: type) -> NDArray[np.float32]:
    """All values of the 16-bit type, the points half-way to their neighbours, and the next float32 on either side."""
    words = ALL_WORDS.view(dtype).astype(np.float32)
    values = np.sort(words[np.isfinite(words)])
    middles = ((values[1:].astype(np.float64) + values[:-1]) / 2).astype(np.float32)
    edges = np.float32([65504, 65519.996, 65520, 65520.004, 3.4028235e38, -3.4028235e38])
    points = np.concatenate([values, middles, edges])
    with np.errstate(over="ignore"):
        up, down = np.nextafter(points, np.float32(np.inf)), np.nextafter(points, np.float32(-np.inf))
    every = np.concatenate([points, up, down])
    return every[np.isfinite(every)].reshape(1, -1)


@pytest.mark.parametrize(("name", "dtype"), [("f16", np.float16), ("bf16", ml_dtypes.bfloat16)])
def test_rounding(name: str, dtype: type) -> None:
    values = around_every_midpoint(dtype)
    found = FORMATS[name].encode(values).view(np.uint16)
    with np.errstate(over="ignore"):
        assert np.array_equal(found, values.astype(dtype).view(np.uint16))
    if libggml.why_missing() is None:
        assert np.array_equal(found.view(np.uint8), libggml.quantize(FORMATS[name], values))


@pytest.mark.parametrize(("name", "dtype"), [("f16", np.float16), ("bf16", ml_dtypes.bfloat16)])
def test_widening(name: str, dtype: type) -> None:
    found = FORMATS[name].decode(ALL_WORDS.view(np.uint8).reshape(1, -1), 65536)[0]
    wanted = ALL_WORDS.view(dtype).astype(np.float32)
    nan = np.isnan(wanted)
    assert np.array_equal(np.isnan(found), nan)
    assert np.array_equal(found[~nan].view(np.uint32), wanted[~nan].view(np.uint32))


@pytest.mark.parametrize("target", ["f32", "f16", "bf16"])
@pytest.mark.parametrize("source", [np.float16, ml_dtypes.bfloat16])
def test_every_word_from_one_type_to_the_other(target: str, source: type) -> None:
    words = ALL_WORDS.view(source)
    words = words[np.isfinite(words.astype(np.float32))].reshape(1, -1)
    kind = {"f32": np.float32, "f16": np.float16, "bf16": ml_dtypes.bfloat16}[target]
    with np.errstate(over="ignore"):
        wanted = words.astype(np.float32).astype(kind)
    assert np.array_equal(FORMATS[target].encode(words), wanted.view(np.uint8))
