"""How far each tensor of an exported file is from the checkpoint's, and whether rounding explains it.

Two bits leave a relative error of about a half; a matrix that is nought has 1, another one in its place 1.4.  Norms and
biases are floats in every format, 16 bits at the least.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import numpy as np

from smolexport.errors import FileFormatError
from smolexport.parity.results import TensorError
from smolexport.spec import Tensor
from smolexport.weights import ReadableTensor, Weights, canonical

__all__ = ["own_tensors", "tensor_errors"]

PIECE = 1 << 20  # elements
MATRIX, VECTOR = 0.9, 0.02  # largest relative errors that rounding makes


def tensor_errors(original: Weights, stored: Weights, path: Path) -> tuple[TensorError, ...]:
    """The relative error of every tensor, in the order of the forward pass, read piece by piece.

    Args:
        original: of the checkpoint.
        stored: of the exported file.
        path: the file, for messages.

    Raises:
        FileFormatError: the file lacks a tensor, or has it in another shape.
    """
    there = {tensor.key: tensor for tensor in stored}
    found = []
    for tensor in canonical(original):
        other = there.get(tensor.key)
        if other is None or other.shape != tensor.shape:
            raise FileFormatError(f"{path}: tensor {tensor.name} is missing or has another shape than the checkpoint's")
        relative = _relative(original[tensor], stored[other], tensor)
        rounded = relative <= (MATRIX if tensor.is_matrix else VECTOR)  # NaN is not
        found.append(TensorError(tensor.name, tensor.layer, tensor.size, relative, rounded))
    return tuple(found)


def own_tensors(original: Weights, stored: Weights, foreign: Collection[str]) -> Weights:
    """`stored` with the checkpoint's own tensors in place of those whose names are in `foreign`."""
    own = {t.key: values for t, values in original.items() if t.name in foreign}
    return {t: own.get(t.key, values) for t, values in stored.items()}


def _relative(a: ReadableTensor, b: ReadableTensor, tensor: Tensor) -> float:
    """Root of the summed squared differences over that of `a`; 0 where both are 0."""
    rows, step = tensor.rows, max(1, PIECE // tensor.columns)
    apart = whole = 0.0
    for start in range(0, rows, step):
        x = a.read_rows(start, min(start + step, rows)).astype(np.float64)
        apart += float(np.square(b.read_rows(start, min(start + step, rows)) - x).sum())
        whole += float(np.square(x).sum())
    return float(np.sqrt(apart / whole)) if whole else float(apart > 0)
