"""What it costs to store a matrix in fewer bits: the divergence of the predictions, from statistics and sensitivities.

Rounding a matrix changes its outputs by D x, D the rounding errors.  With H the mean of x x^T, and F_r how much the
predictions feel output r, that diverges by about 1/2 sum over r of F_r (D H D^T)_rr.  A looked-up row t of an embedding
is read as often as its token comes: 1/2 sum over t of f_t sum over j of F_j D_tj^2.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
from numpy.typing import NDArray

from smolexport.calibration.statistics import Input, Statistics, input_of
from smolexport.calibration.training import encode_rows, lattice_of
from smolexport.checkpoint import Checkpoint
from smolexport.errors import CalibrationError
from smolexport.plan import Entry
from smolexport.spec import Role, Tensor

__all__ = ["HEAD", "Costs", "sample"]

SAMPLE = 256  # rows of a matrix that are rounded
HEAD = "lm_head.weight"  # under this name also where the head is tied

Floats = NDArray[np.float64]


class Costs:
    """Costs of the matrices of one checkpoint."""

    def __init__(self, checkpoint: Checkpoint, statistics: Statistics, sensitivity: Mapping[str, Floats]) -> None:
        """`sensitivity`: by source name, what the torch runtime's `sensitivity` gives."""
        self._checkpoint, self._statistics, self._sensitivity = checkpoint, statistics, sensitivity
        size = checkpoint.spec.vocab_size
        counts = np.bincount(statistics.windows()[:, 1:].ravel(), minlength=size)[:size]
        self._frequencies: Floats = counts / max(1, counts.sum())
        self._last: tuple[Input, NDArray[np.float32]] | None = None  # matrices with one input stand together

    def of(self, tensor: Tensor, entries: Iterable[Entry]) -> float:
        """The most that one of `entries`, ways to store `tensor`, costs in nats per token.

        Raises:
            CalibrationError: a statistic is missing or damaged.
        """
        products, lookups = self._weights(tensor)
        rows, scale = sample(products + lookups)
        weights = self._checkpoint.stored[tensor].read_rows()[rows]
        forms = {(lattice_of(e), e.via, e.importance is None): e for e in entries}
        found = 0.0
        for entry in forms.values():
            encoded = encode_rows(entry, weights, 0)
            error = weights.astype(np.float32) - lattice_of(entry).decode(encoded, tensor.shape[1])
            cost = 0.0
            if products.any():
                moved = np.einsum("ij,ij->i", error @ self._hessian(tensor), error).astype(np.float64)
                cost += float(products[rows] * scale @ np.maximum(moved, 0))
            if lookups.any():
                felt = self._felt(tensor.stored_name, tensor.shape[1])
                cost += float(self._frequencies[rows] * scale @ (error.astype(np.float64) ** 2 @ felt))
            found = max(found, cost / 2)
        return found

    def _weights(self, tensor: Tensor) -> tuple[Floats, Floats]:
        """How much each row matters as a factor of products, and as what is looked up, on comparable scales."""
        rows, nothing = tensor.shape[0], np.zeros(tensor.shape[0])
        if tensor.role is not Role.EMBED:
            return self._felt(HEAD if tensor.role is Role.HEAD else tensor.stored_name, rows), nothing
        lookups = self._frequencies * float(self._felt(tensor.stored_name, tensor.shape[1]).mean())
        if not self._checkpoint.spec.tied:
            return nothing, lookups
        return self._felt(HEAD, rows), lookups

    def _felt(self, name: str, outputs: int) -> Floats:
        found = self._sensitivity.get(name)
        if found is None or found.shape != (outputs,):
            raise CalibrationError(f"{self._checkpoint.folder}: {name}: no {outputs} sensitivities came from torch")
        return found

    def _hessian(self, tensor: Tensor) -> NDArray[np.float32]:
        key = input_of(tensor)
        if self._last is None or self._last[0] != key:
            self._last = None  # before the next one is read
            self._last = key, self._statistics.hessian(tensor)
        return self._last[1]


def sample(weights: Floats, count: int = SAMPLE) -> tuple[NDArray[np.int64], Floats]:
    """Numbers of at most `count` rows, and how many rows each stands for: the heaviest, and some of all others.

    Args:
        weights: of each row.
        count: even.
    """
    rows = len(weights)
    if rows <= count:
        return np.arange(rows), np.ones(rows)
    order = np.argsort(-weights, kind="stable")
    heavy, light = order[: count // 2], np.sort(order[count // 2 :])
    some = light[np.linspace(0, len(light) - 1, count // 2).round().astype(np.int64)]
    scale = np.concatenate([np.ones(len(heavy)), np.full(len(some), len(light) / len(some))])
    chosen = np.concatenate([heavy, some])
    by_number = np.argsort(chosen)
    return chosen[by_number], scale[by_number]
