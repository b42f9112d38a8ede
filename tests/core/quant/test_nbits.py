"""Blocks of MatMulNBits: bytes against ONNX Runtime's quantizer, values against its operator.

Axes: widths x groups x types x symmetric or not x kinds of rows (`rows.FAMILIES`), with rows that end in a short group.
Rows of an odd number of 4-bit codes are left out where bytes are compared: the quantizer puts anything into the half
byte behind the last one.
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
from smolexport.quant import FORMATS, Part, RowFormat
from smolexport.quant.planar import NBits, PortableNBits
from tests.core.quant import libmlx, libort, rows

WIDTHS, GROUPS, TYPES, SYMMETRIC = (4, 8), (32, 64, 128), ("F32", "F16"), (True, False)
ALL = [NBits(*values) for values in product(WIDTHS, GROUPS, TYPES, SYMMETRIC)]  # type: ignore[arg-type]
PORTABLE = [PortableNBits(*values) for values in product(WIDTHS, TYPES, (True, False))]  # type: ignore[arg-type]

# SHA-256 of what ONNX Runtime 1.31.1 makes of `fixed_rows`, all groups, symmetric and not, in F32 and F16.
HASHES = {4: "8cfcc42208281f7d", 8: "c22dbe863acb90a5"}
# SHA-256 of the rows that `libmlx.fixed_rows(7, 672)` becomes, in F32 and F16, with zero points and without.
PORTABLE_HASHES = {4: "8060d6707bd373ce", 8: "b1798aeac6b916a7"}


def fixed_rows(dtype: str) -> list[NDArray[Any]]:
    """Rows of whole groups, and rows that end in a short one."""
    return [libmlx.fixed_rows(7, columns).astype(libmlx.DTYPES[dtype]) for columns in (640, 672, 90)]


def unpacked(form: NBits | PortableNBits, data: NDArray[np.uint8], columns: int) -> list[NDArray[np.float32]]:
    """Codes, scales and zero points of every element, [n, columns] each, by numpy alone."""

    def numbers(packed: NDArray[np.uint8]) -> NDArray[np.float32]:
        wide = packed if form.bits == 8 else np.stack([packed & 15, packed >> 4], axis=2).reshape(len(packed), -1)
        return wide.astype(np.float32)

    codes, scales, *zeros = libmlx.split(data, form.parts(columns))
    scale = scales.view(libmlx.DTYPES[form.dtype]).astype(np.float32)
    zero = numbers(zeros[0])[:, : scale.shape[1]] if zeros else np.full_like(scale, 2 ** (form.bits - 1))
    return [numbers(codes)[:, :columns], *(grid.repeat(form.block, axis=1)[:, :columns] for grid in (scale, zero))]


@pytest.mark.parametrize("form", ALL, ids=str)
def test_equals_the_quantizer(form: NBits) -> None:
    for family, columns in product(rows.FAMILIES, (384, 90)):
        with np.errstate(over="ignore"):
            made = rows.FAMILIES[family](np.random.default_rng(7), (9, 384)).astype(libmlx.DTYPES[form.dtype])
        weights = np.ascontiguousarray(made[:, :columns])
        if np.isfinite(weights.astype(np.float32)).all():
            wanted = libort.quantize(weights, form.bits, form.group, symmetric=form.symmetric)
            assert np.array_equal(form.encode(weights), wanted), (family, columns)


@st.composite
def problems(draw: st.DrawFn) -> NDArray[Any]:
    """Rows whose groups differ in size and offset, some with few distinct values."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    count, columns = draw(st.integers(1, 40)), 2 * draw(st.integers(1, 300))
    groups = (count, -(-columns // 32))
    size, offset = 10.0 ** rng.uniform(draw(st.integers(-12, -2)), 3, groups), rng.standard_normal(groups)
    size, offset = (part.repeat(32, axis=1)[:, :columns] for part in (size, offset))
    noise = rng.standard_normal((count, columns))
    if draw(st.booleans()):
        noise = np.rint(noise * 4) / 4
    weights = np.clip((noise + offset * draw(st.sampled_from([0.0, 1.0, 10.0]))) * size, -6e4, 6e4)
    weights[rng.random(weights.shape) < draw(st.sampled_from([0.0, 0.5, 0.98]))] = 0
    return weights


@given(weights=problems(), form=st.sampled_from(ALL))
@settings(max_examples=80, deadline=None)
def test_equals_the_quantizer_on_random_problems(weights: NDArray[Any], form: NBits) -> None:
    typed = weights.astype(libmlx.DTYPES[form.dtype])
    wanted = libort.quantize(typed, form.bits, form.group, symmetric=form.symmetric)
    assert np.array_equal(form.encode(typed), wanted)


@pytest.mark.parametrize("bits", WIDTHS)
def test_equals_stored_hashes(bits: int) -> None:
    found = [
        form.encode(weights).reshape(-1) for form in ALL if form.bits == bits for weights in fixed_rows(form.dtype)
    ]
    assert libmlx.digest(np.concatenate(found)) == HASHES[bits]
    repacked = [form.encode(libmlx.fixed_rows(7, 672)).reshape(-1) for form in PORTABLE if form.bits == bits]
    assert libmlx.digest(np.concatenate(repacked)) == PORTABLE_HASHES[bits]


@pytest.mark.parametrize("form", ALL, ids=str)
def test_rows_of_another_type_are_rounded_first(form: NBits) -> None:
    for columns, kind in product((256, 90), (ml_dtypes.bfloat16, np.float16, np.float32)):
        weights = rows.gauss(np.random.default_rng(1), (5, columns)).astype(kind)
        assert np.array_equal(form.encode(weights), form.encode(weights.astype(libmlx.DTYPES[form.dtype])))


@pytest.mark.parametrize("form", [*ALL, *PORTABLE], ids=str)
def test_decode_of_any_bytes_is_steps_from_the_zero_point_times_scale(form: Any) -> None:
    for columns in (96, 256, 90, 33, 1):
        if form.fits(columns):
            data = np.random.default_rng(columns).integers(0, 256, (31, form.row_bytes(columns)), np.uint8)
            codes, scales, zeros = unpacked(form, data, columns)
            with np.errstate(all="ignore"):
                assert libmlx.same_bits(form.decode(data, columns), (codes - zeros) * scales)


@pytest.mark.parametrize("form", [*ALL, *PORTABLE], ids=str)
def test_the_operator_multiplies_by_the_decoded_weights(form: Any) -> None:
    rng, limit = np.random.default_rng(3), 1e-5 if form.dtype == "F32" else 2e-3  # float16 results are rounded to it
    for columns in (384, 96, 90, 33):
        if form.fits(columns):
            data = form.encode(rows.gauss(rng, (24, columns)))
            for count in (1, 7):  # one position and several are different kernels
                activations = rng.standard_normal((count, columns)).astype(libmlx.DTYPES[form.dtype])
                found = libort.multiply(activations, data, form.parts(columns), bits=form.bits, block=form.block)
                wanted = activations.astype(np.float64) @ form.decode(data, columns).astype(np.float64).T
                assert np.abs(found - wanted).max() < limit * np.abs(wanted).max()


@pytest.mark.parametrize("form", PORTABLE, ids=str)
@given(count=st.integers(1, 40), blocks=st.integers(1, 20), seed=st.integers(0, 2**32))
@settings(max_examples=20, deadline=None)
def test_repacked_blocks_are_the_same_weights(form: PortableNBits, count: int, blocks: int, seed: int) -> None:
    columns, width = 32 * blocks, form.canonical.nbytes
    data = np.random.default_rng(seed).integers(0, 256, (count, columns // 32 * width), np.uint8)
    found = form.repack(data, columns)
    assert libmlx.same_bits(form.decode(found, columns), form.canonical.decode(data, columns))
    stored = libmlx.split(found, form.parts(columns))
    assert len(stored) == 2 + form.zero_points
    assert np.isin(stored[2:], 0x88 if form.bits == 4 else 0x80).all()


@pytest.mark.parametrize("form", PORTABLE, ids=str)
def test_encode_is_the_canonical_format_repacked(form: PortableNBits) -> None:
    for family, kind in product(("gauss", "1e-8", "outlier"), (np.float32, ml_dtypes.bfloat16)):
        rng = np.random.default_rng(7)
        weights = rows.FAMILIES[family](rng, (17, 352)).astype(kind)
        for importance in (None, rows.IMPORTANCES["squares"](rng, 352)):
            wanted = form.repack(form.canonical.encode(weights, importance), 352)
            assert np.array_equal(form.encode(weights, importance), wanted)


@pytest.mark.parametrize("form", [*ALL[::3], *PORTABLE], ids=str)
def test_rows_are_independent(form: Any) -> None:
    # More rows than the portable formats hand on at once, and rows of a number of bytes that is odd for some.
    rng = np.random.default_rng(2)
    for count, columns in ((3000, 224), (45, 352), (45, 90)):
        if not form.fits(columns):
            continue
        weights, order = rows.gauss(rng, (count, columns)), rng.permutation(count)
        whole = form.encode(weights)
        assert np.array_equal(whole, np.concatenate([form.encode(some) for some in np.split(weights, [1, 34])]))
        assert np.array_equal(whole[order], form.encode(np.ascontiguousarray(weights[order])))
        assert np.array_equal(form.decode(whole, columns)[order], form.decode(whole[order], columns))
        out = np.full(whole.size + 1, 255, np.uint8)[1:].reshape(whole.shape)
        assert form.encode(weights, out=out) is out
        assert np.array_equal(out, whole)
        assert np.array_equal(form.decode(out, columns), form.decode(whole, columns))


def test_are_row_formats() -> None:
    form: RowFormat = NBits(4, 32, "F16", False)
    assert (form.name, form.block, form.canonical) == ("uint4-g32", 32, None)
    assert form.parts(96) == (Part("B", "U8", 48), Part("scales", "F16", 3), Part("zero_points", "U8", 2))
    assert form.parts(97) == (Part("B", "U8", 64), Part("scales", "F16", 4), Part("zero_points", "U8", 2))
    even = NBits(8, 128, "F32", True)
    assert (even.name, even.parts(129)) == ("int8-g128", (Part("B", "U8", 256), Part("scales", "F32", 2)))
    assert (even.size((2, 3, 128)), even.bits_per_weight) == (6 * 132, 8.25)
    assert len({form, NBits(4, 32, "F16", False), NBits(4, 32, "F16", True), even}) == 3
    with pytest.raises(UsageError, match="uint4-g32: repacks no other format"):
        form.repack(np.zeros((1, 18), np.uint8), 32)

    shared: RowFormat = PortableNBits(4, "F32")
    assert (shared.name, shared.block, shared.canonical) == ("s32x4", 32, FORMATS["q4_0"])
    assert (PortableNBits(8, "F16").name, PortableNBits(8, "F16").canonical) == ("s32x8", FORMATS["q8_0"])
    assert shared.parts(96) == (Part("B", "U8", 48), Part("scales", "F32", 3), Part("zero_points", "U8", 2))
    assert PortableNBits(8, "F16", zero_points=False).parts(96) == (Part("B", "U8", 96), Part("scales", "F16", 3))
    assert len({shared, PortableNBits(4, "F32"), PortableNBits(4, "F16"), PortableNBits(4, "F32", False)}) == 3


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ((5, 32, "F32", True), "MatMulNBits: bits is 5, must be one of 4, 8"),
        ((4, 48, "F32", True), "MatMulNBits: group is 48, must be one of 32, 64, 128"),
        ((4, 32, "BF16", True), "MatMulNBits: dtype is 'BF16', must be one of F32, F16"),
    ],
)
def test_formats_that_do_not_exist(values: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        NBits(*values)
    with pytest.raises(UsageError, match="portable groups: bits is 5, must be one of 4, 8"):
        PortableNBits(5, "F32")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="portable groups: dtype is 'BF16', must be one of F32, F16"):
        PortableNBits(4, "BF16")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("form", "row_bytes"), [(NBits(4, 32, "F32", False), 41), (PortableNBits(4, "F32"), 41)], ids=str
)
def test_bad_arguments(form: Any, row_bytes: int) -> None:
    good = np.zeros((2, 64), np.float32)
    with pytest.raises(UsageError, match=f"{form.name}: expected C-contiguous float32"):
        form.encode(good.T)
    with pytest.raises(UsageError, match=f"{form.name}: importance"):
        form.encode(good, np.ones(63, np.float32))
    with pytest.raises(UsageError, match=f"{form.name}: out must be a writable"):
        form.encode(good, out=np.empty((2, row_bytes + 1), np.uint8))
    with pytest.raises(UsageError, match=rf"{form.name}: expected a C-contiguous uint8 array \[n, {row_bytes}\]"):
        form.decode(np.zeros((1, row_bytes + 1), np.uint8), 64)
    with pytest.raises(UsageError, match=f"{form.name}: rows of 0 elements"):
        form.encode(good[:, :0].copy())
    assert form.encode(good[:0]).shape == (0, row_bytes)
    assert form.decode(np.zeros((0, row_bytes), np.uint8), 64).shape == (0, 64)


def test_rows_of_the_canonical_format_are_whole_blocks() -> None:
    form = PortableNBits(4, "F16")
    with pytest.raises(UsageError, match="s32x4: rows of 33 elements are not whole blocks of 32"):
        form.encode(np.zeros((2, 33), np.float32))
    with pytest.raises(UsageError, match=r"s32x4: expected a C-contiguous uint8 array \[n, 36\]"):
        form.repack(np.zeros((1, 37), np.uint8), 64)
    assert form.repack(np.zeros((0, 36), np.uint8), 64).shape == (0, 37)
