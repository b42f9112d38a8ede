"""Q8_0: 32 elements as signed bytes times one float16 scale, the largest magnitude at 127.

Block of 34 bytes: the scale, then 32 bytes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from smolexport.quant.jit import kernel
from smolexport.quant.lane_codes import store_bytes, truncate
from smolexport.quant.lanes import largest, load, magnitude, splat, where
from smolexport.quant.source import fetch
from smolexport.quant.tile import put_word, store_scales, take_half

__all__ = ["decode_q8_0", "encode_q8_0"]

BLOCK, NBYTES = 32, 34
BLOCKS = 64  # per tile
TILE = BLOCKS * BLOCK
ZERO, HALF, ONE, TOP, FAR = (np.float32(v) for v in (0, 0.5, 1, 127, 1e9))


@kernel
def encode_q8_0(f32: NDArray[Any], u16: NDArray[Any], kind: int, _i: NDArray[Any], _c: int, out: NDArray[Any]) -> None:
    """Codes round half away from zero; the reciprocal is that of the scale before it is stored as float16."""
    buffer = np.empty(TILE, np.float32)
    scales, inverses, words = np.empty((3, BLOCKS), np.float32)
    count = out.size // NBYTES * BLOCK
    zero, half, one, minus_one, far = splat(ZERO), splat(HALF), splat(ONE), splat(-ONE), splat(FAR)
    for start in range(0, count, TILE):
        tile = buffer[: min(TILE, count - start)]
        fetch(f32, u16, kind, start, tile)
        for block in range(tile.size // BLOCK):
            scales[block] = largest(magnitude(load(tile, block * BLOCK)))
        store_scales(scales, TOP, inverses, words)
        for block in range(tile.size // BLOCK):
            at = (start // BLOCK + block) * NBYTES
            put_word(words[block], out, at)
            x = load(tile, block * BLOCK) * splat(inverses[block])
            x = where(magnitude(x) < far, x, zero)  # what overflowed or is undefined becomes 0
            whole = truncate(x)
            away = whole + where(x < zero, minus_one, one)
            store_bytes(out, at + 2, where(magnitude(x - whole) >= half, away, whole))


@kernel
def decode_q8_0(data: NDArray[Any], out: NDArray[Any]) -> None:
    """scale * code."""
    for block in range(data.size // NBYTES):
        stored = data[block * NBYTES : (block + 1) * NBYTES]
        target = out[block * BLOCK : (block + 1) * BLOCK]
        scale = take_half(stored, 0)
        for i in range(BLOCK):
            target[i] = scale * np.float32(np.int8(stored[2 + i]))
