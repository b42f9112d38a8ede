"""Formats that keep codes and scales apart: what their row formats share.

Notation: n = rows, columns = elements of a row.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from smolexport.errors import UsageError
from smolexport.quant.formats import NO_F32, BlockFormat, Part, RowFormat, as_importance, as_source, read_only

AT_ONCE = 1 << 18  # bytes of blocks between the two steps of an encoding by way of the lattice: they stay in a cache

Source = tuple[NDArray[Any], NDArray[Any], int]  # rows as kernels take them


class PartedFormat(ABC):
    """A row format whose encoded rows are several arrays, one after another: codes, scales, maybe biases."""

    @property
    @abstractmethod
    def name(self) -> str:
        """Name that people see."""

    @property
    @abstractmethod
    def block(self) -> int:
        """Elements that share a scale."""

    @property
    def lattice(self) -> RowFormat | None:
        """None: groups are encoded from weights."""
        return None

    @abstractmethod
    def parts(self, columns: int) -> tuple[Part, ...]:
        """The arrays of an encoded row of `columns` elements; raises UsageError unless it `fits`."""

    @abstractmethod
    def encode(
        self, rows: NDArray[Any], importance: NDArray[np.float32] | None = None, out: NDArray[np.uint8] | None = None
    ) -> NDArray[np.uint8]:
        """Encode [n, columns] to [n, row_bytes]."""

    @abstractmethod
    def decode(self, data: NDArray[np.uint8], columns: int) -> NDArray[np.float32]:
        """Decode [n, row_bytes] to [n, columns]."""

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per element."""
        columns = 128  # whole groups in every format
        return 8 * self.row_bytes(columns) / columns

    def fits(self, columns: int) -> bool:
        """Whether a row of `columns` elements is a whole number of groups."""
        return columns > 0 and columns % self.block == 0

    def row_bytes(self, columns: int) -> int:
        """Bytes of one row; raises UsageError unless it `fits`."""
        return sum(part.nbytes for part in self.parts(columns))

    def size(self, shape: tuple[int, ...]) -> int:
        """Bytes of a tensor of `shape`, whose last axis is the row; raises UsageError unless it `fits`."""
        if not shape:
            raise UsageError(f"{self.name}: a tensor without axes has no rows")
        return prod(shape[:-1]) * self.row_bytes(shape[-1])

    def repack(self, blocks: NDArray[np.uint8], columns: int) -> NDArray[np.uint8]:  # noqa: ARG002
        """There is no lattice to repack; raises UsageError."""
        raise UsageError(f"{self.name}: repacks no other format")

    def check_fit(self, columns: int) -> None:
        """Raise UsageError unless a row of `columns` elements is whole groups."""
        if not self.fits(columns):
            raise UsageError(f"{self.name}: rows of {columns} elements are not whole groups of {self.block}")

    def source(
        self, rows: NDArray[Any], importance: NDArray[np.float32] | None, out: NDArray[np.uint8] | None
    ) -> tuple[Source, NDArray[np.float32], NDArray[np.uint8]]:
        """The arguments of `encode`, checked: rows as kernels take them, importance (empty if None), and `out`.

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
        return (f32, u16, kind), weights, out

    def stored(self, data: NDArray[np.uint8], width: int) -> NDArray[np.uint8]:
        """Encoded rows of `width` bytes as kernels take them; raises UsageError for another type, shape or layout."""
        if data.ndim != 2 or data.shape[1] != width or data.dtype != np.uint8 or not data.flags.c_contiguous:
            found = f"{data.dtype} {data.shape}"
            raise UsageError(f"{self.name}: expected a C-contiguous uint8 array [n, {width}], found {found}")
        return read_only(data.reshape(-1))


class LatticeFormat(PartedFormat):
    """A format that holds the integers and scales of a `lattice`, a format of GGUF."""

    @property
    @abstractmethod
    def lattice(self) -> BlockFormat:
        """The GGUF format whose blocks are repacked."""

    @abstractmethod
    def _encode(self, source: Source, columns: int, out: NDArray[np.uint8]) -> None:
        """Encode one row or more without importance."""

    @abstractmethod
    def _repack(self, blocks: NDArray[np.uint8], columns: int, out: NDArray[np.uint8]) -> None:
        """Repack rows of the lattice."""

    def encode(
        self, rows: NDArray[Any], importance: NDArray[np.float32] | None = None, out: NDArray[np.uint8] | None = None
    ) -> NDArray[np.uint8]:
        """Quantize `rows` as the lattice does, and repack.

        Args:
            rows: [n, columns] float32, float16 or bfloat16, C-contiguous and finite.
            importance: [columns] float32, finite and not negative, as the lattice takes it.
            out: [n, row_bytes] uint8, C-contiguous; made if None.

        Returns:
            `out`.

        Raises:
            UsageError: an argument of another type, shape or layout, or an importance that is negative or not finite.
        """
        source, weights, out = self.source(rows, importance, out)
        columns = rows.shape[1]
        if not self.lattice.weighted or not weights.size:
            if len(rows):
                self._encode(source, columns, out)
            return out
        width = self.lattice.row_bytes(columns)
        step = max(1, AT_ONCE // width)
        blocks = np.empty((min(step, len(rows)), width), np.uint8)
        for start in range(0, len(rows), step):
            some = rows[start : start + step]
            self.lattice.encode(some, importance, blocks[: len(some)])
            self._repack(blocks[: len(some)], columns, out[start : start + step])
        return out

    def repack(self, blocks: NDArray[np.uint8], columns: int) -> NDArray[np.uint8]:
        """Encoded rows from those of the lattice.

        Args:
            blocks: [n, bytes of a row of the lattice] uint8, C-contiguous.
            columns: elements per row.

        Returns:
            [n, row_bytes] uint8.

        Raises:
            UsageError: `blocks` of another type, shape or layout.
        """
        out = np.empty((len(blocks), self.row_bytes(columns)), np.uint8)
        self._repack(blocks, columns, out)
        return out
