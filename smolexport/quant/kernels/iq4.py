"""IQ4_NL: 32 elements that share a scale; a code is the index of one of sixteen levels, which are denser near zero.

Block of 18 bytes: the scale d as float16; 16 bytes of nibbles, elements j and j + 16 in the halves of byte j.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from smolexport.quant.kernels.codes import joined, store_bytes
from smolexport.quant.kernels.jit import Array, helper, kernel
from smolexport.quant.kernels.lanes import WIDTH, at_least_or_nan, load, negative, splat, sqrt, store, where
from smolexport.quant.kernels.search import TINY, extreme_of
from smolexport.quant.kernels.tile import gather, gather_importance, half_planes, spread, take_half

BLOCK, NBYTES = 32, 18
LEVELS = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.float32)
# From the midpoint of two levels on, a value rounds to the upper one; all midpoints are exact in float32.
MIDDLES = (LEVELS[1:] + LEVELS[:-1]) / np.float32(2)
STEPS = LEVELS[1:] - LEVELS[:-1]
LOWEST, ZERO, ONE, MEAN_FACTOR = LEVELS[0], np.float32(0), np.float32(1), np.float32(2 / 32)
TRIALS = 7


@kernel
def encode_iq4_nl(source: Any, out: Array) -> None:
    """Weights of the error: square of the element."""
    row, planes = np.empty(BLOCK, np.float32), np.empty(NBYTES * WIDTH, np.uint8)
    x, w = np.empty((2, BLOCK * WIDTH), np.float32)
    for first in range(0, out.size // NBYTES, WIDTH):
        count = min(WIDTH, out.size // NBYTES - first)
        gather(source, first, count, row, x)
        for e in range(BLOCK):
            store(w, e * WIDTH, load(x, e * WIDTH) * load(x, e * WIDTH))
        write_block(x, search(x, w), planes)
        spread(planes, NBYTES, first, count, out)


@kernel
def encode_iq4_nl_weighted(source: Any, importance: Array, out: Array) -> None:
    """Weights of the error: importance * sqrt(2 * mean square of the block + square of the element)."""
    row, planes = np.empty(BLOCK, np.float32), np.empty(NBYTES * WIDTH, np.uint8)
    x, w, v = np.empty((3, BLOCK * WIDTH), np.float32)
    for first in range(0, out.size // NBYTES, WIDTH):
        count = min(WIDTH, out.size // NBYTES - first)
        gather(source, first, count, row, x)
        gather_importance(importance, first, BLOCK, v)
        total = splat(ZERO)
        for e in range(BLOCK):
            total = total + load(x, e * WIDTH) * load(x, e * WIDTH)
        variance = total * splat(MEAN_FACTOR)
        for e in range(BLOCK):
            value = load(x, e * WIDTH)
            store(w, e * WIDTH, load(v, e * WIDTH) * sqrt(variance + value * value))
        write_block(x, search(x, w), planes)
        spread(planes, NBYTES, first, count, out)


@helper
def level(a: Any) -> Any:
    """The level nearest to each lane; a NaN counts as large."""
    value = splat(LOWEST)
    for k in range(15):
        value = value + where(at_least_or_nan(a, splat(MIDDLES[k])), splat(STEPS[k]), splat(ZERO))
    return value


@helper
def level_number(a: Any) -> Any:
    """The index, 0 ... 15, of the level nearest to each lane."""
    number = splat(ZERO)
    for k in range(15):
        number = number + where(at_least_or_nan(a, splat(MIDDLES[k])), splat(ONE), splat(ZERO))
    return number


@helper
def search(x: Array, w: Array) -> Any:
    """Scale by weighted least squares: the best of fifteen around the one that maps the largest magnitude to -127."""
    zero = splat(ZERO)
    peak, extreme = extreme_of(x, 0, BLOCK)
    sum_xl, sum_l2 = projection(x, w, splat(ONE) / (negative(extreme) / splat(LOWEST)))
    scale = where(sum_l2 > zero, sum_xl / sum_l2, zero)
    best = scale * sum_xl
    for trial in range(-TRIALS, TRIALS + 1):
        sum_xl, sum_l2 = projection(x, w, splat(np.float32(np.float32(trial) + LOWEST)) / extreme)
        wins = (sum_l2 > zero) & (sum_xl * sum_xl > best * sum_l2)
        this_scale = sum_xl / sum_l2
        scale, best = where(wins, this_scale, scale), where(wins, this_scale * sum_xl, best)
    return where(peak < splat(TINY), zero, scale)


@helper
def projection(x: Array, w: Array, inverse: Any) -> Any:
    """(sum of w * x * level, sum of w * level * level)."""
    sum_xl, sum_l2 = splat(ZERO), splat(ZERO)
    for e in range(BLOCK):
        value = load(x, e * WIDTH)
        at = level(inverse * value)
        weighted = load(w, e * WIDTH) * at
        sum_xl, sum_l2 = sum_xl + weighted * value, sum_l2 + weighted * at
    return sum_xl, sum_l2


@helper
def write_block(x: Array, scale: Any, planes: Array) -> None:
    """Codes for the scale before it is rounded to float16."""
    half_planes(scale, planes, 0)
    inverse = where(scale == splat(ZERO), splat(ZERO), splat(ONE) / scale)
    for j in range(16):
        low, high = load(x, j * WIDTH), load(x, (j + 16) * WIDTH)
        store_bytes(planes, (2 + j) * WIDTH, joined(level_number(inverse * low), level_number(inverse * high), 4))


@kernel
def decode_iq4_nl(data: Array, out: Array) -> None:
    """d * level."""
    for block in range(data.size // NBYTES):
        stored = data[block * NBYTES : (block + 1) * NBYTES]
        target = out[block * BLOCK : (block + 1) * BLOCK]
        scale, nibbles = take_half(stored, 0), stored[2:]
        for j in range(16):
            target[j] = scale * LEVELS[nibbles[j] & np.uint8(15)]
            target[j + 16] = scale * LEVELS[nibbles[j] >> np.uint8(4)]
