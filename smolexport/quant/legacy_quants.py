"""Q4_0, Q4_1, Q5_0 and Q5_1: 32 elements that share a scale, and for the _1 formats a minimum.

Blocks: the scale d as float16; for _1 the minimum m as float16; for Q5 a 32-bit word of fifth bits, bit e of element
e; 16 bytes of nibbles, elements j and j + 16 in the halves of byte j.
Values: d * (code - 8), d * (code - 16) and, for _1, d * code + m.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from smolexport.quant.bitstream import copy_bytes
from smolexport.quant.jit import helper, kernel, lean_helper
from smolexport.quant.lane_codes import (
    codes,
    half_bits,
    joined,
    low_bits,
    store_bytes,
    store_halves,
    store_nibbles,
    upper,
)
from smolexport.quant.lane_groups import extremes_of_groups
from smolexport.quant.lanes import (
    WIDTH,
    any_lane,
    bits_set,
    first_lane,
    largest,
    load,
    magnitude,
    negative,
    pick,
    splat,
    store,
    where,
)
from smolexport.quant.search import search_range, search_symmetric
from smolexport.quant.source import fetch
from smolexport.quant.superblock import importance_weights
from smolexport.quant.tile import BLOCKS, aligned, gather, gather_importance, half_planes, spread, take_half

BLOCK = WIDTH  # a block is also one vector
TILE = BLOCKS * BLOCK
ZERO, HALF, ONE, SIXTEEN, INFINITY = (np.float32(v) for v in (0, 0.5, 1, 16, np.inf))


@kernel
def encode_q4_0(f32: NDArray[Any], u16: NDArray[Any], kind: int, _i: NDArray[Any], _c: int, out: NDArray[Any]) -> None:
    """The element of largest magnitude is stored as -8."""
    encode(f32, u16, kind, out, 15, False)


@kernel
def encode_q5_0(f32: NDArray[Any], u16: NDArray[Any], kind: int, _i: NDArray[Any], _c: int, out: NDArray[Any]) -> None:
    """The element of largest magnitude is stored as -16."""
    encode(f32, u16, kind, out, 31, False)


@kernel
def encode_q4_1(f32: NDArray[Any], u16: NDArray[Any], kind: int, _i: NDArray[Any], _c: int, out: NDArray[Any]) -> None:
    """The range is cut into 15 steps."""
    encode(f32, u16, kind, out, 15, True)


@kernel
def encode_q5_1(f32: NDArray[Any], u16: NDArray[Any], kind: int, _i: NDArray[Any], _c: int, out: NDArray[Any]) -> None:
    """The range is cut into 31 steps."""
    encode(f32, u16, kind, out, 31, True)


@helper
def encode(f32: NDArray[Any], u16: NDArray[Any], kind: int, out: NDArray[Any], top: int, with_min: bool) -> None:
    """All four formats without importance."""
    buffer, grids, words = aligned(TILE), np.zeros((3, BLOCKS), np.float32), np.empty(2 * BLOCKS, np.uint16)
    nbytes = (4 if with_min else 2) + (16 if top == 15 else 20)
    blocks = out.size // nbytes
    for first in range(0, blocks, BLOCKS):
        count = min(BLOCKS, blocks - first)
        fetch(f32, u16, kind, first * BLOCK, buffer[: count * BLOCK])
        find_grids(buffer, count, top, with_min, grids, words)
        put_blocks(buffer, top, with_min, grids, words, count, first * nbytes, out)


@lean_helper
def encode_q4_0_tile(
    f32: NDArray[Any],
    u16: NDArray[Any],
    kind: int,
    first: int,
    count: int,
    buffer: NDArray[Any],
    grids: NDArray[Any],
    words: NDArray[Any],
    at: int,
    out: NDArray[Any],
) -> None:
    """Write `count` blocks from number `first` on, at most BLOCKS, from byte `at` on; other arrays are scratch."""
    fetch(f32, u16, kind, first * BLOCK, buffer[: count * BLOCK])
    find_grids(buffer, count, 15, False, grids, words)
    put_blocks(buffer, 15, False, grids, words, count, at, out)


@lean_helper
def find_grids(
    tile: NDArray[Any], count: int, top: int, with_min: bool, grids: NDArray[Any], words: NDArray[Any]
) -> None:
    """Origin, reciprocal of the scale and shift of `count` blocks; in `words` the bits of the scales, of the minima.

    A code is (x - origin) * reciprocal + shift, truncated.  It is 0 where the scale has no finite reciprocal.
    """
    zero, middle = splat(ZERO), np.float32(top // 2 + 1)
    divisor, shift = (np.float32(top), HALF) if with_min else (-middle, np.float32(middle + HALF))
    for i in range(0, count, WIDTH):
        low, high = extremes_of_groups(tile, i * BLOCK, BLOCK)
        if with_min:
            scale = where(high == low, zero, high - low)
            low = settled(low, low == zero, tile, i, True, grids[0])
            store(grids[0], i, low)
            store_halves(words, BLOCKS + i, half_bits(low))
        else:
            scale = where(high > negative(low), high, low)
            scale = settled(scale, high == negative(low), tile, i, False, grids[1])
        scale = scale / splat(divisor)
        factor = where(scale == zero, zero, splat(ONE) / scale)
        endless = magnitude(factor) == splat(INFINITY)
        store(grids[1], i, where(endless, zero, factor))
        store(grids[2], i, where(endless, zero, splat(shift)))
        store_halves(words, i, half_bits(scale))


@lean_helper
def settled(values: Any, doubtful: Any, tile: NDArray[Any], first: int, with_min: bool, scratch: NDArray[Any]) -> Any:
    """Lanes for which it matters which of several elements of a block comes first, of WIDTH blocks from `first` on."""
    if not any_lane(doubtful):
        return values
    store(scratch, first, values)
    for lane in range(WIDTH):
        if (bits_set(doubtful) >> lane) & 1:
            x = load(tile, (first + lane) * BLOCK)
            scratch[first + lane] = pick(x, first_lane(x == splat(ZERO))) if with_min else widest(x)
    return load(scratch, first)


@lean_helper
def put_blocks(
    tile: NDArray[Any],
    top: int,
    with_min: bool,
    grids: NDArray[Any],
    words: NDArray[Any],
    count: int,
    at: int,
    out: NDArray[Any],
) -> None:
    """Write `count` blocks from byte `at` on; lanes are the elements of one block."""
    zero, last = splat(ZERO), splat(np.float32(top))
    for i in range(count):
        copy_bytes(words, 2 * i, out, at, 2)
        at += 2
        x = load(tile, i * BLOCK)
        if with_min:
            copy_bytes(words, 2 * (BLOCKS + i), out, at, 2)
            at += 2
            x = x - splat(grids[0, i])
        code = x * splat(grids[1, i]) + splat(grids[2, i])
        if with_min:
            code = where(code > zero, code, zero)  # not a number where the range overflows
        code = where(code < last, code, last)
        if top == 31:
            put_fifths(bits_set(code >= splat(SIXTEEN)), out, at)
            at += 4
        store_nibbles(out, at, code)
        at += 16


@lean_helper
def put_fifths(word: int, out: NDArray[Any], at: int) -> None:
    """Write a 32-bit word."""
    for i in range(4):
        out[at + i] = np.uint8((word >> (8 * i)) & 255)


@lean_helper
def widest(x: Any) -> Any:
    """The lane of largest magnitude with its sign, the first one of equals; +0 if all are zero."""
    size = magnitude(x)
    return pick(x, first_lane(size == splat(largest(size)))) + ZERO  # -0 + 0 is 0


@kernel
def encode_q4_0_weighted(
    f32: NDArray[Any], u16: NDArray[Any], kind: int, importance: NDArray[Any], _c: int, out: NDArray[Any]
) -> None:
    """Scale by search; weights importance * sqrt(mean square of the row + square of the element)."""
    encode_weighted(f32, u16, kind, importance, out, 15, False)


@kernel
def encode_q5_0_weighted(
    f32: NDArray[Any], u16: NDArray[Any], kind: int, importance: NDArray[Any], _c: int, out: NDArray[Any]
) -> None:
    """As Q4_0."""
    encode_weighted(f32, u16, kind, importance, out, 31, False)


@kernel
def encode_q4_1_weighted(
    f32: NDArray[Any], u16: NDArray[Any], kind: int, importance: NDArray[Any], _c: int, out: NDArray[Any]
) -> None:
    """Scale and minimum by search, weights as for Q4_0."""
    encode_weighted(f32, u16, kind, importance, out, 15, True)


@kernel
def encode_q5_1_weighted(
    f32: NDArray[Any], u16: NDArray[Any], kind: int, importance: NDArray[Any], _c: int, out: NDArray[Any]
) -> None:
    """As Q4_1."""
    encode_weighted(f32, u16, kind, importance, out, 31, True)


@helper
def encode_weighted(
    f32: NDArray[Any],
    u16: NDArray[Any],
    kind: int,
    importance: NDArray[Any],
    out: NDArray[Any],
    top: int,
    with_min: bool,
) -> None:
    """All four formats with importance; lanes are blocks."""
    header = 4 if with_min else 2
    nbytes = header + (16 if top == 15 else 20)
    blocks, per_row = out.size // nbytes, importance.size // BLOCK
    row, planes, lane = np.empty(BLOCK, np.float32), np.empty(nbytes * WIDTH, np.uint8), np.empty(WIDTH, np.float32)
    x, v, w, c = np.empty((4, BLOCK * WIDTH), np.float32)
    squares = row_mean_squares(f32, u16, kind, importance.size, blocks // per_row)
    for first in range(0, blocks, WIDTH):
        count = min(WIDTH, blocks - first)
        gather(f32, u16, kind, first, count, row, x)
        gather_importance(importance, first, BLOCK, v)
        for i in range(WIDTH):
            lane[i] = squares[min(first + i, blocks - 1) // per_row]
        importance_weights(x, v, 0, BLOCK, load(lane, 0), w)
        if with_min:
            search = (np.float32(-0.9), np.float32(0.05), 37)
            scale, minimum, inverse, base = search_range(x, 0, w, BLOCK, top, search[0], search[1], search[2], False, c)
            half_planes(negative(minimum), planes, 2)
            for e in range(BLOCK):
                store(x, e * WIDTH, codes(inverse * (load(x, e * WIDTH) - base), 0, top))
        else:
            middle = top // 2 + 1
            scale, inverse, empty = search_symmetric(x, 0, w, BLOCK, middle)
            for e in range(BLOCK):
                code = codes(inverse * load(x, e * WIDTH), -middle, middle - 1) + splat(np.float32(middle))
                store(x, e * WIDTH, where(empty, splat(ZERO), code))
        half_planes(scale, planes, 0)
        write_codes(x, header, nbytes, planes)
        spread(planes, nbytes, first, count, out)


@helper
def row_mean_squares(f32: NDArray[Any], u16: NDArray[Any], kind: int, columns: int, rows: int) -> NDArray[Any]:
    """Mean square of each row, summed from left to right."""
    row, result = np.empty(columns, np.float32), np.empty(rows, np.float32)
    for i in range(rows):
        fetch(f32, u16, kind, i * columns, row)
        total = ZERO
        for e in range(columns):
            total = np.float32(total + row[e] * row[e])
        result[i] = total / np.float32(columns)
    return result


@helper
def write_codes(x: NDArray[Any], header: int, nbytes: int, planes: NDArray[Any]) -> None:
    """Pack 32 codes per lane into byte planes."""
    for j in range(16):
        low, high = load(x, j * WIDTH), load(x, (j + 16) * WIDTH)
        store_bytes(planes, (nbytes - 16 + j) * WIDTH, joined(low_bits(low, 4), low_bits(high, 4), 4))
    for i in range(nbytes - 16 - header):
        fifths = splat(ZERO)
        for bit in range(8):
            fifths = joined(fifths, upper(load(x, (i * 8 + bit) * WIDTH), 4), bit)
        store_bytes(planes, (header + i) * WIDTH, fifths)


@kernel
def decode_q4_0(data: NDArray[Any], out: NDArray[Any]) -> None:
    """d * (code - 8)."""
    decode(data, out, 15, False)


@kernel
def decode_q5_0(data: NDArray[Any], out: NDArray[Any]) -> None:
    """d * (code - 16)."""
    decode(data, out, 31, False)


@kernel
def decode_q4_1(data: NDArray[Any], out: NDArray[Any]) -> None:
    """d * code + m."""
    decode(data, out, 15, True)


@kernel
def decode_q5_1(data: NDArray[Any], out: NDArray[Any]) -> None:
    """d * code + m."""
    decode(data, out, 31, True)


@helper
def decode(data: NDArray[Any], out: NDArray[Any], top: int, with_min: bool) -> None:
    """All four formats."""
    header = 4 if with_min else 2
    nbytes = header + (16 if top == 15 else 20)
    middle = np.float32(0 if with_min else top // 2 + 1)
    for block in range(data.size // nbytes):
        stored = data[block * nbytes : (block + 1) * nbytes]
        target = out[block * BLOCK : (block + 1) * BLOCK]
        scale, minimum = take_half(stored, 0), take_half(stored, 2) if with_min else ZERO
        nibbles, fifths = stored[nbytes - 16 :], stored[header : header + 4]
        for e in range(BLOCK):
            code = np.uint8((nibbles[e % 16] >> np.uint8(e // 16 * 4)) & np.uint8(15))
            if top == 31:
                code = np.uint8(code | (((fifths[e // 8] >> np.uint8(e % 8)) & np.uint8(1)) << np.uint8(4)))
            value = (np.float32(code) - middle) * scale
            target[e] = value + minimum if with_min else value
