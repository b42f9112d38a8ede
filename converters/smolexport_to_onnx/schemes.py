"""Quantization schemes: what each makes of every tensor, and the name of the graph's file.

A graph computes in one float type, float32 or float16; scales, norms and biases are of that type.  Embedding and head
take 8 bits in every 4-bit scheme but `int4-pure`: a tied embedding is the output layer as well, the part of a small
model that 4 bits hurt most.  `int8-dynamic` multiplies integers, which WebAssembly has kernels for.  File names
are those that Transformers.js forms from its `dtype`.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol

from smolexport.conversion import portable
from smolexport.conversion.portable import Storage
from smolexport.errors import UsageError
from smolexport.model.spec import Role, Tensor
from smolexport.quant import FORMATS, RowFormat
from smolexport.quant.planar import ChannelFormat, NBits, PortableNBits

Dtype = Literal["F32", "F16"]
Group = Literal[32, 64, 128]
GROUPS: tuple[Group, ...] = (32, 64, 128)
HALF = FORMATS["f16"]
# The `dtype` of Transformers.js -> the name of the graph that it looks for.
STEMS: Mapping[str, str] = {
    "fp32": "model", "fp16": "model_fp16", "q4": "model_q4", "q4f16": "model_q4f16", "int8": "model_int8",
    "q8": "model_quantized",
}  # fmt: skip


@dataclass(frozen=True)
class Choice:
    """What a scheme makes of one tensor.

    Attributes:
        format: how it is stored.
        via: the format through which its values are rounded first; None = they are not.
        wanted: what the row length did not allow; None when it did.
    """

    format: RowFormat
    via: RowFormat | None = None
    wanted: RowFormat | None = None


class Scheme(Protocol):
    """A way to choose a format for every tensor of one graph."""

    @property
    def name(self) -> str:
        """Its name in `--quant`."""
        ...

    @property
    def about(self) -> str:
        """One line about it."""
        ...

    @property
    def dtype(self) -> Dtype:
        """The float type that the graph computes in."""
        ...

    @property
    def js(self) -> str:
        """The `dtype` under which Transformers.js finds the graph."""
        ...

    @property
    def parts(self) -> tuple[Scheme, ...]:
        """The schemes of the graphs in the folder; itself, where it is one."""
        ...

    def choose(self, tensor: Tensor) -> Choice:
        """The format of `tensor`."""
        ...


@dataclass(frozen=True)
class Floats:
    """Every tensor as a float."""

    name: str
    about: str
    dtype: Dtype
    js: str

    @property
    def parts(self) -> tuple[Scheme, ...]:
        """Itself."""
        return (self,)

    def choose(self, tensor: Tensor) -> Choice:  # noqa: ARG002
        """The one float type."""
        return Choice(FORMATS[self.dtype.lower()])


@dataclass(frozen=True)
class Portable:
    """The choices that `smolexport.conversion.portable` makes for every format; `base` is its name of them.

    `pure` has 4 bits where they take 8, which other formats have no scheme for; `bits` are those of each matrix, for
    `auto-bits`.
    """

    name: str
    about: str
    dtype: Dtype
    js: str
    base: str
    pure: bool = False
    bits: Mapping[Tensor, int] | None = field(default=None, repr=False)

    @property
    def parts(self) -> tuple[Scheme, ...]:
        """Itself."""
        return (self,)

    def choose(self, tensor: Tensor) -> Choice:
        """The lattice for matrices; float16 values for the rest, in the type of the graph."""
        storage = portable.storage_of(tensor, self.base, self.bits)
        wanted = portable.wanted_of(tensor, self.base, self.bits)
        form = self._format(storage)
        via = HALF if storage is Storage.HALF and self.dtype == "F32" else None
        return Choice(form, via, None if storage is wanted else self._format(wanted))

    def _format(self, storage: Storage) -> RowFormat:
        if storage is Storage.HALF:
            return FORMATS[self.dtype.lower()]
        return PortableNBits(4 if self.pure or storage is Storage.INT4 else 8, self.dtype)


@dataclass(frozen=True)
class Blocks:
    """Matrices of 4 bits in blocks of `group` as ONNX Runtime's own quantizer makes them; embedding and head 8 bits."""

    name: str
    about: str
    group: Group
    symmetric: bool
    dtype: Dtype = "F32"
    js: str = "q4"

    @property
    def parts(self) -> tuple[Scheme, ...]:
        """Itself."""
        return (self,)

    def choose(self, tensor: Tensor) -> Choice:
        """Blocks where the rows are whole ones, of a smaller size if need be; floats for the rest."""
        plain = Choice(FORMATS[self.dtype.lower()])
        if not tensor.is_matrix:
            return plain
        columns = tensor.shape[-1]
        if tensor.role in (Role.EMBED, Role.HEAD):
            eight = PortableNBits(8, self.dtype)
            return Choice(eight) if columns % eight.block == 0 else replace(plain, wanted=eight)
        wanted = NBits(4, self.group, self.dtype, self.symmetric)
        for group in reversed(GROUPS):
            if group <= self.group and columns % group == 0:
                return Choice(replace(wanted, group=group), wanted=None if group == self.group else wanted)
        return replace(plain, wanted=wanted)


@dataclass(frozen=True)
class Rows:
    """Matrices of 8 bits with one scale a row, for products of integers; norms and biases as floats."""

    name: str
    about: str
    dtype: Dtype = "F32"
    js: str = "q8"

    @property
    def parts(self) -> tuple[Scheme, ...]:
        """Itself."""
        return (self,)

    def choose(self, tensor: Tensor) -> Choice:
        """Rows may have any length."""
        return Choice(FORMATS[self.dtype.lower()] if not tensor.is_matrix else ChannelFormat())


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
        Floats("f32", "32-bit floats", "F32", "fp32"),
        Floats("f16", "16-bit floats, computed in them: for WebGPU; slower than f32 on a CPU", "F16", "fp16"),
        Portable("int4", portable.SCHEMES["int4"], "F32", "q4", "int4"),
        Portable("int8", portable.SCHEMES["int8"], "F32", "int8", "int8"),
        Portable(portable.AUTO_BITS, portable.AUTO_BITS_ABOUT, "F32", "q4", portable.AUTO_BITS),
        Rows("int8-dynamic", "8 bits, a scale a row, products of integers: for WebAssembly, and long prompts on a CPU"),
        Portable("int4-pure", pure, "F32", "q4", "int4", pure=True),
        Portable("q4f16", half, "F16", "q4f16", "int4"),
        Blocks("int4-asym", f"4 bits, blocks of 32{zeros}", 32, False),
        *(Blocks(f"int4-g{group}", f"4 bits, blocks of {group}{eight}", group, True) for group in GROUPS[1:]),
        *(Blocks(f"int4-asym-g{group}", f"4 bits, blocks of {group}{zeros}", group, False) for group in GROUPS[1:]),
    ]


SCHEMES: Mapping[str, Scheme] = {s.name: s for s in _schemes()}
ALIASES: Mapping[str, str] = {
    "fp32": "f32", "float32": "f32", "fp16": "f16", "float16": "f16", "q4": "int4", "q8": "int8-dynamic",
    "int4-g32": "int4", "int4-asym-g32": "int4-asym", "best4": "int4-asym",
}  # fmt: skip


def find_scheme(name: str) -> Scheme | Several:
    """The scheme of that name, in any case, or several with `+` between them.

    Raises:
        UsageError: unknown; names the known ones.  Two of them in one file; a `+` without one on each side.
    """
    words = name.split("+")
    if len(words) > 1 and not all(map(str.strip, words)):
        raise UsageError(f"--quant {name}: each + should stand between two schemes")
    parts = tuple(map(_find_one, words))
    if len(parts) == 1:
        return parts[0]
    for number, part in enumerate(parts):
        same = [earlier.name for earlier in parts[:number] if earlier.js == part.js]
        if same:
            raise UsageError(f"--quant {name}: {same[0]} and {part.name} have the same file name; take one of them")
    return Several(parts)


def _find_one(name: str) -> Scheme:
    key = name.strip().lower().replace("_", "-")
    key = ALIASES.get(key, key)
    if key not in SCHEMES:
        near = difflib.get_close_matches(key, [*SCHEMES, *ALIASES], 1)
        hint = f"did you mean '{near[0]}'? " if near else ""
        raise UsageError(f"--quant {name}: ONNX has no such scheme; {hint}known: {', '.join(SCHEMES)}")
    return SCHEMES[key]
