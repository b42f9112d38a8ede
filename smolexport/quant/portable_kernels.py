"""Blocks of q4_0 and q8_0 as affine groups of 32: the same integers, moved to 0 ... 2^bits - 1, and the same scales.

    q4_0   d * (q - 8)    nibbles j and j + 16 share a byte    code q          bias -8 d
    q8_0   d * q          signed bytes                         code q + 128    bias -128 d

The biases are exact in float16 unless they overflow.  A row is its codes, its scales, its biases.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from smolexport.quant.bitstream import copy_bytes
from smolexport.quant.jit import kernel, lean_helper
from smolexport.quant.lane_codes import half_bits, half_value, load_halves, store_halves
from smolexport.quant.lanes import WIDTH, splat
from smolexport.quant.legacy_quants import encode_q4_0_tile
from smolexport.quant.q8 import encode_q8_0_tile
from smolexport.quant.repacking import BLOCK, take_apart
from smolexport.quant.tile import BLOCKS, aligned


@cache
def encoder(bits: int) -> Callable[..., None]:
    """The kernel for `bits` bits: `per_row` blocks a row, without importance."""

    @kernel
    def encode_portable(f32: NDArray[Any], u16: NDArray[Any], kind: int, per_row: int, out: NDArray[Any]) -> None:
        """A tile of blocks at a time, repacked at once."""
        buffer, grids, words = (
            aligned(BLOCKS * BLOCK),
            np.zeros((3, BLOCKS), np.float32),
            np.zeros(2 * BLOCKS, np.uint16),
        )
        blocks = np.empty(BLOCKS * (2 + BLOCK * bits // 8), np.uint8)
        for row in range(out.size // (per_row * (BLOCK * bits // 8 + 4))):
            for group in range(0, per_row, BLOCKS):
                count = min(BLOCKS, per_row - group)
                first = row * per_row + group
                if (
                    bits == 4
                ):  # known while compiling; a kernel that held one of the two would not be found in the cache
                    encode_q4_0_tile(f32, u16, kind, first, count, buffer, grids, words, 0, blocks)
                else:
                    encode_q8_0_tile(f32, u16, kind, first, count, buffer, grids, words, 0, blocks)
                put_groups(blocks, 0, count, row, group, per_row, bits, words, out)

    return encode_portable


@cache
def repacker(bits: int) -> Callable[..., None]:
    """The kernel for blocks of q4_0 (4 bits) or q8_0 (8 bits)."""

    @kernel
    def repack_portable(blocks: NDArray[Any], per_row: int, out: NDArray[Any]) -> None:
        """`per_row` blocks a row."""
        words = np.zeros(2 * BLOCKS, np.uint16)
        for row in range(out.size // (per_row * (BLOCK * bits // 8 + 4))):
            for group in range(0, per_row, BLOCKS):
                count = min(BLOCKS, per_row - group)
                put_groups(blocks, row * per_row + group, count, row, group, per_row, bits, words, out)

    return repack_portable


@lean_helper
def put_groups(
    blocks: NDArray[Any],
    first: int,
    count: int,
    row: int,
    group: int,
    per_row: int,
    bits: int,
    words: NDArray[Any],
    out: NDArray[Any],
) -> None:
    """Write `count` blocks from number `first` on as groups of a row from number `group` on; `words` is scratch."""
    group_bytes, factor = BLOCK * bits // 8, splat(np.float32(-(1 << (bits - 1))))
    start = row * per_row * (group_bytes + 4)
    scales = start + per_row * group_bytes + 2 * group
    take_apart(blocks, first, count, bits, out, start + group * group_bytes, words)
    for i in range(0, count, WIDTH):
        store_halves(words, BLOCKS + i, half_bits(half_value(load_halves(words, i)) * factor))
    copy_bytes(words, 0, out, scales, 2 * count)
    copy_bytes(words, 2 * BLOCKS, out, scales + 2 * per_row, 2 * count)
