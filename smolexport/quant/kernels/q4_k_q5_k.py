"""Q4_K and Q5_K: super-blocks of eight groups of 32 elements, value = d * scale * code - dmin * min.

Block of 144 or 176 bytes: d and dmin as float16; 12 bytes with eight scales and eight mins of 6 bits; for Q5_K 32 bytes
of fifth bits; 128 bytes of nibbles, for each run of 64 elements 32 bytes with the first half in the low nibbles.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from smolexport.quant.kernels.codes import joined, low_bits, store_bytes, upper
from smolexport.quant.kernels.jit import Array, helper, kernel
from smolexport.quant.kernels.lanes import WIDTH, load, magnitude, splat, sqrt, store
from smolexport.quant.kernels.search import at_most, search_range
from smolexport.quant.kernels.superblock import (
    SUPER,
    keep,
    round_by_search,
    round_group,
    round_to_largest,
    scratch,
    search_weighted,
)
from smolexport.quant.kernels.tile import gather, gather_importance, spread, take_half

GROUP, GROUPS = 32, 8
ZERO, GROUP_SIZE = np.float32(0), np.float32(32)
HEADER = 16  # bytes before the codes


@helper
def block_bytes(top: int) -> int:
    """Bytes of a super-block whose largest code is `top`."""
    return 144 if top == 15 else 176


@kernel
def encode(top: int, start: np.float32, trials: int, source: Any, out: Array) -> None:
    """Both formats without importance, one kernel: to compile it takes seconds.

    Weights of the squared error: root mean square of the group plus the element's magnitude.
    """
    nbytes = block_bytes(top)
    row, x, planes, found, w, c = scratch(nbytes, GROUPS)
    for first in range(0, out.size // nbytes, WIDTH):
        count = min(WIDTH, out.size // nbytes - first)
        gather(source, first, count, row, x)
        for j in range(GROUPS):
            sum_x2 = splat(ZERO)
            for e in range(j * GROUP, (j + 1) * GROUP):
                sum_x2 = sum_x2 + load(x, e * WIDTH) * load(x, e * WIDTH)
            spread_x = sqrt(sum_x2 / splat(GROUP_SIZE))
            for e in range(GROUP):
                store(w, e * WIDTH, spread_x + magnitude(load(x, (j * GROUP + e) * WIDTH)))
            keep(found, j, search_range(x, j * GROUP, w, GROUP, top, start, np.float32(0.1), trials, False, c))
        d = round_to_largest(found[0], GROUPS, 63, planes, 0)
        dmin = round_to_largest(found[1], GROUPS, 63, planes, 2)
        write_block(x, found, d, dmin, top, 63, planes)
        spread(planes, nbytes, first, count, out)


@kernel
def encode_weighted(top: int, source: Any, importance: Array, out: Array) -> None:
    """Both formats with importance."""
    nbytes = block_bytes(top)
    limit = 255 if top == 15 else 63  # the reference does not limit the codes of Q4_K, so one that wrapped stays
    row, x, planes, found, w, c = scratch(nbytes, GROUPS)
    v, sums = np.empty(SUPER * WIDTH, np.float32), np.empty(GROUPS * WIDTH, np.float32)
    for first in range(0, out.size // nbytes, WIDTH):
        count = min(WIDTH, out.size // nbytes - first)
        gather(source, first, count, row, x)
        gather_importance(importance, first, SUPER, v)
        search_weighted(x, v, np.float32(2), GROUPS, top, found, sums, w, c)
        d = round_by_search(found[0], sums, GROUPS, 63, c, planes, 0)
        dmin = round_by_search(found[1], sums, GROUPS, 63, c, planes, 2)
        write_block(x, found, d, dmin, top, limit, planes)
        spread(planes, nbytes, first, count, out)


@helper
def write_block(x: Array, found: Array, d: Any, dmin: Any, top: int, limit: int, planes: Array) -> None:
    """Round all values on the grid of the stored scales and pack; where a scale is zero, the search's codes stay."""
    store_scales(found, limit, planes)
    for j in range(GROUPS):
        scale, low = d * load(found[0], j * WIDTH), dmin * load(found[1], j * WIDTH)
        round_group(x, found, j, GROUP, top, scale, low)
    nibbles_at = block_bytes(top) - 128
    for e in range(GROUP):
        fifths = splat(ZERO)
        for run in range(4):
            low, high = load(x, (run * 64 + e) * WIDTH), load(x, (run * 64 + 32 + e) * WIDTH)
            fifths = joined(fifths, joined(upper(low, 4), upper(high, 4), 1), 2 * run)
            store_bytes(planes, (nibbles_at + run * 32 + e) * WIDTH, joined(low_bits(low, 4), low_bits(high, 4), 4))
        if top == 31:
            store_bytes(planes, (HEADER + e) * WIDTH, fifths)


@helper
def store_scales(found: Array, limit: int, planes: Array) -> None:
    """Pack the codes of scales and mins into the byte planes 4 ... 15."""
    scales, mins = np.empty((2, GROUPS * WIDTH), np.float32)
    pack_codes(found[0], limit, scales)
    pack_codes(found[1], limit, mins)
    for j in range(4):
        store_bytes(planes, (4 + j) * WIDTH, load(scales, j * WIDTH))
        store_bytes(planes, (8 + j) * WIDTH, load(mins, j * WIDTH))
        nibbles = joined(load(scales, (j + 4) * WIDTH), load(mins, (j + 4) * WIDTH), 4)
        store_bytes(planes, (12 + j) * WIDTH, nibbles)


@helper
def pack_codes(values: Array, limit: int, packed: Array) -> None:
    """Pack eight 6-bit codes: the upper two bits of each of the last four go to the spare bits of the first four.

    Args:
        values: codes in lanes; replaced by the codes that a reader decodes.
        limit: larger codes are reduced to it.
        packed: filled with the four bytes of the first four codes, then the low nibbles of the last four.
    """
    for j in range(4):
        early, late = at_most(load(values, j * WIDTH), limit), at_most(load(values, (j + 4) * WIDTH), limit)
        octet = low_bits(joined(early, upper(late, 4), 6), 8)
        store(packed, j * WIDTH, octet)
        store(packed, (j + 4) * WIDTH, low_bits(late, 4))
        store(values, j * WIDTH, low_bits(octet, 6))
        store(values, (j + 4) * WIDTH, joined(low_bits(late, 4), upper(octet, 6), 4))


def decoder(top: int) -> Callable[..., None]:
    """The kernel for codes of 4 or 5 bits."""

    @kernel
    def decode_k(data: Array, out: Array) -> None:
        nbytes = block_bytes(top)
        nibbles_at = nbytes - 128
        for block in range(data.size // nbytes):
            stored = data[block * nbytes : (block + 1) * nbytes]
            target = out[block * SUPER : (block + 1) * SUPER]
            d, dmin = take_half(stored, 0), take_half(stored, 2)
            for j in range(GROUPS):
                scale, low = stored_scale(stored, j, d, dmin)
                nibbles = stored[nibbles_at + j // 2 * 32 : nibbles_at + j // 2 * 32 + 32]
                fifths = stored[HEADER : HEADER + 32]
                group = target[j * GROUP : (j + 1) * GROUP]
                shift = np.uint8(4 * (j % 2))
                for e in range(GROUP):
                    code = np.uint8((nibbles[e] >> shift) & np.uint8(15))
                    if top == 31:
                        code = np.uint8(code | (((fifths[e] >> np.uint8(j)) & np.uint8(1)) << np.uint8(4)))
                    group[e] = scale * np.float32(code) - low

    return decode_k


@helper
def stored_scale(stored: Array, j: int, d: np.float32, dmin: np.float32) -> tuple[np.float32, np.float32]:
    """(scale, min) of group `j` of an encoded block."""
    packed = stored[4:16]
    if j < 4:
        scale, low = np.uint8(packed[j] & np.uint8(63)), np.uint8(packed[j + 4] & np.uint8(63))
    else:
        rest = packed[j + 4]
        scale = np.uint8((rest & np.uint8(15)) | ((packed[j - 4] >> np.uint8(6)) << np.uint8(4)))
        low = np.uint8((rest >> np.uint8(4)) | ((packed[j] >> np.uint8(6)) << np.uint8(4)))
    return d * np.float32(scale), dmin * np.float32(low)


encode_q4_k, encode_q5_k = partial(encode, 15, np.float32(-1.0), 21), partial(encode, 31, np.float32(-0.5), 16)
encode_q4_k_weighted, encode_q5_k_weighted = partial(encode_weighted, 15), partial(encode_weighted, 31)
decode_q4_k, decode_q5_k = decoder(15), decoder(31)
