"""Rows encoded with GPTQ's error feedback, chunk by chunk.

The grid (scales, zero points, minima) comes from the format's own search, weighted by the importance of each column;
only the codes are chosen anew.  Rows are independent, so a chunk of them needs nothing but the factor of its Hessian.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from smolexport.calibration.gptq import Factor, factor, solve
from smolexport.calibration.statistics import Input, Statistics, input_of
from smolexport.model.spec import Tensor
from smolexport.quant import RowFormat
from smolexport.quant.affine_view import grid_of, with_codes

ENOUGH = 8  # tokens per column, below which a Hessian is noisy
FEW_DAMPING = 0.05  # then
SAMPLE = 256  # rows of a matrix whose error is measured

Floats = NDArray[np.float32]


class GptqEncoders:
    """Encoders of the matrices of one checkpoint; threads may share them."""

    def __init__(self, statistics: Statistics, damping: float) -> None:
        """`damping` is a share of the mean of each Hessian's diagonal; Hessians of few tokens get more."""
        self.statistics = statistics
        self.damping = damping
        self._encoders: dict[Tensor, GptqEncoder] = {}
        self._lock = threading.Lock()
        self._sums: dict[Tensor, NDArray[np.float64]] = {}
        self._last: tuple[Input, Factor] | None = None  # matrices with one input stand together, and factors are large

    def encoder(self, tensor: Tensor) -> GptqEncoder:
        """The one encoder of `tensor`, so that outputs can share what it makes; raises CalibrationError."""
        if tensor not in self._encoders:
            self._encoders[tensor] = GptqEncoder(self, tensor, self.statistics.mean_squares(tensor))
        return self._encoders[tensor]

    def factor(self, tensor: Tensor) -> Factor:
        """Of the Hessian of the input of `tensor`.

        Raises:
            CalibrationError: the statistic is missing, damaged, or has no factor.
        """
        key = input_of(tensor)
        with self._lock:
            if self._last is None or self._last[0] != key:
                self._last = None  # before the next one is made
                few = self.statistics.manifest.tokens < ENOUGH * tensor.shape[1]
                damping = max(self.damping, FEW_DAMPING) if few else self.damping
                self._last = key, factor(self.statistics.hessian(tensor), damping)
            return self._last[1]

    def note(self, tensor: Tensor, rows: Floats, start: int, before: Floats, after: Floats) -> None:
        """Measure what two ways to round `rows`, those from `start` on, do to the outputs, on a sample of the rows.

        Args:
            tensor: the matrix.
            rows: [n, c] weights.
            start: number of the first one.
            before, after: [n, c], rounded.
        """
        stride = -(-tensor.shape[0] // SAMPLE)
        some = slice(-start % stride, None, stride)
        found = self.factor(tensor)
        parts = (found.squares(part) for part in (rows[some] - before[some], rows[some] - after[some], rows[some]))
        sums = np.array([part.sum(dtype=np.float64) for part in parts])
        with self._lock:
            self._sums[tensor] = self._sums.get(tensor, 0) + sums

    def errors(self, tensors: Iterable[Tensor]) -> dict[str, dict[str, float]]:
        """By source name the squared error of the outputs over their square, for each of `tensors` that was encoded.

        `before` is that of the format's own rounding, `after` that of error feedback, both on at most 256 rows of each
        matrix.
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
        """The rows [n, columns] in `form`: the scales of its search, the codes of error feedback.

        Raises:
            CalibrationError: the statistic is missing, damaged, or has no factor.
        """
        columns = rows.shape[1]
        encoded = form.encode(rows, self.importance)
        weights = rows.astype(np.float32)
        grid = grid_of(form, encoded, columns)
        solved = with_codes(form, encoded, solve(weights, grid, self.encoders.factor(self.tensor), threads=1))
        before, after = form.decode(encoded, columns), form.decode(solved, columns)
        self.encoders.note(self.tensor, weights, start, before, after)
        return solved
