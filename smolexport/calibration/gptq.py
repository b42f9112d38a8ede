"""GPTQ on a fixed grid: codes that keep the outputs of a matrix close, not its weights.

With H the mean of x x^T over the inputs x of a matrix, a row w rounded to q costs (w - q) H (w - q)^T.  Columns are
rounded one after another, those with the largest inputs first, and the columns still to come compensate for each
rounding error.  The grid (scales, zero points, minima) comes from the format's own search, weighted by the importance
of each column, so the order of columns leaves no trace in the result, and rows are independent of each other.

With H = G^T G, G upper triangular, column i is best rounded to the grid value nearest to
w_i + sum over j > i of G_ij / G_ii * (w_j - q_j), from the last column to the first.  That is what the usual form
computes with the Cholesky factor of the inverse, without an inverse: it is the same as Babai's nearest plane.

Notation: n = rows, c = columns of the matrix; order[i] = column of the matrix that is column i here.
Sources: GPTQ, arXiv 2210.17323; its equality to Babai's algorithm, arXiv 2507.18553.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from smolexport.calibration.statistics import Input, Statistics, input_of
from smolexport.errors import UsageError
from smolexport.model.spec import Tensor
from smolexport.quant import RowFormat
from smolexport.quant.affine_view import Grid, grid_of, with_codes

PANEL = 256  # columns of the Cholesky factor at a time
LANES = 32  # a multiple of the rows that the kernel does at once
NOISY = 8  # tokens per column, below which a Hessian is noisy
NOISY_DAMPING = 0.05  # the least for such a Hessian
SAMPLE = 256  # rows of a matrix whose error is measured

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Factor:
    """A factorized Hessian, for all matrices with the same input.

    Attributes:
        order: [c] int64, ascending diagonal: the last column is rounded first.
        lower: [c, c] float32: G^T with each column divided by its diagonal element.
        pivots: [c] float32, squares of the diagonal of G; 0 for columns without input.
        damping: added to the diagonal, as a share of its mean.
        ridge: the same as a number.
    """

    order: NDArray[np.int64]
    lower: Floats
    pivots: Floats
    damping: float
    ridge: float

    def squares(self, rows: Floats) -> NDArray[np.float64]:
        """[n]: w H w^T of each of `rows` [n, c], without the damping: its share of the squared outputs."""
        ordered = rows[:, self.order]
        damped = np.square(ordered @ self.lower, dtype=np.float64) @ self.pivots
        added = self.ridge * np.square(ordered[:, self.pivots > 0], dtype=np.float64).sum(axis=1)
        return np.asarray(np.maximum(damped - added, 0), np.float64)


def factor(hessian: Floats, damping: float = 0.01) -> Factor:
    """Order and factorize a Hessian.

    Columns whose input is always zero are separated from the others and rounded to nearest.  If the matrix is not
    positive definite even in float64, damping is doubled, to 1 at most.

    Args:
        hessian: [c, c] float32, symmetric, positive semidefinite but for rounding; not changed.
        damping: share of the diagonal's mean to add to the diagonal, above 0 and at most 1.

    Raises:
        UsageError: not a square float32 matrix; it is not finite, has a negative diagonal or cannot be factorized; a
            damping out of range.
    """
    diagonal = _checked_diagonal(hessian, damping)
    live = diagonal > 0
    mean = float(diagonal[live].mean(dtype=np.float64)) if live.any() else 1.0
    order = np.argsort(diagonal, kind="stable").astype(np.int64)  # columns without input come first
    while True:
        for kind in (np.float32, np.float64):
            found = _factorized(hessian, order, int((~live).sum()), mean, damping, kind)
            if found is not None:
                return Factor(order, *found, damping, damping * mean)
        if damping >= 1:
            raise UsageError(f"a Hessian of {len(order)} columns is not positive definite even with damping {damping}")
        damping = min(1.0, 2 * damping)


def _factorized(
    hessian: Floats, order: NDArray[np.int64], dead: int, mean: float, damping: float, kind: type[Any]
) -> tuple[Floats, Floats] | None:
    """`lower` and `pivots` of a Factor, computed in the dtype `kind`; None if not positive definite in it."""
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


def _checked_diagonal(hessian: Floats, damping: float) -> Floats:
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
    """Replace the lower triangle of `a` by its Cholesky factor; False, with `a` overwritten, if there is none.

    In place, a panel at a time, because numpy's LAPACK makes two more copies of a matrix of up to 512 MiB.
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


def solve(rows: Floats, grid: Grid, factor: Factor) -> NDArray[np.uint8]:
    """The codes, [n, c] uint8, of finite float32 `rows` [n, c] on `grid`; `factor`: of the Hessian of their inputs.

    Raises:
        UsageError: the shapes do not match.
    """
    from smolexport.calibration.gptq_kernels import BLOCK, round_block

    count, columns = rows.shape
    groups = -(-columns // grid.group)
    if rows.dtype != np.float32 or factor.order.shape != (columns,) or grid.scales.shape != (count, groups):
        raise UsageError(
            f"{rows.dtype} rows {rows.shape}, a grid {grid.scales.shape} of groups of {grid.group} and a Hessian of "
            f"{len(factor.order)} columns do not belong together"
        )
    width = -(-count // LANES) * LANES
    # Weights, replaced by errors from the last column on.
    errors = _transposed(rows, factor.order, width)
    scales, offsets = (_transposed(a, np.arange(groups), width) for a in (grid.scales, grid.offsets))
    codes, group_of = np.empty((columns, width), np.uint8), factor.order // grid.group
    for start in reversed(range(0, columns, BLOCK)):
        stop = min(columns, start + BLOCK)
        here = slice(start, stop)
        moved = factor.lower[stop:, here].T @ errors[stop:]
        below = np.ascontiguousarray(factor.lower[here, here])
        round_block(below, moved, errors[here], scales, offsets, group_of[here], grid.top, grid.middle, codes[here])
    found = np.empty((count, columns), np.uint8)
    found[:, factor.order] = codes[:, :count].T
    return found


def _transposed(rows: Floats, order: NDArray[np.int64], width: int) -> Floats:
    """[columns in `order`, width] from [n, columns], zero-padded."""
    made = np.zeros((len(order), width), np.float32)
    for start in range(0, len(order), PANEL):
        made[start : start + PANEL, : len(rows)] = rows.T[order[start : start + PANEL]]
    return made


class GptqEncoders:
    """Encoders of the matrices of one checkpoint, each with the format's own grid; threads may share them."""

    def __init__(self, statistics: Statistics, damping: float) -> None:
        """`damping` is a share of the mean of each Hessian's diagonal; Hessians of few tokens get more."""
        self.statistics = statistics
        self.damping = damping
        self._encoders: dict[Tensor, GptqEncoder] = {}
        self._lock = threading.Lock()
        self._sums: dict[Tensor, NDArray[np.float64]] = {}
        self._last: tuple[Input, Factor] | None = None  # matrices with one input follow each other; factors are large

    def encoder(self, tensor: Tensor) -> GptqEncoder:
        """The one encoder of `tensor`, so that outputs can share its rows; raises CalibrationError."""
        if tensor not in self._encoders:
            self._encoders[tensor] = GptqEncoder(self, tensor, self.statistics.mean_squares(tensor))
        return self._encoders[tensor]

    def factor(self, tensor: Tensor) -> Factor:
        """Factor of the Hessian of the input of `tensor`; raises CalibrationError, UsageError."""
        key = input_of(tensor)
        with self._lock:
            if self._last is None or self._last[0] != key:
                self._last = None  # before the next one is made
                noisy = self.statistics.manifest.tokens < NOISY * tensor.shape[1]
                damping = max(self.damping, NOISY_DAMPING) if noisy else self.damping
                self._last = key, factor(self.statistics.hessian(tensor), damping)
            return self._last[1]

    def note(self, tensor: Tensor, rows: Floats, start: int, before: Floats, after: Floats) -> None:
        """Add up the squared output errors of `before` and `after`, `rows` [n, c] rounded two ways, on a sample."""
        stride = -(-tensor.shape[0] // SAMPLE)
        some = slice(-start % stride, None, stride)
        found = self.factor(tensor)
        parts = (found.squares(part) for part in (rows[some] - before[some], rows[some] - after[some], rows[some]))
        sums = np.array([part.sum(dtype=np.float64) for part in parts])
        with self._lock:
            self._sums[tensor] = self._sums.get(tensor, 0) + sums

    def errors(self, tensors: Iterable[Tensor]) -> dict[str, dict[str, float]]:
        """Relative squared error of the outputs of each of `tensors` that was encoded, by name, on at most SAMPLE rows:
        `before` with the format's own rounding, `after` with error feedback.
        """
        found = {}
        for tensor in tensors:
            if tensor in self._sums:
                before, after, whole = self._sums[tensor]
                found[tensor.name] = {"before": float(before / whole), "after": float(after / whole)}
        return found


@dataclass(frozen=True)
class GptqEncoder:
    """Encodes the rows of `tensor`; `importance` is [columns] float32."""

    encoders: GptqEncoders = field(repr=False)
    tensor: Tensor
    importance: Floats = field(repr=False, compare=False)

    def encode(self, form: RowFormat, rows: NDArray[Any], start: int) -> NDArray[np.uint8]:
        """The rows [n, columns] in `form`: the scales of its search, the codes of error feedback."""
        columns = rows.shape[1]
        encoded = form.encode(rows, self.importance)
        weights = rows.astype(np.float32)
        grid = grid_of(form, encoded, columns)
        solved = with_codes(form, encoded, solve(weights, grid, self.encoders.factor(self.tensor)))
        before, after = form.decode(encoded, columns), form.decode(solved, columns)
        self.encoders.note(self.tensor, weights, start, before, after)
        return solved
