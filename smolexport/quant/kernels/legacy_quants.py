"""Q4_0, Q4_1, Q5_0, Q5_1 and Q8_0: 32 elements that share a scale, and for the _1 formats a minimum.

Blocks: the scale d as float16; for _1 the minimum m as float16; for Q5 a 32-bit word of fifth bits, bit e of element
e; 16 bytes of nibbles, elements j and j + 16 in the halves of byte j; for Q8 32 signed bytes instead.
Values: d * (code - 8), d * (code - 16), for _1 d * code + m, for Q8 d * code.

Notation: top = largest code: 15, 31 or, for Q8_0, 127.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from smolexport.quant.kernels.codes import (
    codes,
    copy_bytes,
    joined,
    low_bits,
    store_bytes,
    store_halves,
    store_nibbles,
    upper,
)
from smolexport.quant.kernels.floats import half_bits
from smolexport.quant.kernels.jit import Array, helper, kernel, lean_helper
from smolexport.quant.kernels.lanes import (
    WIDTH,
    any_lane,
    bits_set,
    extremes_of_groups,
    first_lane,
    largest,
    load,
    magnitude,
    negative,
    pick,
    rounded,
    splat,
    store,
    where,
)
from smolexport.quant.kernels.search import search_range, search_symmetric
from smolexport.quant.kernels.superblock import importance_weights
from smolexport.quant.kernels.tile import (
    BLOCKS,
    aligned,
    fetch,
    gather,
    gather_importance,
    half_planes,
    spread,
    take_half,
)

BLOCK = WIDTH  # a block is also one vector
ZERO, HALF, ONE, SIXTEEN, INFINITY = (np.float32(v) for v in (0, 0.5, 1, 16, np.inf))


@helper
def block_layout(top: int, with_min: bool) -> tuple[int, int]:
    """(bytes before the codes, bytes of a block)."""
    header = 4 if with_min else 2
    return header, header + (16 if top == 15 else 20 if top == 31 else 32)


def encoder(top: int, with_min: bool) -> Callable[..., None]:
    """The kernel without importance: the range is `top` steps, or the element of largest magnitude one end of it."""

    @kernel
    def encode_legacy(source: Any, out: Array) -> None:
        scratch, nbytes = tile_scratch(), block_layout(top, with_min)[1]
        blocks = out.size // nbytes
        for first in range(0, blocks, BLOCKS):
            encode_tile(source, first, min(BLOCKS, blocks - first), top, with_min, scratch, first * nbytes, out)

    return encode_legacy


@helper
def tile_scratch() -> Any:
    """Arrays of a tile: values, grids of the blocks, float16 bits of scales and then of minima."""
    return aligned(BLOCKS * BLOCK), np.zeros((3, BLOCKS), np.float32), np.zeros(2 * BLOCKS, np.uint16)


@lean_helper
def encode_tile(
    source: Any, first: int, count: int, top: int, with_min: bool, scratch: Any, at: int, out: Array
) -> None:
    """Write `count` blocks from number `first` on, at most BLOCKS, from byte `at` on."""
    tile, grids, words = scratch
    fetch(source, first * BLOCK, tile[: count * BLOCK])
    if top == 127:
        find_scales(tile, count, grids[0], words)
        put_bytes(tile, grids[0], words, count, at, out)
    else:
        find_grids(tile, count, top, with_min, grids, words)
        put_codes(tile, top, with_min, grids, words, count, at, out)


@lean_helper
def find_scales(tile: Array, count: int, factors: Array, words: Array) -> None:
    """Reciprocals of the scales of `count` blocks, 0 for those without a finite one, and the scales' float16 bits."""
    zero = splat(ZERO)
    for i in range(0, count, WIDTH):
        low, high = extremes_of_groups(tile, i * BLOCK, BLOCK)
        scale = magnitude(where(high > negative(low), high, low)) / splat(np.float32(127))
        factor = where(scale > zero, splat(ONE) / scale, zero)
        store(factors, i, where(factor < splat(INFINITY), factor, zero))
        store_halves(words, i, half_bits(scale))


@lean_helper
def put_bytes(tile: Array, factors: Array, words: Array, count: int, at: int, out: Array) -> None:
    """Write `count` blocks from byte `at` on."""
    for i in range(count):
        copy_bytes(words, 2 * i, out, at, 2)
        store_bytes(out, at + 2, rounded(load(tile, i * BLOCK) * splat(factors[i])))
        at += 2 + BLOCK


@lean_helper
def find_grids(tile: Array, count: int, top: int, with_min: bool, grids: Array, words: Array) -> None:
    """Origin, reciprocal of the scale and shift of `count` blocks; in `words` the bits of the scales, of the minima.

    A code is (x - origin) * reciprocal + shift, truncated.  It is 0 where the scale has no finite reciprocal.
    """
    zero, middle = splat(ZERO), np.float32(top // 2 + 1)
    divisor, shift = (np.float32(top), HALF) if with_min else (-middle, np.float32(middle + HALF))
    for i in range(0, count, WIDTH):
        low, high = extremes_of_groups(tile, i * BLOCK, BLOCK)
        if with_min:
            scale = where(high == low, zero, high - low)
            low = resolve_ties(low, low == zero, tile, i, True, grids[0])
            store(grids[0], i, low)
            store_halves(words, BLOCKS + i, half_bits(low))
        else:
            scale = where(high > negative(low), high, low)
            scale = resolve_ties(scale, high == negative(low), tile, i, False, grids[1])
        scale = scale / splat(divisor)
        factor = where(scale == zero, zero, splat(ONE) / scale)
        infinite = magnitude(factor) == splat(INFINITY)
        store(grids[1], i, where(infinite, zero, factor))
        store(grids[2], i, where(infinite, zero, splat(shift)))
        store_halves(words, i, half_bits(scale))


@lean_helper
def resolve_ties(values: Any, ambiguous: Any, tile: Array, first: int, with_min: bool, scratch: Array) -> Any:
    """`values` of WIDTH blocks from `first` on; where `ambiguous`, the element that comes first in its block."""
    if not any_lane(ambiguous):
        return values
    store(scratch, first, values)
    for lane in range(WIDTH):
        if (bits_set(ambiguous) >> lane) & 1:
            x = load(tile, (first + lane) * BLOCK)
            scratch[first + lane] = pick(x, first_lane(x == splat(ZERO))) if with_min else widest_value(x)
    return load(scratch, first)


@lean_helper
def put_codes(
    tile: Array, top: int, with_min: bool, grids: Array, words: Array, count: int, at: int, out: Array
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
def put_fifths(word: int, out: Array, at: int) -> None:
    """Write a 32-bit word."""
    for i in range(4):
        out[at + i] = np.uint8((word >> (8 * i)) & 255)


@lean_helper
def widest_value(x: Any) -> Any:
    """The lane of largest magnitude with its sign, the first one of equals; +0 if all are zero."""
    size = magnitude(x)
    return pick(x, first_lane(size == splat(largest(size)))) + ZERO  # -0 + 0 is 0


def weighted_encoder(top: int, with_min: bool) -> Callable[..., None]:
    """The kernel with importance: scale and minimum by search; lanes are blocks.

    Weights of the squared error: importance * sqrt(mean square of the row + square of the element).
    """

    @kernel
    def encode_legacy_weighted(source: Any, importance: Array, out: Array) -> None:
        header, nbytes = block_layout(top, with_min)
        blocks, per_row = out.size // nbytes, importance.size // BLOCK
        row, planes, lane = np.empty(BLOCK, np.float32), np.empty(nbytes * WIDTH, np.uint8), np.empty(WIDTH, np.float32)
        x, v, w, c = np.empty((4, BLOCK * WIDTH), np.float32)
        squares = row_mean_squares(source, importance.size, blocks // per_row)
        for first in range(0, blocks, WIDTH):
            count = min(WIDTH, blocks - first)
            gather(source, first, count, row, x)
            gather_importance(importance, first, BLOCK, v)
            for i in range(WIDTH):
                lane[i] = squares[min(first + i, blocks - 1) // per_row]
            importance_weights(x, v, 0, BLOCK, load(lane, 0), w)
            if with_min:
                start, step = np.float32(-0.9), np.float32(0.05)
                scale, minimum, inverse, base = search_range(x, 0, w, BLOCK, top, start, step, 37, False, c)
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

    return encode_legacy_weighted


@helper
def row_mean_squares(source: Any, columns: int, rows: int) -> Array:
    """Mean square of each row, summed from left to right."""
    row, result = np.empty(columns, np.float32), np.empty(rows, np.float32)
    for i in range(rows):
        fetch(source, i * columns, row)
        total = ZERO
        for e in range(columns):
            total = np.float32(total + row[e] * row[e])
        result[i] = total / np.float32(columns)
    return result


@helper
def write_codes(x: Array, header: int, nbytes: int, planes: Array) -> None:
    """Pack 32 codes per lane into byte planes."""
    for j in range(16):
        low, high = load(x, j * WIDTH), load(x, (j + 16) * WIDTH)
        store_bytes(planes, (nbytes - 16 + j) * WIDTH, joined(low_bits(low, 4), low_bits(high, 4), 4))
    for i in range(nbytes - 16 - header):
        fifths = splat(ZERO)
        for bit in range(8):
            fifths = joined(fifths, upper(load(x, (i * 8 + bit) * WIDTH), 4), bit)
        store_bytes(planes, (header + i) * WIDTH, fifths)


@helper
def decode(data: Array, out: Array, top: int, with_min: bool) -> None:
    """Decode nibbles, with or without fifth bits; inside the kernel itself, the loop takes twice as long."""
    header, nbytes = block_layout(top, with_min)
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


def decoder(top: int, with_min: bool) -> Callable[..., None]:
    """The kernel that decodes blocks with codes up to `top`."""

    @kernel
    def decode_legacy(data: Array, out: Array) -> None:
        decode(data, out, top, with_min)

    return decode_legacy


@kernel
def decode_q8_0(data: Array, out: Array) -> None:
    """scale * code."""
    for block in range(data.size // 34):
        stored, target = data[block * 34 : (block + 1) * 34], out[block * BLOCK : (block + 1) * BLOCK]
        scale = take_half(stored, 0)
        for i in range(BLOCK):
            target[i] = scale * np.float32(np.int8(stored[2 + i]))


encode_q4_0, encode_q4_1 = encoder(15, False), encoder(15, True)
encode_q5_0, encode_q5_1 = encoder(31, False), encoder(31, True)
encode_q8_0 = encoder(127, False)
encode_q4_0_weighted, encode_q4_1_weighted = weighted_encoder(15, False), weighted_encoder(15, True)
encode_q5_0_weighted, encode_q5_1_weighted = weighted_encoder(31, False), weighted_encoder(31, True)
decode_q4_0, decode_q4_1 = decoder(15, False), decoder(15, True)
decode_q5_0, decode_q5_1 = decoder(31, False), decoder(31, True)
