"""Blocks of MatMulNBits: value = (code - zero point) * scale.  A row is its codes, its scales, maybe its zero points.

The first of two codes of 4 bits is in the low half of a byte, also of two zero points; where their number is odd, the
half byte left over holds 8.  A last group shorter than the others is filled up: with zeros while its scale is sought,
with codes 0 as it is stored.  Rows are any number of bytes, so scales are not aligned.

Kernels are compiled for a number of bits, so that packing is shifts by constants; the rest are arguments.

Notation: group = elements that share a scale (32, 64 or 128); per_row = groups of a row; dtype = storage type of the
scales, as a code of `source`; top = largest code; middle = (top + 1) / 2.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from smolexport.quant.affine_search import transpose
from smolexport.quant.bitstream import copy_bytes, load_codes, store_codes, store_limited
from smolexport.quant.half import float_of, widen_f16
from smolexport.quant.jit import helper, kernel, lean_helper
from smolexport.quant.lane_codes import half_value, load_halves, truncate
from smolexport.quant.lane_groups import extremes_of_groups
from smolexport.quant.lanes import WIDTH, any_lane, load, magnitude, negative, splat, store, where
from smolexport.quant.legacy_quants import encode_q4_0_tile
from smolexport.quant.nbits_search import search_lanes
from smolexport.quant.planar_io import codes_putter, fetch_rounded, put_part, round_lanes, round_values, store_floats
from smolexport.quant.q8 import encode_q8_0_tile
from smolexport.quant.repacking import BLOCK, take_apart
from smolexport.quant.source import F32, fetch
from smolexport.quant.tile import BLOCKS, aligned

TILE = 2048  # elements, more where that is less than WIDTH groups
ZERO, ONE, INFINITY = np.float32(0), np.float32(1), np.float32(np.inf)
BELOW_HALF = np.float32(0.5 - 2.0**-25)  # x >= 0 plus this, truncated, is the integer nearest to x, ties up


@lean_helper
def put_limited(out: NDArray[Any], at: int, x: Any, factor: Any, zero: Any, bits: int) -> None:
    """Write codes."""
    store_limited(out, at, x * factor + zero + splat(BELOW_HALF), bits)


put_codes = codes_putter(put_limited)


@cache
def encoder(bits: int, search: bool) -> Callable[..., None]:
    """The kernel for `bits` bits, with or without the search for scales and zero points."""

    @kernel
    def encode_nbits(
        f32: NDArray[Any],
        u16: NDArray[Any],
        kind: int,
        dtype: int,
        group: int,
        columns: int,
        symmetric: bool,
        importance: NDArray[Any],
        out: NDArray[Any],
    ) -> None:
        """Symmetric groups have the middle code as their zero point and do not store it.

        `importance` is that of whole groups, 0 behind the end of a row; only a search looks at it.
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
            fetch_groups(f32, u16, kind, dtype, first, group, columns, count, buffer)
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
def fetch_groups(
    f32: NDArray[Any],
    u16: NDArray[Any],
    kind: int,
    dtype: int,
    first: int,
    group: int,
    columns: int,
    count: int,
    buffer: NDArray[Any],
) -> None:
    """Fill `buffer` with `count` groups from number `first` on, short ones filled up with zeros."""
    tile = buffer[: count * group]
    if columns % group == 0:
        fetch_rounded(f32, u16, kind, dtype, first * group, tile)
        return
    row, i = divmod(first, -(-columns // group))
    for start in range(0, tile.size, group):
        used = min(group, columns - i * group)
        piece = tile[start : start + group]
        fetch(f32, u16, kind, row * columns + i * group, piece[:used])
        piece[used:] = ZERO
        i += 1
        if i * group >= columns:
            row, i = row + 1, 0
    if dtype not in (kind, F32):
        round_values(tile, dtype)


@lean_helper
def limited(x: Any, top: int) -> Any:
    """Values within 0 ... top; 0 for NaN."""
    x = where(x > splat(ZERO), x, splat(ZERO))
    return where(x < splat(np.float32(top)), x, splat(np.float32(top)))


@lean_helper
def find_grids(
    tile: NDArray[Any],
    group: int,
    bits: int,
    symmetric: bool,
    dtype: int,
    grids: NDArray[Any],
    scales: NDArray[Any],
    zeros: NDArray[Any],
) -> None:
    """Of each group of the tile: scale and zero point as stored; in `grids`, the scale's reciprocal and the zero point.

    Symmetric: the value farthest from zero, the negative one of two, becomes code 0.  Else the range, stretched to
    contain zero, is all codes, and the zero point goes with the scale before it is rounded to `dtype`.
    """
    for i in range(0, tile.size // group, WIDTH):
        scale, code = plain_grid(tile, i, group, bits, symmetric, dtype, grids[0])
        put_grid(tile, i, group, bits, dtype, scale, code, grids, scales, zeros)


@lean_helper
def plain_grid(
    tile: NDArray[Any], i: int, group: int, bits: int, symmetric: bool, dtype: int, scratch: NDArray[Any]
) -> Any:
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
    tile: NDArray[Any],
    i: int,
    group: int,
    bits: int,
    dtype: int,
    scale: Any,
    code: Any,
    grids: NDArray[Any],
    scales: NDArray[Any],
    zeros: NDArray[Any],
) -> None:
    """Keep what `plain_grid` or a search found for WIDTH groups from number `i` on, for codes and as it is stored."""
    zero = splat(ZERO)
    factor = where(scale == zero, zero, splat(ONE) / scale)
    store(grids[0], i, factor)
    store(grids[1], i, code)
    store_codes(zeros, i * bits // 8, code, bits)
    store_floats(scales, i, scale, dtype)
    if any_lane(magnitude(factor) == splat(INFINITY)):
        settle(tile, i, group, (1 << bits) - 1, grids)


@lean_helper
def signed_zeros(extreme: Any, tile: NDArray[Any], first: int, group: int, scratch: NDArray[Any]) -> Any:
    """Lanes with the sign of a group's first element where the group is zeros of either sign."""
    store(scratch, first, extreme)
    for i in range(first, first + WIDTH):
        if scratch[i] == ZERO:
            scratch[i] = tile[i * group]
    return load(scratch, first)


@lean_helper
def settle(tile: NDArray[Any], first: int, group: int, top: int, grids: NDArray[Any]) -> None:
    """Replace the values of groups whose scale has no finite reciprocal by their codes."""
    for i in range(first, first + WIDTH):
        factor = grids[0, i]
        if abs(factor) == INFINITY:
            grids[0, i], grids[1, i] = ONE, ZERO
            for e in range(i * group, (i + 1) * group):
                tile[e] = np.float32(top) if tile[e] * factor > ZERO else ZERO


@helper
def take_scale(data: NDArray[Any], at: int, dtype: int) -> Any:
    """The scale at any byte."""
    word = np.uint32(data[at]) | np.uint32(np.uint32(data[at + 1]) << np.uint32(8))
    if dtype == F32:
        word |= np.uint32(np.uint32(data[at + 2]) << np.uint32(16))
        word |= np.uint32(np.uint32(data[at + 3]) << np.uint32(24))
        return float_of(np.uint32(word))
    return widen_f16(np.uint16(word))


@lean_helper
def put_zeros(zeros: NDArray[Any], place: Any, count: int, offset: int, bits: int, out: NDArray[Any]) -> None:
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
def clear_fill(place: Any, count: int, size: int, columns: int, bits: int, out: NDArray[Any]) -> None:
    """Set the codes behind the end of a row to 0, for the rows that end within `count` groups of `size` elements."""
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
    def decode_nbits(
        data: NDArray[Any], dtype: int, group: int, columns: int, symmetric: bool, out: NDArray[Any]
    ) -> None:
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


@cache
def portable_encoder(bits: int) -> Callable[..., None]:
    """The kernel for groups with the integers and scales of q4_0 (4 bits) or q8_0 (8 bits) without importance."""

    @kernel
    def encode_portable_nbits(
        f32: NDArray[Any],
        u16: NDArray[Any],
        kind: int,
        per_row: int,
        dtype: int,
        symmetric: bool,
        out: NDArray[Any],
    ) -> None:
        """A tile of blocks at a time, repacked at once."""
        buffer, grids = aligned(BLOCKS * BLOCK), np.zeros((3, BLOCKS), np.float32)
        words, floats = np.zeros(2 * BLOCKS, np.uint16), np.empty(BLOCKS, np.float32)
        middles = np.full(BLOCKS, 0x88 if bits == 4 else 0x80, np.uint8)
        blocks = np.empty(BLOCKS * (2 + BLOCK * bits // 8), np.uint8)
        for row in range(out.size // portable_bytes(per_row, bits, dtype, symmetric)):
            for group in range(0, per_row, BLOCKS):
                count = min(BLOCKS, per_row - group)
                first = row * per_row + group
                if (
                    bits == 4
                ):  # known while compiling; a kernel that held one of the two would not be found in the cache
                    encode_q4_0_tile(f32, u16, kind, first, count, buffer, grids, words, 0, blocks)
                else:
                    encode_q8_0_tile(f32, u16, kind, first, count, buffer, grids, words, 0, blocks)
                put_groups(blocks, 0, count, row, group, per_row, bits, dtype, symmetric, words, floats, middles, out)

    return encode_portable_nbits


@cache
def repacker(bits: int) -> Callable[..., None]:
    """The kernel for blocks of q4_0 (4 bits) or q8_0 (8 bits)."""

    @kernel
    def repack_nbits(blocks: NDArray[Any], per_row: int, dtype: int, symmetric: bool, out: NDArray[Any]) -> None:
        """`per_row` blocks a row."""
        words, floats = np.zeros(BLOCKS, np.uint16), np.empty(BLOCKS, np.float32)
        middles = np.full(BLOCKS, 0x88 if bits == 4 else 0x80, np.uint8)
        for row in range(out.size // portable_bytes(per_row, bits, dtype, symmetric)):
            for group in range(0, per_row, BLOCKS):
                first, count = row * per_row + group, min(BLOCKS, per_row - group)
                put_groups(
                    blocks, first, count, row, group, per_row, bits, dtype, symmetric, words, floats, middles, out
                )

    return repack_nbits


@lean_helper
def portable_bytes(per_row: int, bits: int, dtype: int, symmetric: bool) -> Any:
    """Bytes of a row of `per_row` groups of 32."""
    zeros = 0 if symmetric else (per_row * bits + 7) // 8
    return per_row * (BLOCK * bits // 8 + (4 if dtype == F32 else 2)) + zeros


@lean_helper
def put_groups(
    blocks: NDArray[Any],
    first: int,
    count: int,
    row: int,
    group: int,
    per_row: int,
    bits: int,
    dtype: int,
    symmetric: bool,
    words: NDArray[Any],
    floats: NDArray[Any],
    middles: NDArray[Any],
    out: NDArray[Any],
) -> None:
    """Write `count` blocks from number `first` on as groups of a row from number `group` on.

    The codes are those of the block, moved to 0 ... 2^bits - 1; `words` and `floats` are scratch.
    """
    group_bytes, scale_bytes = BLOCK * bits // 8, 4 if dtype == F32 else 2
    row_bytes = portable_bytes(per_row, bits, dtype, symmetric)
    start = row * row_bytes
    scales = start + per_row * group_bytes
    take_apart(blocks, first, count, bits, out, start + group * group_bytes, words)
    for i in range(0, count, WIDTH):
        store_floats(floats, i, half_value(load_halves(words, i)), dtype)
    copy_bytes(floats, 0, out, scales + group * scale_bytes, count * scale_bytes)
    if not symmetric:
        zeros = scales + per_row * scale_bytes + group * bits // 8
        copy_bytes(middles, 0, out, zeros, (count * bits + 7) // 8)
