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

from smolexport.quant.bitstream import flip_top_bits, load_codes, reorder_nibbles, store_codes
from smolexport.quant.half import bits_of, float_of, narrow_f16, widen_f16
from smolexport.quant.jit import helper, kernel
from smolexport.quant.lane_codes import truncate
from smolexport.quant.lanes import WIDTH, largest, load, magnitude, negative, smallest, splat, store, where
from smolexport.quant.rowparts import fetch_rounded, find_places, round_lanes, round_values
from smolexport.quant.source import F32, fetch

__all__ = ["decoder", "encoder", "repacker"]

TILE = 4096  # elements; as many lanes of groups as possible: WIDTH groups of 128
BLOCK = 32  # elements of a block of q4_0 and q8_0
ZERO, HALF, ONE = np.float32(0), np.float32(0.5), np.float32(1)


@cache
def encoder(bits: int) -> Callable[..., None]:
    """The kernel for `bits` bits."""
    top = (1 << bits) - 1

    @kernel
    def encode_nbits(
        f32: NDArray[Any],
        u16: NDArray[Any],
        kind: int,
        dtype: int,
        group: int,
        columns: int,
        symmetric: bool,
        out: NDArray[Any],
    ) -> None:
        """Symmetric groups have the middle code as their zero point and do not store it."""
        buffer, grids = np.empty(TILE, np.float32), np.zeros((3, TILE // group), np.float32)
        places = np.empty((2, TILE // group), np.int64)
        per_row, group_bytes, scale_bytes = -(-columns // group), group * bits // 8, 4 if dtype == F32 else 2
        zeros = per_row * (group_bytes + scale_bytes)  # where they begin in a row
        row_bytes = zeros if symmetric else zeros + (per_row * bits + 7) // 8
        groups = out.size // row_bytes * per_row
        for first in range(0, groups, TILE // group):
            here = places[:, : min(TILE // group, groups - first)]
            find_places(first, per_row, row_bytes, group_bytes, scale_bytes, here)
            tile = buffer[: here.shape[1] * group]
            fetch_groups(f32, u16, kind, dtype, first, group, columns, tile)
            find_grids(tile, group, top, symmetric, dtype, grids)
            for i in range(here.shape[1]):
                factor, zero, at = splat(grids[1, i]), splat(grids[2, i]), here[0, i]
                for e in range(0, group, WIDTH):
                    code = nearest_code(load(tile, i * group + e) * factor + zero, top)
                    store_codes(out, at + e * bits // 8, code, bits)
                put_scale(grids[0, i], dtype, out, here[1, i])
            if columns % group:
                clear_fill(first, here.shape[1], group, columns, bits, here[0], out)
            if not symmetric:
                put_zeros(grids[2], first, here.shape[1], per_row, row_bytes, zeros, bits, out)

    return encode_nbits


@helper
def fetch_groups(
    f32: NDArray[Any],
    u16: NDArray[Any],
    kind: int,
    dtype: int,
    first: int,
    group: int,
    columns: int,
    tile: NDArray[Any],
) -> None:
    """Fill `tile` with the groups from number `first` on, short ones filled up with zeros."""
    if columns % group == 0:
        fetch_rounded(f32, u16, kind, dtype, first * group, tile)
        return
    row, i = divmod(first, -(-columns // group))
    for start in range(0, tile.size, group):
        count = min(group, columns - i * group)
        piece = tile[start : start + group]
        fetch(f32, u16, kind, row * columns + i * group, piece[:count])
        piece[count:] = ZERO
        i += 1
        if i * group >= columns:
            row, i = row + 1, 0
    if dtype not in (kind, F32):
        round_values(tile, dtype)


@helper
def nearest_code(x: Any, top: int) -> Any:
    """Nearest integers, ties up, within 0 ... top; 0 for NaN."""
    x = where(x > splat(ZERO), x, splat(ZERO))
    x = where(x < splat(np.float32(top)), x, splat(np.float32(top)))
    whole = truncate(x)
    return where(x - whole >= splat(HALF), whole + splat(ONE), whole)


@helper
def find_grids(tile: NDArray[Any], group: int, top: int, symmetric: bool, dtype: int, grids: NDArray[Any]) -> None:
    """Of each group of the tile: scale as stored, the factor that replaces a division by it, zero point.

    Symmetric: the value farthest from zero, the negative one of two, becomes code 0.  Else the range, stretched to
    contain zero, is all codes, and the zero point goes with the scale before it is rounded to `dtype`.
    """
    count = tile.size // group
    for i in range(count):
        start = i * group
        low = high = load(tile, start)
        for e in range(start + WIDTH, start + group, WIDTH):
            x = load(tile, e)
            low, high = where(x < low, x, low), where(x > high, x, high)
        grids[0, i], grids[1, i] = smallest(low), largest(high)
        if grids[0, i] == grids[1, i]:
            grids[0, i] = tile[start]  # for the sign of a zero among zeros of both signs
    zero, middle = splat(ZERO), splat(np.float32((top + 1) // 2))
    for i in range(0, count, WIDTH):
        low, high = load(grids[0], i), load(grids[1], i)
        if symmetric:
            scale = where(magnitude(high) > magnitude(low), high, low) / negative(middle)
            code = middle
        else:
            low, high = where(low < zero, low, zero), where(high > zero, high, zero)
            scale = (high - low) / splat(np.float32(top))
            code = where(scale == zero, zero, nearest_code(negative(low) / scale, top))
        scale = round_lanes(scale, dtype)
        store(grids[0], i, scale)
        store(grids[1], i, where(scale == zero, zero, splat(ONE) / scale))
        store(grids[2], i, code)


@helper
def put_scale(scale: np.float32, dtype: int, out: NDArray[Any], at: int) -> None:
    """Write a scale that is rounded already, low byte first, at any byte."""
    if dtype == F32:
        word = bits_of(scale)
        out[at + 2] = np.uint8((word >> np.uint32(16)) & np.uint32(255))
        out[at + 3] = np.uint8(word >> np.uint32(24))
    else:
        word = np.uint32(narrow_f16(scale))
    out[at] = np.uint8(word & np.uint32(255))
    out[at + 1] = np.uint8((word >> np.uint32(8)) & np.uint32(255))


@helper
def take_scale(data: NDArray[Any], at: int, dtype: int) -> Any:
    """The scale at any byte."""
    word = np.uint32(data[at]) | np.uint32(np.uint32(data[at + 1]) << np.uint32(8))
    if dtype == F32:
        word |= np.uint32(np.uint32(data[at + 2]) << np.uint32(16))
        word |= np.uint32(np.uint32(data[at + 3]) << np.uint32(24))
        return float_of(np.uint32(word))
    return widen_f16(np.uint16(word))


@helper
def put_zeros(
    codes: NDArray[Any], first: int, count: int, per_row: int, row_bytes: int, offset: int, bits: int, out: NDArray[Any]
) -> None:
    """Write the zero points of `count` groups from number `first` on; those of a row begin `offset` bytes in it."""
    row, group = divmod(first, per_row)
    for i in range(count):
        at, code = row * row_bytes + offset + group * bits // 8, np.uint8(np.int64(codes[i]))
        if bits == 8:
            out[at] = code
        elif group % 2 == 0:
            out[at] = np.uint8(code | np.uint8(0x80))  # stays where there is no next one
        else:
            out[at] = np.uint8((out[at] & np.uint8(15)) | np.uint8(code << np.uint8(4)))
        group += 1
        if group == per_row:
            row, group = row + 1, 0


@helper
def clear_fill(
    first: int, count: int, group: int, columns: int, bits: int, places: NDArray[Any], out: NDArray[Any]
) -> None:
    """Set the codes behind the end of a row to 0, of those of `count` groups from `first` on that are last of a row."""
    per_row, used = -(-columns // group), columns % group * bits
    for i in range(per_row - 1 - first % per_row, count, per_row):
        if used % 8:
            out[places[i] + used // 8] &= np.uint8(15)
        for byte in range((used + 7) // 8, group * bits // 8):
            out[places[i] + byte] = np.uint8(0)


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
def repacker(bits: int) -> Callable[..., None]:
    """The kernel for blocks of q4_0 (4 bits) or q8_0 (8 bits)."""

    @kernel
    def repack_nbits(blocks: NDArray[Any], per_row: int, dtype: int, symmetric: bool, out: NDArray[Any]) -> None:
        """`per_row` blocks a row; the codes are those of the block, moved to 0 ... 2^bits - 1."""
        group_bytes, scale_bytes = BLOCK * bits // 8, 4 if dtype == F32 else 2
        zeros = per_row * (group_bytes + scale_bytes)
        row_bytes = zeros if symmetric else zeros + (per_row * bits + 7) // 8
        words, middle = blocks.view(np.uint16), np.uint8(0x88 if bits == 4 else 0x80)
        nbytes = 2 + group_bytes
        for row in range(out.size // row_bytes):
            start = row * row_bytes
            for i in range(per_row):
                at = (row * per_row + i) * nbytes
                if bits == 4:
                    reorder_nibbles(blocks, at + 2, out, start + i * group_bytes)
                else:
                    flip_top_bits(blocks, at + 2, out, start + i * group_bytes)
                put_scale(widen_f16(words[at // 2]), dtype, out, start + per_row * group_bytes + i * scale_bytes)
            out[start + zeros : start + row_bytes] = middle

    return repack_nbits
