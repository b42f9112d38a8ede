"""Bytes and values against the C library and against gguf-py.

Axes: every format x kinds of rows (`rows.FAMILIES`) x kinds of importance x float32, float16 and bfloat16 input, with a
number of blocks that is not a multiple of the vector width.  Not compared: input that is not finite, which `encode` is
not made for, and the payload of NaNs that come out of infinite scales.
"""

from __future__ import annotations

import platform
from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from smolexport.quant import FORMATS, BlockFormat
from tests.core.quant import libggml, rows

SHAPE = (17, 512)
QUANTIZED = [form for form in FORMATS.values() if form.block > 1]

needs_libggml = pytest.mark.skipif(libggml.why_missing() is not None, reason=str(libggml.why_missing()))
# Elsewhere the C compiler may fuse multiplications and additions, and a few blocks differ.
needs_x86 = pytest.mark.skipif(
    platform.machine() not in ("x86_64", "AMD64"), reason="bytes are defined by the x86-64 build of libggml"
)
by_name = {"argvalues": QUANTIZED, "ids": [form.name for form in QUANTIZED]}


def generator(*words: str) -> np.random.Generator:
    return np.random.default_rng(list("/".join(words).encode()))


def same_values(a: NDArray[np.float32], b: NDArray[np.float32]) -> bool:
    return bool(np.all((a.view(np.uint32) == b.view(np.uint32)) | (np.isnan(a) & np.isnan(b))))


@needs_libggml
@needs_x86
@pytest.mark.parametrize("family", rows.FAMILIES)
@pytest.mark.parametrize("form", FORMATS.values(), ids=list(FORMATS))
def test_encode_equals_libggml(form: BlockFormat, family: str) -> None:
    for kind, make_importance in rows.IMPORTANCES.items():
        rng = generator(form.name, family, kind)
        importance = make_importance(rng, SHAPE[1])
        for name, dtype in rows.DTYPES.items():
            with np.errstate(over="ignore"):
                weights = rows.FAMILIES[family](rng, SHAPE).astype(dtype)
            wide = weights.astype(np.float32)
            if not np.isfinite(wide).all():
                continue  # float16 cannot hold this family
            found, wanted = form.encode(weights, importance), libggml.quantize(form, wide, importance)
            different = np.flatnonzero((found != wanted).reshape(-1, form.nbytes).any(axis=1))
            assert not different.size, f"{name}, importance {kind}: {different.size} blocks, first {different[0]}"


@needs_libggml
@needs_x86
@pytest.mark.parametrize("form", **by_name)
def test_encode_equals_libggml_where_scales_come_out_negative(form: BlockFormat) -> None:
    # Rounding errors of the search; the reference's codes then wrap to 255 and spill into their neighbours' bits.
    for seed in range(8):
        rng = np.random.default_rng(seed)
        weights, importance = rows.far_offset(rng, (64, 256)), rows.few_columns(rng, 256)
        assert np.array_equal(form.encode(weights, importance), libggml.quantize(form, weights, importance))


@needs_libggml
@pytest.mark.parametrize("family", rows.FAMILIES)
@pytest.mark.parametrize("form", **by_name)
def test_decode_equals_libggml(form: BlockFormat, family: str) -> None:
    data = libggml.quantize(form, rows.FAMILIES[family](generator(form.name, family), SHAPE))
    assert same_values(form.decode(data, SHAPE[1]), libggml.dequantize(form, data, SHAPE[1]))


@pytest.mark.parametrize("form", FORMATS.values(), ids=list(FORMATS))
def test_decode_of_any_bytes_equals_gguf_py(form: BlockFormat) -> None:
    data = generator(form.name).integers(0, 256, (31, form.row_bytes(512)), np.uint8)
    with np.errstate(all="ignore"):
        wanted = gguf.quants.dequantize(data, gguf.GGMLQuantizationType[form.name.upper()])
    assert same_values(form.decode(data, 512), wanted.astype(np.float32))


@needs_libggml
@pytest.mark.parametrize("form", **by_name)
def test_decode_of_any_bytes_equals_libggml(form: BlockFormat) -> None:
    data = generator(form.name, "any").integers(0, 256, (31, form.row_bytes(512)), np.uint8)
    assert same_values(form.decode(data, 512), libggml.dequantize(form, data, 512))


@st.composite
def problems(draw: st.DrawFn) -> tuple[NDArray[Any], NDArray[np.float32] | None]:
    """Rows of 1 to 3 super-blocks whose groups of 16 differ in size, offset and share of zeros; maybe an importance."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    count, columns = draw(st.integers(1, 40)), 256 * draw(st.integers(1, 3))
    low = draw(st.integers(-46, 15))
    high = draw(st.integers(low, min(low + draw(st.sampled_from([0, 3, 40])), 15)))
    groups = (count, columns // 16)

    def per_group(values: NDArray[Any]) -> NDArray[Any]:
        return values.repeat(16, axis=1)

    size = per_group(10.0 ** rng.uniform(low, high, groups))
    offset = per_group(rng.standard_normal(groups) * draw(st.sampled_from([0.0, 1.0, 1e3, 1e7])))
    weights = (rng.standard_normal((count, columns)) + offset) * size
    weights[rng.random(weights.shape) < draw(st.sampled_from([0.0, 0.5, 0.98]))] = 0
    if draw(st.booleans()):
        weights = np.rint(weights / size * 2) * size  # few distinct values
    dtype = draw(st.sampled_from(list(rows.DTYPES.values())))
    limit = float(np.float32(6e4)) if dtype is np.float16 else 1e30
    kind = draw(st.sampled_from(list(rows.IMPORTANCES)))
    return np.clip(weights, -limit, limit).astype(dtype), rows.IMPORTANCES[kind](rng, columns)


@needs_libggml
@needs_x86
@pytest.mark.parametrize("form", **by_name)
@given(problem=problems())
@example(problem=(np.array([[0.0, -0.0] * 128], np.float32), None))
@settings(max_examples=25, deadline=None)
def test_encode_equals_libggml_on_random_problems(
    form: BlockFormat, problem: tuple[NDArray[Any], NDArray[np.float32] | None]
) -> None:
    weights, importance = problem
    wanted = libggml.quantize(form, weights.astype(np.float32), importance)
    assert np.array_equal(form.encode(weights, importance), wanted)


@pytest.mark.parametrize("form", **by_name)
def test_error_shrinks_with_the_bits_spent(form: BlockFormat) -> None:
    # Not against a library: a sane codec of b bits per weight leaves an error of roughly 2^-b of a Gaussian row.
    weights = generator(form.name, "error").standard_normal((8, 1024)).astype(np.float32)
    error = float(np.sqrt(np.mean((form.decode(form.encode(weights), 1024) - weights) ** 2)))
    assert 0.3 < error * 2**form.bits_per_weight < 3.0


@pytest.mark.parametrize("form", **by_name)
def test_rows_are_independent(form: BlockFormat) -> None:
    rng = generator(form.name, "rows")
    weights, importance = rows.gauss(rng, (45, 512)), rows.IMPORTANCES["squares"](rng, 512)
    for weighting in (None, importance):
        whole = form.encode(weights, weighting)
        parts = [form.encode(weights[a:b], weighting) for a, b in ((0, 1), (1, 34), (34, 45))]
        assert np.array_equal(whole, np.concatenate(parts))
