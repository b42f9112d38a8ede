"""Blocks of q4_0 and q8_0 taken apart, for formats that keep codes and scales in parts of their own."""

from __future__ import annotations

from typing import Any

from numpy.typing import NDArray

from smolexport.quant.bitstream import copy_bytes, flip_top_bits, reorder_nibbles
from smolexport.quant.jit import lean_helper

BLOCK = 32


@lean_helper
def take_apart(
    blocks: NDArray[Any], first: int, count: int, bits: int, out: NDArray[Any], at: int, words: NDArray[Any]
) -> None:
    """Write the codes of `count` blocks from number `first` on, moved to 0 ... 2^bits - 1, to `out` from byte `at` on.

    A block is its scale in two bytes, which go to the uint16 `words`, and its codes: for 4 bits, elements j and j + 16
    share a byte; for 8 bits they are signed.
    """
    size = BLOCK * bits // 8
    for i in range(count):
        start = (first + i) * (2 + size)
        copy_bytes(blocks, start, words, 2 * i, 2)
        if bits == 4:
            reorder_nibbles(blocks, start + 2, out, at + i * size)
        else:
            flip_top_bits(blocks, start + 2, out, at + i * size)
