"""Q8_0: 32 elements as signed bytes times one float16 scale, the largest magnitude at 127.

Block of 34 bytes: the scale, then 32 bytes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from smolexport.quant.bitstream import copy_bytes
from smolexport.quant.jit import kernel, lean_helper
from smolexport.quant.lane_codes import half_bits, rounded, store_bytes, store_halves
from smolexport.quant.lane_groups import extremes_of_groups
from smolexport.quant.lanes import WIDTH, load, magnitude, negative, splat, store, where
from smolexport.quant.source import fetch
from smolexport.quant.tile import BLOCKS, aligned, take_half

BLOCK, NBYTES = 32, 34
TILE = BLOCKS * BLOCK
ZERO, ONE, TOP, INFINITY = (np.float32(v) for v in (0, 1, 127, np.inf))


@kernel
def encode_q8_0(f32: NDArray[Any], u16: NDArray[Any], kind: int, _i: NDArray[Any], _c: int, out: NDArray[Any]) -> None:
    """Codes round half away from zero; the reciprocal is that of the scale before it is stored as float16."""
    buffer, grids, words = aligned(TILE), np.zeros((3, BLOCKS), np.float32), np.empty(2 * BLOCKS, np.uint16)
    blocks = out.size // NBYTES
    for first in range(0, blocks, BLOCKS):
        count = min(BLOCKS, blocks - first)
        encode_q8_0_tile(f32, u16, kind, first, count, buffer, grids, words, first * NBYTES, out)


@lean_helper
def encode_q8_0_tile(
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
    find_scales(buffer, count, grids[0], words)
    put_blocks(buffer, grids[0], words, count, at, out)


@lean_helper
def find_scales(tile: NDArray[Any], count: int, factors: NDArray[Any], words: NDArray[Any]) -> None:
    """Reciprocals of the scales of `count` blocks, 0 for those without a finite one, and the scales' float16 bits."""
    zero = splat(ZERO)
    for i in range(0, count, WIDTH):
        low, high = extremes_of_groups(tile, i * BLOCK, BLOCK)
        scale = magnitude(where(high > negative(low), high, low)) / splat(TOP)
        factor = where(scale > zero, splat(ONE) / scale, zero)
        store(factors, i, where(factor < splat(INFINITY), factor, zero))
        store_halves(words, i, half_bits(scale))


@lean_helper
def put_blocks(
    tile: NDArray[Any], factors: NDArray[Any], words: NDArray[Any], count: int, at: int, out: NDArray[Any]
) -> None:
    """Write `count` blocks from byte `at` on."""
    for i in range(count):
        copy_bytes(words, 2 * i, out, at, 2)
        store_bytes(out, at + 2, rounded(load(tile, i * BLOCK) * splat(factors[i])))
        at += NBYTES


@kernel
def decode_q8_0(data: NDArray[Any], out: NDArray[Any]) -> None:
    """scale * code."""
    for block in range(data.size // NBYTES):
        stored = data[block * NBYTES : (block + 1) * NBYTES]
        target = out[block * BLOCK : (block + 1) * BLOCK]
        scale = take_half(stored, 0)
        for i in range(BLOCK):
            target[i] = scale * np.float32(np.int8(stored[2 + i]))
