"""The sequential part of GPTQ: the columns of a block, one after another.

Rows of weights are SIMD lanes, so arrays are [columns, n], n = rows, a multiple of WIDTH.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from smolexport.quant.kernels.codes import store_bytes
from smolexport.quant.kernels.jit import kernel
from smolexport.quant.kernels.lanes import WIDTH, load, rint, splat, store, where

BLOCK = 64  # columns at most

ZERO = np.float32(0)


@kernel
def round_block(
    below: NDArray[Any],
    moved: NDArray[Any],
    weights: NDArray[Any],
    scales: NDArray[Any],
    offsets: NDArray[Any],
    groups: NDArray[Any],
    top: int,
    middle: int,
    codes: NDArray[Any],
) -> None:
    """Round a block's columns from the last to the first, each corrected by the errors of those before it.

    Args:
        below: [count, count] float32; column j's error moves column i < j by below[j, i] times itself.
        moved: [count, n] float32: corrections by the columns of earlier blocks.
        weights: [count, n] float32; replaced by the errors, weight - value.
        scales, offsets: [groups, n] float32, the grid.
        groups: [count] int64, each column's group.
        top: largest code.
        middle: the code where the scale is zero.
        codes: [count, n] uint8, written.
    """
    count, n = weights.shape
    errors = np.empty(count * WIDTH, np.float32)
    moved_flat, weights_flat, codes_flat = moved.reshape(-1), weights.reshape(-1), codes.reshape(-1)
    scales_flat, offsets_flat = scales.reshape(-1), offsets.reshape(-1)
    zero, last, fixed = splat(ZERO), splat(np.float32(top)), splat(np.float32(middle))
    for row in range(0, n, WIDTH):
        for i in range(count - 1, -1, -1):
            target = load(moved_flat, i * n + row)
            for j in range(i + 1, count):
                target = target + splat(below[j, i]) * load(errors, j * WIDTH)
            weight = load(weights_flat, i * n + row)
            scale, offset = load(scales_flat, groups[i] * n + row), load(offsets_flat, groups[i] * n + row)
            place = (weight + target - offset) / scale
            place = where(place > zero, place, zero)
            code = where(scale == zero, fixed, rint(where(place < last, place, last)))
            error = weight - (scale * code + offset)
            store(errors, i * WIDTH, error)
            store(weights_flat, i * n + row, error)
            store_bytes(codes_flat, i * n + row, code)
