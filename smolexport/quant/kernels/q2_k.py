"""Q2_K: super-blocks of sixteen groups of 16 elements, value = d * scale * code - dmin * min.

Block of 84 bytes: 16 bytes with a scale in the low and a min in the high nibble; for each half of 128 elements, seen as
four rows of 32, 32 bytes of 2-bit codes, the first row lowest; d and dmin as float16.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from smolexport.quant.kernels.codes import joined, low_bits, store_bytes, upper
from smolexport.quant.kernels.jit import Array, helper, kernel
from smolexport.quant.kernels.lanes import WIDTH, load, magnitude, store
from smolexport.quant.kernels.search import search_range
from smolexport.quant.kernels.superblock import (
    SUPER,
    keep,
    pack_pairs,
    round_by_search,
    round_group,
    round_to_largest,
    scratch,
    search_weighted,
)
from smolexport.quant.kernels.tile import gather, gather_importance, spread, take_half

GROUP, GROUPS, NBYTES = 16, 16, 84
CODES_AT, D_AT, DMIN_AT = 16, 80, 82
TOP = 3


@kernel
def encode_q2_k(source: Any, out: Array) -> None:
    """Weights of the absolute error: magnitude of the element."""
    row, x, planes, found, w, c = scratch(NBYTES, GROUPS)
    for first in range(0, out.size // NBYTES, WIDTH):
        count = min(WIDTH, out.size // NBYTES - first)
        gather(source, first, count, row, x)
        for j in range(GROUPS):
            for e in range(GROUP):
                store(w, e * WIDTH, magnitude(load(x, (j * GROUP + e) * WIDTH)))
            keep(found, j, search_range(x, j * GROUP, w, GROUP, TOP, np.float32(-0.5), np.float32(0.1), 16, True, c))
        d = round_to_largest(found[0], GROUPS, 15, planes, D_AT)
        dmin = round_to_largest(found[1], GROUPS, 15, planes, DMIN_AT)
        write_block(x, found, d, dmin, planes)
        spread(planes, NBYTES, first, count, out)


@kernel
def encode_q2_k_weighted(source: Any, importance: Array, out: Array) -> None:
    """Weights of the squared error: importance * sqrt(mean square of the super-block + square of the element)."""
    row, x, planes, found, w, c = scratch(NBYTES, GROUPS)
    v, sums = np.empty(SUPER * WIDTH, np.float32), np.empty(GROUPS * WIDTH, np.float32)
    for first in range(0, out.size // NBYTES, WIDTH):
        count = min(WIDTH, out.size // NBYTES - first)
        gather(source, first, count, row, x)
        gather_importance(importance, first, SUPER, v)
        search_weighted(x, v, np.float32(1), GROUPS, TOP, found, sums, w, c)
        d = round_by_search(found[0], sums, GROUPS, 15, c, planes, D_AT)
        dmin = round_by_search(found[1], sums, GROUPS, 15, c, planes, DMIN_AT)
        write_block(x, found, d, dmin, planes)
        spread(planes, NBYTES, first, count, out)


@helper
def write_block(x: Array, found: Array, d: Any, dmin: Any, planes: Array) -> None:
    """Round all values on the grid of the stored scales and pack; where a scale is zero, the search's codes stay."""
    for j in range(GROUPS):
        both = low_bits(joined(load(found[0], j * WIDTH), load(found[1], j * WIDTH), 4), 8)
        store_bytes(planes, j * WIDTH, both)
        round_group(x, found, j, GROUP, TOP, d * low_bits(both, 4), dmin * upper(both, 4))
    pack_pairs(x, planes, CODES_AT)


@kernel
def decode_q2_k(data: Array, out: Array) -> None:
    """d * scale * code - dmin * min."""
    for block in range(data.size // NBYTES):
        stored = data[block * NBYTES : (block + 1) * NBYTES]
        target = out[block * SUPER : (block + 1) * SUPER]
        d, dmin = take_half(stored, D_AT), take_half(stored, DMIN_AT)
        for j in range(GROUPS):
            scale = d * np.float32(stored[j] & np.uint8(15))
            low = dmin * np.float32(stored[j] >> np.uint8(4))
            pairs = stored[CODES_AT + j // 8 * 32 + j % 2 * 16 :]
            group = target[j * GROUP : (j + 1) * GROUP]
            shift = np.uint8(j // 2 % 4 * 2)
            for e in range(GROUP):
                group[e] = scale * np.float32((pairs[e] >> shift) & np.uint8(3)) - low
