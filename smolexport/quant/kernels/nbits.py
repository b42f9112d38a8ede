"""Blocks of MatMulNBits: value = (code - zero point) * scale.  A row is its codes, its scales, maybe its zero points.

The first of two codes of 4 bits is in the low half of a byte, also of two zero points; where their number is odd, the
spare half byte is 8.  A last group shorter than the others is padded: with zeros while its scale is computed,
with codes 0 where it is stored.  Rows may be any number of bytes, so scales are not aligned.

The search, one group per lane.  Symmetric: scales around the one that makes the value farthest from zero code 0.  With
zero points: ranges narrower than the group's and a little wider, for which least squares find scale and offset; the
offset becomes a whole zero point, and the scale is fitted once more.  The error is measured on the grid as it is
stored; the best is then refined from its own codes.

Kernels are compiled for a number of bits, so that packing is shifts by constants; the rest are arguments.

Notation: group = elements that share a scale (32, 64 or 128); per_row = groups of a row; dtype = storage type of the
scales, as a code of `tile`; top = largest code; middle = (top + 1) / 2; x, w = values and weights of WIDTH groups as
`[element * WIDTH + lane]`; n = elements of a group; zero = zero point.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np

from smolexport.quant.kernels.affine import ENDS, MARGIN, POLISH, STRIDE, WIDEST, transpose
from smolexport.quant.kernels.codes import load_codes, store_codes, store_limited
from smolexport.quant.kernels.floats import float_of, widen_f16
from smolexport.quant.kernels.jit import Array, helper, kernel, lean_helper
from smolexport.quant.kernels.lanes import (
    WIDTH,
    any_lane,
    extremes_of_groups,
    load,
    magnitude,
    negative,
    rint,
    splat,
    store,
    truncate,
    where,
)
from smolexport.quant.kernels.tile import (
    F32,
    aligned,
    codes_putter,
    fetch,
    fetch_rounded,
    put_part,
    round_lanes,
    round_values,
    store_floats,
)

TILE = 2048  # elements, more where that is less than WIDTH groups
ZERO, ONE, INFINITY = np.float32(0), np.float32(1), np.float32(np.inf)
BELOW_HALF = np.float32(0.5 - 2.0**-25)  # x >= 0 plus this, truncated, is the integer nearest to x, ties up
SIDES, TENTH = 9, np.float32(0.1)  # trials on each side of a symmetric scale, and how many levels lie between two


@lean_helper
def search_lanes(x: Array, w: Array, n: int, top: int, symmetric: bool, dtype: int, scale: Any, zero: Any) -> Any:
    """(scale as stored, zero point) with the smallest weighted squared error; those given if no trial is better."""
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
        if trial > 0:  # the encoder cannot use a scale without a finite reciprocal
            wins = wins & (magnitude(splat(ONE) / new_scale) < splat(INFINITY))
        best = where(wins, error * splat(MARGIN), best)
        scale, zero = where(wins, new_scale, scale), where(wins, new_zero, zero)
    return scale, zero


@lean_helper
def ends(x: Array, n: int) -> Any:
    """(minimum, maximum) of each group."""
    low = high = load(x, 0)
    for e in range(1, n):
        value = load(x, e * WIDTH)
        low, high = where(value < low, value, low), where(value > high, value, high)
    return low, high


@lean_helper
def nearest_code(place: Any, top: int) -> Any:
    """Positions on a grid rounded to codes; 0 for NaN."""
    place = where(place > splat(ZERO), place, splat(ZERO))
    return rint(where(place < splat(np.float32(top)), place, splat(np.float32(top))))


@lean_helper
def whole_zero(x: Array, w: Array, n: int, top: int, near: Any, origin: Any) -> Any:
    """Least-squares (scale, zero point) for the codes at scale `near` and zero `origin`, which need not be whole."""
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
def fit_scale(x: Array, w: Array, n: int, top: int, near: Any, zero: Any) -> Any:
    """The least-squares scale for the codes at scale `near` and this zero point."""
    inverse = splat(ONE) / near
    sum_qq = sum_xq = splat(ZERO)
    for e in range(n):
        value = load(x, e * WIDTH)
        steps = nearest_code(value * inverse + zero, top) - zero
        weighted = load(w, e * WIDTH) * steps
        sum_qq, sum_xq = sum_qq + weighted * steps, sum_xq + weighted * value
    return sum_xq / sum_qq


@lean_helper
def grid_error(x: Array, w: Array, n: int, top: int, scale: Any, zero: Any, unit: Any) -> Any:
    """Weighted squared error, in units of 1 / `unit` squared, of a grid with the codes that are nearest on it."""
    error, inverse = splat(ZERO), where(scale == splat(ZERO), splat(ZERO), splat(ONE) / scale)
    for e in range(n):
        value = load(x, e * WIDTH)
        difference = ((nearest_code(value * inverse + zero, top) - zero) * scale - value) * unit
        error = error + load(w, e * WIDTH) * (difference * difference)
    return error


@lean_helper
def put_limited(out: Array, at: int, x: Any, factor: Any, zero: Any, bits: int) -> None:
    """Write codes."""
    store_limited(out, at, x * factor + zero + splat(BELOW_HALF), bits)


put_codes = codes_putter(put_limited)


@cache
def encoder(bits: int, search: bool) -> Callable[..., None]:
    """The kernel for `bits` bits, with or without the search for scales and zero points."""

    @kernel
    def encode_nbits(
        source: Any, dtype: int, group: int, columns: int, symmetric: bool, importance: Array, out: Array
    ) -> None:
        """Symmetric groups have the middle code as their zero point and do not store it.

        `importance` covers whole groups, 0 beyond the end of a row; only a search uses it.
        """
        step = max(TILE // group, WIDTH)
        buffer, zeros = aligned(step * group), np.empty(step * bits // 8, np.uint8)
        grids, scales = np.zeros((2, step), np.float32), np.empty(step, np.float32)
        x, w = np.zeros((2, group * WIDTH if search else 0), np.float32)
        per_row, group_bytes, scale_bytes = -(-columns // group), group * bits // 8, 4 if dtype == F32 else 2
        end = per_row * (group_bytes + scale_bytes)
        row_bytes = end if symmetric else end + (per_row * bits + 7) // 8
        groups = out.size // row_bytes * per_row
        for first in range(0, groups, step):
            count, place = min(step, groups - first), (first // per_row, first % per_row, per_row, row_bytes)
            fetch_groups(source, dtype, first, group, columns, count, buffer)
            if search:
                for i in range(0, count, WIDTH):
                    transpose(buffer[: count * group], i, group, importance, first, x, w)
                    scale, code = plain_grid(buffer, i, group, bits, symmetric, dtype, grids[0])
                    scale, code = search_lanes(x, w, group, (1 << bits) - 1, symmetric, dtype, scale, code)
                    put_grid(buffer, i, group, bits, dtype, scale, code, grids, scales, zeros)
            else:
                find_grids(buffer, group, bits, symmetric, dtype, grids, scales, zeros)
            put_codes(buffer, grids, place, count, group, bits, out)
            if columns % group:
                clear_fill(place, count, group, columns, bits, out)
            put_part(scales, scale_bytes, place, count, per_row * group_bytes, out)
            if not symmetric:
                put_zeros(zeros, place, count, end, bits, out)

    return encode_nbits


@lean_helper
def fetch_groups(source: Any, dtype: int, first: int, group: int, columns: int, count: int, buffer: Array) -> None:
    """Fill `buffer` with `count` groups from number `first` on, short ones padded with zeros."""
    tile = buffer[: count * group]
    if columns % group == 0:
        fetch_rounded(source, dtype, first * group, tile)
        return
    row, i = divmod(first, -(-columns // group))
    for start in range(0, tile.size, group):
        used = min(group, columns - i * group)
        piece = tile[start : start + group]
        fetch(source, row * columns + i * group, piece[:used])
        piece[used:] = ZERO
        i += 1
        if i * group >= columns:
            row, i = row + 1, 0
    if dtype not in (source[2], F32):
        round_values(tile, dtype)


@lean_helper
def limited(x: Any, top: int) -> Any:
    """Values within 0 ... top; 0 for NaN."""
    x = where(x > splat(ZERO), x, splat(ZERO))
    return where(x < splat(np.float32(top)), x, splat(np.float32(top)))


@lean_helper
def find_grids(
    tile: Array, group: int, bits: int, symmetric: bool, dtype: int, grids: Array, scales: Array, zeros: Array
) -> None:
    """Of each group of the tile: scale and zero point as stored; in `grids`, the scale's reciprocal and the zero point.

    Symmetric: the value farthest from zero, the negative one of two, becomes code 0.  Else the range, stretched to
    contain zero, is all codes, and the zero point follows from the scale before it is rounded to `dtype`.
    """
    for i in range(0, tile.size // group, WIDTH):
        scale, code = plain_grid(tile, i, group, bits, symmetric, dtype, grids[0])
        put_grid(tile, i, group, bits, dtype, scale, code, grids, scales, zeros)


@lean_helper
def plain_grid(tile: Array, i: int, group: int, bits: int, symmetric: bool, dtype: int, scratch: Array) -> Any:
    """(scale as stored, zero point) of WIDTH groups from number `i` on."""
    top = (1 << bits) - 1
    zero, middle = splat(ZERO), splat(np.float32((top + 1) // 2))
    low, high = extremes_of_groups(tile, i * group, group)
    if symmetric:
        extreme = where(magnitude(high) > magnitude(low), high, low)
        if any_lane(extreme == zero):
            extreme = signed_zeros(extreme, tile, i, group, scratch)
        scale = extreme / negative(middle)
        code = middle
    else:
        low, high = where(low < zero, low, zero), where(high > zero, high, zero)
        scale = (high - low) / splat(np.float32(top))
        code = where(scale == zero, zero, truncate(limited(negative(low) / scale, top) + splat(BELOW_HALF)))
    return round_lanes(scale, dtype), code


@lean_helper
def put_grid(
    tile: Array,
    i: int,
    group: int,
    bits: int,
    dtype: int,
    scale: Any,
    code: Any,
    grids: Array,
    scales: Array,
    zeros: Array,
) -> None:
    """Write scales and zero points of WIDTH groups from number `i` on, to `grids` for the codes, else as stored."""
    zero = splat(ZERO)
    factor = where(scale == zero, zero, splat(ONE) / scale)
    store(grids[0], i, factor)
    store(grids[1], i, code)
    store_codes(zeros, i * bits // 8, code, bits)
    store_floats(scales, i, scale, dtype)
    if any_lane(magnitude(factor) == splat(INFINITY)):
        replace_by_codes(tile, i, group, (1 << bits) - 1, grids)


@lean_helper
def signed_zeros(extreme: Any, tile: Array, first: int, group: int, scratch: Array) -> Any:
    """Where a group is all zeros, of either sign, its first element, which determines the sign."""
    store(scratch, first, extreme)
    for i in range(first, first + WIDTH):
        if scratch[i] == ZERO:
            scratch[i] = tile[i * group]
    return load(scratch, first)


@lean_helper
def replace_by_codes(tile: Array, first: int, group: int, top: int, grids: Array) -> None:
    """Replace the values of groups whose scale has no finite reciprocal by their codes."""
    for i in range(first, first + WIDTH):
        factor = grids[0, i]
        if abs(factor) == INFINITY:
            grids[0, i], grids[1, i] = ONE, ZERO
            for e in range(i * group, (i + 1) * group):
                tile[e] = np.float32(top) if tile[e] * factor > ZERO else ZERO


@helper
def take_scale(data: Array, at: int, dtype: int) -> Any:
    """The scale at byte `at`, aligned or not."""
    word = np.uint32(data[at]) | np.uint32(np.uint32(data[at + 1]) << np.uint32(8))
    if dtype == F32:
        word |= np.uint32(np.uint32(data[at + 2]) << np.uint32(16))
        word |= np.uint32(np.uint32(data[at + 3]) << np.uint32(24))
        return float_of(np.uint32(word))
    return widen_f16(np.uint16(word))


@lean_helper
def put_zeros(zeros: Array, place: Any, count: int, offset: int, bits: int, out: Array) -> None:
    """Write the zero points of `count` groups; those of a row begin `offset` bytes in it."""
    row, group, per_row, row_bytes = place
    if bits == 8:
        put_part(zeros, 1, place, count, offset, out)
        return
    if per_row % 2 == 0:
        put_part(zeros, 1, (row, group // 2, per_row // 2, row_bytes), count // 2, offset, out)
        return
    for i in range(count):
        at = row * row_bytes + offset + group // 2
        code = np.uint8((zeros[i // 2] >> np.uint8(i % 2 * 4)) & np.uint8(15))
        if group % 2 == 0:
            out[at] = np.uint8(code | np.uint8(0x80))  # stays where there is no next one
        else:
            out[at] = np.uint8((out[at] & np.uint8(15)) | np.uint8(code << np.uint8(4)))
        group += 1
        if group == per_row:
            row, group = row + 1, 0


@lean_helper
def clear_fill(place: Any, count: int, size: int, columns: int, bits: int, out: Array) -> None:
    """Set the codes beyond the end of a row to 0, for the rows that end within `count` groups of `size` elements."""
    row, group, per_row, row_bytes = place
    used = columns * bits
    for start in range(row * row_bytes, (row + (group + count) // per_row) * row_bytes, row_bytes):
        if used % 8:
            out[start + used // 8] &= np.uint8(15)
        for byte in range((used + 7) // 8, per_row * size * bits // 8):
            out[start + byte] = np.uint8(0)


@cache
def decoder(bits: int) -> Callable[..., None]:
    """The kernel for `bits` bits."""

    @kernel
    def decode_nbits(data: Array, dtype: int, group: int, columns: int, symmetric: bool, out: Array) -> None:
        """(code - zero point) * scale, once rounded."""
        last = np.empty(WIDTH, np.float32)
        per_row, group_bytes, scale_bytes = -(-columns // group), group * bits // 8, 4 if dtype == F32 else 2
        zeros = per_row * (group_bytes + scale_bytes)
        row_bytes = zeros if symmetric else zeros + (per_row * bits + 7) // 8
        zero = np.float32(1 << (bits - 1))
        for row in range(data.size // row_bytes):
            start = row * row_bytes
            for i in range(per_row):
                scale = splat(take_scale(data, start + per_row * group_bytes + i * scale_bytes, dtype))
                if not symmetric:
                    byte = np.int64(data[start + zeros + i * bits // 8])
                    zero = np.float32(byte if bits == 8 else (byte >> (i % 2 * 4)) & 15)
                for e in range(i * group, min((i + 1) * group, columns), WIDTH):
                    value = (load_codes(data, start + e * bits // 8, bits) - splat(zero)) * scale
                    if e + WIDTH <= columns:
                        store(out, row * columns + e, value)
                    else:
                        store(last, 0, value)
                        out[row * columns + e : (row + 1) * columns] = last[: columns - e]

    return decode_nbits
