"""What the formats with super-blocks of 256 elements share: weights, and scales that are themselves quantized.

Per tile there is an array `found[kind, group * WIDTH + lane]`; kinds 0 and 1 are scale and minimum, as real numbers
after the search and as integer codes once rounded; kinds 2 and 3 describe the codes that the search had found.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from smolexport.quant.kernels.codes import codes, joined, low_bits, nearest, store_bytes
from smolexport.quant.kernels.jit import Array, helper
from smolexport.quant.kernels.lanes import WIDTH, load, splat, sqrt, store, where
from smolexport.quant.kernels.search import search_positive, search_range
from smolexport.quant.kernels.tile import half_planes

SUPER = 256
SUPER_SIZE, ZERO = np.float32(256), np.float32(0)


@helper
def scratch(nbytes: int, groups: int) -> Any:
    """Arrays of a tile: one block in memory order, values in lanes, byte planes, `found`, group weights, codes."""
    return (
        np.empty(SUPER, np.float32),
        np.empty(SUPER * WIDTH, np.float32),
        np.empty(nbytes * WIDTH, np.uint8),
        np.empty((4, groups * WIDTH), np.float32),
        np.empty(SUPER // groups * WIDTH, np.float32),
        np.empty(32 * WIDTH, np.float32),
    )


@helper
def mean_square(x: Array, factor: np.float32) -> Any:
    """factor * (sum of squares) / 256 for each super-block."""
    total = splat(ZERO)
    for e in range(SUPER):
        total = total + load(x, e * WIDTH) * load(x, e * WIDTH)
    return splat(factor) * total / splat(SUPER_SIZE)


@helper
def importance_weights(x: Array, v: Array, at: int, n: int, variance: Any, w: Array) -> Any:
    """Fill `w` with v * sqrt(variance + x * x) for the `n` elements from `at` on; returns their sum."""
    total = splat(ZERO)
    for e in range(n):
        value = load(x, (at + e) * WIDTH)
        weight = load(v, (at + e) * WIDTH) * sqrt(variance + value * value)
        store(w, e * WIDTH, weight)
        total = total + weight
    return total


@helper
def round_to_largest(values: Array, n: int, top: int, planes: Array, at: int) -> Any:
    """Replace `n` values >= 0 by codes of which the largest is `top`.

    Rounding errors of the search can leave a value slightly below zero.  As in the reference, it wraps to a code near
    255, here and in `round_by_search`; each format then handles that code in its own way.

    Returns:
        Lanes of the unit of these codes, as stored in the byte planes `at` and `at` + 1.
    """
    zero, most = splat(ZERO), splat(np.float32(top))
    peak = zero
    for j in range(n):
        value = load(values, j * WIDTH)
        peak = where(value > peak, value, peak)
    inverse = where(peak > zero, most / peak, zero)
    for j in range(n):
        store(values, j * WIDTH, low_bits(nearest(inverse * load(values, j * WIDTH)), 8))
    return half_planes(where(peak > zero, peak / most, zero), planes, at)


@helper
def round_by_search(values: Array, sums: Array, n: int, top: int, c: Array, planes: Array, at: int) -> Any:
    """As `round_to_largest`, by a search weighted with `sums`; `c` is scratch for `n` codes."""
    unit = search_positive(values, sums, n, top, c)
    for j in range(n):
        store(values, j * WIDTH, load(c, j * WIDTH))
    return half_planes(unit, planes, at)


@helper
def keep(found: Array, j: int, result: Any) -> None:
    """Store what `search_range` returned for group `j`."""
    scale, low, inverse, base = result
    store(found[0], j * WIDTH, scale)
    store(found[1], j * WIDTH, low)
    store(found[2], j * WIDTH, inverse)
    store(found[3], j * WIDTH, base)


@helper
def search_weighted(
    x: Array, v: Array, factor: np.float32, groups: int, top: int, found: Array, sums: Array, w: Array, c: Array
) -> None:
    """Keep scale and minimum of all groups; `sums` gets the sums of their weights.

    Weights of the squared error: v * sqrt(factor * mean square of the super-block + square of the element).
    """
    n, variance = SUPER // groups, mean_square(x, factor)
    for j in range(groups):
        store(sums, j * WIDTH, importance_weights(x, v, j * n, n, variance, w))
        keep(found, j, search_range(x, j * n, w, n, top, np.float32(-0.9), np.float32(0.05), 37, False, c))


@helper
def round_group(x: Array, found: Array, j: int, n: int, top: int, scale: Any, low: Any) -> None:
    """Replace the `n` values of group `j` by codes for its stored scale and minimum.

    Where the stored scale is zero, the search's codes stay.
    """
    inverse, base = load(found[2], j * WIDTH), load(found[3], j * WIDTH)
    no_scale = scale == splat(ZERO)
    for e in range(j * n, (j + 1) * n):
        value = load(x, e * WIDTH)
        code, searched = codes((value + low) / scale, 0, top), codes(inverse * (value - base), 0, top)
        store(x, e * WIDTH, where(no_scale, searched, code))


@helper
def pack_pairs(x: Array, planes: Array, at: int) -> None:
    """Pack 2-bit codes into 64 byte planes from `at` on: of each half of 128 elements four rows of 32, lowest first."""
    for half in range(2):
        for e in range(32):
            octet = splat(ZERO)
            for row in range(4):
                octet = joined(octet, load(x, (half * 128 + row * 32 + e) * WIDTH), 2 * row)
            store_bytes(planes, (at + half * 32 + e) * WIDTH, octet)
