"""Affine groups: value = scale * code + bias.  A row is its codes as one bit stream, its scales, its biases.

Kernels are compiled for a number of bits, so that packing is shifts by constants; the rest are arguments.

Notation: group = elements that share a scale (32, 64 or 128); grid = scale and bias of a group, [0] and [1] of `grids`;
dtype = storage type of the grids, as a code of `source`; top = largest code.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from smolexport.quant.affine_grids import find_grids, position
from smolexport.quant.affine_search import search_grids
from smolexport.quant.bitstream import load_codes, store_codes
from smolexport.quant.jit import kernel, lean_helper
from smolexport.quant.lanes import WIDTH, load, splat, store
from smolexport.quant.planar_io import codes_putter, fetch_rounded, put_part, round_values, store_floats, take_float
from smolexport.quant.source import F32
from smolexport.quant.tile import aligned

TILE = 2048  # elements, more where that is less than WIDTH groups


@lean_helper
def put_nearest(out: NDArray[Any], at: int, x: Any, scale: Any, bias: Any, bits: int) -> None:
    """Write codes."""
    store_codes(out, at, position(x, scale, bias), bits)


put_codes = codes_putter(put_nearest)


@cache
def encoder(bits: int, search: bool) -> Callable[..., None]:
    """The kernel for `bits` bits, with or without the search for grids."""
    top = (1 << bits) - 1

    @kernel
    def encode_affine(
        f32: NDArray[Any],
        u16: NDArray[Any],
        kind: int,
        dtype: int,
        group: int,
        columns: int,
        recode: bool,
        importance: NDArray[Any],
        out: NDArray[Any],
    ) -> None:
        """Codes follow from the grids as computed or, to `recode`, from the grids as stored; a search implies that."""
        step = max(TILE // group, WIDTH)
        buffer, grids = aligned(step * group), np.zeros((2, step), np.float32)
        scales, biases = np.empty((2, step), np.float32)
        per_row, group_bytes, scale_bytes = columns // group, group * bits // 8, 4 if dtype == F32 else 2
        end = per_row * group_bytes
        row_bytes = end + 2 * per_row * scale_bytes
        groups = out.size // row_bytes * per_row
        for first in range(0, groups, step):
            count, place = min(step, groups - first), (first // per_row, first % per_row, per_row, row_bytes)
            fetch_rounded(f32, u16, kind, dtype, first * group, buffer[: count * group])
            find_grids(buffer, group, top, grids)
            if recode:
                round_values(grids.reshape(-1), dtype)
            if search:
                search_grids(buffer, count, group, top, dtype, importance, first, grids)
            put_codes(buffer, grids, place, count, group, bits, out)
            for i in range(0, count, WIDTH):
                store_floats(scales, i, load(grids[0], i), dtype)
                store_floats(biases, i, load(grids[1], i), dtype)
            put_part(scales, scale_bytes, place, count, end, out)
            put_part(biases, scale_bytes, place, count, end + per_row * scale_bytes, out)

    return encode_affine


@cache
def decoder(bits: int) -> Callable[..., None]:
    """The kernel for `bits` bits."""

    @kernel
    def decode_affine(data: NDArray[Any], dtype: int, group: int, columns: int, out: NDArray[Any]) -> None:
        """scale * code, rounded, + bias."""
        per_row, group_bytes, scale_bytes = columns // group, group * bits // 8, 4 if dtype == F32 else 2
        row_bytes = per_row * (group_bytes + 2 * scale_bytes)
        f32, u16 = data.view(np.float32), data.view(np.uint16)
        for row in range(data.size // row_bytes):
            start = row * row_bytes
            scales = start + per_row * group_bytes
            for i in range(per_row):
                scale = splat(take_float(f32, u16, scales + i * scale_bytes, dtype))
                bias = splat(take_float(f32, u16, scales + (per_row + i) * scale_bytes, dtype))
                for e in range(i * group, (i + 1) * group, WIDTH):
                    code = load_codes(data, start + e * bits // 8, bits)
                    store(out, row * columns + e, scale * code + bias)

    return decode_affine
