"""Blocks of q4_0 and q8_0 as planar groups of 32: the same integers, moved to 0 ... 2^bits - 1, and the same scales.

    q4_0   d * (q - 8)    nibbles j and j + 16 share a byte    code q          bias -8 d      zero point 8
    q8_0   d * q          signed bytes                         code q + 128    bias -128 d    zero point 128

The biases are exact in float16 unless they overflow.  A row is its codes, its scales and a `third` part:
NOTHING, its BIASES or its ZERO_POINTS.

Notation: per_row = blocks of a row; dtype = storage type of scales and biases, as a code of `tile`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np

from smolexport.quant.kernels.codes import copy_bytes, flip_top_bits, load_halves, reorder_nibbles
from smolexport.quant.kernels.floats import half_value
from smolexport.quant.kernels.jit import Array, helper, kernel, lean_helper
from smolexport.quant.kernels.lanes import WIDTH, splat
from smolexport.quant.kernels.legacy_quants import encode_tile, tile_scratch
from smolexport.quant.kernels.tile import BLOCKS, F32, put_part, store_floats

NOTHING, BIASES, ZERO_POINTS = 0, 1, 2


@cache
def encoder(bits: int) -> Callable[..., None]:
    """The kernel for groups with the integers and scales of q4_0 (4 bits) or q8_0 (8 bits) without importance."""

    @kernel
    def encode_portable(source: Any, per_row: int, dtype: int, third: int, out: Array) -> None:
        """A tile of blocks at a time, repacked at once."""
        blocks, scratch, parts = np.empty(BLOCKS * (2 + 4 * bits), np.uint8), tile_scratch(), part_scratch(bits)
        groups = write_zero_points(per_row, bits, dtype, third, out)
        for first in range(0, groups, BLOCKS):
            count = min(BLOCKS, groups - first)
            encode_tile(source, first, count, 15 if bits == 4 else 127, False, scratch, 0, blocks)
            put_groups(blocks, 0, first, count, per_row, bits, dtype, third, parts, out)

    return encode_portable


@cache
def repacker(bits: int) -> Callable[..., None]:
    """The kernel for blocks of q4_0 (4 bits) or q8_0 (8 bits)."""

    @kernel
    def repack_portable(blocks: Array, per_row: int, dtype: int, third: int, out: Array) -> None:
        parts = part_scratch(bits)
        groups = write_zero_points(per_row, bits, dtype, third, out)
        for first in range(0, groups, BLOCKS):
            count = min(BLOCKS, groups - first)
            put_groups(blocks, first, first, count, per_row, bits, dtype, third, parts, out)

    return repack_portable


@helper
def part_scratch(bits: int) -> Any:
    """Arrays of a tile: codes, scales as they are in blocks, scales and biases as they are stored."""
    return np.empty(BLOCKS * 4 * bits, np.uint8), np.zeros(BLOCKS, np.uint16), np.empty((2, BLOCKS), np.float32)


@lean_helper
def row_size(per_row: int, bits: int, dtype: int, third: int) -> Any:
    """(bytes of codes, of scales, of a row)."""
    scales = per_row * (4 if dtype == F32 else 2)
    rest = scales if third == BIASES else (per_row * bits + 7) // 8 if third == ZERO_POINTS else 0
    return per_row * 4 * bits, scales, per_row * 4 * bits + scales + rest


@helper
def write_zero_points(per_row: int, bits: int, dtype: int, third: int, out: Array) -> Any:
    """Write the zero points, all of them the middle code; returns the number of groups of all rows."""
    codes, scales, row_bytes = row_size(per_row, bits, dtype, third)
    rows = out.size // row_bytes
    if third == ZERO_POINTS:
        for row in range(rows):
            out[row * row_bytes + codes + scales : (row + 1) * row_bytes] = np.uint8(0x88 if bits == 4 else 0x80)
    return rows * per_row


@lean_helper
def put_groups(
    blocks: Array,
    start: int,
    first: int,
    count: int,
    per_row: int,
    bits: int,
    dtype: int,
    third: int,
    parts: Any,
    out: Array,
) -> None:
    """Write `count` blocks from number `start` on as the groups from number `first` on; `parts` is scratch."""
    (codes, words, floats), size = parts, 4 * bits
    for i in range(count):
        at = (start + i) * (2 + size)
        copy_bytes(blocks, at, words, 2 * i, 2)
        if bits == 4:
            reorder_nibbles(blocks, at + 2, codes, i * size)
        else:
            flip_top_bits(blocks, at + 2, codes, i * size)
    for i in range(0, count, WIDTH):
        scale = half_value(load_halves(words, i))
        store_floats(floats[0], i, scale, dtype)
        store_floats(floats[1], i, scale * splat(np.float32(-(1 << (bits - 1)))), dtype)
    code_bytes, scale_bytes, row_bytes = row_size(per_row, bits, dtype, third)
    place = (first // per_row, first % per_row, per_row, row_bytes)
    put_part(codes, size, place, count, 0, out)
    put_part(floats[0], scale_bytes // per_row, place, count, code_bytes, out)
    if third == BIASES:
        put_part(floats[1], scale_bytes // per_row, place, count, code_bytes + scale_bytes, out)
