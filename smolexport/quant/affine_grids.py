"""Scales and biases of affine groups: those that MLX chooses, and where a value lies between two codes.

The end of a group's range that is farther from zero is a value of the grid, as bias and code 0; where the range
straddles zero the step is stretched so that zero is a value too.

Notation: grid = scale and bias of a group, [0] and [1] of `grids`; top = largest code.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from smolexport.quant.jit import lean_helper
from smolexport.quant.lane_floats import rint
from smolexport.quant.lane_groups import extremes_of_groups
from smolexport.quant.lanes import WIDTH, magnitude, negative, splat, store, where

ZERO, EPSILON = np.float32(0), np.float32(1e-7)


@lean_helper
def position(x: Any, scale: Any, bias: Any) -> Any:
    """Where values lie on a grid, between two codes for most; 0 for what lies below code 0."""
    place = (x - bias) / scale
    return where(place > splat(ZERO), place, splat(ZERO))


@lean_helper
def find_grids(tile: NDArray[Any], group: int, top: int, grids: NDArray[Any]) -> None:
    """Scale and bias, in float32, of each group of the tile, which is WIDTH groups or a multiple of them."""
    zero, steps, epsilon = splat(ZERO), splat(np.float32(top)), splat(EPSILON)
    for i in range(0, tile.size // group, WIDTH):
        low, high = extremes_of_groups(tile, i * group, group)
        scale = (high - low) / steps
        scale = where(scale > epsilon, scale, epsilon)
        upwards = magnitude(low) > magnitude(high)
        scale, edge = where(upwards, scale, negative(scale)), where(upwards, low, high)
        steps_from_zero = rint(edge / scale)
        empty = steps_from_zero == zero
        store(grids[0], i, where(empty, scale, edge / steps_from_zero))
        store(grids[1], i, where(empty, zero, edge))
