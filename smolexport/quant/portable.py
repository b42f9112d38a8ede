"""Symmetric groups of 32 that are the same weights in a GGUF file and in an MLX folder.

Integers and float16 scales are those of q4_0 or q8_0; here they are stored as MLX stores affine groups, which adds a
bias that follows from the scale.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from smolexport.errors import UsageError
from smolexport.quant.affine import AffineFormat
from smolexport.quant.formats import FORMATS, BlockFormat, Part
from smolexport.quant.planar import LatticeFormat, Source

LATTICES = {4: "q4_0", 8: "q8_0"}


@dataclass(frozen=True)
class PortableFormat(LatticeFormat):
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

    def _encode(self, source: Source, columns: int, out: NDArray[np.uint8]) -> None:
        from smolexport.quant.portable_kernels import encoder

        encoder(self.bits)(*source, columns // self.block, out.reshape(-1))

    def _repack(self, blocks: NDArray[np.uint8], columns: int, out: NDArray[np.uint8]) -> None:
        flat = self.stored(blocks, self.lattice.row_bytes(columns))
        if len(blocks):
            from smolexport.quant.portable_kernels import repacker

            repacker(self.bits)(flat, columns // self.block, out.reshape(-1))

    def decode(self, data: NDArray[np.uint8], columns: int) -> NDArray[np.float32]:
        """The values that `data` stands for; see `AffineFormat.decode`."""
        self.stored(data, self.row_bytes(columns))
        return self.affine.decode(data, columns)
