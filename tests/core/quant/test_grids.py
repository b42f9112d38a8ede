"""Rows as grids and factors: every format against its own decoder, on rows of all kinds (`rows.FAMILIES`)."""

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
from smolexport.quant import FORMATS
from smolexport.quant.affine_view import (
    Factors,
    Grid,
    codes_of,
    factors_of,
    grid_of,
    has_grid,
    with_codes,
    with_factors,
)
from smolexport.quant.planar import AffineFormat, ChannelFormat, MicroFormat, NBits, PortableFormat, PortableNBits
from tests.core.quant import rows

BLOCKS = [FORMATS[name] for name in "q4_0 q4_1 q5_0 q5_1 q2_k q3_k q4_k q5_k q6_k".split()]
AFFINE = [AffineFormat(*values) for values in product((2, 3, 4, 5, 6), (32, 64, 128), ("F16", "BF16", "F32"))]  # type: ignore[arg-type]
NBITS = [NBits(4, *values) for values in product((32, 64, 128), ("F16", "F32"), (True, False))]  # type: ignore[arg-type]
ALL: list[Any] = [*BLOCKS, *AFFINE, *NBITS]
SHORT = (90, 33, 1)  # columns with a last group that is not full

TYPES: dict[str, Any] = {"F16": np.float16, "F32": np.float32, "BF16": ml_dtypes.bfloat16}


def widths(form: Any) -> tuple[int, ...]:
    return (512, *(columns for columns in SHORT if form.fits(columns)))


def stored_type(form: Any) -> Any:
    return TYPES[getattr(form, "dtype", "F16")]


def encoded(form: Any, family: str, columns: int, count: int = 7) -> NDArray[np.uint8] | None:
    """Rows of a kind; None where the format's floats cannot hold them."""
    with np.errstate(over="ignore"):
        made = rows.FAMILIES[family](np.random.default_rng(5), (count, max(columns, 128)))
    made = np.ascontiguousarray(made[:, :columns])
    data = form.encode(made) if np.abs(made).max() < 6e4 else None
    return None if data is None or not np.isfinite(form.decode(data, columns)).all() else data


def check_grid(grid: Grid, codes: NDArray[np.uint8], decoded: NDArray[np.float32]) -> None:
    """Within the rounding of product and offset; the reference is in float64."""
    scales, offsets = (
        part.astype(np.float64).repeat(grid.group, axis=1)[:, : codes.shape[1]] for part in (grid.scales, grid.offsets)
    )
    size = np.maximum(np.abs(scales * grid.top), np.abs(offsets)).astype(np.float32)
    assert (np.abs(scales * codes + offsets - decoded) <= np.spacing(size)).all()
    assert (np.abs(grid.values(codes) - decoded) <= 2 * np.spacing(size)).all()


@pytest.mark.parametrize("form", ALL, ids=str)
def test_rows_of_all_kinds(form: Any) -> None:
    seen = 0
    for columns, family in product(widths(form), rows.FAMILIES):
        data = encoded(form, family, columns)
        if data is None:
            continue
        seen += 1
        before, codes, decoded = data.copy(), codes_of(form, data, columns), form.decode(data, columns)
        assert codes.shape == (7, columns)
        assert codes.flags.c_contiguous
        assert np.array_equal(with_codes(form, data, codes), data)
        grid = grid_of(form, data, columns)
        check_grid(grid, codes, decoded)
        other = np.random.default_rng(1).integers(0, grid.top + 1, codes.shape, np.uint8)
        changed = with_codes(form, data, other)
        assert np.array_equal(codes_of(form, changed, columns), other)
        check_grid(grid, other, form.decode(changed, columns))
        same = grid_of(form, changed, columns)
        assert np.array_equal(same.scales, grid.scales)
        assert np.array_equal(same.offsets, grid.offsets)
        assert np.array_equal(with_codes(form, changed, codes), data)
        assert np.array_equal(data, before)
    assert seen > 10


@pytest.mark.parametrize("form", ALL, ids=str)
def test_factors_are_the_values(form: Any) -> None:
    for columns, family in product(widths(form), ("gauss", "weights", "half-empty", "uneven-groups", "negative")):
        data = encoded(form, family, columns)
        if data is None:
            continue
        factors = factors_of(form, data, columns)
        decoded = form.decode(data, columns)
        assert np.array_equal(factors.values(), decoded)
        assert (factors.b is None) == (factors.m is None) == (factors.m is None)
        assert np.array_equal(with_factors(form, data, columns, factors.d, factors.m), data)
        small = np.abs(decoded).max() < 3e4
        for factor in (2, -1) if small else (-1,):
            m = None if factors.m is None else factors.m * np.float32(factor)
            other = with_factors(form, data, columns, factors.d * np.float32(factor), m)
            assert np.array_equal(form.decode(other, columns), factor * decoded)
            assert np.array_equal(codes_of(form, other, columns), codes_of(form, data, columns))


@pytest.mark.parametrize("form", ALL, ids=str)
@given(seed=st.integers(0, 2**32), count=st.integers(1, 5), pieces=st.integers(1, 4), cut=st.integers(0, 31))
@settings(max_examples=15, deadline=None)
def test_any_codes_and_any_floats_come_back(form: Any, seed: int, count: int, pieces: int, cut: int) -> None:
    rng, columns = np.random.default_rng(seed), pieces * 256
    columns -= cut if form.fits(columns - cut) else 0
    data = form.encode(rng.standard_normal((count, columns)).astype(np.float32))
    top = grid_of(form, data, columns).top
    codes = rng.integers(0, top + 1, (count, columns), np.uint8)
    data = with_codes(form, data, codes)
    old = factors_of(form, data, columns)
    d, m = (
        None if part is None else (rng.standard_normal(part.shape) * 10.0 ** rng.integers(-3, 3)).astype(np.float32)
        for part in (old.d, old.m)
    )
    assert d is not None
    made = with_factors(form, data, columns, d, m)
    found, kind = factors_of(form, made, columns), stored_type(form)
    assert np.array_equal(found.d, d.astype(kind).astype(np.float32))
    assert (found.m is None) == (m is None)
    if m is not None:
        assert np.array_equal(found.m, m.astype(kind).astype(np.float32))
    wanted = Factors(old.a, found.d, old.b, found.m, old.block).values()
    assert np.array_equal(form.decode(made, columns), wanted)
    assert np.array_equal(codes_of(form, made, columns), codes)


@pytest.mark.parametrize(("form", "columns"), [(FORMATS["q4_0"], 64), (FORMATS["q6_k"], 256), (NBITS[0], 90)])
def test_zeros_are_in_a_symmetric_grid(form: Any, columns: int) -> None:
    data = encoded(form, "gauss", columns)
    assert data is not None
    grid = grid_of(form, data, columns)
    assert (grid.scales * np.float32(grid.middle) + grid.offsets == 0).all()
    assert grid.middle == (grid.top + 1) // 2


def test_bits_of_no_code_stay() -> None:
    form, rng = NBits(4, 32, "F16", False), np.random.default_rng(0)
    data = rng.integers(0, 256, (3, form.row_bytes(33)), np.uint8)
    made = with_codes(form, data, np.zeros((3, 33), np.uint8))
    assert np.array_equal(made[:, 17:], data[:, 17:])
    assert (made[:, :16] == 0).all()
    assert np.array_equal(made[:, 16], data[:, 16] & 0xF0)


def test_who_has_a_grid() -> None:
    assert all(has_grid(form) for form in ALL)
    without = [FORMATS[name] for name in ("f32", "f16", "bf16", "q8_0", "iq4_nl")]
    others = [AffineFormat(8, 32, "F16"), NBits(8, 32, "F16", True), ChannelFormat(), MicroFormat("mxfp4", "F16")]
    for form in (*without, *others, PortableFormat(4), PortableNBits(4, "F16")):
        assert not has_grid(form)
    with pytest.raises(UsageError, match="q8_0: its values are not a grid of less than 8 bits"):
        codes_of(FORMATS["q8_0"], np.zeros((1, 34), np.uint8), 32)


@pytest.mark.parametrize("form", [FORMATS["q4_1"], FORMATS["q4_k"], AffineFormat(3, 32, "F16"), NBITS[1]], ids=str)
def test_no_rows(form: Any) -> None:
    none = np.empty((0, form.row_bytes(512)), np.uint8)
    assert codes_of(form, none, 512).shape == (0, 512)
    assert with_codes(form, none, np.empty((0, 512), np.uint8)).shape == none.shape
    assert grid_of(form, none, 512).scales.shape[0] == 0
    factors = factors_of(form, none, 512)
    assert with_factors(form, none, 512, factors.d, factors.m).shape == none.shape


def test_bad_arguments() -> None:
    form = FORMATS["q4_1"]
    data = form.encode(np.ones((2, 64), np.float32))
    for bad in (data[:, :39], data.astype(np.int16), data[0], np.asfortranarray(data)):
        with pytest.raises(UsageError, match=r"q4_1: expected a C-contiguous uint8 array \[n, 40\]"):
            codes_of(form, bad, 64)
    for codes in (np.zeros((1, 64), np.uint8), np.zeros((2, 64), np.int8), np.zeros(64, np.uint8)):
        with pytest.raises(UsageError, match=r"q4_1: expected uint8 codes \[2, columns\]"):
            with_codes(form, data, codes)
    with pytest.raises(UsageError, match="q4_1: codes reach from 0 to 15, found 16"):
        with_codes(form, data, np.full((2, 64), 16, np.uint8))
    one = np.ones((2, 2), np.float32)
    with pytest.raises(UsageError, match="q4_1: m is missing"):
        with_factors(form, data, 64, one, None)
    with pytest.raises(UsageError, match=r"q4_1: expected d of shape \(2, 2\), found \(2, 1\)"):
        with_factors(form, data, 64, one[:, :1], one)
    with pytest.raises(UsageError, match="do not fit F16"):
        with_factors(form, data, 64, one * 1e5, one)
    plain = FORMATS["q4_0"]
    with pytest.raises(UsageError, match="q4_0: m is not stored by this format"):
        with_factors(plain, plain.encode(np.ones((2, 64), np.float32)), 64, one, one)
