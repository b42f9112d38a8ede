"""What is gathered about one input: the arrays that an engine returns and a file holds."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from smolexport.spec import Layer, ModelSpec

__all__ = ["KINDS", "Moments", "input_columns"]

KINDS = ("attn", "o", "mlp", "down")  # the inputs of a layer, in the order of the forward pass


def input_columns(spec: ModelSpec, layer: Layer) -> dict[str, int]:
    """Columns of each of `KINDS` in `layer`."""
    heads = layer.mixer.num_attention_heads * layer.mixer.head_dim
    columns = (spec.hidden_size, heads, spec.hidden_size, layer.mlp.intermediate_size)
    return dict(zip(KINDS, columns, strict=True))


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
