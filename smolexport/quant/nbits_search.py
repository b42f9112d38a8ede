"""A search for the scale and zero point of MatMulNBits' groups of 4 bits, one group per lane.

Symmetric: scales around the one that makes the value farthest from zero code 0.  With zero points: ranges narrower than
the group's and a little wider, of which least squares find scale and offset; the offset becomes a whole zero point,
and the scale is fitted once more.  What counts is the error on the grid as it is stored; the best is then refined from
its own codes.

Notation: x, w = values and weights of WIDTH groups as `[element * WIDTH + lane]`; n = elements of a group;
top = largest code; zero = zero point.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from smolexport.quant.jit import lean_helper
from smolexport.quant.lane_floats import rint
from smolexport.quant.lanes import WIDTH, load, magnitude, splat, where
from smolexport.quant.planar_io import round_lanes

ZERO, ONE, INFINITY = np.float32(0), np.float32(1), np.float32(np.inf)
ENDS = 5  # trials for each end of a range
WIDEST, STRIDE = np.float32(-0.5), np.float32(0.625)  # by how many steps an end moves inwards: -0.5 ... 2
SIDES, TENTH = 9, np.float32(0.1)  # trials on each side of a symmetric scale, and how many levels lie between two
POLISH = 3  # refinements of the best
# A grid must be better by more than the rounding errors of two sums of 128 squares, so that none is worse than it was.
MARGIN = np.float32(1 - 2.0**-15)


@lean_helper
def search_lanes(
    x: NDArray[Any], w: NDArray[Any], n: int, top: int, symmetric: bool, dtype: int, scale: Any, zero: Any
) -> Any:
    """(scale as stored, zero point) with the smallest weighted squared error; those given where no trial is better."""
    low, high = ends(x, n)
    step = (high - low) / splat(np.float32(top))
    middle = np.float32((top + 1) // 2)
    extreme = where(magnitude(high) > magnitude(low), high, low)
    unit = splat(ONE) / magnitude(extreme)  # so that squares stay within float32 whatever the size of the group
    unit = where(unit < splat(INFINITY), unit, splat(ONE))
    new_scale, new_zero, best = scale, zero, splat(INFINITY)
    trials = 2 * SIDES + 1 if symmetric else ENDS * ENDS
    for trial in range(1 + trials + POLISH):
        if trial > 0:
            near, origin = scale, zero
            if trial <= trials and symmetric:
                near = extreme / splat(np.float32(-middle - TENTH * np.float32(trial - 1 - SIDES)))
            elif trial <= trials:
                above, below = divmod(trial - 1, ENDS)
                start, end = WIDEST + STRIDE * np.float32(above), WIDEST + STRIDE * np.float32(below)
                near = step * splat(np.float32(ONE - (start + end) / np.float32(top)))
                origin = splat(ZERO) - low / near - splat(start)
            if not symmetric:
                near, new_zero = whole_zero(x, w, n, top, near, origin)
            new_scale = round_lanes(fit_scale(x, w, n, top, near, new_zero), dtype)
        error = grid_error(x, w, n, top, new_scale, new_zero, unit)
        wins = error < best
        if trial > 0:  # a scale without a finite reciprocal is none that the encoder can use
            wins = wins & (magnitude(splat(ONE) / new_scale) < splat(INFINITY))
        best = where(wins, error * splat(MARGIN), best)
        scale, zero = where(wins, new_scale, scale), where(wins, new_zero, zero)
    return scale, zero


@lean_helper
def ends(x: NDArray[Any], n: int) -> Any:
    """(minimum, maximum) of each group."""
    low = high = load(x, 0)
    for e in range(1, n):
        value = load(x, e * WIDTH)
        low, high = where(value < low, value, low), where(value > high, value, high)
    return low, high


@lean_helper
def nearest_code(place: Any, top: int) -> Any:
    """Codes nearest to places between them; 0 for NaN."""
    place = where(place > splat(ZERO), place, splat(ZERO))
    return rint(where(place < splat(np.float32(top)), place, splat(np.float32(top))))


@lean_helper
def whole_zero(x: NDArray[Any], w: NDArray[Any], n: int, top: int, near: Any, origin: Any) -> Any:
    """(scale, whole zero point) that suit the codes on a grid with its zero at `origin`, whole or not, best."""
    inverse = splat(ONE) / near
    sum_w = sum_q = sum_qq = sum_x = sum_xq = splat(ZERO)
    for e in range(n):
        value, weight = load(x, e * WIDTH), load(w, e * WIDTH)
        code = nearest_code(value * inverse + origin, top)
        weighted = weight * code
        sum_w, sum_q, sum_qq = sum_w + weight, sum_q + weighted, sum_qq + weighted * code
        sum_x, sum_xq = sum_x + weight * value, sum_xq + weighted * value
    slope = (sum_w * sum_xq - sum_q * sum_x) / (sum_w * sum_qq - sum_q * sum_q)
    offset = (sum_x - slope * sum_q) / sum_w
    return slope, nearest_code((splat(ZERO) - offset) / slope, top)


@lean_helper
def fit_scale(x: NDArray[Any], w: NDArray[Any], n: int, top: int, near: Any, zero: Any) -> Any:
    """The scale that suits the codes on another grid with this zero point best."""
    inverse = splat(ONE) / near
    sum_qq = sum_xq = splat(ZERO)
    for e in range(n):
        value = load(x, e * WIDTH)
        steps = nearest_code(value * inverse + zero, top) - zero
        weighted = load(w, e * WIDTH) * steps
        sum_qq, sum_xq = sum_qq + weighted * steps, sum_xq + weighted * value
    return sum_xq / sum_qq


@lean_helper
def grid_error(x: NDArray[Any], w: NDArray[Any], n: int, top: int, scale: Any, zero: Any, unit: Any) -> Any:
    """Weighted squared error, in units of 1 / `unit` squared, of a grid with the codes that are nearest on it."""
    error, inverse = splat(ZERO), where(scale == splat(ZERO), splat(ZERO), splat(ONE) / scale)
    for e in range(n):
        value = load(x, e * WIDTH)
        difference = ((nearest_code(value * inverse + zero, top) - zero) * scale - value) * unit
        error = error + load(w, e * WIDTH) * (difference * difference)
    return error
