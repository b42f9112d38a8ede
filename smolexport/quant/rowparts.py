"""Where the groups of a tile lie in rows that are their parts one after another, and writing scales there.

Kernels take groups of all rows as one sequence, a tile of them at a time, so that the work per group is done for WIDTH
groups at once however short a row is.

Notation: places = int64 [2, groups of a tile], the bytes in the output of a group's codes and of its scale.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from smolexport.quant.half import bits_of, narrow_f16, widen_bf16, widen_f16
from smolexport.quant.jit import helper
from smolexport.quant.lane_floats import brain_rounded, half_rounded
from smolexport.quant.lanes import WIDTH, load, store
from smolexport.quant.source import BF16, F16, F32, fetch

__all__ = ["fetch_rounded", "find_places", "put_floats", "round_lanes", "round_values", "take_float"]


@helper
def find_places(
    first: int, per_row: int, row_bytes: int, group_bytes: int, scale_bytes: int, places: NDArray[Any]
) -> None:
    """Fill `places` for the groups from number `first` on: codes first in the row, then scales."""
    row, group = divmod(first, per_row)
    for i in range(places.shape[1]):
        places[0, i] = row * row_bytes + group * group_bytes
        places[1, i] = row * row_bytes + per_row * group_bytes + group * scale_bytes
        group += 1
        if group == per_row:
            row, group = row + 1, 0


@helper
def round_lanes(a: Any, dtype: int) -> Any:
    """Lanes rounded to a storage type."""
    if dtype == F16:
        return half_rounded(a)
    if dtype == BF16:
        return brain_rounded(a)
    return a


@helper
def round_values(values: NDArray[Any], dtype: int) -> None:
    """Round float32 values, whole lanes of them, to a storage type."""
    for i in range(0, values.size, WIDTH):
        store(values, i, round_lanes(load(values, i), dtype))


@helper
def fetch_rounded(f32: NDArray[Any], u16: NDArray[Any], kind: int, dtype: int, start: int, tile: NDArray[Any]) -> None:
    """Fill `tile` with the elements from `start` on, rounded to a storage type if theirs is another."""
    fetch(f32, u16, kind, start, tile)
    if dtype not in (kind, F32):
        round_values(tile, dtype)


@helper
def put_floats(values: NDArray[Any], dtype: int, places: NDArray[Any], offset: int, out: NDArray[Any]) -> None:
    """Write values that are rounded already `offset` bytes after their `places` (one number a value, even)."""
    if dtype == F32:
        words = out.view(np.uint32)
        for i in range(places.size):
            words[(places[i] + offset) // 4] = bits_of(values[i])
        return
    halves = out.view(np.uint16)
    for i in range(places.size):
        at = (places[i] + offset) // 2
        halves[at] = narrow_f16(values[i]) if dtype == F16 else np.uint16(bits_of(values[i]) >> np.uint32(16))


@helper
def take_float(f32: NDArray[Any], u16: NDArray[Any], at: int, dtype: int) -> Any:
    """The value of a storage type at byte `at`, a multiple of its size, of data seen as both."""
    if dtype == F32:
        return f32[at // 4]
    return widen_f16(u16[at // 2]) if dtype == F16 else widen_bf16(u16[at // 2])
