"""Affine groups: value = scale * code + bias.  A row is its codes as one bit stream, its scales, its biases.

MLX's grids: the end of a group's range that is farther from zero is a value of the grid, as bias and code 0; where the
range straddles zero the step is stretched so that zero is a value too.

The search, one group per lane: from several ranges, narrower than the group's and a little wider, the values are
rounded to codes, and scale and bias follow from the codes by weighted least squares, the scale once more after the bias
is rounded to its storage type.  The error is that of the codes for scale and bias as they are
stored; the best is then refined from its own codes in the same way.

Kernels are compiled for a number of bits, so that packing is shifts by constants; the rest are arguments.

Notation: group = elements that share a scale (32, 64 or 128); grid = scale and bias of a group, [0] and [1] of `grids`;
dtype = storage type of the grids, as a code of `tile`; top = largest code; x, w = values and weights of WIDTH groups as
`[element * WIDTH + lane]`; n = elements of a group.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np

from smolexport.quant.kernels.codes import load_codes, store_codes
from smolexport.quant.kernels.jit import Array, helper, kernel, lean_helper
from smolexport.quant.kernels.lanes import (
    WIDTH,
    extremes_of_groups,
    load,
    magnitude,
    negative,
    rint,
    splat,
    store,
    where,
)
from smolexport.quant.kernels.tile import (
    F32,
    aligned,
    codes_putter,
    fetch_rounded,
    put_part,
    round_lanes,
    round_values,
    store_floats,
    take_float,
)

TILE = 2048  # elements, more where that is less than WIDTH groups
ZERO, ONE, INFINITY, EPSILON = (np.float32(v) for v in (0, 1, np.inf, 1e-7))
ENDS = 5  # trials for each end of the range
WIDEST, STRIDE = np.float32(-0.5), np.float32(0.625)  # how many steps an end moves inwards: -0.5 ... 2
POLISH = 3  # refinements of the best
# A grid must be better by more than the rounding errors of two sums of 128 squares, so that none is worse than it was.
MARGIN = np.float32(1 - 2.0**-15)


@lean_helper
def position(x: Any, scale: Any, bias: Any) -> Any:
    """Positions of values on a grid, fractions of codes included; 0 below code 0."""
    place = (x - bias) / scale
    return where(place > splat(ZERO), place, splat(ZERO))


@lean_helper
def find_grids(tile: Array, group: int, top: int, grids: Array) -> None:
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


@helper
def search_grids(
    tile: Array, count: int, group: int, top: int, dtype: int, importance: Array, first: int, grids: Array
) -> None:
    """Improve `grids`, rounded to the storage type, of `count` groups of the tile, the first of them number `first`."""
    x, w = np.empty((2, group * WIDTH), np.float32)
    for start in range(0, count, WIDTH):
        transpose(tile[: count * group], start, group, importance, first, x, w)
        scale, bias = search_lanes(x, w, group, top, dtype, load(grids[0], start), load(grids[1], start))
        store(grids[0], start, scale)
        store(grids[1], start, bias)


@helper
def transpose(tile: Array, start: int, group: int, importance: Array, first: int, x: Array, w: Array) -> None:
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
def search_lanes(x: Array, w: Array, n: int, top: int, dtype: int, scale: Any, bias: Any) -> Any:
    """(scale, bias) with the smallest weighted squared error; the given ones where no trial is better."""
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
def group_sums(x: Array, w: Array, n: int) -> Any:
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
    x: Array, w: Array, n: int, top: int, dtype: int, scale: Any, bias: Any, low: Any, sum_w: Any, sum_x: Any
) -> Any:
    """Least-squares (scale, bias), rounded to the storage type, for the codes on another grid."""
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
def grid_error(x: Array, w: Array, n: int, top: int, scale: Any, bias: Any) -> Any:
    """Weighted squared error of the nearest codes on a grid."""
    error, last = splat(ZERO), splat(np.float32(top))
    for e in range(n):
        value = load(x, e * WIDTH)
        code = position(value, scale, bias)
        difference = scale * rint(where(code < last, code, last)) + bias - value
        error = error + load(w, e * WIDTH) * (difference * difference)
    return error


@lean_helper
def put_nearest(out: Array, at: int, x: Any, scale: Any, bias: Any, bits: int) -> None:
    """Write codes."""
    store_codes(out, at, position(x, scale, bias), bits)


put_codes = codes_putter(put_nearest)


@cache
def encoder(bits: int, search: bool) -> Callable[..., None]:
    """The kernel for `bits` bits, with or without the search for grids."""
    top = (1 << bits) - 1

    @kernel
    def encode_affine(
        source: Any, dtype: int, group: int, columns: int, recode: bool, importance: Array, out: Array
    ) -> None:
        """Codes follow from the grids as computed or, to `recode`, from the grids as stored; a search implies that."""
        step = max(TILE // group, WIDTH)
        buffer, grids = aligned(step * group), np.zeros((2, step), np.float32)
        scales, biases = np.empty((2, step), np.float32)
        per_row, group_bytes, scale_bytes = columns // group, group * bits // 8, 4 if dtype == F32 else 2
        end = per_row * group_bytes
        row_bytes = end + 2 * per_row * scale_bytes
        groups = out.size // row_bytes * per_row
        for first in range(0, groups, step):
            count, place = min(step, groups - first), (first // per_row, first % per_row, per_row, row_bytes)
            fetch_rounded(source, dtype, first * group, buffer[: count * group])
            find_grids(buffer, group, top, grids)
            if recode:
                round_values(grids.reshape(-1), dtype)
            if search:
                search_grids(buffer, count, group, top, dtype, importance, first, grids)
            put_codes(buffer, grids, place, count, group, bits, out)
            for i in range(0, count, WIDTH):
                store_floats(scales, i, load(grids[0], i), dtype)
                store_floats(biases, i, load(grids[1], i), dtype)
            put_part(scales, scale_bytes, place, count, end, out)
            put_part(biases, scale_bytes, place, count, end + per_row * scale_bytes, out)

    return encode_affine


@cache
def decoder(bits: int) -> Callable[..., None]:
    """The kernel for `bits` bits."""

    @kernel
    def decode_affine(data: Array, dtype: int, group: int, columns: int, out: Array) -> None:
        """scale * code, rounded, + bias."""
        per_row, group_bytes, scale_bytes = columns // group, group * bits // 8, 4 if dtype == F32 else 2
        row_bytes = per_row * (group_bytes + 2 * scale_bytes)
        f32, u16 = data.view(np.float32), data.view(np.uint16)
        for row in range(data.size // row_bytes):
            start = row * row_bytes
            scales = start + per_row * group_bytes
            for i in range(per_row):
                scale = splat(take_float(f32, u16, scales + i * scale_bytes, dtype))
                bias = splat(take_float(f32, u16, scales + (per_row + i) * scale_bytes, dtype))
                for e in range(i * group, (i + 1) * group, WIDTH):
                    code = load_codes(data, start + e * bits // 8, bits)
                    store(out, row * columns + e, scale * code + bias)

    return decode_affine
