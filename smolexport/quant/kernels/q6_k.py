"""Q6_K: super-blocks of sixteen groups of 16 elements, value = d * scale * (code - 32).

Block of 210 bytes: for each half of 128 elements, seen as four rows A B C D of 32, 64 bytes of low nibbles (A with C,
then B with D); for each half 32 bytes of upper bit pairs (A B C D from low to high); 16 signed scales; d as float16.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from smolexport.quant.kernels.codes import codes, joined, low_bits, nearest, store_bytes, upper
from smolexport.quant.kernels.jit import Array, helper, kernel
from smolexport.quant.kernels.lanes import WIDTH, load, splat, store, where
from smolexport.quant.kernels.search import TINY, at_most, extreme_of, search_symmetric
from smolexport.quant.kernels.superblock import SUPER, scratch
from smolexport.quant.kernels.tile import gather, gather_importance, half_planes, spread, take_half

GROUP, GROUPS, NBYTES = 16, 16, 210
UPPER_AT, SCALES_AT, D_AT = 128, 192, 208
ZERO, ONE, MIDDLE, LARGEST_SCALE = np.float32(0), np.float32(1), np.float32(32), np.float32(-128)


@kernel
def encode_q6_k(source: Any, out: Array) -> None:
    """Weights of the error: square of the element."""
    row, x, planes, found, w, _c = scratch(NBYTES, GROUPS)
    for first in range(0, out.size // NBYTES, WIDTH):
        count = min(WIDTH, out.size // NBYTES - first)
        gather(source, first, count, row, x)
        for j in range(GROUPS):
            for e in range(GROUP):
                value = load(x, (j * GROUP + e) * WIDTH)
                store(w, e * WIDTH, value * value)
            search_group(x, w, j, found)
        write_block(x, found, planes)
        spread(planes, NBYTES, first, count, out)


@kernel
def encode_q6_k_weighted(source: Any, importance: Array, out: Array) -> None:
    """Weights of the error: the importance as it is."""
    row, x, planes, found, _w, _c = scratch(NBYTES, GROUPS)
    v = np.empty(SUPER * WIDTH, np.float32)
    for first in range(0, out.size // NBYTES, WIDTH):
        count = min(WIDTH, out.size // NBYTES - first)
        gather(source, first, count, row, x)
        gather_importance(importance, first, SUPER, v)
        for j in range(GROUPS):
            search_group(x, v[j * GROUP * WIDTH :], j, found)
        write_block(x, found, planes)
        spread(planes, NBYTES, first, count, out)


@helper
def search_group(x: Array, w: Array, j: int, found: Array) -> None:
    """Store scale, inverse, and 1 where the group is zero."""
    scale, inverse, empty = search_symmetric(x, j * GROUP, w, GROUP, 32)
    store(found[0], j * WIDTH, scale)
    store(found[1], j * WIDTH, inverse)
    store(found[2], j * WIDTH, where(empty, splat(ONE), splat(ZERO)))


@helper
def write_block(x: Array, found: Array, planes: Array) -> None:
    """Store the scale of largest magnitude as -128, round all values on the grid of the stored scales, and pack."""
    zero = splat(ZERO)
    peak, extreme = extreme_of(found[0], 0, GROUPS)
    is_zero = peak < splat(TINY)  # such a block is all zero bytes
    unit_inverse = splat(LARGEST_SCALE) / extreme
    d = half_planes(where(is_zero, zero, splat(ONE) / unit_inverse), planes, D_AT)
    for j in range(GROUPS):
        scale = where(is_zero, zero, at_most(nearest(unit_inverse * load(found[0], j * WIDTH)), 127))
        store_bytes(planes, (SCALES_AT + j) * WIDTH, scale)
        round_group(x, j, d * scale, load(found[1], j * WIDTH), (load(found[2], j * WIDTH) > zero) | is_zero)
    for half in range(2):
        for e in range(32):
            at = half * 128 + e
            a, b = load(x, at * WIDTH), load(x, (at + 32) * WIDTH)
            c_row, d_row = load(x, (at + 64) * WIDTH), load(x, (at + 96) * WIDTH)
            store_bytes(planes, (half * 64 + e) * WIDTH, joined(low_bits(a, 4), low_bits(c_row, 4), 4))
            store_bytes(planes, (half * 64 + 32 + e) * WIDTH, joined(low_bits(b, 4), low_bits(d_row, 4), 4))
            pairs = joined(joined(upper(a, 4), upper(b, 4), 2), joined(upper(c_row, 4), upper(d_row, 4), 2), 4)
            store_bytes(planes, (UPPER_AT + half * 32 + e) * WIDTH, pairs)


@helper
def round_group(x: Array, j: int, scale: Any, inverse: Any, empty: Any) -> None:
    """Replace the values of group `j` by codes; where the stored scale is zero, the search's codes stay."""
    no_scale = scale == splat(ZERO)
    for e in range(j * GROUP, (j + 1) * GROUP):
        value = load(x, e * WIDTH)
        searched = where(empty, splat(-MIDDLE), codes(inverse * value, -32, 31))
        store(x, e * WIDTH, where(no_scale, searched, codes(value / scale, -32, 31)) + splat(MIDDLE))


@kernel
def decode_q6_k(data: Array, out: Array) -> None:
    """d * scale * (code - 32)."""
    for block in range(data.size // NBYTES):
        stored = data[block * NBYTES : (block + 1) * NBYTES]
        target = out[block * SUPER : (block + 1) * SUPER]
        d = take_half(stored, D_AT)
        for j in range(GROUPS):
            scale = d * np.float32(np.int8(stored[SCALES_AT + j]))
            half, row = j // 8, j // 2 % 4
            nibbles = stored[half * 64 + row % 2 * 32 + j % 2 * 16 :]
            pairs = stored[UPPER_AT + half * 32 + j % 2 * 16 :]
            group = target[j * GROUP : (j + 1) * GROUP]
            shift, pair_shift = np.uint8(row // 2 * 4), np.uint8(row * 2)
            for e in range(GROUP):
                low = np.uint8((nibbles[e] >> shift) & np.uint8(15))
                high = np.uint8((pairs[e] >> pair_shift) & np.uint8(3))
                group[e] = scale * (np.float32(np.uint8(low | (high << np.uint8(4)))) - MIDDLE)
