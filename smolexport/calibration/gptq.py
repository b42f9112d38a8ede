"""GPTQ on a fixed grid: codes that keep the outputs of a matrix close, not its weights.

With H the mean of x x^T over the inputs x of a matrix, a row w rounded to q costs (w - q) H (w - q)^T.  Columns are
rounded one after another, those with the largest inputs first, and each rounding error is made up for by the columns
that are still to come.  Scales are fixed beforehand, so the order of columns leaves no trace in the result.

With H = G^T G, G upper triangular, column i is best rounded to the grid value nearest to
w_i + sum over j > i of G_ij / G_ii * (w_j - q_j), from the last column to the first.  That is what the usual form
computes with the Cholesky factor of the inverse, without an inverse: it is the same as Babai's nearest plane.

Notation: n = rows, c = columns of the matrix; order[i] = column of the matrix that is column i here.
Sources: GPTQ, arXiv 2210.17323; its equality to Babai's algorithm, arXiv 2507.18553.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from smolexport.errors import UsageError
from smolexport.quant.affine_view import Grid

PANEL = 256  # columns of the Cholesky factor at a time
AT_ONCE = 1 << 24  # weights at a time: 64 MiB of errors
LANES = 32  # rows that a kernel does at once

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Factor:
    """What `solve` needs to know of a Hessian; serves all matrices with the same inputs.

    Attributes:
        order: [c] int64, ascending diagonal: the last column is rounded first.
        lower: [c, c] float32: G^T with each column divided by its diagonal element.
        pivots: [c] float32, squares of the diagonal of G; 0 for columns without input.
        damping: what was added to the diagonal, as a share of its mean.
        ridge: the same as a number.
    """

    order: NDArray[np.int64]
    lower: Floats
    pivots: Floats
    damping: float
    ridge: float

    def squares(self, rows: Floats) -> NDArray[np.float64]:
        """What each of `rows` [n, c] adds to the square of the outputs, [n]: w H w^T, without the damping."""
        ordered = rows[:, self.order]
        damped = np.square(ordered @ self.lower, dtype=np.float64) @ self.pivots
        added = self.ridge * np.square(ordered[:, self.pivots > 0], dtype=np.float64).sum(axis=1)
        return np.asarray(np.maximum(damped - added, 0), np.float64)


def factor(hessian: Floats, damping: float = 0.01) -> Factor:
    """Order and factorize a Hessian.

    Columns whose input is always zero are cut off from the others: they are rounded as they are.  If the matrix is not
    positive definite even in float64, damping is doubled, to 1 at most.

    Args:
        hessian: [c, c] float32, symmetric, positive semidefinite but for rounding; not changed.
        damping: share of the diagonal's mean to add to the diagonal, above 0 and at most 1.

    Raises:
        UsageError: a matrix that is not square and float32, or not finite, or has a negative diagonal, or cannot be
            factorized; a damping out of range.
    """
    diagonal = damped_diagonal(hessian, damping)
    live = diagonal > 0
    mean = float(diagonal[live].mean(dtype=np.float64)) if live.any() else 1.0
    order = np.argsort(diagonal, kind="stable").astype(np.int64)  # columns without input come first
    while True:
        for kind in (np.float32, np.float64):
            found = factorized(hessian, order, int((~live).sum()), mean, damping, kind)
            if found is not None:
                return Factor(order, *found, damping, damping * mean)
        if damping >= 1:
            raise UsageError(f"a Hessian of {len(order)} columns is not positive definite even with damping {damping}")
        damping = min(1.0, 2 * damping)


def factorized(
    hessian: Floats, order: NDArray[np.int64], dead: int, mean: float, damping: float, kind: type[Any]
) -> tuple[Floats, Floats] | None:
    """`lower` and `pivots` of a Factor, computed in `kind`; None where the matrix is not positive definite in it."""
    ordered = np.empty(hessian.shape, kind)
    for i, column in enumerate(order):  # a row at a time, so that there is one copy
        np.multiply(hessian[column, order], 1 / mean, out=ordered[i], casting="same_kind")
    ordered[:dead], ordered[:, :dead] = 0, 0
    diagonal = np.einsum("ii->i", ordered)
    diagonal[:dead] = 1
    diagonal[dead:] += damping
    if not cholesky(ordered):
        return None
    pivots = (mean * diagonal.astype(np.float64) ** 2).astype(np.float32)
    pivots[:dead] = 0
    ordered /= diagonal.copy()
    for i, row in enumerate(ordered):
        row[i + 1 :] = 0
    return ordered.astype(np.float32, copy=False), pivots


def damped_diagonal(hessian: Floats, damping: float) -> Floats:
    """The diagonal of `hessian`; raises UsageError as `factor` says."""
    if hessian.ndim != 2 or hessian.shape[0] != hessian.shape[1] or hessian.dtype != np.float32:
        raise UsageError(f"expected a square float32 Hessian, found {hessian.dtype} {hessian.shape}")
    if not 0 < damping <= 1:
        raise UsageError(f"damping is {damping}, must be above 0 and at most 1")
    for i, row in enumerate(hessian):
        if not np.isfinite(row).all():
            raise UsageError(f"the Hessian is not finite in row {i}")
    diagonal = np.ascontiguousarray(hessian.diagonal())
    if (diagonal < 0).any():
        raise UsageError(f"the Hessian's diagonal is negative in column {int(np.argmax(diagonal < 0))}")
    return diagonal


def cholesky(a: NDArray[Any]) -> bool:
    """Put the Cholesky factor of `a` in its lower triangle; False, with `a` spoilt, where there is none.

    In place, a panel at a time, because LAPACK by way of numpy takes two more copies of a matrix of up to 512 MiB.
    """
    size = len(a)
    for start in range(0, size, PANEL):
        stop = min(size, start + PANEL)
        if start:
            a[start:, start:stop] -= a[start:, :start] @ a[start:stop, :start].T
        try:
            corner = np.linalg.cholesky(a[start:stop, start:stop].astype(np.float64))
        except np.linalg.LinAlgError:
            return False
        a[start:stop, start:stop] = corner
        if stop < size:
            inverse = np.linalg.inv(corner).astype(a.dtype)
            a[stop:, start:stop] = a[stop:, start:stop] @ inverse.T
    diagonal = a.diagonal()
    return bool(np.isfinite(a[-1]).all() and (diagonal > 0).all() and np.isfinite(diagonal).all())


def solve(rows: Floats, grid: Grid, factor: Factor, threads: int = 1) -> NDArray[np.uint8]:
    """The codes of `rows` on `grid`.

    Args:
        rows: [n, c] float32, finite.
        grid: of n rows of c columns.
        factor: of the Hessian of the inputs of these rows.
        threads: how many round rows at once; the result does not depend on it.  Products of matrices use as many as
            numpy's BLAS does.

    Returns:
        [n, c] uint8, 0 ... grid.top.

    Raises:
        UsageError: shapes that do not belong together.
    """
    count, columns = rows.shape
    groups = -(-columns // grid.group)
    if rows.dtype != np.float32 or factor.order.shape != (columns,) or grid.scales.shape != (count, groups):
        raise UsageError(
            f"{rows.dtype} rows {rows.shape}, a grid {grid.scales.shape} of groups of {grid.group} and a Hessian of "
            f"{len(factor.order)} columns do not belong together"
        )
    codes = np.empty((count, columns), np.uint8)
    step = max(1, AT_ONCE // max(1, columns) // LANES) * LANES
    with pool(threads) as workers:
        for start in range(0, count, step):
            part = slice(start, min(count, start + step))
            codes[part] = solve_part(rows[part], grid, part, factor, workers, threads)
    return codes


@contextmanager
def pool(threads: int) -> Iterator[ThreadPoolExecutor | None]:
    """Workers, or None where one thread does it all."""
    if threads < 2:
        yield None
    else:
        with ThreadPoolExecutor(threads) as workers:
            yield workers


def solve_part(
    rows: Floats, grid: Grid, part: slice, factor: Factor, workers: ThreadPoolExecutor | None, threads: int
) -> NDArray[np.uint8]:
    """Codes of a part of the rows, `rows`, with `part` of the grid."""
    from smolexport.calibration.gptq_kernels import BLOCK, round_block

    count, columns = rows.shape
    width = -(-count // LANES) * LANES
    # Weights, replaced by errors from the last column on.
    errors = transposed(rows, factor.order, width)
    scales, offsets = (transposed(a[part], np.arange(a.shape[1]), width) for a in (grid.scales, grid.offsets))
    codes, groups = np.empty((columns, width), np.uint8), factor.order // grid.group
    share = max(1, -(-width // LANES // threads)) * LANES
    for start in reversed(range(0, columns, BLOCK)):
        stop = min(columns, start + BLOCK)
        here = slice(start, stop)
        moved = factor.lower[stop:, here].T @ errors[stop:]
        below = np.ascontiguousarray(factor.lower[here, here])

        def work(first: int, here: slice = here, moved: Floats = moved, below: Floats = below) -> None:
            round_block(
                below, moved, errors[here], scales, offsets, groups[here], grid.top, grid.middle, codes[here],
                first, min(width, first + share),
            )  # fmt: skip

        firsts = range(0, width, share)
        for _ in map(work, firsts) if workers is None else workers.map(work, firsts):
            pass
    found = np.empty((count, columns), np.uint8)
    found[:, factor.order] = codes[:, :count].T
    return found


def transposed(rows: Floats, order: NDArray[np.int64], width: int) -> Floats:
    """[columns in `order`, width] from [n, columns], with zeros behind the n rows."""
    made = np.zeros((len(order), width), np.float32)
    for start in range(0, len(order), PANEL):
        made[start : start + PANEL, : len(rows)] = rows.T[order[start : start + PANEL]]
    return made


def relative_error(rows: Floats, decoded: Floats, hessian: Floats) -> float:
    """Squared error of the outputs, as a share of the outputs' square: 0 is perfect, 1 as bad as no weights at all.

    Args:
        rows: [n, c] float32 weights.
        decoded: [n, c] float32, what became of them.
        hessian: [c, c] float32.

    Returns:
        trace(D H D^T) / trace(W H W^T) with D = rows - decoded; 0 if both are 0, infinity if only the latter is.
    """
    step, error, size = max(1, AT_ONCE // max(1, rows.shape[1])), 0.0, 0.0
    for start in range(0, len(rows), step):
        some = rows[start : start + step]
        error += weighted_square(some - decoded[start : start + step], hessian)
        size += weighted_square(some, hessian)
    if size > 0:
        return max(0.0, error) / size
    return float("inf") if error > 0 else 0.0


def weighted_square(rows: Floats, hessian: Floats) -> float:
    """trace(W H W^T)."""
    return float(np.einsum("ij,ij->i", rows @ hessian, rows).sum(dtype=np.float64))
