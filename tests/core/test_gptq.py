"""The solver against GPTQ as it is written down: inverse, Cholesky factor of it, column by column, in float64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from smolexport.calibration import gptq
from smolexport.calibration.gptq import Factor, factor, solve
from smolexport.errors import UsageError
from smolexport.quant import FORMATS
from smolexport.quant.affine_view import Grid, codes_of, grid_of, with_codes
from smolexport.quant.kernels.lanes import WIDTH
from smolexport.quant.planar import AffineFormat, NBits

Doubles = NDArray[np.float64]

FORMS: list[Any] = [
    *(FORMATS[name] for name in "q4_0 q4_1 q5_0 q5_1 q2_k q3_k q4_k q5_k q6_k".split()),
    *(AffineFormat(bits, group, "F16", "search") for bits, group in ((2, 32), (3, 64), (4, 32), (5, 128), (6, 32))),
    *(NBits(4, 32, "F16", symmetric, "search") for symmetric in (True, False)),
]


def hessian(seed: int, columns: int, tokens: int | None = None) -> NDArray[np.float32]:
    """Of inputs that go together and differ in size; singular where there are fewer tokens than columns."""
    rng = np.random.default_rng(seed)
    tokens = tokens or 4 * columns
    shared = rng.standard_normal((tokens, 16)) @ rng.standard_normal((16, columns))
    x = (shared / 2 + rng.standard_normal((tokens, columns))) * np.exp(0.7 * rng.standard_normal(columns))
    return (x.T @ x / tokens).astype(np.float32)


def weights(seed: int, count: int, columns: int) -> NDArray[np.float32]:
    return (np.random.default_rng(seed).standard_normal((count, columns)) * 0.02).astype(np.float32)


def relative_error(rows: NDArray[np.float32], decoded: NDArray[np.float32], h: NDArray[np.float32]) -> float:
    """trace(D H D^T) / trace(W H W^T) with D = rows - decoded: 0 is perfect, 1 as bad as no weights at all."""
    error, size = (float(np.einsum("ij,ij->", x @ h, x)) for x in ((rows - decoded).astype(float), rows.astype(float)))
    return error / size if error else 0.0


def widened(grid: Grid, columns: int) -> tuple[Doubles, Doubles]:
    scales, offsets = (
        part.repeat(grid.group, axis=1)[:, :columns].astype(np.float64) for part in (grid.scales, grid.offsets)
    )
    return scales, offsets


def textbook(
    rows: NDArray[np.float32], grid: Grid, h: NDArray[np.float32], damping: float = 0.01
) -> tuple[NDArray[np.uint8], Doubles, NDArray[np.int64]]:
    """Codes, how far each element was from a tie (in steps), and the order of the columns."""
    scales, offsets = widened(grid, rows.shape[1])
    wide = h.astype(np.float64)
    diagonal = wide.diagonal().copy()
    dead = diagonal == 0
    wide += np.diag(np.where(dead, 1, damping * (diagonal[~dead].mean() if (~dead).any() else 0)))
    order = np.argsort(diagonal, kind="stable")[::-1]
    wide = wide[np.ix_(order, order)]
    upper = np.linalg.cholesky(np.linalg.inv(wide)).T
    w, codes, margin = rows.astype(np.float64)[:, order], np.empty(rows.shape, np.uint8), np.empty(rows.shape)
    for i, column in enumerate(order):
        scale = scales[:, column]
        empty = scale == 0
        place = (w[:, i] - offsets[:, column]) / np.where(empty, 1, scale)
        code = np.where(empty, grid.middle, np.clip(np.rint(place), 0, grid.top))
        codes[:, column] = code
        margin[:, column] = np.where(empty, 1, np.abs(np.clip(place, -0.25, grid.top + 0.25) % 1 - 0.5))
        error = (w[:, i] - (code * scale + offsets[:, column])) / upper[i, i]
        w[:, i + 1 :] -= error[:, None] * upper[i, i + 1 :]
    return codes, margin, order


def check(
    rows: NDArray[np.float32], grid: Grid, h: NDArray[np.float32], found: NDArray[np.uint8], damping: float = 0.01
) -> None:
    """The textbook's codes in every row, or a tie where the first code differs."""
    codes, margin, order = textbook(rows, grid, h, damping)
    differ = codes != found
    for row in np.flatnonzero(differ.any(axis=1)):
        first = order[np.argmax(differ[row][order])]
        assert margin[row, first] < 1e-3, (row, first, margin[row, first])
        assert abs(int(codes[row, first]) - int(found[row, first])) == 1
    assert differ.any(axis=1).mean() < 0.2
    exact = widened(grid, rows.shape[1])
    of_codes, of_found = (
        relative_error(rows, (exact[0] * some + exact[1]).astype(np.float32), h) for some in (codes, found)
    )
    assert abs(of_codes - of_found) < max(1e-6, 0.01 * of_codes * differ.any())


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_equals_the_textbook_on_every_grid(form: Any) -> None:
    columns = 512 if form.block == 256 else 384
    rows, h = weights(1, 45, columns), hessian(2, columns)
    rows[3] = 0
    rows[5, 64:192] = 0
    data = form.encode(rows, h.diagonal().copy())
    grid, solved = grid_of(form, data, columns), factor(h)
    found = solve(rows, grid, solved)
    check(rows, grid, h, found)
    made = with_codes(form, data, found)
    assert np.array_equal(codes_of(form, made, columns), found)
    before, after = (relative_error(rows, form.decode(some, columns), h) for some in (data, made))
    assert after < 0.6 * before
    assert (form.decode(made, columns)[3] == 0).all()


@given(
    seed=st.integers(0, 2**32),
    count=st.integers(1, 70),
    columns=st.integers(1, 200),
    group=st.sampled_from([16, 32, 64]),
    top=st.sampled_from([3, 15, 63]),
    dead=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_equals_the_textbook_on_random_grids(
    seed: int, count: int, columns: int, group: int, top: int, dead: bool
) -> None:
    rng, rows, h = np.random.default_rng(seed), weights(seed, count, columns), hessian(seed, columns)
    shape = (count, -(-columns // group))
    scales = (0.06 / top * (1 + 0.3 * rng.standard_normal(shape))).astype(np.float32)
    scales[rng.random(shape) < 0.05] = 0
    offsets = (-scales * top / 2 + 0.001 * rng.standard_normal(shape)).astype(np.float32)
    if dead:
        gone = rng.random(columns) < 0.3
        h[gone], h[:, gone] = 0, 0
    grid = Grid(scales, offsets, group, top, 1)
    check(rows, grid, h, solve(rows, grid, factor(h)))


def test_codes_are_clipped() -> None:
    rows, h = weights(1, 33, 96), hessian(1, 96)
    shape = (33, 3)
    grid = Grid(np.full(shape, 0.002, np.float32), np.full(shape, -0.015, np.float32), 32, 15)
    found = solve(rows, grid, factor(h))
    check(rows, grid, h, found)
    assert found.min() == 0
    assert found.max() == 15
    assert ((found == 0) | (found == 15)).mean() > 0.1


def test_dead_columns_are_rounded_as_they_are() -> None:
    rows, h, form = weights(1, 40, 128), hessian(3, 128), FORMATS["q4_0"]
    dead = np.arange(128) % 5 == 0
    h[dead], h[:, dead] = 0, 0
    data = form.encode(rows)
    grid, solved = grid_of(form, data, 128), factor(h)
    found = solve(rows, grid, solved)
    scales, offsets = widened(grid, 128)
    plain = np.clip(np.rint((rows - offsets) / scales), 0, 15)
    assert np.array_equal(found[:, dead], plain[:, dead])
    assert not np.array_equal(found[:, ~dead], plain[:, ~dead])
    assert dead[solved.order[: dead.sum()]].all()
    # No input at all: everything is.
    nothing = factor(np.zeros((128, 128), np.float32))
    assert np.array_equal(solve(rows, grid, nothing), plain)
    # Sizes do not matter, nor do dead columns to the damping of the others.
    rest = np.ascontiguousarray(h[~dead][:, ~dead])
    alone = factor(rest)
    assert np.allclose(alone.lower, solved.lower[dead.sum() :, dead.sum() :], atol=1e-6)
    scaled = factor(h * np.float32(2.0**-60))
    assert np.array_equal(scaled.order, solved.order)
    assert np.array_equal(scaled.lower, solved.lower)


@pytest.mark.parametrize("tokens", [1, 20])
def test_singular_hessians(tokens: int) -> None:
    rows, h, form = weights(1, 40, 128), hessian(3, 128, tokens), FORMATS["q4_0"]
    data = form.encode(rows, h.diagonal().copy())
    grid, solved = grid_of(form, data, 128), factor(h)
    found = solve(rows, grid, solved)
    assert solved.damping == 0.01
    check(rows, grid, h, found)
    decoded = form.decode(with_codes(form, data, found), 128)
    assert relative_error(rows, decoded, h) < 0.1 * relative_error(rows, form.decode(data, 128), h)


def test_damping_is_doubled_until_it_works() -> None:
    h = hessian(3, 64)
    size = np.sqrt(h.diagonal())
    h /= size[:, None] * size
    lowest = np.linalg.eigvalsh(h.astype(np.float64))[0]
    worse = h - np.float32(lowest + 0.05) * np.eye(64, dtype=np.float32)  # smallest eigenvalue -0.05, diagonal below 1
    solved = factor(worse)
    assert solved.damping == 0.08
    rows = weights(1, 10, 64)
    grid = grid_of(FORMATS["q4_0"], FORMATS["q4_0"].encode(rows), 64)
    check(rows, grid, worse, solve(rows, grid, solved), 0.08)
    impossible = np.ones((4, 4), np.float32) * 5 - 4 * np.eye(4, dtype=np.float32)
    with pytest.raises(UsageError, match="a Hessian of 4 columns is not positive definite even with damping 1"):
        factor(impossible)


def test_float64_where_float32_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """A diagonal over twelve orders of magnitude with exact relations; the factor must still give H back."""
    seen: list[Any] = []
    real = gptq.cholesky

    def noted(a: NDArray[Any]) -> bool:
        seen.append((a.dtype, real(a)))
        return bool(seen[-1][1])

    monkeypatch.setattr(gptq, "cholesky", noted)
    rng = np.random.default_rng(0)
    x = (np.ones((600, 1)) * 1e4 + rng.standard_normal((600, 400)) * 1e-3).astype(np.float64)
    h = (x.T @ x / 600).astype(np.float32)
    solved = factor(h, 1e-8)
    assert seen[0] == (np.dtype(np.float32), False)
    assert seen[1][0] == np.dtype(np.float64)
    assert np.isfinite(np.tril(solved.lower)).all()


@pytest.mark.parametrize("columns", [1, 63, 300, 700])
def test_the_factor_gives_the_hessian_back(columns: int) -> None:
    h = hessian(8, columns)
    solved = factor(h)
    unit = np.tril(solved.lower).astype(np.float64)
    assert (unit.diagonal() == 1).all()
    wanted = h[np.ix_(solved.order, solved.order)].astype(np.float64)
    wanted += 0.01 * h.diagonal().astype(np.float64).mean() * np.eye(columns)
    middle = np.linalg.solve(unit, np.linalg.solve(unit, wanted).T)  # diagonal, if unit is right
    off = middle - np.diag(middle.diagonal())
    assert np.abs(off).max(initial=0) < 1e-5 * middle.diagonal().max()
    assert (np.diff(h.diagonal()[solved.order]) >= 0).all()


def test_rows_are_independent() -> None:
    rows, h, form = weights(1, 300, 160), hessian(3, 160), FORMATS["q4_0"]
    grid, solved = grid_of(form, form.encode(rows), 160), factor(h)
    one = solve(rows, grid, solved)
    parts = [slice(at, at + 70) for at in range(0, 300, 70)]
    pieces = np.concatenate(
        [solve(rows[p], replace(grid, scales=grid.scales[p], offsets=grid.offsets[p]), solved) for p in parts]
    )
    assert (pieces != one).any(axis=1).mean() < 0.05  # another shape of product may round otherwise at a tie
    check(rows, grid, h, pieces)
    assert solve(rows[:0], Grid(grid.scales[:0], grid.offsets[:0], 32, 15), solved).shape == (0, 160)


def test_rows_fill_lanes() -> None:
    assert gptq.LANES % WIDTH == 0


def test_bad_arguments() -> None:
    good = hessian(1, 32)
    for bad in (good.astype(np.float64), good[:4], good[0]):
        with pytest.raises(UsageError, match="expected a square float32 Hessian"):
            factor(bad)
    for damping in (0, -1, 1.5, float("nan")):
        with pytest.raises(UsageError, match="damping is"):
            factor(good, damping)
    holed, negative = good.copy(), good.copy()
    holed[7, 3], negative[5, 5] = np.nan, -1
    with pytest.raises(UsageError, match="not finite in row 7"):
        factor(holed)
    with pytest.raises(UsageError, match="negative in column 5"):
        factor(negative)
    rows = weights(1, 4, 64)
    solved = Factor(np.arange(64), np.eye(64, dtype=np.float32), np.ones(64, np.float32), 0.01, 0.01)
    grid = grid_of(FORMATS["q4_0"], FORMATS["q4_0"].encode(rows), 64)
    for some, other in ((rows[:3], solved), (rows[:, :32], solved), (rows, factor(good)), (rows.astype(float), solved)):
        with pytest.raises(UsageError, match="do not belong together"):
            solve(some, grid, other)
