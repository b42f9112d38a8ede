"""F32, F16 and BF16: one element per block."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from smolexport.quant.half import narrow_bf16, narrow_f16, widen_bf16, widen_f16
from smolexport.quant.jit import kernel
from smolexport.quant.source import BF16, F16, fetch

TILE = 2048


@kernel
def encode_f32(f32: NDArray[Any], u16: NDArray[Any], kind: int, _i: NDArray[Any], _c: int, out: NDArray[Any]) -> None:
    """Widen to float32."""
    wide = out.view(np.float32)
    for start in range(0, wide.size, TILE):
        fetch(f32, u16, kind, start, wide[start : start + TILE])


@kernel
def encode_f16(f32: NDArray[Any], u16: NDArray[Any], kind: int, _i: NDArray[Any], _c: int, out: NDArray[Any]) -> None:
    """Round to float16; float16 input is copied."""
    halves = out.view(np.uint16)
    if kind == F16:
        for i in range(halves.size):  # a slice would compile the message of a shape that does not fit
            halves[i] = u16[i]
        return
    buffer = np.empty(TILE, np.float32)
    for start in range(0, halves.size, TILE):
        target = halves[start : start + TILE]
        tile = buffer[: target.size]
        fetch(f32, u16, kind, start, tile)
        for i in range(tile.size):
            target[i] = narrow_f16(tile[i])


@kernel
def encode_bf16(f32: NDArray[Any], u16: NDArray[Any], kind: int, _i: NDArray[Any], _c: int, out: NDArray[Any]) -> None:
    """Round to bfloat16; bfloat16 input is copied."""
    halves = out.view(np.uint16)
    if kind == BF16:
        for i in range(halves.size):
            halves[i] = u16[i]
        return
    buffer = np.empty(TILE, np.float32)
    for start in range(0, halves.size, TILE):
        target = halves[start : start + TILE]
        tile = buffer[: target.size]
        fetch(f32, u16, kind, start, tile)
        for i in range(tile.size):
            target[i] = narrow_bf16(tile[i])


@kernel
def decode_f32(data: NDArray[Any], out: NDArray[Any]) -> None:
    """Copy."""
    target = out.view(np.uint8)
    for i in range(target.size):
        target[i] = data[i]


@kernel
def decode_f16(data: NDArray[Any], out: NDArray[Any]) -> None:
    """Widen."""
    for i in range(out.size):
        low, high = np.uint16(data[2 * i]), np.uint16(data[2 * i + 1])
        out[i] = widen_f16(np.uint16(low | (high << np.uint16(8))))


@kernel
def decode_bf16(data: NDArray[Any], out: NDArray[Any]) -> None:
    """Widen."""
    for i in range(out.size):
        low, high = np.uint16(data[2 * i]), np.uint16(data[2 * i + 1])
        out[i] = widen_bf16(np.uint16(low | (high << np.uint16(8))))
