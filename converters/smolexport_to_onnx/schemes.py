"""Quantization schemes: the format of every tensor, and the name of the graph's file.

A graph computes in one float type, float32 or float16; scales, norms and biases are of that type.  Embedding and head
take 8 bits in every 4-bit scheme but `int4-pure`: a tied embedding is the output layer as well, the part of a small
model that 4 bits hurt most.  `int8-dynamic` multiplies integers, which WebAssembly has kernels for.  File names
are those that Transformers.js derives from its `dtype`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from smolexport.conversion import portable
from smolexport.conversion.converter import Choice, named_scheme
from smolexport.conversion.portable import Storage
from smolexport.errors import UsageError
from smolexport.model.spec import ModelSpec, Role, Tensor
from smolexport.quant import FORMATS, RowFormat
from smolexport.quant.planar import ChannelFormat, NBits, PortableNBits

Dtype = Literal["F32", "F16"]
Group = Literal[32, 64, 128]
GROUPS: tuple[Group, ...] = (32, 64, 128)
# The `dtype` of Transformers.js -> the name of the graph that it looks for.
STEMS: Mapping[str, str] = {
    "fp32": "model", "fp16": "model_fp16", "q4": "model_q4", "q4f16": "model_q4f16", "int8": "model_int8",
    "q8": "model_quantized",
}  # fmt: skip


@dataclass(frozen=True)
class Scheme:
    """A way to choose a format for every tensor of one graph.

    Attributes:
        name: in `--quant`.
        about: one line about it.
        dtype: the float type that the graph computes in.
        js: the `dtype` under which Transformers.js finds the graph.
    """

    name: str
    about: str
    dtype: Dtype = "F32"
    js: str = "q4"

    @property
    def parts(self) -> tuple[Scheme, ...]:
        """The schemes of the graphs in the folder."""
        return (self,)

    @property
    def plain(self) -> RowFormat:
        """The format of what is not quantized."""
        return FORMATS[self.dtype.lower()]

    def choose(self, tensor: Tensor, spec: ModelSpec, bits: portable.Bits | None = None) -> Choice:  # noqa: ARG002
        """What to do with `tensor` of the model `spec`: floats; `bits` of each matrix are for `auto-bits`."""
        return Choice(self.plain)


@dataclass(frozen=True)
class Portable(Scheme):
    """The scheme `base` that `smolexport.conversion.portable` defines for all formats.

    `pure` has 4 bits instead of its 8, which no other format has a scheme for.
    """

    base: str = "int4"
    pure: bool = False

    def choose(self, tensor: Tensor, spec: ModelSpec, bits: portable.Bits | None = None) -> Choice:  # noqa: ARG002
        """See `Scheme.choose`; floats are float16 values, in the type of the graph."""
        choice = portable.choose(tensor, self.base, bits, self._format)
        half = choice.format == self.plain and self.dtype == "F32"
        return replace(choice, rounded_through=FORMATS["f16"] if half else None)

    def _format(self, storage: Storage) -> RowFormat:
        if storage is Storage.HALF:
            return self.plain
        return PortableNBits(4 if self.pure or storage is Storage.INT4 else 8, self.dtype)


@dataclass(frozen=True)
class Blocks(Scheme):
    """Matrices of 4 bits in blocks of `group` as ONNX Runtime's own quantizer makes them; embedding and head 8 bits."""

    group: Group = 32
    symmetric: bool = False

    def choose(self, tensor: Tensor, spec: ModelSpec, bits: portable.Bits | None = None) -> Choice:  # noqa: ARG002
        """Blocks if the rows are whole ones, of a smaller size if need be; else floats."""
        if not tensor.is_matrix:
            return Choice(self.plain)
        requested: RowFormat = NBits(4, self.group, self.dtype, self.symmetric)
        smaller: list[RowFormat] = [
            NBits(4, group, self.dtype, self.symmetric) for group in reversed(GROUPS) if group < self.group
        ]
        if tensor.role in (Role.EMBED, Role.HEAD):
            requested, smaller = PortableNBits(8, self.dtype), []
        fitting = (form for form in (requested, *smaller) if tensor.columns % form.block == 0)
        return Choice(next(fitting, self.plain), requested)


@dataclass(frozen=True)
class Rows(Scheme):
    """Matrices of 8 bits with one scale per row, for products of integers; norms and biases as floats."""

    js: str = "q8"

    def choose(self, tensor: Tensor, spec: ModelSpec, bits: portable.Bits | None = None) -> Choice:  # noqa: ARG002
        """Rows may have any length."""
        return Choice(ChannelFormat() if tensor.is_matrix else self.plain)


@dataclass(frozen=True)
class Several:
    """Several graphs in one folder; the first is the one that is run unless another is named."""

    parts: tuple[Scheme, ...]

    @property
    def name(self) -> str:
        """E.g. `int4+f16`."""
        return "+".join(part.name for part in self.parts)

    @property
    def about(self) -> str:
        """What the parts are."""
        return "; ".join(f"{part.name}: {part.about}" for part in self.parts)


def packing_of(form: RowFormat) -> NBits | ChannelFormat | None:
    """The format as the operators know it: MatMulNBits or MatMulInteger; None for floats."""
    match form:
        case NBits() | ChannelFormat():
            return form
        case PortableNBits():
            return form.stored
    return None


def _schemes() -> list[Scheme]:
    eight = "; embedding and head 8 bits"
    zeros = f" with zero points{eight}"
    pure = "4 bits, blocks of 32, embedding and head too: smallest and fastest"
    half = "for WebGPU: the weights of int4, computed in 16-bit floats"
    return [
        Scheme("f32", "32-bit floats", "F32", "fp32"),
        Scheme("f16", "16-bit floats, computed in them: for WebGPU; slower than f32 on a CPU", "F16", "fp16"),
        Portable("int4", portable.SCHEMES["int4"], base="int4"),
        Portable("int8", portable.SCHEMES["int8"], js="int8", base="int8"),
        Portable(portable.AUTO_BITS, portable.AUTO_BITS_ABOUT, base=portable.AUTO_BITS),
        Rows("int8-dynamic", "8 bits, a scale a row, products of integers: for WebAssembly, and long prompts on a CPU"),
        Portable("int4-pure", pure, pure=True),
        Portable("q4f16", half, "F16", "q4f16"),
        Blocks("int4-asym", f"4 bits, blocks of 32{zeros}"),
        *(Blocks(f"int4-g{n}", f"4 bits, blocks of {n}{eight}", group=n, symmetric=True) for n in GROUPS[1:]),
        *(Blocks(f"int4-asym-g{n}", f"4 bits, blocks of {n}{zeros}", group=n) for n in GROUPS[1:]),
    ]


SCHEMES: Mapping[str, Scheme] = {s.name: s for s in _schemes()}
ALIASES: Mapping[str, str] = {
    "fp32": "f32", "float32": "f32", "fp16": "f16", "float16": "f16", "q4": "int4", "q8": "int8-dynamic",
    "int4-g32": "int4", "int4-asym-g32": "int4-asym", "best4": "int4-asym",
}  # fmt: skip


def find_scheme(name: str) -> Scheme | Several:
    """The scheme of that name, in any case, or several with `+` between them; raises UsageError."""
    words = name.split("+")
    if len(words) > 1 and not all(map(str.strip, words)):
        raise UsageError(f"--quant {name}: each + must be between two schemes")
    parts = tuple(named_scheme(word, SCHEMES, ALIASES, "ONNX") for word in words)
    if len(parts) == 1:
        return parts[0]
    for number, part in enumerate(parts):
        same = [earlier.name for earlier in parts[:number] if earlier.js == part.js]
        if same:
            raise UsageError(f"--quant {name}: {same[0]} and {part.name} have the same file name; use one of them")
    return Several(parts)
