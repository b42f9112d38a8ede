"""Rows with one scale each: codes and scales against ONNX Runtime's quantizer, products against its operator.

Axes: kinds of rows (`rows.FAMILIES`) x types x lengths, also such as no block divides and longer than a kernel's tile.
"""

from __future__ import annotations

from itertools import product
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from smolexport.errors import UsageError
from smolexport.quant import Part, RowFormat
from smolexport.quant.planar import ChannelFormat
from tests.core.quant import libmlx, rows
from tests.core.quant.libort import REASON

FORM = ChannelFormat()
# SHA-256 of what onnxruntime.quantization 1.31.1 makes of `fixed_rows`, codes raised by 128, and of a row of zeros.
HASH = "4ad169d4f5c92bdd"


def fixed_rows() -> list[NDArray[np.float32]]:
    return [libmlx.fixed_rows(7, columns) for columns in (640, 90, 1, 5000)] + [np.zeros((1, 9), np.float32)]


def quantized(weights: NDArray[Any]) -> NDArray[np.uint8]:
    """[n, columns + 4]: row by row what the library makes of a channel, its signed codes raised by 128."""
    library = pytest.importorskip("onnxruntime.quantization.quant_utils", reason=REASON)
    kind = pytest.importorskip("onnx", reason="no onnx installed").TensorProto.INT8
    found = []
    for row in weights.astype(np.float32):
        _, scale, codes = library.quantize_data(row, kind, symmetric=True)
        raised = (codes.astype(np.int16) + 128).astype(np.uint8)
        found.append(np.concatenate([raised, np.asarray(scale, np.float32).reshape(1).view(np.uint8)]))
    return np.array(found, np.uint8)


@pytest.mark.parametrize("kind", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("family", rows.FAMILIES)
def test_equals_the_quantizer(family: str, kind: Any) -> None:
    with np.errstate(over="ignore"):
        made = rows.FAMILIES[family](np.random.default_rng(7), (9, 384)).astype(kind)
    for columns in (384, 91):
        weights = np.ascontiguousarray(made[:, :columns])
        if np.isfinite(weights.astype(np.float32)).all():
            assert np.array_equal(FORM.encode(weights), quantized(weights)), columns


@given(seed=st.integers(0, 2**32), columns=st.integers(1, 5000), size=st.floats(-44, 30), ties=st.booleans())
@settings(max_examples=60, deadline=None)
def test_equals_the_quantizer_on_random_problems(seed: int, columns: int, size: float, ties: bool) -> None:
    """Down to rows too small for a scale, and with values halfway between two codes."""
    rng = np.random.default_rng(seed)
    weights = rng.standard_normal((3, columns))
    if ties:
        weights = np.rint(weights * 60) / 2
        weights[:, 0] = 127
    weights = (weights * 10.0**size).astype(np.float32)
    assert np.array_equal(FORM.encode(weights), quantized(weights))


def test_equals_a_stored_hash() -> None:
    assert libmlx.digest(np.concatenate([FORM.encode(weights).reshape(-1) for weights in fixed_rows()])) == HASH


def test_decode_of_any_bytes_is_steps_from_the_middle_times_the_scale() -> None:
    for columns in (1, 33, 256):
        data = np.random.default_rng(columns).integers(0, 256, (31, FORM.row_bytes(columns)), np.uint8)
        codes, scales = libmlx.split(data, FORM.parts(columns))
        with np.errstate(all="ignore"):
            wanted = (codes.astype(np.float32) - 128) * scales.view(np.float32)
            assert libmlx.same_bits(FORM.decode(data, columns), wanted)


def test_no_value_is_farther_than_half_a_step() -> None:
    for family, columns in product(("gauss", "outlier", "1e-8"), (64, 4097)):
        weights = rows.FAMILIES[family](np.random.default_rng(3), (5, columns)).astype(np.float32)
        step = np.abs(weights).max(axis=1, keepdims=True) / 127
        assert (np.abs(FORM.decode(FORM.encode(weights), columns) - weights) <= 0.50001 * step).all()


def test_rows_are_independent() -> None:
    weights = rows.gauss(np.random.default_rng(2), (300, 97))
    whole, order = FORM.encode(weights), np.random.default_rng(3).permutation(300)
    assert np.array_equal(whole[order], FORM.encode(np.ascontiguousarray(weights[order])))
    assert np.array_equal(FORM.decode(whole, 97)[order], FORM.decode(np.ascontiguousarray(whole[order]), 97))
    out = np.full(whole.size + 1, 255, np.uint8)[1:].reshape(whole.shape)
    assert FORM.encode(weights, np.ones(97, np.float32), out) is out
    assert np.array_equal(out, whole)


def test_is_a_row_format() -> None:
    form: RowFormat = FORM
    assert (form.name, form.block, form.canonical) == ("int8-row", 1, None)
    assert form.parts(97) == (Part("B", "U8", 97), Part("scales", "F32", 1))
    assert (form.size((2, 3, 128)), form.fits(1), form.fits(0)) == (6 * 132, True, False)
    assert form == ChannelFormat()
    with pytest.raises(UsageError, match="int8-row: repacks no other format"):
        form.repack(np.zeros((1, 18), np.uint8), 32)


def test_bad_arguments() -> None:
    good = np.zeros((2, 64), np.float32)
    with pytest.raises(UsageError, match="int8-row: expected C-contiguous float32"):
        FORM.encode(good.T)
    with pytest.raises(UsageError, match="int8-row: importance"):
        FORM.encode(good, np.ones(63, np.float32))
    with pytest.raises(UsageError, match="int8-row: out must be a writable"):
        FORM.encode(good, out=np.empty((2, 69), np.uint8))
    with pytest.raises(UsageError, match=r"int8-row: expected a C-contiguous uint8 array \[n, 68\]"):
        FORM.decode(np.zeros((1, 69), np.uint8), 64)
    with pytest.raises(UsageError, match="int8-row: rows of 0 elements"):
        FORM.encode(good[:, :0].copy())
    assert FORM.encode(good[:0]).shape == (0, 68)
    assert FORM.decode(np.zeros((0, 68), np.uint8), 64).shape == (0, 64)
