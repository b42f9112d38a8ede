"""Blocks of ONNX Runtime's MatMulNBits, 4 and 8 bits: value = (code - zero point) * scale."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from smolexport.errors import UsageError
from smolexport.quant.affine import relative
from smolexport.quant.formats import FORMATS, BlockFormat, Part, read_only
from smolexport.quant.planar import LatticeFormat, PartedFormat, Source

LATTICES = {4: "q4_0", 8: "q8_0"}
DTYPES = {"F32": 0, "F16": 1}  # storage types, as the kernels know them
BITS, GROUPS, ENCODERS = (4, 8), (32, 64, 128), ("onnxruntime", "search")


@dataclass(frozen=True)
class NBits(PartedFormat):
    """Blocks of a row with a scale and maybe a zero point.

    The last block of a row may be shorter: it is filled up with zeros, which take their space.

    Attributes:
        bits: 4 or 8 bits a code.
        group: 32, 64 or 128 elements that share a scale and a zero point.
        dtype: type of the scales, `F32` or `F16`; weights are rounded to it first.
        symmetric: whether the zero point is 8 (4 bits) or 128 (8 bits), not stored: what the operator takes without.
        encoder: how scales and zero points are found.  `onnxruntime`: byte for byte as its own quantizer.  `search`:
            those with the least squared error among several, weighted by importance; no block is worse.
    """

    bits: Literal[4, 8]
    group: Literal[32, 64, 128]
    dtype: Literal["F32", "F16"]
    symmetric: bool
    encoder: Literal["onnxruntime", "search"] = "onnxruntime"

    def __post_init__(self) -> None:
        for what, value, known in (
            ("bits", self.bits, BITS),
            ("group", self.group, GROUPS),
            ("dtype", self.dtype, DTYPES),
            ("encoder", self.encoder, ENCODERS),
        ):
            if value not in known:
                raise UsageError(f"MatMulNBits: {what} is {value!r}, must be one of {', '.join(map(str, known))}")

    @property
    def name(self) -> str:
        """E.g. `int4-g32`, or `uint4-g32` with zero points; type of the scales and encoder are not in it."""
        return f"{'' if self.symmetric else 'u'}int{self.bits}-g{self.group}"

    @property
    def block(self) -> int:
        """The group."""
        return self.group

    def fits(self, columns: int) -> bool:
        """Any row does."""
        return columns > 0

    def parts(self, columns: int) -> tuple[Part, ...]:
        """Codes, scales and, unless symmetric, zero points; a row of zero points is whole bytes."""
        self.check_fit(columns)
        blocks = -(-columns // self.block)
        parts = (Part("B", "U8", blocks * self.block * self.bits // 8), Part("scales", self.dtype, blocks))
        zeros = Part("zero_points", "U8", -(-blocks * self.bits // 8))
        return parts if self.symmetric else (*parts, zeros)

    def encode(
        self, rows: NDArray[Any], importance: NDArray[np.float32] | None = None, out: NDArray[np.uint8] | None = None
    ) -> NDArray[np.uint8]:
        """Quantize `rows`.

        Args:
            rows: [n, columns] float32, float16 or bfloat16, C-contiguous and finite, also once rounded to `dtype`.
            importance: [columns] float32, finite and not negative: how much an error in each column matters.  Only
                `search` uses it, the other checks it and goes on as without.
            out: [n, row_bytes] uint8, C-contiguous; made if None.

        Returns:
            `out`.

        Raises:
            UsageError: an argument of another type, shape or layout, or an importance that is negative or not finite.
        """
        source, weights, out = self.source(rows, importance, out)
        if len(rows):
            from smolexport.quant.nbits_kernels import encoder

            search, columns = self.encoder == "search", rows.shape[1]
            if search:
                whole = np.zeros(-(-columns // self.group) * self.group, np.float32)
                whole[:columns] = relative(weights, columns)
                weights = read_only(whole)
            encode = encoder(self.bits, search)
            encode(*source, DTYPES[self.dtype], self.group, columns, self.symmetric, weights, out.reshape(-1))
        return out

    def decode(self, data: NDArray[np.uint8], columns: int) -> NDArray[np.float32]:
        """The values that `data` stands for: (code - zero point) * scale in float32.

        Args:
            data: [n, row_bytes] uint8, C-contiguous.
            columns: elements per row.

        Returns:
            [n, columns] float32.

        Raises:
            UsageError: `data` of another type, shape or layout.
        """
        flat = self.stored(data, self.row_bytes(columns))
        out = np.empty((len(data), columns), np.float32)
        if len(data):
            from smolexport.quant.nbits_kernels import decoder

            decode = decoder(self.bits)
            decode(flat, DTYPES[self.dtype], self.group, columns, self.symmetric, out.reshape(-1))
        return out


@dataclass(frozen=True)
class PortableNBits(LatticeFormat):
    """Blocks of 32 that hold a `lattice` of GGUF: the same integers and scales.

    Attributes:
        bits: 4 (q4_0) or 8 (q8_0).
        dtype: type of the scales: `F16` as in the lattice, or the same values as `F32`.
        zero_points: whether they are stored, all 8 or 128; the operator on a CPU takes them so without.
    """

    bits: Literal[4, 8]
    dtype: Literal["F32", "F16"]
    zero_points: bool = True

    def __post_init__(self) -> None:
        if self.bits not in LATTICES:
            raise UsageError(f"portable blocks: bits is {self.bits!r}, must be 4 or 8")
        if self.dtype not in DTYPES:
            raise UsageError(f"portable blocks: dtype is {self.dtype!r}, must be F32 or F16")

    @property
    def name(self) -> str:
        """`s32x4` or `s32x8`: symmetric, 32 elements, bits."""
        return f"s32x{self.bits}"

    @property
    def block(self) -> int:
        """Elements that share a scale."""
        return self.nbits.block

    @property
    def lattice(self) -> BlockFormat:
        """The GGUF format whose blocks are repacked."""
        return FORMATS[LATTICES[self.bits]]

    @property
    def nbits(self) -> NBits:
        """The format as the operator knows it."""
        return NBits(self.bits, 32, self.dtype, not self.zero_points)

    def parts(self, columns: int) -> tuple[Part, ...]:
        """Codes, scales and, if stored, zero points."""
        self.check_fit(columns)
        return self.nbits.parts(columns)

    def _encode(self, source: Source, columns: int, out: NDArray[np.uint8]) -> None:
        from smolexport.quant.nbits_kernels import portable_encoder

        encode = portable_encoder(self.bits)
        encode(*source, columns // self.block, DTYPES[self.dtype], not self.zero_points, out.reshape(-1))

    def _repack(self, blocks: NDArray[np.uint8], columns: int, out: NDArray[np.uint8]) -> None:
        flat = self.stored(blocks, self.lattice.row_bytes(columns))
        if len(blocks):
            from smolexport.quant.nbits_kernels import repacker

            repack = repacker(self.bits)
            repack(flat, columns // self.block, DTYPES[self.dtype], not self.zero_points, out.reshape(-1))

    def decode(self, data: NDArray[np.uint8], columns: int) -> NDArray[np.float32]:
        """The values that `data` stands for; see `NBits.decode`."""
        self.stored(data, self.row_bytes(columns))
        return self.nbits.decode(data, columns)
