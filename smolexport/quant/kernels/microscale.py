"""Groups of E2M1 or E4M3 elements times one 8-bit scale, as MLX's CPU backend computes them: mxfp4, nvfp4, mxfp8.

A row is its elements, the low nibble of a byte first, then one byte of scale per group: an exponent (E8M0), or E4M3
for nvfp4.  MLX computes in the storage type of the weights; where that affects the result, kernels round to it.

Notation: dtype = storage type of the weights, as a code of `tile`; peak = largest magnitude of a group.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np

from smolexport.quant.kernels.codes import load_codes, store_bytes, store_codes
from smolexport.quant.kernels.floats import e4m3_bits, e4m3_value, exponents_up, powers_of_two
from smolexport.quant.kernels.jit import Array, helper, kernel
from smolexport.quant.kernels.lanes import (
    WIDTH,
    largest_of_half,
    load,
    magnitude,
    negative,
    splat,
    splat_halves,
    store,
    where,
)
from smolexport.quant.kernels.tile import fetch_rounded, put_part, round_lanes

TILE = 2048
ZERO, ONE, BIAS = np.float32(0), np.float32(1), np.float32(127)
E2M1_TOP, E4M3_TOP = np.float32(6), np.float32(448)


@cache
def encoder(bits: int, group: int) -> Callable[..., None]:
    """The kernel for elements of 4 or 8 bits in groups of 16 (with E4M3 scales) or 32."""
    top = E2M1_TOP if bits == 4 else E4M3_TOP

    @kernel
    def encode_microscale(source: Any, dtype: int, columns: int, out: Array) -> None:
        buffer, scales = np.empty(TILE, np.float32), np.zeros((2, TILE // group), np.float32)
        codes, exponents = np.empty(TILE * bits // 8, np.uint8), np.empty(TILE // group, np.uint8)
        per_row, group_bytes = columns // group, group * bits // 8
        row_bytes = per_row * (group_bytes + 1)
        groups = out.size // row_bytes * per_row
        for first in range(0, groups, TILE // group):
            count = min(TILE // group, groups - first)
            place = (first // per_row, first % per_row, per_row, row_bytes)
            tile = buffer[: count * group]
            fetch_rounded(source, dtype, first * group, tile)
            find_scales(tile, group, top, dtype, scales)
            for i in range(0, count, WIDTH):
                store_bytes(exponents, i, load(scales[1], i))
            for e in range(0, tile.size, WIDTH):
                i = e // group
                scale = splat_halves(scales[0, i], scales[0, i + WIDTH // group - 1])
                x = load(tile, e) / scale
                if group < WIDTH:
                    x = round_lanes(where(scale > splat(ZERO), x, splat(ZERO)), dtype)
                code = e2m1_bits(x) if bits == 4 else e4m3_bits(x)
                store_codes(codes, e * bits // 8, code, bits)
            put_part(codes, group_bytes, place, count, 0, out)
            put_part(exponents, 1, place, count, per_row * group_bytes, out)

    return encode_microscale


@helper
def find_scales(tile: Array, group: int, top: np.float32, dtype: int, scales: Array) -> None:
    """Write the scales to `scales[0]` and the bytes that encode them to `scales[1]`."""
    count = tile.size // group
    for i in range(count):
        if group < WIDTH:
            scales[0, i] = largest_of_half(magnitude(load(tile, i // 2 * WIDTH)), i % 2)
        else:
            half = magnitude(load(tile, i * WIDTH))
            scales[0, i] = max(largest_of_half(half, 0), largest_of_half(half, 1))
    for i in range(0, count, WIDTH):
        ideal = round_lanes(load(scales[0], i) / splat(top), dtype)
        if group < WIDTH:
            stored = e4m3_bits(ideal)
            store(scales[0], i, e4m3_value(stored))
            store(scales[1], i, stored)
        else:
            exponent = where(ideal > splat(ZERO), exponents_up(ideal), splat(ZERO))
            store(scales[0], i, powers_of_two(exponent))
            store(scales[1], i, exponent + splat(BIAS))


@helper
def e2m1_bits(x: Any) -> Any:
    """Codes of the nearest E2M1 values, ties to the smaller magnitude; a value that rounds to zero loses its sign."""
    size, code = magnitude(x), splat(ZERO)
    code = where(size > splat(np.float32(0.25)), splat(np.float32(1)), code)
    code = where(size > splat(np.float32(0.75)), splat(np.float32(2)), code)
    code = where(size > splat(np.float32(1.25)), splat(np.float32(3)), code)
    code = where(size > splat(np.float32(1.75)), splat(np.float32(4)), code)
    code = where(size > splat(np.float32(2.5)), splat(np.float32(5)), code)
    code = where(size > splat(np.float32(3.5)), splat(np.float32(6)), code)
    code = where(size > splat(np.float32(5)), splat(np.float32(7)), code)
    return where(x < splat(np.float32(-0.25)), code + splat(np.float32(8)), code)


@helper
def e2m1_value(code: Any) -> Any:
    """Values of E2M1 codes; -0 for 8."""
    negative_code = code >= splat(np.float32(8))
    size = where(negative_code, code - splat(np.float32(8)), code)
    # Codes 0 ... 4 mean half their number, then the steps double: 2, 3, 4, 6.
    value = size * splat(np.float32(0.5))
    value = where(size > splat(np.float32(4)), size - splat(np.float32(2)), value)
    value = where(size > splat(np.float32(6)), splat(E2M1_TOP), value)
    return where(negative_code, negative(value), value)


@cache
def decoder(bits: int, group: int) -> Callable[..., None]:
    """The kernel for elements of 4 or 8 bits in groups of 16 (with E4M3 scales) or 32."""

    @kernel
    def decode_microscale(data: Array, columns: int, out: Array) -> None:
        """Element * scale."""
        per_row, group_bytes = columns // group, group * bits // 8
        row_bytes, table = per_row * (group_bytes + 1), scale_table(group)
        codes, values = np.zeros(WIDTH, np.uint8), np.empty(WIDTH, np.float32)
        for row in range(data.size // row_bytes):
            start = row * row_bytes
            scales = start + per_row * group_bytes
            for e in range(0, columns - WIDTH + 1, WIDTH):
                i = scales + e // group
                scale = splat_halves(table[data[i]], table[data[i + WIDTH // group - 1]])
                code = load_codes(data, start + e * bits // 8, bits)
                store(out, row * columns + e, (e2m1_value(code) if bits == 4 else e4m3_value(code)) * scale)
            if columns % WIDTH:  # a last group of 16, half a vector
                codes[:group_bytes] = data[scales - group_bytes : scales]
                scale = splat(table[data[scales + per_row - 1]])
                store(values, 0, e2m1_value(load_codes(codes, 0, bits)) * scale)
                out[(row + 1) * columns - group : (row + 1) * columns] = values[:group]

    return decode_microscale


@helper
def scale_table(group: int) -> Array:
    """The values of all 256 scale bytes."""
    table = np.empty(256, np.float32)
    for byte in range(256):
        table[byte] = np.float32(byte)
    for byte in range(0, 256, WIDTH):
        code = load(table, byte)
        store(table, byte, e4m3_value(code) if group < WIDTH else powers_of_two(code - splat(BIAS)))
    return table
