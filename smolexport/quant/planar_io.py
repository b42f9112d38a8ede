"""Writing a tile of groups to rows that are their parts one after another: codes, which come first, scales and more.

Kernels take groups of all rows as one sequence, a tile of them at a time, so that the work per group is done for WIDTH
groups at once however short a row is.

Notation: place = (row, group in it, groups of a row, bytes of a row), of the first group of a tile.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numpy.typing import NDArray

from smolexport.quant.bitstream import copy_bytes
from smolexport.quant.half import widen_bf16, widen_f16
from smolexport.quant.jit import lean_helper
from smolexport.quant.lane_codes import half_bits, store_halves
from smolexport.quant.lane_floats import brain_bits, brain_rounded, half_rounded
from smolexport.quant.lanes import WIDTH, load, splat, store
from smolexport.quant.source import BF16, F16, F32, fetch


@lean_helper
def round_lanes(a: Any, dtype: int) -> Any:
    """Lanes rounded to a storage type."""
    if dtype == F16:
        return half_rounded(a)
    if dtype == BF16:
        return brain_rounded(a)
    return a


@lean_helper
def round_values(values: NDArray[Any], dtype: int) -> None:
    """Round float32 values, whole lanes of them, to a storage type."""
    for i in range(0, values.size, WIDTH):
        store(values, i, round_lanes(load(values, i), dtype))


@lean_helper
def fetch_rounded(f32: NDArray[Any], u16: NDArray[Any], kind: int, dtype: int, start: int, tile: NDArray[Any]) -> None:
    """Fill `tile` with the elements from `start` on, rounded to a storage type if theirs is another."""
    fetch(f32, u16, kind, start, tile)
    if dtype not in (kind, F32):
        round_values(tile, dtype)


@lean_helper
def store_floats(floats: NDArray[Any], i: int, a: Any, dtype: int) -> None:
    """Write lanes, rounded to a storage type, as that type's numbers i ... i + WIDTH to the memory of `floats`."""
    if dtype == F32:
        store(floats, i, a)
    elif dtype == F16:
        store_halves(floats, i, half_bits(a))
    else:
        store_halves(floats, i, brain_bits(a))


def codes_putter(write: Callable[..., None]) -> Callable[..., None]:
    """A helper that writes codes; `write(out, at, x, a, b, bits)` does for WIDTH of them, a and b being their grid."""

    @lean_helper
    def put_codes(
        tile: NDArray[Any], grids: NDArray[Any], place: Any, count: int, size: int, bits: int, out: NDArray[Any]
    ) -> None:
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
def put_part(part: NDArray[Any], size: int, place: Any, count: int, offset: int, out: NDArray[Any]) -> None:
    """Copy `size` bytes for each of `count` groups to the part that begins `offset` bytes after that of a row.

    `part` is memory of any type.
    """
    row, group, per_row, row_bytes = place
    done = 0
    while done < count:
        run = min(per_row - group, count - done)
        copy_bytes(part, done * size, out, row * row_bytes + offset + group * size, run * size)
        done, row, group = done + run, row + 1, 0


@lean_helper
def take_float(f32: NDArray[Any], u16: NDArray[Any], at: int, dtype: int) -> Any:
    """The value of a storage type at byte `at`, a multiple of its size, of data seen as both."""
    if dtype == F32:
        return f32[at // 4]
    return widen_f16(u16[at // 2]) if dtype == F16 else widen_bf16(u16[at // 2])
