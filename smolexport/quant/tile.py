"""Between memory order and lanes.

Searches work on a tile of WIDTH blocks with one block per lane: `x[element * WIDTH + lane]`.  What they produce is a
tile of byte planes, `planes[byte * WIDTH + lane]`, the image of WIDTH encoded blocks.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from smolexport.quant.half import widen_f16
from smolexport.quant.jit import helper
from smolexport.quant.lane_codes import half_bits, half_value, store_bytes, upper
from smolexport.quant.lanes import WIDTH
from smolexport.quant.source import fetch

BLOCKS = 64  # in a tile of the formats with blocks of 32
LINE = 16  # float32 values in a cache line
ZERO, ONE = np.float32(0), np.float32(1)


@helper
def aligned(count: int) -> Any:
    """Float32 zeros from the beginning of a cache line on: vectors that lie in two lines take twice as long."""
    values = np.zeros(count + LINE, np.float32)
    skipped = -(values.ctypes.data // 4) % LINE
    return values[skipped : skipped + count]


@helper
def take_half(data: NDArray[Any], at: int) -> Any:
    """The float16 in the two bytes at `at`."""
    return widen_f16(np.uint16(np.uint16(data[at]) | (np.uint16(data[at + 1]) << np.uint16(8))))


@helper
def gather(
    f32: NDArray[Any], u16: NDArray[Any], kind: int, first: int, count: int, row: NDArray[Any], x: NDArray[Any]
) -> None:
    """Put `count` blocks from number `first` on into the lanes of `x`, zeros into the other lanes.

    `row` is scratch of one block's length.
    """
    size = row.size
    for lane in range(WIDTH):
        if lane < count:
            fetch(f32, u16, kind, (first + lane) * size, row)
        else:
            row[:] = np.float32(0)
        for e in range(size):
            x[e * WIDTH + lane] = row[e]


@helper
def gather_importance(importance: NDArray[Any], first: int, size: int, v: NDArray[Any]) -> None:
    """Put the importance of the columns of WIDTH blocks of `size` elements, from number `first` on, into lanes."""
    per_row = importance.size // size
    for lane in range(WIDTH):
        start = (first + lane) % per_row * size
        columns = importance[start : start + size]
        for e in range(size):
            v[e * WIDTH + lane] = columns[e]


@helper
def half_planes(values: Any, planes: NDArray[Any], at: int) -> Any:
    """Write lanes as float16 to the byte planes `at` and `at` + 1; returns them as rounded."""
    bits = half_bits(values)
    store_bytes(planes, at * WIDTH, bits)
    store_bytes(planes, (at + 1) * WIDTH, upper(bits, 8))
    return half_value(bits)


@helper
def spread(planes: NDArray[Any], nbytes: int, first: int, count: int, out: NDArray[Any]) -> None:
    """Write the first `count` lanes of byte planes as blocks from number `first` on."""
    for lane in range(count):
        block = out[(first + lane) * nbytes : (first + lane + 1) * nbytes]
        for i in range(nbytes):
            block[i] = planes[i * WIDTH + lane]
