"""mxfp4, nvfp4 and mxfp8: bytes and values against MLX."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from smolexport.errors import UsageError
from smolexport.quant import Part, RowFormat
from smolexport.quant.planar import MicroFormat
from tests.core.quant import libmlx, rows

MODES = ("mxfp4", "nvfp4", "mxfp8")
SHAPE = (17, 384)

# SHA-256 of what MLX 0.32.4 makes of `libmlx.fixed_rows(7, 640)` in F32, F16 and BF16.
HASHES = {"mxfp4": "f5bb6cc4bbe8ec84", "nvfp4": "aa9437a15b05b8a7", "mxfp8": "b55c1db42277f4ec"}


def near_powers(rng: np.random.Generator, shape: tuple[int, int]) -> NDArray[np.float32]:
    """Largest values a few units in the last place around 6 and 448 times a power of two."""
    top = rng.choice([6.0, 448.0], (shape[0], shape[1] // 32)) * 2.0 ** rng.integers(-60, 12, (shape[0], 1))
    size = np.where(np.arange(shape[1]) % 32 == 0, 1, 0.3 * rng.standard_normal(shape).clip(-3, 3))
    return (top.repeat(32, axis=1) * size * (1 + rng.integers(-20, 20, shape) * 2.0**-23)).astype(np.float32)


def ties(rng: np.random.Generator, shape: tuple[int, int]) -> NDArray[np.float32]:
    """Multiples of a quarter of the scale."""
    weights = rng.integers(-24, 25, shape) / 4 * 2.0 ** rng.integers(-9, 10, (shape[0], 1))
    weights[:, ::16] = 6 * 2.0 ** rng.integers(-9, 10, (shape[0], 1))
    return weights.astype(np.float32)


FAMILIES = rows.FAMILIES | {"near-powers": near_powers, "ties": ties}


def of_family(family: str, dtype: str) -> NDArray[Any] | None:
    """Rows of a kind, or None where the type cannot hold them."""
    with np.errstate(over="ignore"):
        made = FAMILIES[family](np.random.default_rng(7), SHAPE).astype(libmlx.DTYPES[dtype])
    return made if np.isfinite(made.astype(np.float32)).all() else None


def per_element(form: MicroFormat, data: NDArray[np.uint8], columns: int) -> tuple[NDArray[Any], NDArray[Any]]:
    """Element codes and scale bytes of every element, [n, columns] each, by numpy alone."""
    weight, scales = libmlx.split(data, form.parts(columns))
    codes = weight if form.bits == 8 else np.stack([weight & 15, weight >> 4], axis=2).reshape(len(data), columns)
    return codes, scales.repeat(form.block, axis=1)


def values(form: MicroFormat, data: NDArray[np.uint8], columns: int) -> NDArray[np.float32]:
    """Decoded with ml_dtypes' tables."""
    codes, scales = per_element(form, data, columns)
    with np.errstate(invalid="ignore", over="ignore"):
        element = codes.view(ml_dtypes.float8_e4m3fn if form.bits == 8 else ml_dtypes.float4_e2m1fn).astype(np.float32)
        kind = ml_dtypes.float8_e4m3fn if form.mode == "nvfp4" else ml_dtypes.float8_e8m0fnu
        return element * scales.view(kind).astype(np.float32)


def excepted(form: MicroFormat, weights: NDArray[Any]) -> NDArray[np.bool_]:
    """[n, columns]: elements of the groups for which MLX writes infinities or zeros."""
    exact = weights.astype(libmlx.DTYPES[form.dtype]).astype(np.float32)
    peak = np.abs(exact).reshape(len(weights), -1, form.block).max(axis=2)
    top = np.float32(448 if form.bits == 8 else 6)
    scale = (peak / top).astype(libmlx.DTYPES[form.dtype]).astype(np.float64)
    wrong = peak > 2.0**21 * 448 if form.mode == "nvfp4" else (scale > 0) & (scale <= 2.0**-128)
    return wrong.repeat(form.block, axis=1)


@pytest.mark.parametrize("dtype", libmlx.DTYPES)
@pytest.mark.parametrize("mode", MODES)
def test_equals_mlx(mode: Any, dtype: Any) -> None:
    form = MicroFormat(mode, dtype)
    compared = 0
    for family in FAMILIES:
        weights = of_family(family, dtype)
        if weights is None:
            continue
        found, wanted = form.encode(weights), libmlx.quantize(weights, mode=mode)
        same = [a == b for a, b in zip(*(per_element(form, d, SHAPE[1]) for d in (found, wanted)), strict=True)]
        sane = ~excepted(form, weights)
        compared += int(sane.sum())
        assert (same[0] & same[1])[sane].all(), family
        if sane.all():
            assert np.array_equal(found, wanted), family
            assert libmlx.same_bits(form.decode(found, SHAPE[1]), libmlx.dequantize(wanted, form.parts(384), mode=mode))
    assert compared > 15 * 17 * 384


@pytest.mark.parametrize("dtype", ["F32", "BF16"])
def test_where_mlx_writes_infinities(dtype: Any) -> None:
    for mode, family, limit in (("mxfp4", "1e-37", 0.3), ("mxfp8", "1e-37", 0.3), ("nvfp4", "1e18", 1.0)):
        form, weights = MicroFormat(mode, dtype), of_family(family, dtype)  # type: ignore[arg-type]
        assert weights is not None
        wide = weights.astype(np.float32)
        decoded = form.decode(form.encode(weights), SHAPE[1])
        assert np.isfinite(decoded).all()
        assert np.abs(decoded - wide).max() <= limit * np.abs(wide).max()


@st.composite
def problems(draw: st.DrawFn) -> NDArray[Any]:
    """Rows whose groups of 16 differ in size, some with few distinct values."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    # An odd number of groups of 16 in a row is for nvfp4 alone, and MLX takes it in an even number of rows.
    count, columns = draw(st.integers(1, 70)), 16 * draw(st.integers(1, 18))
    count += count % 2 if columns % 32 else 0
    size = (10.0 ** rng.uniform(draw(st.integers(-12, -2)), 3, (count, columns // 16))).repeat(16, axis=1)
    noise = rng.standard_normal((count, columns))
    if draw(st.booleans()):
        noise, size = np.rint(noise * 4) / 4, 2.0 ** np.rint(np.log2(size))
    weights = np.clip(noise * size, -6e4, 6e4)
    weights[rng.random(weights.shape) < draw(st.sampled_from([0.0, 0.5, 0.98]))] = 0
    return weights.astype(draw(st.sampled_from(list(libmlx.DTYPES.values()))))


@given(weights=problems(), mode=st.sampled_from(MODES))
@settings(max_examples=60, deadline=None)
def test_equals_mlx_on_random_problems(weights: NDArray[Any], mode: Any) -> None:
    dtype = next(name for name, kind in libmlx.DTYPES.items() if weights.dtype == kind)
    form = MicroFormat("nvfp4" if weights.shape[1] % 32 else mode, dtype)  # type: ignore[arg-type]
    found, wanted = form.encode(weights), libmlx.quantize(weights, mode=form.mode)
    assert np.array_equal(found, wanted)
    columns = weights.shape[1]
    assert libmlx.same_bits(form.decode(found, columns), libmlx.dequantize(wanted, form.parts(columns), mode=form.mode))


@pytest.mark.parametrize("dtype", libmlx.DTYPES)
@pytest.mark.parametrize("columns", [16, 48, 80, 112, 1040, 2064, 4144])
def test_nvfp4_rows_of_an_odd_number_of_groups(columns: int, dtype: Any) -> None:
    """Rows longer and shorter than a kernel's tile, and tiles that end inside a pair of groups."""
    form = MicroFormat("nvfp4", dtype)
    assert form.parts(columns) == (Part("weight", "U32", columns // 8), Part("scales", "U8", columns // 16))
    for count in (2, 10, 46):
        weights = rows.gauss(np.random.default_rng(columns + count), (count, columns)).astype(libmlx.DTYPES[dtype])
        found, wanted = form.encode(weights), libmlx.quantize(weights, mode="nvfp4")
        assert np.array_equal(found, wanted)
        decoded = form.decode(found, columns)
        assert libmlx.same_bits(decoded, libmlx.dequantize(wanted, form.parts(columns), mode="nvfp4"))
        # Rows stand for themselves, so an odd number of them is the same bytes.
        odd = np.ascontiguousarray(weights[1:])
        assert np.array_equal(form.encode(odd), found[1:])
        assert libmlx.same_bits(form.decode(np.ascontiguousarray(found[1:]), columns), decoded[1:])


def test_nothing_is_written_beyond_an_odd_row() -> None:
    form, weights = MicroFormat("nvfp4", "F32"), rows.gauss(np.random.default_rng(3), (3, 48))
    guarded = np.full((5, form.row_bytes(48)), 0xAA, np.uint8)
    form.encode(weights, out=guarded[1:4])
    assert np.array_equal(guarded[1:4], form.encode(weights))
    assert (guarded[[0, 4]] == 0xAA).all()


def test_what_mlx_takes_of_rows_of_an_odd_number_of_groups() -> None:
    """Whole groups in each row, and 32 elements in all."""
    for shape, taken in (((2, 48), True), ((3, 48), False), ((1, 16), False), ((3, 64), True), ((2, 40), False)):
        if taken:
            assert len(libmlx.quantize(np.ones(shape, np.float32), mode="nvfp4")) == shape[0]
        else:
            with pytest.raises(ValueError, match=r"reshape|divisible"):
                libmlx.quantize(np.ones(shape, np.float32), mode="nvfp4")


@pytest.mark.parametrize("mode", MODES)
def test_equals_stored_hashes(mode: Any) -> None:
    weights = libmlx.fixed_rows(7, 640)
    found = [MicroFormat(mode, d).encode(weights.astype(k)).reshape(-1) for d, k in libmlx.DTYPES.items()]  # type: ignore[arg-type]
    assert libmlx.digest(np.concatenate(found)) == HASHES[mode]


@pytest.mark.parametrize("mode", MODES)
def test_decode_of_any_bytes(mode: Any) -> None:
    form = MicroFormat(mode, "F32")
    data = np.random.default_rng(1).integers(0, 256, (300, form.row_bytes(96)), np.uint8)
    found, wanted = form.decode(data, 96), values(form, data, 96)
    # The tables have NaN where MLX has numbers or infinities: E4M3 127 and 255, E8M0 255; no encoder writes these.
    known = ~np.isnan(wanted)
    assert known.mean() > 0.9
    assert np.array_equal(found[known].view(np.uint32), wanted[known].view(np.uint32))


@pytest.mark.parametrize(("mode", "limit"), [("mxfp4", 0.1170), ("nvfp4", 0.0960), ("mxfp8", 0.0268)])
def test_error_on_normal_weights(mode: Any, limit: float) -> None:
    weights = rows.gauss(np.random.default_rng(11), (256, 1024)).astype(ml_dtypes.bfloat16)
    form = MicroFormat(mode, "BF16")
    exact = weights.astype(np.float32)
    error = np.sqrt(np.mean((form.decode(form.encode(weights), 1024) - exact) ** 2) / np.mean(exact**2))
    assert 0.95 * limit < error < limit


@pytest.mark.parametrize("mode", MODES)
def test_rows_are_independent_and_rounded_first(mode: Any) -> None:
    rng, form = np.random.default_rng(2), MicroFormat(mode, "BF16")
    weights, order = rows.gauss(rng, (45, 352)), rng.permutation(45)
    whole = form.encode(weights)
    assert np.array_equal(whole, form.encode(weights.astype(ml_dtypes.bfloat16)))
    assert np.array_equal(whole, np.concatenate([form.encode(weights[a:b]) for a, b in ((0, 1), (1, 34), (34, 45))]))
    assert np.array_equal(whole[order], form.encode(np.ascontiguousarray(weights[order])))
    assert np.array_equal(form.decode(whole, 352)[order], form.decode(whole[order], 352))


def test_is_a_row_format() -> None:
    form: RowFormat = MicroFormat("nvfp4", "F16")
    assert (form.name, form.block, form.canonical) == ("nvfp4", 16, None)
    assert form.parts(64) == (Part("weight", "U32", 8), Part("scales", "U8", 4))
    assert form.row_bytes(64) == 36
    assert MicroFormat("mxfp8", "F16").parts(64) == (Part("weight", "U32", 16), Part("scales", "U8", 2))
    assert [MicroFormat(mode, "F32").bits_per_weight for mode in ("mxfp4", "nvfp4", "mxfp8")] == [4.25, 4.5, 8.25]
    assert len({form, MicroFormat("nvfp4", "F16"), MicroFormat("nvfp4", "BF16")}) == 2
    with pytest.raises(UsageError, match="nvfp4: repacks no other format"):
        form.repack(np.zeros((1, 34), np.uint8), 32)


def test_bad_arguments() -> None:
    for bad in (("mxfp6", "F32"), ("mxfp4", "F64")):
        with pytest.raises(UsageError, match=r"micro-scaled floats: .* must be one of"):
            MicroFormat(*bad)  # type: ignore[arg-type]
    form = MicroFormat("nvfp4", "F16")
    for columns in (0, 8, 40, 65):
        assert not form.fits(columns)
        with pytest.raises(UsageError, match=f"nvfp4: rows of {columns} elements are not whole blocks of 16"):
            form.encode(np.zeros((2, columns), np.float32))
    assert not MicroFormat("mxfp4", "F16").fits(48)
    good = np.zeros((2, 64), np.float32)
    with pytest.raises(UsageError, match="nvfp4: expected C-contiguous float32"):
        form.encode(good.astype(np.float64))
    with pytest.raises(UsageError, match="nvfp4: importance"):
        form.encode(good, np.ones(63, np.float32))
    with pytest.raises(UsageError, match="out must be a writable"):
        form.encode(good, out=np.empty((2, 35), np.uint8))
    with pytest.raises(UsageError, match=r"nvfp4: expected a C-contiguous uint8 array \[n, 36\]"):
        form.decode(np.zeros((1, 35), np.uint8), 64)
    assert form.encode(good[:0]).shape == (0, 36)
    assert not form.encode(good, np.ones(64, np.float32)).any()
