"""Between memory and lanes: tiles of weights, of encoded blocks, and of rows that keep codes and scales apart.

A kernel's weights are a `source`, (f32, u16, kind): one of the two flat arrays is the tensor and the other is empty, so
that one compiled kernel serves float32, float16 and bfloat16 without a float32 copy of the tensor.

Searches work on a tile of WIDTH blocks with one block per lane: `x[element * WIDTH + lane]`.  What they produce is a
tile of byte planes, `planes[byte * WIDTH + lane]`, the image of WIDTH encoded blocks.

Rows of planar formats are their parts one after another: codes, which come first, scales and more.  Kernels take the
groups of all rows as one sequence, a tile of them at a time, so that the work per group is done for WIDTH groups at
once however short a row is.

Notation: place = (row, group in it, groups of a row, bytes of a row), of the first group of a tile.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from smolexport.quant.kernels.codes import copy_bytes, load_halves, store_bytes, store_halves, upper
from smolexport.quant.kernels.floats import (
    bf16_bits,
    bf16_rounded,
    half_bits,
    half_rounded,
    half_value,
    load_bf16,
    widen_bf16,
    widen_f16,
)
from smolexport.quant.kernels.jit import Array, helper, lean_helper
from smolexport.quant.kernels.lanes import WIDTH, load, splat, store

F32, F16, BF16 = 0, 1, 2  # storage types
BLOCKS = 64  # in a tile of the formats with blocks of 32
LINE = 16  # float32 values in a cache line


@lean_helper
def fetch(source: Any, start: int, into: Array) -> None:
    """Fill `into` (float32) with the elements from `start` on."""
    f32, u16, kind = source
    whole = into.size // WIDTH * WIDTH
    if kind == F32:
        for i in range(0, whole, WIDTH):
            store(into, i, load(f32, start + i))
        for i in range(whole, into.size):
            into[i] = f32[start + i]
    elif kind == F16:
        for i in range(0, whole, WIDTH):
            store(into, i, half_value(load_halves(u16, start + i)))
        for i in range(whole, into.size):
            into[i] = widen_f16(u16[start + i])
    else:
        for i in range(0, whole, WIDTH):
            store(into, i, load_bf16(u16, start + i))
        for i in range(whole, into.size):
            into[i] = widen_bf16(u16[start + i])


@helper
def aligned(count: int) -> Any:
    """Float32 zeros that start on a cache line: loading a vector that straddles two lines takes twice as long."""
    values = np.zeros(count + LINE, np.float32)
    skipped = -(values.ctypes.data // 4) % LINE
    return values[skipped : skipped + count]


@helper
def gather(source: Any, first: int, count: int, row: Array, x: Array) -> None:
    """Put `count` blocks from number `first` on into the lanes of `x`, zeros into the other lanes.

    `row` is scratch of one block's length.
    """
    size = row.size
    for lane in range(WIDTH):
        if lane < count:
            fetch(source, (first + lane) * size, row)
        else:
            row[:] = np.float32(0)
        for e in range(size):
            x[e * WIDTH + lane] = row[e]


@helper
def gather_importance(importance: Array, first: int, size: int, v: Array) -> None:
    """Put the importance of the columns of WIDTH blocks of `size` elements, from number `first` on, into lanes."""
    per_row = importance.size // size
    for lane in range(WIDTH):
        start = (first + lane) % per_row * size
        columns = importance[start : start + size]
        for e in range(size):
            v[e * WIDTH + lane] = columns[e]


@helper
def half_planes(values: Any, planes: Array, at: int) -> Any:
    """Write lanes as float16 to the byte planes `at` and `at` + 1; returns them as rounded."""
    bits = half_bits(values)
    store_bytes(planes, at * WIDTH, bits)
    store_bytes(planes, (at + 1) * WIDTH, upper(bits, 8))
    return half_value(bits)


@helper
def spread(planes: Array, nbytes: int, first: int, count: int, out: Array) -> None:
    """Write the first `count` lanes of byte planes as blocks from number `first` on."""
    for lane in range(count):
        block = out[(first + lane) * nbytes : (first + lane + 1) * nbytes]
        for i in range(nbytes):
            block[i] = planes[i * WIDTH + lane]


@helper
def take_half(data: Array, at: int) -> Any:
    """The float16 in the two bytes at `at`."""
    return widen_f16(np.uint16(np.uint16(data[at]) | (np.uint16(data[at + 1]) << np.uint16(8))))


@lean_helper
def round_lanes(a: Any, dtype: int) -> Any:
    """Lanes rounded to a storage type."""
    if dtype == F16:
        return half_rounded(a)
    if dtype == BF16:
        return bf16_rounded(a)
    return a


@lean_helper
def round_values(values: Array, dtype: int) -> None:
    """Round float32 values, whole lanes of them, to a storage type."""
    for i in range(0, values.size, WIDTH):
        store(values, i, round_lanes(load(values, i), dtype))


@lean_helper
def fetch_rounded(source: Any, dtype: int, start: int, tile: Array) -> None:
    """Fill `tile` with the elements from `start` on, rounded to a storage type if theirs is another."""
    fetch(source, start, tile)
    if dtype not in (source[2], F32):
        round_values(tile, dtype)


@lean_helper
def store_floats(floats: Array, i: int, a: Any, dtype: int) -> None:
    """Write lanes, rounded to a storage type, as that type's numbers i ... i + WIDTH to the memory of `floats`."""
    if dtype == F32:
        store(floats, i, a)
    elif dtype == F16:
        store_halves(floats, i, half_bits(a))
    else:
        store_halves(floats, i, bf16_bits(a))


def codes_putter(write: Callable[..., None]) -> Callable[..., None]:
    """A helper that writes codes; `write(out, at, x, a, b, bits)` writes WIDTH of them, on the grid a, b."""

    @lean_helper
    def put_codes(tile: Array, grids: Array, place: Any, count: int, size: int, bits: int, out: Array) -> None:
        """Codes of `bits` bits of `count` groups of `size` elements, whose grids are `grids[0]` and `grids[1]`."""
        row, group, per_row, row_bytes = place
        done = 0
        while done < count:
            stop, at = min(count, done + per_row - group), row * row_bytes + group * size * bits // 8
            for i in range(done, stop):
                a, b = splat(grids[0, i]), splat(grids[1, i])
                for e in range(i * size, (i + 1) * size, WIDTH):
                    write(out, at, load(tile, e), a, b, bits)
                    at += WIDTH * bits // 8
            done, row, group = stop, row + 1, 0

    return put_codes


@lean_helper
def put_part(part: Array, size: int, place: Any, count: int, offset: int, out: Array) -> None:
    """Copy `size` bytes for each of `count` groups to the part that starts `offset` bytes into a row.

    `part` is memory of any type.
    """
    row, group, per_row, row_bytes = place
    done = 0
    while done < count:
        run = min(per_row - group, count - done)
        copy_bytes(part, done * size, out, row * row_bytes + offset + group * size, run * size)
        done, row, group = done + run, row + 1, 0


@lean_helper
def take_float(f32: Array, u16: Array, at: int, dtype: int) -> Any:
    """The float of a storage type at byte `at`, a multiple of its size, of data viewed as float32 and as uint16."""
    if dtype == F32:
        return f32[at // 4]
    return widen_f16(u16[at // 2]) if dtype == F16 else widen_bf16(u16[at // 2])
