"""Arrays in front of the kernels: their checks, and the largest or first non-finite weight."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from smolexport.errors import UsageError

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
# Storage types that the kernels read, with their codes in `kernels.tile`.
KINDS = {np.dtype(np.float32): 0, np.dtype(np.float16): 1, BFLOAT16: 2}
NO_F32 = np.empty(0, np.float32)
NO_U16 = np.empty(0, np.uint16)
NO_F32.flags.writeable = NO_U16.flags.writeable = False  # kernels are compiled for read-only input, once

# Few floats, such as norms and biases, are cast by NumPy sooner than a kernel is compiled.
FEW = 1 << 16
FLOATS: Mapping[str, np.dtype[Any]] = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": BFLOAT16}


def check_rows(name: str, rows: NDArray[Any]) -> None:
    """Raise UsageError unless kernels can read `rows`."""
    if rows.dtype not in KINDS or rows.ndim != 2 or not rows.flags.c_contiguous:
        found = f"{rows.dtype} {rows.shape}{'' if rows.flags.c_contiguous else ', not contiguous'}"
        raise UsageError(f"{name}: expected C-contiguous float32, float16 or bfloat16 [n, columns], found {found}")


def source(rows: NDArray[Any]) -> tuple[NDArray[np.float32], NDArray[np.uint16], int]:
    """Checked `rows` as the kernels take them: flat float32, flat 16-bit words, storage code."""
    kind, flat = KINDS[rows.dtype], rows.reshape(-1)
    return (read_only(flat), NO_U16, kind) if kind == 0 else (NO_F32, read_only(flat.view(np.uint16)), kind)


def checked_importance(name: str, importance: NDArray[np.float32], columns: int) -> NDArray[np.float32]:
    """`importance` as the kernels take it; raises UsageError unless it is [columns] float32, finite and >= 0."""
    if importance.shape != (columns,):
        raise UsageError(f"{name}: importance of shape {importance.shape} for rows of {columns} elements")
    if importance.dtype != np.float32:
        raise UsageError(f"{name}: importance is {importance.dtype}, convert it to float32")
    wrong = np.flatnonzero(~((importance >= 0) & np.isfinite(importance)))
    if wrong.size:
        column = int(wrong[0])
        raise UsageError(f"{name}: importance of column {column} is {importance[column]}, must be finite and >= 0")
    return read_only(np.ascontiguousarray(importance))


def relative(importance: NDArray[np.float32] | None, columns: int, padded: int) -> NDArray[np.float32]:
    """Importance [columns] with 1 as its largest, so that sums of it stay finite, and zeros up to [padded].

    Ones where there is none.
    """
    weights, most = np.zeros(padded, np.float32), 0 if importance is None else importance.max(initial=0)
    weights[:columns] = importance / most if importance is not None and most > 0 else 1
    return read_only(weights)


def output(name: str, shape: tuple[int, int], out: NDArray[np.uint8] | None = None) -> NDArray[np.uint8]:
    """An array for encoded rows: `out`, checked, or a new one."""
    if out is None:
        return np.empty(shape, np.uint8)
    if out.shape != shape or out.dtype != np.uint8 or not out.flags.c_contiguous or not out.flags.writeable:
        raise UsageError(f"{name}: out must be a writable C-contiguous uint8 array of shape {shape}")
    return out


def values(shape: tuple[int, int]) -> NDArray[np.float32]:
    """An array for decoded rows."""
    return np.empty(shape, np.float32)


def encoded(name: str, data: NDArray[np.uint8], width: int) -> NDArray[np.uint8]:
    """Encoded rows of `width` bytes, flat and read-only; raises UsageError for another type, shape or layout."""
    if data.ndim != 2 or data.shape[1] != width or data.dtype != np.uint8 or not data.flags.c_contiguous:
        found = f"{data.dtype} {data.shape}"
        raise UsageError(f"{name}: expected a C-contiguous uint8 array [n, {width}], found {found}")
    return read_only(data.reshape(-1))


def cast(rows: NDArray[Any], dtype: str, out: NDArray[np.uint8]) -> None:
    """Write `rows` as F32, F16 or BF16; values out of range become infinite."""
    with np.errstate(over="ignore", invalid="ignore"):
        out[:] = rows.astype(FLOATS[dtype]).view(np.uint8)


def read_only(array: NDArray[Any]) -> NDArray[Any]:
    """A read-only view; memory-mapped weights are read-only too, so that each kernel is compiled for one kind only."""
    view = array.view()
    view.flags.writeable = False
    return view


def first_nonfinite(rows: NDArray[Any]) -> tuple[int, int] | None:
    """(row, column) of the first NaN or infinity of `rows`, or None.

    Args:
        rows: [n, columns] float32, float16 or bfloat16, C-contiguous.

    Raises:
        UsageError: `rows` of another type or layout.
    """
    check_rows("first_nonfinite", rows)
    if not rows.size or np.isfinite(largest(rows)):
        return None
    row, column = divmod(int(np.argmin(np.isfinite(rows))), rows.shape[1])
    return row, column


def largest(rows: NDArray[Any]) -> float:
    """Largest magnitude, without a copy; infinity or NaN if there is one.

    Floats of one sign are ordered like their bits.
    """
    signed, unsigned = rows.view(f"i{rows.itemsize}"), rows.view(f"u{rows.itemsize}")
    sign = np.array(1 << (8 * rows.itemsize - 1), unsigned.dtype)
    positive = np.array(max(int(signed.max()), 0), unsigned.dtype)
    negative = np.array(int(unsigned.max()) & ~int(sign), unsigned.dtype)
    return float(np.maximum(positive, negative).view(rows.dtype).astype(np.float32))
