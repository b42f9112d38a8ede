"""Symmetric groups of 32 that are the same weights in a GGUF file and in an MLX folder.

Integers and float16 scales are those of q4_0 or q8_0; here they are stored as MLX stores affine groups, which adds a
bias that follows from the scale.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from smolexport.errors import UsageError
from smolexport.quant.affine import AffineFormat
from smolexport.quant.formats import FORMATS, BlockFormat, Part
from smolexport.quant.parted import PartedFormat

__all__ = ["PortableFormat"]

LATTICES = {4: "q4_0", 8: "q8_0"}
AT_ONCE = 1 << 18  # bytes of blocks between the two steps of `encode`: they stay in the processor's cache


@dataclass(frozen=True)
class PortableFormat(PartedFormat):
    """Affine groups of 32 with float16 scales that hold a `lattice` of GGUF.

    Decoded values equal those of the lattice as numbers; where these have a zero of either sign, these have +0.

    Attributes:
        bits: 4 (q4_0) or 8 (q8_0).
    """

    bits: Literal[4, 8]

    def __post_init__(self) -> None:
        if self.bits not in LATTICES:
            raise UsageError(f"portable groups: bits is {self.bits!r}, must be 4 or 8")

    @property
    def name(self) -> str:
        """`s32x4` or `s32x8`: symmetric, 32 elements, bits."""
        return f"s32x{self.bits}"

    @property
    def block(self) -> int:
        """The group."""
        return self.affine.block

    @property
    def lattice(self) -> BlockFormat:
        """The GGUF format whose blocks are repacked."""
        return FORMATS[LATTICES[self.bits]]

    @property
    def affine(self) -> AffineFormat:
        """The format as MLX knows it."""
        return AffineFormat(self.bits, 32, "F16")

    def parts(self, columns: int) -> tuple[Part, ...]:
        """Codes, scales and biases."""
        self.check_fit(columns)
        return self.affine.parts(columns)

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
        _, _, out = self.source(rows, importance, out)
        columns = rows.shape[1]
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

    def _repack(self, blocks: NDArray[np.uint8], columns: int, out: NDArray[np.uint8]) -> None:
        flat = self.stored(blocks, self.lattice.row_bytes(columns))
        if len(blocks):
            from smolexport.quant import portable_kernels

            kernel = portable_kernels.repack_q4_0 if self.bits == 4 else portable_kernels.repack_q8_0
            kernel(flat, columns // self.block, out.reshape(-1))

    def decode(self, data: NDArray[np.uint8], columns: int) -> NDArray[np.float32]:
        """The values that `data` stands for; see `AffineFormat.decode`."""
        self.stored(data, self.row_bytes(columns))
        return self.affine.decode(data, columns)
