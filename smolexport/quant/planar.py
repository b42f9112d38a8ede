"""Planar formats: codes and scales of a row are stored apart, as in MLX and ONNX Runtime."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from smolexport.errors import UsageError
from smolexport.quant.formats import FORMATS, BlockFormat, Part, RowFormat

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

DTYPES = {"F32": 0, "F16": 1, "BF16": 2}  # storage types, with their codes in `kernels.tile`
AFFINE_BITS = (2, 3, 4, 5, 6, 8)
GROUPS = (32, 64, 128)
MIDDLE = 128  # the zero point of 8 bits

Mode = Literal["mxfp4", "nvfp4", "mxfp8"]
# bits of an element, elements of a group
MODES: Mapping[Mode, tuple[int, int]] = {"mxfp4": (4, 32), "nvfp4": (4, 16), "mxfp8": (8, 32)}


def _check(form: RowFormat, what: str, **known: Collection[Any]) -> None:
    """Raise UsageError unless the fields of a format are among those `known`."""
    for field, values in known.items():
        value = getattr(form, field)
        if value not in values:
            raise UsageError(f"{what}: {field} is {value!r}, must be one of {', '.join(map(str, values))}")


@dataclass(frozen=True)
class AffineFormat(RowFormat):
    """Affine groups of MLX: value = scale * code + bias, with scales and biases of one float type.

    `decode` equals `mx.dequantize` with scales and biases as float32 to the bit.

    Attributes:
        bits: 2, 3, 4, 5, 6 or 8 bits a code.
        group: 32, 64 or 128 elements that share a scale and a bias.
        dtype: type of scales and biases, `F16`, `BF16` or `F32`; weights are rounded to it first.
        encoder: how codes are found.  `mlx`: byte for byte as `mx.quantize` on a CPU.  `recode`: the same scales and
            biases, with codes that take their rounding to `dtype` into account.  `search`: scales and biases with the
            least squared error among several, weighted by importance; no group is worse than with `recode`.
    """

    bits: int
    group: int
    dtype: Literal["F16", "BF16", "F32"]
    encoder: Literal["mlx", "recode", "search"] = "mlx"

    def __post_init__(self) -> None:
        encoders = ("mlx", "recode", "search")
        _check(self, "affine groups", bits=AFFINE_BITS, group=GROUPS, dtype=DTYPES, encoder=encoders)

    @property
    def name(self) -> str:
        """E.g. `affine4-g64`; type and encoder are not in it."""
        return f"affine{self.bits}-g{self.group}"

    @property
    def block(self) -> int:
        """The group."""
        return self.group

    def _parts(self, columns: int) -> tuple[Part, ...]:
        floats = (Part(suffix, self.dtype, columns // self.group) for suffix in ("scales", "biases"))
        return (Part("weight", "U32", columns * self.bits // 32), *floats)

    def _encode(self, rows: NDArray[Any], importance: NDArray[np.float32] | None, out: NDArray[np.uint8]) -> None:
        from smolexport.quant import arrays
        from smolexport.quant.kernels.affine import encoder

        search, columns = self.encoder == "search", rows.shape[1]
        weights = arrays.relative(importance, columns, columns) if search else arrays.NO_F32
        encode, dtype = encoder(self.bits, search), DTYPES[self.dtype]
        encode(arrays.source(rows), dtype, self.group, columns, self.encoder != "mlx", weights, out.reshape(-1))

    def _decode(self, data: NDArray[np.uint8], columns: int, out: NDArray[np.float32]) -> None:
        from smolexport.quant.kernels.affine import decoder

        decoder(self.bits)(data, DTYPES[self.dtype], self.group, columns, out)


@dataclass(frozen=True)
class MicroFormat(RowFormat):
    """Micro-scaled floats of MLX: groups of 4- or 8-bit floats that share an 8-bit scale.

    mode     elements         scale                     group
    mxfp4    E2M1, 4 bits     2^e (E8M0)                32
    nvfp4    E2M1, 4 bits     E4M3                      16
    mxfp8    E4M3, 8 bits     2^e (E8M0)                32

    `encode` equals `mx.quantize` on a CPU byte for byte, except where that writes infinities or zeros: scales below
    2^-127 become 2^-127, and elements of nvfp4 beyond 2^21 times their scale become the largest value.  `decode` equals
    `mx.dequantize` to float32 to the bit.  Importance is not used.

    Attributes:
        mode: `mxfp4`, `nvfp4` or `mxfp8`.
        dtype: `F16`, `BF16` or `F32`, the type of the model; weights are rounded to it first, and scales computed in
            it, as in MLX.
    """

    mode: Mode
    dtype: Literal["F16", "BF16", "F32"]

    def __post_init__(self) -> None:
        _check(self, "micro-scaled floats", mode=MODES, dtype=DTYPES)

    @property
    def name(self) -> str:
        """The mode; the type of the model is not in it."""
        return self.mode

    @property
    def bits(self) -> int:
        """Bits of an element."""
        return MODES[self.mode][0]

    @property
    def block(self) -> int:
        """Elements that share a scale."""
        return MODES[self.mode][1]

    def _parts(self, columns: int) -> tuple[Part, ...]:
        return Part("weight", "U32", columns * self.bits // 32), Part("scales", "U8", columns // self.block)

    def _encode(self, rows: NDArray[Any], _importance: NDArray[np.float32] | None, out: NDArray[np.uint8]) -> None:
        from smolexport.quant import arrays
        from smolexport.quant.kernels.microscale import encoder

        encode = encoder(self.bits, self.block)
        encode(arrays.source(rows), DTYPES[self.dtype], rows.shape[1], out.reshape(-1))

    def _decode(self, data: NDArray[np.uint8], columns: int, out: NDArray[np.float32]) -> None:
        from smolexport.quant.kernels.microscale import decoder

        decoder(self.bits, self.block)(data, columns, out)


@dataclass(frozen=True)
class NBits(RowFormat):
    """Blocks of ONNX Runtime's MatMulNBits: value = (code - zero point) * scale in float32.

    The last block of a row may be shorter: it is padded with zeros, which take their space.

    Attributes:
        bits: 4 or 8 bits a code.
        group: 32, 64 or 128 elements that share a scale and a zero point.
        dtype: type of the scales, `F32` or `F16`; weights are rounded to it first.
        symmetric: whether the zero point is 8 (4 bits) or 128 (8 bits), not stored: the operator's default.
        encoder: how scales and zero points are found.  `onnxruntime`: byte for byte as its own quantizer.  `search`:
            those with the least squared error among several, weighted by importance; no block is worse.
    """

    bits: Literal[4, 8]
    group: Literal[32, 64, 128]
    dtype: Literal["F32", "F16"]
    symmetric: bool
    encoder: Literal["onnxruntime", "search"] = "onnxruntime"

    def __post_init__(self) -> None:
        encoders = ("onnxruntime", "search")
        _check(self, "MatMulNBits", bits=(4, 8), group=GROUPS, dtype=("F32", "F16"), encoder=encoders)

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

    def _parts(self, columns: int) -> tuple[Part, ...]:
        blocks = -(-columns // self.group)
        parts = Part("B", "U8", blocks * self.group * self.bits // 8), Part("scales", self.dtype, blocks)
        return parts if self.symmetric else (*parts, Part("zero_points", "U8", -(-blocks * self.bits // 8)))

    def _encode(self, rows: NDArray[Any], importance: NDArray[np.float32] | None, out: NDArray[np.uint8]) -> None:
        from smolexport.quant import arrays
        from smolexport.quant.kernels.nbits import encoder

        search, columns = self.encoder == "search", rows.shape[1]
        padded = -(-columns // self.group) * self.group
        weights = arrays.relative(importance, columns, padded) if search else arrays.NO_F32
        encode, dtype = encoder(self.bits, search), DTYPES[self.dtype]
        encode(arrays.source(rows), dtype, self.group, columns, self.symmetric, weights, out.reshape(-1))

    def _decode(self, data: NDArray[np.uint8], columns: int, out: NDArray[np.float32]) -> None:
        from smolexport.quant.kernels.nbits import decoder

        decoder(self.bits)(data, DTYPES[self.dtype], self.group, columns, self.symmetric, out)


@dataclass(frozen=True)
class ChannelFormat(RowFormat):
    """Rows of bytes with one scale each, for ONNX Runtime's MatMulInteger: value = (code - 128) * scale in float32.

    Codes are 1 to 255, the largest magnitude of a row 127 steps from 128; ties go to even codes.  They are those of
    `onnxruntime.quantization` for a symmetric weight `per_channel`, plus 128.  Importance is not used.
    """

    @property
    def name(self) -> str:
        """`int8-row`."""
        return "int8-row"

    @property
    def block(self) -> int:
        """1: rows of any length."""
        return 1

    def _parts(self, columns: int) -> tuple[Part, ...]:
        return Part("B", "U8", columns), Part("scales", "F32", 1)

    def _encode(self, rows: NDArray[Any], _importance: NDArray[np.float32] | None, out: NDArray[np.uint8]) -> None:
        from smolexport.quant import arrays
        from smolexport.quant.kernels.channel import encode_channel

        encode_channel(arrays.source(rows), rows.shape[1], out.reshape(-1))

    def _decode(self, data: NDArray[np.uint8], columns: int, out: NDArray[np.float32]) -> None:
        from smolexport.quant.kernels.channel import decode_channel

        decode_channel(data, columns, out)


class _RepackedFormat(RowFormat):
    """Groups of 32 with the integers and scales of q4_0 or q8_0, so that a GGUF file holds the same weights."""

    AT_ONCE = 1 << 18  # bytes of blocks between the two steps of an encoding with importance: they stay in a cache
    bits: Literal[4, 8]
    dtype: Literal["F32", "F16"]

    @property
    @abstractmethod
    def stored(self) -> AffineFormat | NBits:
        """The planar format whose rows these are."""

    @property
    @abstractmethod
    def _third(self) -> int:
        """What follows codes and scales: NOTHING, BIASES or ZERO_POINTS of `kernels.portable`."""

    @property
    def name(self) -> str:
        """`s32x4` or `s32x8`: symmetric, 32 elements, bits."""
        return f"s32x{self.bits}"

    @property
    def block(self) -> int:
        """The group."""
        return 32

    @property
    def canonical(self) -> BlockFormat:
        """The GGUF format whose blocks are repacked."""
        return FORMATS["q4_0" if self.bits == 4 else "q8_0"]

    def _parts(self, columns: int) -> tuple[Part, ...]:
        return self.stored.parts(columns)

    def _encode(self, rows: NDArray[Any], importance: NDArray[np.float32] | None, out: NDArray[np.uint8]) -> None:
        from smolexport.quant import arrays
        from smolexport.quant.kernels.portable import encoder

        columns = rows.shape[1]
        if importance is None or not self.canonical.weighted:
            encode = encoder(self.bits)
            encode(arrays.source(rows), columns // 32, DTYPES[self.dtype], self._third, out.reshape(-1))
            return
        step = max(1, self.AT_ONCE // self.canonical.row_bytes(columns))
        for start in range(0, len(rows), step):
            blocks = self.canonical.encode(rows[start : start + step], importance)
            out[start : start + step] = self.repack(blocks, columns)

    def repack(self, blocks: NDArray[np.uint8], columns: int) -> NDArray[np.uint8]:
        """Encoded rows from those of the canonical format."""
        from smolexport.quant import arrays
        from smolexport.quant.kernels.portable import repacker

        flat = arrays.encoded(self.name, blocks, self.canonical.row_bytes(columns))
        out = arrays.output(self.name, (len(blocks), self.row_bytes(columns)))
        repacker(self.bits)(flat, columns // 32, DTYPES[self.dtype], self._third, out.reshape(-1))
        return out

    def _decode(self, data: NDArray[np.uint8], columns: int, out: NDArray[np.float32]) -> None:
        self.stored._decode(data, columns, out)


@dataclass(frozen=True)
class PortableFormat(_RepackedFormat):
    """Affine groups of 32 with float16 scales and biases that equal blocks of GGUF.

    Decoded values equal those of the blocks, except that every zero is +0.

    Attributes:
        bits: 4 (q4_0) or 8 (q8_0).
    """

    bits: Literal[4, 8]
    dtype = "F16"  # as in the blocks, and no field

    def __post_init__(self) -> None:
        _check(self, "portable groups", bits=(4, 8))

    @property
    def stored(self) -> AffineFormat:
        """The format as MLX reads it."""
        return AffineFormat(self.bits, 32, "F16")

    @property
    def _third(self) -> int:
        return 1  # biases


@dataclass(frozen=True)
class PortableNBits(_RepackedFormat):
    """Groups of 32 of MatMulNBits that equal blocks of GGUF.

    Attributes:
        bits: 4 (q4_0) or 8 (q8_0).
        dtype: type of the scales: `F16` as in the blocks, or the same values as `F32`.
        zero_points: whether they are stored, all 8 or 128; without them the operator on a CPU assumes the same.
    """

    bits: Literal[4, 8]
    dtype: Literal["F32", "F16"]
    zero_points: bool = True

    def __post_init__(self) -> None:
        _check(self, "portable groups", bits=(4, 8), dtype=("F32", "F16"))

    @property
    def stored(self) -> NBits:
        """The format as the operator reads it."""
        return NBits(self.bits, 32, self.dtype, not self.zero_points)

    @property
    def _third(self) -> int:
        return 2 if self.zero_points else 0  # zero points or nothing
