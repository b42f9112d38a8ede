"""Relative error of each tensor of an exported file, and whether rounding can explain it.

Rounding to two bits leaves a relative error of about 0.5; a zero matrix has 1, an unrelated matrix 1.4.  Norms and
biases are floats of at least 16 bits in every format.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from smolexport.errors import FileFormatError
from smolexport.model.spec import Tensor
from smolexport.model.weights import ReadableTensor, Weights, canonical
from smolexport.parity.results import WeightError

PIECE = 1 << 20  # elements
MATRIX, VECTOR = 0.9, 0.02  # largest relative errors that rounding explains


def tensor_errors(original: Weights, stored: Weights, path: Path) -> tuple[WeightError, ...]:
    """The relative error of every tensor, in the order of the forward pass, read in pieces.

    Args:
        original: the checkpoint's weights.
        stored: the exported file's weights.
        path: the file, for messages.

    Raises:
        FileFormatError: a tensor is missing from the file or has another shape.
    """
    there = {tensor.key: tensor for tensor in stored}
    found = []
    for tensor in canonical(original):
        other = there.get(tensor.key)
        if other is None or other.shape != tensor.shape:
            raise FileFormatError(f"{path}: tensor {tensor.name} is missing or has another shape than the checkpoint's")
        relative = _relative(original[tensor], stored[other], tensor)
        rounded = relative <= (MATRIX if tensor.is_matrix else VECTOR)  # NaN compares false
        found.append(WeightError(tensor.name, tensor.layer, tensor.size, relative, rounded))
    return tuple(found)


def _relative(a: ReadableTensor, b: ReadableTensor, tensor: Tensor) -> float:
    """Root of the summed squared differences over that of `a`; 0 if both are 0."""
    rows, step = tensor.rows, max(1, PIECE // tensor.columns)
    apart = whole = 0.0
    for start in range(0, rows, step):
        x = a.read_rows(start, min(start + step, rows)).astype(np.float64)
        apart += float(np.square(b.read_rows(start, min(start + step, rows)) - x).sum())
        whole += float(np.square(x).sum())
    return float(np.sqrt(apart / whole)) if whole else float(apart > 0)
