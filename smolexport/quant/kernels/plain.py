"""F32, F16 and BF16: one element per block."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from smolexport.quant.kernels.floats import narrow_bf16, narrow_f16, widen_bf16, widen_f16
from smolexport.quant.kernels.jit import Array, kernel
from smolexport.quant.kernels.tile import BF16, F16, fetch

TILE = 2048


@kernel
def encode_f32(source: Any, out: Array) -> None:
    """Widen to float32."""
    wide = out.view(np.float32)
    for start in range(0, wide.size, TILE):
        fetch(source, start, wide[start : start + TILE])


def encoder(kind: int) -> Callable[..., None]:
    """The kernel that rounds to a 16-bit type; input of that type is copied."""

    @kernel
    def encode_halves(source: Any, out: Array) -> None:
        words, buffer = out.view(np.uint16), np.empty(TILE, np.float32)
        if source[2] == kind:
            for i in range(words.size):  # a slice would compile the message of a shape that does not fit
                words[i] = source[1][i]
            return
        for start in range(0, words.size, TILE):
            target = words[start : start + TILE]
            tile = buffer[: target.size]
            fetch(source, start, tile)
            for i in range(tile.size):
                target[i] = narrow_f16(tile[i]) if kind == F16 else narrow_bf16(tile[i])

    return encode_halves


@kernel
def decode_f32(data: Array, out: Array) -> None:
    """Copy."""
    target = out.view(np.uint8)
    for i in range(target.size):
        target[i] = data[i]


def decoder(kind: int) -> Callable[..., None]:
    """The kernel that widens a 16-bit type."""

    @kernel
    def decode_halves(data: Array, out: Array) -> None:
        for i in range(out.size):
            word = np.uint16(np.uint16(data[2 * i]) | (np.uint16(data[2 * i + 1]) << np.uint16(8)))
            out[i] = widen_f16(word) if kind == F16 else widen_bf16(word)

    return decode_halves


encode_f16, encode_bf16 = encoder(F16), encoder(BF16)
decode_f16, decode_bf16 = decoder(F16), decoder(BF16)
