"""Rows of 8-bit integers with one scale each: a row is its codes, each 128 above its integer, then its scale.

A row may be any number of bytes, so scales are not aligned.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from smolexport.quant.kernels.floats import bits_of, float_of
from smolexport.quant.kernels.jit import Array, helper, kernel
from smolexport.quant.kernels.tile import fetch

TILE = 4096  # elements
TOP, ONE = np.float32(127), np.float32(1)
TINY = np.finfo(np.float32).tiny
# Added to a float32, it rounds that to an integer, ties to even; the lowest byte of the sum is the integer plus 128.
ROUNDER = np.float32((3 << 22) + 128)
SCALE_BYTES = 4


@kernel
def encode_channel(source: Any, columns: int, out: Array) -> None:
    """Codes are those of exact quotients rounded to float32.

    A row whose scale would be subnormal is stored as zeros with the scale 1.
    """
    buffer = np.empty(TILE, np.float32)
    row_bytes = columns + SCALE_BYTES
    for row in range(out.size // row_bytes):
        first, at = row * columns, row * row_bytes
        largest = np.uint32(0)
        for start in range(0, columns, TILE):
            tile = buffer[: min(TILE, columns - start)]
            fetch(source, first + start, tile)
            largest = max(largest, largest_bits(tile))
        scale = float_of(largest) / TOP
        scale = ONE if scale < TINY else scale
        for start in range(0, columns, TILE):
            tile = buffer[: min(TILE, columns - start)]
            if columns > TILE:
                fetch(source, first + start, tile)
            codes = out[at + start : at + start + tile.size]
            for i in range(tile.size):
                codes[i] = np.uint8(bits_of(tile[i] / scale + ROUNDER) & np.uint32(0xFF))
        put_scale(bits_of(scale), out, at + columns)


@helper
def largest_bits(tile: Array) -> Any:
    """The bits of the largest magnitude: among floats of one sign the order of the bits is that of the values."""
    bits = np.uint32(0)
    words = tile.view(np.uint32)
    for i in range(tile.size):
        bits = max(bits, np.uint32(words[i] & np.uint32(0x7FFFFFFF)))
    return bits


@helper
def put_scale(bits: np.uint32, out: Array, at: int) -> None:
    """Store four bytes, the lowest first."""
    for i in range(SCALE_BYTES):
        out[at + i] = np.uint8(bits >> np.uint32(8 * i) & np.uint32(0xFF))


@kernel
def decode_channel(data: Array, columns: int, out: Array) -> None:
    """(code - 128) * scale."""
    row_bytes = columns + SCALE_BYTES
    for row in range(data.size // row_bytes):
        stored = data[row * row_bytes : (row + 1) * row_bytes]
        bits = np.uint32(0)
        for i in range(SCALE_BYTES):
            bits |= np.uint32(stored[columns + i]) << np.uint32(8 * i)
        scale = float_of(np.uint32(bits))
        target = out[row * columns : (row + 1) * columns]
        for i in range(columns):
            target[i] = np.float32(np.int32(stored[i]) - np.int32(128)) * scale
