"""Blocks of q4_0 and q8_0 as affine groups of 32: the same integers, moved to 0 ... 2^bits - 1, and the same scales.

    q4_0   d * (q - 8)    nibbles j and j + 16 share a byte    code q          bias -8 d
    q8_0   d * q          signed bytes                         code q + 128    bias -128 d

The biases are exact in float16 unless they overflow.  A row is its codes, its scales, its biases.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from smolexport.quant.bitstream import flip_top_bits, reorder_nibbles
from smolexport.quant.half import narrow_f16, widen_f16
from smolexport.quant.jit import helper, kernel

__all__ = ["repack_q4_0", "repack_q8_0"]

BLOCK = 32


@kernel
def repack_q4_0(blocks: NDArray[Any], per_row: int, out: NDArray[Any]) -> None:
    """`per_row` blocks a row."""
    repack(blocks, per_row, 4, out)


@kernel
def repack_q8_0(blocks: NDArray[Any], per_row: int, out: NDArray[Any]) -> None:
    """`per_row` blocks a row."""
    repack(blocks, per_row, 8, out)


@helper
def repack(blocks: NDArray[Any], per_row: int, bits: int, out: NDArray[Any]) -> None:
    """Both formats."""
    group_bytes = BLOCK * bits // 8
    nbytes, row_bytes = 2 + group_bytes, per_row * (group_bytes + 4)
    stored, words = blocks.view(np.uint16), out.view(np.uint16)
    for row in range(out.size // row_bytes):
        codes, first = row * row_bytes, row * per_row
        scales = (codes + per_row * group_bytes) // 2
        for i in range(per_row):
            at = (first + i) * nbytes
            if bits == 4:
                reorder_nibbles(blocks, at + 2, out, codes + i * group_bytes)
            else:
                flip_top_bits(blocks, at + 2, out, codes + i * group_bytes)
            word = stored[at // 2]
            words[scales + i] = word
            words[scales + per_row + i] = lowered(word, bits - 1)


@helper
def lowered(word: np.uint16, power: int) -> Any:
    """The float16 bits of -2^power times a float16."""
    exponent = np.uint16(word & np.uint16(0x7C00))
    step = np.uint16(power << 10)
    if np.uint16(0x400) <= exponent < np.uint16(np.uint16(0x7C00) - step):
        return np.uint16(np.uint16(word + step) ^ np.uint16(0x8000))
    return narrow_f16(np.float32(-(1 << power)) * widen_f16(word))  # subnormal, zero, or too large
