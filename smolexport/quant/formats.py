"""The block formats as one table, and the checks in front of their kernels.

A row of a tensor is cut into blocks of `block` consecutive elements, each stored in `nbytes` bytes on its own, so rows
and tiles of rows can be encoded independently and in any order.  The numbers are those of GGUF version 3.

Kernels live in the modules named in the table, `encode_NAME`, `encode_NAME_weighted` where an importance changes the
result, and `decode_NAME`.  They are imported, and compiled or read from numba's cache, at the first use of a format:
this module costs numpy only.  The kernels release the GIL.

Notation: n = rows, columns = elements of a row.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from math import prod
from types import MappingProxyType
from typing import Any, Protocol

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from smolexport.errors import UsageError

# Storage types that the kernels read, with the code that `source.fetch` knows them by.
KINDS = {np.dtype(np.float32): 0, np.dtype(np.float16): 1, np.dtype(ml_dtypes.bfloat16): 2}
NO_F32 = np.empty(0, np.float32)
NO_U16 = np.empty(0, np.uint16)
NO_F32.flags.writeable = NO_U16.flags.writeable = False  # kernels are compiled for read-only input, once


# Floats that are few, as norms and biases are, NumPy casts sooner than a kernel is compiled.
FEW = 1 << 16
CASTS: Mapping[str, np.dtype[Any]] = {
    "f32": np.dtype("<f4"), "f16": np.dtype("<f2"), "bf16": np.dtype(ml_dtypes.bfloat16),
}  # fmt: skip
SIZES = {"F32": 4, "F16": 2, "BF16": 2, "U32": 4, "U8": 1}  # bytes, under the names of safetensors


@dataclass(frozen=True)
class Part:
    """One array of an encoded row, where a format keeps codes and scales apart.

    Attributes:
        suffix: what it is called beside the others: `weight`, `scales`, `biases`.
        dtype: safetensors name of its type.
        columns: elements per row.
    """

    suffix: str
    dtype: str
    columns: int

    @property
    def nbytes(self) -> int:
        """Bytes per row."""
        return self.columns * SIZES[self.dtype]


class RowFormat(Protocol):
    """How rows of weights are stored: each row by itself, so rows can be encoded, moved and decoded in any order.

    An encoded row is its parts one after another.  Where several formats hold the same integers and scales in
    different order, they name one of them as their `lattice` and only repack what that one made.
    """

    @property
    def name(self) -> str:
        """Name that people see."""
        ...

    @property
    def block(self) -> int:
        """Elements that share a scale; a row is whole blocks."""
        ...

    @property
    def lattice(self) -> RowFormat | None:
        """The format whose encoded rows `repack` takes; None for most."""
        ...

    def fits(self, columns: int) -> bool:
        """Whether a row of `columns` elements is a whole number of blocks."""
        ...

    def row_bytes(self, columns: int) -> int:
        """Bytes of one row; raises UsageError unless it `fits`."""
        ...

    def size(self, shape: tuple[int, ...]) -> int:
        """Bytes of a tensor of `shape`, whose last axis is the row; raises UsageError unless it `fits`."""
        ...

    def parts(self, columns: int) -> tuple[Part, ...]:
        """The arrays of an encoded row of `columns` elements, in the order in which they stand in it."""
        ...

    def encode(
        self, rows: NDArray[Any], importance: NDArray[np.float32] | None = None, out: NDArray[np.uint8] | None = None
    ) -> NDArray[np.uint8]:
        """Encode [n, columns] to [n, row_bytes]; see `BlockFormat.encode`."""
        ...

    def decode(self, data: NDArray[np.uint8], columns: int) -> NDArray[np.float32]:
        """Decode [n, row_bytes] to [n, columns]; see `BlockFormat.decode`."""
        ...

    def repack(self, blocks: NDArray[np.uint8], columns: int) -> NDArray[np.uint8]:
        """Encoded rows from those of the lattice; raises UsageError for a format without one."""
        ...


@dataclass(frozen=True)
class BlockFormat:
    """How a row of weights is stored, with its codec.

    Attributes:
        name: lower-case name, e.g. `q4_k`.
        block: elements per block.
        nbytes: bytes per block.
        ggml_type: number of the type in a GGUF file.
        home: module with the kernels.
        weighted: whether an importance changes what `encode` writes.
    """

    name: str
    block: int
    nbytes: int
    ggml_type: int
    home: str = field(repr=False)
    weighted: bool = field(repr=False)

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per element."""
        return 8 * self.nbytes / self.block

    @property
    def lattice(self) -> RowFormat | None:
        """None: blocks are encoded from weights."""
        return None

    def parts(self, columns: int) -> tuple[Part, ...]:
        """One array: of floats for f32, f16 and bf16, of bytes for blocks."""
        if self.block == 1:
            return (Part("weight", self.name.upper(), columns),)
        return (Part("weight", "U8", self.row_bytes(columns)),)

    def repack(self, blocks: NDArray[np.uint8], columns: int) -> NDArray[np.uint8]:  # noqa: ARG002
        """There is no lattice to repack; raises UsageError."""
        raise UsageError(f"{self.name}: repacks no other format")

    def fits(self, columns: int) -> bool:
        """Whether a row of `columns` elements is a whole number of blocks."""
        return columns > 0 and columns % self.block == 0

    def row_bytes(self, columns: int) -> int:
        """Bytes of one row; raises UsageError unless it `fits`."""
        if not self.fits(columns):
            raise UsageError(f"{self.name}: rows of {columns} elements are not whole blocks of {self.block}")
        return columns // self.block * self.nbytes

    def size(self, shape: tuple[int, ...]) -> int:
        """Bytes of a tensor of `shape`, whose last axis is the row; raises UsageError unless it `fits`."""
        if not shape:
            raise UsageError(f"{self.name}: a tensor without axes has no rows")
        return prod(shape[:-1]) * self.row_bytes(shape[-1])

    def encode(
        self,
        rows: NDArray[Any],
        importance: NDArray[np.float32] | None = None,
        out: NDArray[np.uint8] | None = None,
    ) -> NDArray[np.uint8]:
        """Quantize `rows`, byte for byte as libggml's `ggml_quantize_chunk` on x86-64.

        Args:
            rows: [n, columns] float32, float16 or bfloat16, C-contiguous and finite.
            importance: [columns] float32, finite and not negative: how much an error in each column matters; None
                stands for the format's own weighting.  Formats without `weighted` check it and go on as without.
            out: [n, row_bytes] uint8, C-contiguous; made if None.

        Returns:
            `out`.

        Raises:
            UsageError: an argument of another type, shape or layout, or an importance that is negative or not finite.
        """
        f32, u16, kind, count, columns = as_source(self.name, rows)
        shape = (count, self.row_bytes(columns))
        if out is None:
            out = np.empty(shape, np.uint8)
        elif out.shape != shape or out.dtype != np.uint8 or not out.flags.c_contiguous or not out.flags.writeable:
            raise UsageError(f"{self.name}: out must be a writable C-contiguous uint8 array of shape {shape}")
        weights = NO_F32 if importance is None else as_importance(self.name, importance, columns)
        suffix = "_weighted" if importance is not None and self.weighted else ""
        if self.block == 1 and rows.size <= FEW:
            with np.errstate(over="ignore", invalid="ignore"):
                out[:] = rows.astype(CASTS[self.name]).view(np.uint8)
        elif count:
            self._kernel(f"encode_{self.name}{suffix}")(f32, u16, kind, weights, columns, out.reshape(-1))
        return out

    def decode(self, data: NDArray[np.uint8], columns: int) -> NDArray[np.float32]:
        """The values that `data` stands for, equal to the bit to libggml's.

        Args:
            data: [n, row_bytes] uint8, C-contiguous.
            columns: elements per row.

        Returns:
            [n, columns] float32.

        Raises:
            UsageError: `data` of another type, shape or layout.
        """
        width = self.row_bytes(columns)
        if data.ndim != 2 or data.shape[1] != width or data.dtype != np.uint8 or not data.flags.c_contiguous:
            found = f"{data.dtype} {data.shape}"
            raise UsageError(f"{self.name}: expected a C-contiguous uint8 array [n, {width}], found {found}")
        if self.block == 1 and data.shape[0] * columns <= FEW:
            return data.view(CASTS[self.name]).astype(np.float32)
        out = np.empty((data.shape[0], columns), np.float32)
        if len(data):
            self._kernel(f"decode_{self.name}")(read_only(data.reshape(-1)), out.reshape(-1))
        return out

    def _kernel(self, name: str) -> Callable[..., None]:
        kernel: Callable[..., None] = getattr(import_module(f"smolexport.quant.{self.home}"), name)
        return kernel


def first_nonfinite(rows: NDArray[Any]) -> tuple[int, int] | None:
    """(row, column) of the first NaN or infinity of `rows`, or None.

    Args:
        rows: [n, columns] float32, float16 or bfloat16, C-contiguous.

    Raises:
        UsageError: `rows` of another type or layout.
    """
    as_source("first_nonfinite", rows)
    if not rows.size or np.isfinite(largest(rows)):
        return None
    row, column = divmod(int(np.argmin(np.isfinite(rows))), rows.shape[1])
    return row, column


def largest(rows: NDArray[Any]) -> float:
    """Largest magnitude, beyond all others that of an infinity or a NaN; without a copy.

    Among floats of one sign the order of the bits is that of the magnitudes.
    """
    signed, unsigned = rows.view(f"i{rows.itemsize}"), rows.view(f"u{rows.itemsize}")
    sign = np.array(1 << (8 * rows.itemsize - 1), unsigned.dtype)
    positive = np.array(max(int(signed.max()), 0), unsigned.dtype)
    negative = np.array(int(unsigned.max()) & ~int(sign), unsigned.dtype)
    return float(np.maximum(positive, negative).view(rows.dtype).astype(np.float32))


def as_source(name: str, rows: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any], int, int, int]:
    """`rows` as the kernels take it: flat float32, flat 16-bit words, storage code, n, columns."""
    kind = KINDS.get(rows.dtype)
    if kind is None or rows.ndim != 2 or not rows.flags.c_contiguous:
        found = f"{rows.dtype} {rows.shape}{'' if rows.flags.c_contiguous else ', not contiguous'}"
        raise UsageError(f"{name}: expected C-contiguous float32, float16 or bfloat16 [n, columns], found {found}")
    flat = rows.reshape(-1)
    words = read_only(flat if kind == 0 else flat.view(np.uint16))
    return words if kind == 0 else NO_F32, NO_U16 if kind == 0 else words, kind, rows.shape[0], rows.shape[1]


def as_importance(name: str, importance: NDArray[np.float32], columns: int) -> NDArray[np.float32]:
    """`importance`, checked."""
    if importance.shape != (columns,):
        raise UsageError(f"{name}: importance of shape {importance.shape} for rows of {columns} elements")
    if importance.dtype != np.float32:
        raise UsageError(f"{name}: importance is {importance.dtype}, convert it to float32")
    wrong = np.flatnonzero(~((importance >= 0) & np.isfinite(importance)))
    if wrong.size:
        column = int(wrong[0])
        raise UsageError(f"{name}: importance of column {column} is {importance[column]}, must be finite and >= 0")
    return read_only(np.ascontiguousarray(importance))


def read_only(array: NDArray[Any]) -> NDArray[Any]:
    """A view that cannot be written; memory-mapped weights are so already, and a kernel is compiled for one kind."""
    view = array.view()
    view.flags.writeable = False
    return view


FORMATS: Mapping[str, BlockFormat] = MappingProxyType(
    {
        row[0]: BlockFormat(*row)
        for row in (
            # name   block bytes type  home        weighted
            ("f32", 1, 4, 0, "plain", False),
            ("f16", 1, 2, 1, "plain", False),
            ("bf16", 1, 2, 30, "plain", False),
            ("q8_0", 32, 34, 8, "q8", False),
            ("q4_0", 32, 18, 2, "legacy_quants", True),
            ("q4_1", 32, 20, 3, "legacy_quants", True),
            ("q5_0", 32, 22, 6, "legacy_quants", True),
            ("q5_1", 32, 24, 7, "legacy_quants", True),
            ("iq4_nl", 32, 18, 20, "iq4", True),
            ("q2_k", 256, 84, 10, "q2_k", True),
            ("q3_k", 256, 110, 11, "q3_k", True),
            ("q4_k", 256, 144, 12, "q4_k_q5_k", True),
            ("q5_k", 256, 176, 13, "q4_k_q5_k", True),
            ("q6_k", 256, 210, 14, "q6_k", True),
        )
    }
)
