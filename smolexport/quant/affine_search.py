"""A search for the scale and bias of affine groups, one group per lane.

From several ranges, narrower than the group's and a little wider, the values are rounded to codes, and scale and bias
follow from the codes by weighted least squares, the scale once more after the bias is rounded to its storage type.
What counts is the error of the codes that belong to scale and bias as they are stored; the best is then refined from
its own codes in the same way.

Notation: grid = scale and bias of a group, [0] and [1] of `grids`; x, w = values and weights of WIDTH groups as
`[element * WIDTH + lane]`; n = elements of a group; top = largest code.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from smolexport.quant.affine_grids import position
from smolexport.quant.jit import helper
from smolexport.quant.lane_floats import rint
from smolexport.quant.lanes import WIDTH, load, splat, store, where
from smolexport.quant.planar_io import round_lanes

ZERO, ONE, INFINITY = np.float32(0), np.float32(1), np.float32(np.inf)
ENDS = 5  # trials for each end of the range
WIDEST, STRIDE = np.float32(-0.5), np.float32(0.625)  # by how many steps an end moves inwards: -0.5 ... 2
POLISH = 3  # refinements of the best
# A grid must be better by more than the rounding errors of two sums of 128 squares, so that none is worse than it was.
MARGIN = np.float32(1 - 2.0**-15)


@helper
def search_grids(
    tile: NDArray[Any],
    count: int,
    group: int,
    top: int,
    dtype: int,
    importance: NDArray[Any],
    first: int,
    grids: NDArray[Any],
) -> None:
    """Improve `grids`, rounded to the storage type, of `count` groups of the tile, the first of them number `first`."""
    x, w = np.empty((2, group * WIDTH), np.float32)
    for start in range(0, count, WIDTH):
        transpose(tile[: count * group], start, group, importance, first, x, w)
        scale, bias = search_lanes(x, w, group, top, dtype, load(grids[0], start), load(grids[1], start))
        store(grids[0], start, scale)
        store(grids[1], start, bias)


@helper
def transpose(
    tile: NDArray[Any],
    start: int,
    group: int,
    importance: NDArray[Any],
    first: int,
    x: NDArray[Any],
    w: NDArray[Any],
) -> None:
    """Put WIDTH groups of the tile and their weights into lanes; zeros where the tile has no more groups."""
    per_row, count = importance.size // group, tile.size // group
    for lane in range(WIDTH):
        i = start + lane
        if i < count:
            values = tile[i * group : (i + 1) * group]
            column = (first + i) % per_row * group
            weights = importance[column : column + group]
            for e in range(group):
                x[e * WIDTH + lane], w[e * WIDTH + lane] = values[e], weights[e]
        else:
            for e in range(group):
                x[e * WIDTH + lane] = w[e * WIDTH + lane] = ZERO


@helper
def search_lanes(x: NDArray[Any], w: NDArray[Any], n: int, top: int, dtype: int, scale: Any, bias: Any) -> Any:
    """(scale, bias) with the smallest weighted squared error; those given where no trial is better."""
    low, high, sum_w, sum_x = group_sums(x, w, n)
    step = (high - low) / splat(np.float32(top))
    new_scale, new_bias, best = scale, bias, splat(INFINITY)
    for trial in range(1 + ENDS * ENDS + POLISH):
        if trial > 0:
            near, origin = scale, bias
            if trial <= ENDS * ENDS:
                above, below = divmod(trial - 1, ENDS)
                start, end = WIDEST + STRIDE * np.float32(above), WIDEST + STRIDE * np.float32(below)
                near = step * splat(np.float32(ONE - (start + end) / np.float32(top)))
                origin = low + step * splat(start)
            new_scale, new_bias = fit(x, w, n, top, dtype, near, origin, low, sum_w, sum_x)
        error = grid_error(x, w, n, top, new_scale, new_bias)
        wins = error < best
        best = where(wins, error * splat(MARGIN), best)
        scale, bias = where(wins, new_scale, scale), where(wins, new_bias, bias)
    return scale, bias


@helper
def group_sums(x: NDArray[Any], w: NDArray[Any], n: int) -> Any:
    """(minimum, maximum, sum of w, sum of w * (x - minimum))."""
    low = high = load(x, 0)
    for e in range(1, n):
        value = load(x, e * WIDTH)
        low, high = where(value < low, value, low), where(value > high, value, high)
    sum_w = sum_x = splat(ZERO)
    for e in range(n):
        weight = load(w, e * WIDTH)
        sum_w, sum_x = sum_w + weight, sum_x + weight * (load(x, e * WIDTH) - low)
    return low, high, sum_w, sum_x


@helper
def fit(
    x: NDArray[Any],
    w: NDArray[Any],
    n: int,
    top: int,
    dtype: int,
    scale: Any,
    bias: Any,
    low: Any,
    sum_w: Any,
    sum_x: Any,
) -> Any:
    """(scale, bias), rounded to the storage type, that suit the codes on another grid best."""
    zero, last, inverse = splat(ZERO), splat(np.float32(top)), splat(ONE) / scale
    sum_q = sum_qq = sum_xq = zero
    for e in range(n):
        value = load(x, e * WIDTH)
        code = (value - bias) * inverse
        code = where(code > zero, code, zero)
        code = rint(where(code < last, code, last))
        weighted = load(w, e * WIDTH) * code
        sum_q, sum_qq = sum_q + weighted, sum_qq + weighted * code
        sum_xq = sum_xq + weighted * (value - low)
    slope = (sum_w * sum_xq - sum_q * sum_x) / (sum_w * sum_qq - sum_q * sum_q)
    bias = round_lanes(low + (sum_x - slope * sum_q) / sum_w, dtype)
    return round_lanes((sum_xq + (low - bias) * sum_q) / sum_qq, dtype), bias


@helper
def grid_error(x: NDArray[Any], w: NDArray[Any], n: int, top: int, scale: Any, bias: Any) -> Any:
    """Weighted squared error of a grid with the codes that are nearest on it."""
    error, last = splat(ZERO), splat(np.float32(top))
    for e in range(n):
        value = load(x, e * WIDTH)
        code = position(value, scale, bias)
        difference = scale * rint(where(code < last, code, last)) + bias - value
        error = error + load(w, e * WIDTH) * (difference * difference)
    return error
