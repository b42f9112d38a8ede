"""Q3_K: super-blocks of sixteen groups of 16 elements, value = d * (scale - 32) * (code - 4).

Block of 110 bytes: 32 bytes of third bits, bit k of byte j for element 32 * k + j; for each half of 128 elements, seen
as four rows of 32, 32 bytes of the low two bits, the first row lowest; 12 bytes with sixteen 6-bit scales, eight bytes
of low nibbles (j with j + 8) and four of upper pairs (j, j + 4, j + 8, j + 12); d as float16.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from smolexport.quant.kernels.codes import codes, joined, low_bits, store_bytes, upper
from smolexport.quant.kernels.jit import Array, helper, kernel
from smolexport.quant.kernels.lanes import WIDTH, load, splat, store, where
from smolexport.quant.kernels.search import extreme_of, search_sweeps, search_symmetric
from smolexport.quant.kernels.superblock import SUPER, importance_weights, mean_square, pack_pairs, scratch
from smolexport.quant.kernels.tile import gather, gather_importance, half_planes, spread, take_half

GROUP, GROUPS, NBYTES = 16, 16, 110
CODES_AT, SCALES_AT, D_AT = 32, 96, 108
ZERO, ONE, TWO, FOUR, LARGEST_SCALE, MIDDLE_SCALE = (np.float32(v) for v in (0, 1, 2, 4, -32, 32))


@kernel
def encode_q3_k(source: Any, out: Array) -> None:
    """Weights of the error: square of the element; the scale of largest magnitude is stored as -32."""
    row, x, planes, found, _w, _c = scratch(NBYTES, GROUPS)
    searched = np.empty(SUPER * WIDTH, np.float32)
    for first in range(0, out.size // NBYTES, WIDTH):
        count = min(WIDTH, out.size // NBYTES - first)
        gather(source, first, count, row, x)
        for j in range(0, GROUPS, 2):
            even, odd = search_sweeps(x, j * GROUP, GROUP, 4, searched)
            store(found[0], j * WIDTH, even)
            store(found[0], (j + 1) * WIDTH, odd)
        _peak, extreme = extreme_of(found[0], 0, GROUPS)
        is_zero = extreme == splat(ZERO)
        inverse = splat(LARGEST_SCALE) / extreme
        round_scales(found[0], inverse, is_zero)
        d = half_planes(where(is_zero, splat(ZERO), splat(ONE) / inverse), planes, D_AT)
        write_block(x, searched, found[0], d, planes)
        spread(planes, NBYTES, first, count, out)


@kernel
def encode_q3_k_weighted(source: Any, importance: Array, out: Array) -> None:
    """Weights of the error: importance * sqrt(2 * mean square of the super-block + square of the element)."""
    row, x, planes, found, w, _c = scratch(NBYTES, GROUPS)
    searched, v = np.empty(SUPER * WIDTH, np.float32), np.empty(SUPER * WIDTH, np.float32)
    for first in range(0, out.size // NBYTES, WIDTH):
        count = min(WIDTH, out.size // NBYTES - first)
        gather(source, first, count, row, x)
        gather_importance(importance, first, SUPER, v)
        variance = mean_square(x, TWO)
        for j in range(GROUPS):
            store(found[1], j * WIDTH, importance_weights(x, v, j * GROUP, GROUP, variance, w))
            scale, inverse, empty = search_symmetric(x, j * GROUP, w, GROUP, 4)
            store(found[0], j * WIDTH, scale)
            for e in range(j * GROUP, (j + 1) * GROUP):
                code = codes(inverse * load(x, e * WIDTH), -4, 3)
                store(searched, e * WIDTH, where(empty, splat(-FOUR), code))
        unit, inverse, empty = search_symmetric(found[0], 0, found[1], GROUPS, 32)
        round_scales(found[0], inverse, empty)
        write_block(x, searched, found[0], half_planes(unit, planes, D_AT), planes)
        spread(planes, NBYTES, first, count, out)


@helper
def round_scales(scales: Array, inverse: Any, empty: Any) -> None:
    """Replace scales by their codes, 0 in a super-block that is zero."""
    for j in range(GROUPS):
        scale = codes(inverse * load(scales, j * WIDTH), -32, 31) + splat(MIDDLE_SCALE)
        store(scales, j * WIDTH, where(empty, splat(ZERO), scale))


@helper
def write_block(x: Array, searched: Array, scales: Array, d: Any, planes: Array) -> None:
    """Round all values on the grid of the stored scales and pack; where a scale is zero, the search's codes stay."""
    for j in range(GROUPS):
        scale = d * (load(scales, j * WIDTH) - splat(MIDDLE_SCALE))
        no_scale = scale == splat(ZERO)
        for e in range(j * GROUP, (j + 1) * GROUP):
            code = where(no_scale, load(searched, e * WIDTH), codes(load(x, e * WIDTH) / scale, -4, 3))
            store(x, e * WIDTH, code + splat(FOUR))
    for e in range(32):
        thirds = splat(ZERO)
        for row in range(8):
            code = load(x, (row * 32 + e) * WIDTH)
            thirds = joined(thirds, upper(code, 2), row)
            store(x, (row * 32 + e) * WIDTH, low_bits(code, 2))
        store_bytes(planes, e * WIDTH, thirds)
    pack_pairs(x, planes, CODES_AT)
    for j in range(4):
        pairs = splat(ZERO)
        for k in range(4):
            pairs = joined(pairs, upper(load(scales, (4 * k + j) * WIDTH), 4), 2 * k)
        store_bytes(planes, (SCALES_AT + 8 + j) * WIDTH, pairs)
    for j in range(8):
        low, high = load(scales, j * WIDTH), load(scales, (j + 8) * WIDTH)
        store_bytes(planes, (SCALES_AT + j) * WIDTH, joined(low_bits(low, 4), low_bits(high, 4), 4))


@kernel
def decode_q3_k(data: Array, out: Array) -> None:
    """d * (scale - 32) * (code - 4)."""
    for block in range(data.size // NBYTES):
        stored = data[block * NBYTES : (block + 1) * NBYTES]
        target = out[block * SUPER : (block + 1) * SUPER]
        d, packed = take_half(stored, D_AT), stored[SCALES_AT:D_AT]
        for j in range(GROUPS):
            low = np.uint8((packed[j % 8] >> np.uint8(j // 8 * 4)) & np.uint8(15))
            high = np.uint8((packed[8 + j % 4] >> np.uint8(j // 4 * 2)) & np.uint8(3))
            scale = d * (np.float32(np.uint8(low | (high << np.uint8(4)))) - MIDDLE_SCALE)
            pairs, thirds = stored[CODES_AT + j // 8 * 32 + j % 2 * 16 :], stored[j % 2 * 16 :]
            group = target[j * GROUP : (j + 1) * GROUP]
            shift, third_shift = np.uint8(j // 2 % 4 * 2), np.uint8(j // 2)
            for e in range(GROUP):
                third = np.uint8((thirds[e] >> third_shift) & np.uint8(1))
                code = np.uint8(((pairs[e] >> shift) & np.uint8(3)) | (third << np.uint8(2)))
                group[e] = scale * (np.float32(code) - FOUR)
