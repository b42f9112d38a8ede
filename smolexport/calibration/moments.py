"""What is gathered about one input: the arrays that an engine returns and a file holds."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

__all__ = ["KINDS", "Moments"]

KINDS = ("attn", "o", "mlp", "down")  # the inputs of a layer, in the order of the forward pass


@dataclass(frozen=True)
class Moments:
    """Second moments of one input of c columns.

    Attributes:
        hessian: [c, c] float32, X^T X / T over all positions but the first of each window; only its upper triangle
            counts, below it stands anything.
        mean_squares: [c] float32, over all positions.
        largest_share: of the trace of the Hessian, what the largest single token makes.
    """

    hessian: NDArray[np.float32] = field(repr=False)
    mean_squares: NDArray[np.float32] = field(repr=False)
    largest_share: float
