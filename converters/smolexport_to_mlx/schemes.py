"""Quantization schemes under the names of mlx-lm, and the portable ones.

Facts: mlx-lm 0.32.2 `utils.py` (which modules are quantized), `convert.py` (the mixed recipes); MLX's modes and groups.
mlx-lm leaves a module float, without a word, when its rows are not a multiple of the group; here such rows get the next
smaller group that fits, and the plan says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, get_args

from smolexport.conversion import portable
from smolexport.conversion.converter import named_scheme
from smolexport.conversion.portable import Storage
from smolexport.model.spec import ModelSpec, Role, Tensor
from smolexport.quant import FORMATS, RowFormat
from smolexport.quant.planar import AFFINE_BITS, GROUPS, MODES, AffineFormat, MicroFormat, Mode, PortableFormat

Dtype = Literal["F32", "F16", "BF16"]
Encoder = Literal["mlx", "recode", "search"]
PIECE = 32  # elements that MLX on a CPU packs at a time, when the groups are smaller
DTYPES: Mapping[str, Dtype] = {"f32": "F32", "f16": "F16", "bf16": "BF16"}


@dataclass(frozen=True)
class Choice:
    """What a scheme makes of one tensor; `wanted` is what the row length did not allow, None when it did."""

    format: RowFormat
    wanted: RowFormat | None = None


class Scheme(Protocol):
    """A way to choose a format for every tensor."""

    @property
    def name(self) -> str:
        """Its name in `--quant`."""
        ...

    @property
    def about(self) -> str:
        """One line about it."""
        ...

    @property
    def dtype(self) -> Dtype | None:
        """The float type that it prescribes; None = the checkpoint's own."""
        ...

    @property
    def common(self) -> RowFormat | None:
        """The format of modules that config.json does not name; None for a folder of floats."""
        ...

    def choose(self, tensor: Tensor, spec: ModelSpec, dtype: Dtype, encoder: Encoder) -> Choice:
        """The format of `tensor` in a folder whose floats are of type `dtype`."""
        ...


@dataclass(frozen=True)
class Floats:
    """Every tensor as a float."""

    name: str
    about: str
    dtype: Dtype

    common: None = None

    def choose(self, tensor: Tensor, spec: ModelSpec, dtype: Dtype, encoder: Encoder) -> Choice:  # noqa: ARG002
        """The one float type."""
        return Choice(FORMATS[dtype.lower()])


@dataclass(frozen=True)
class Portable:
    """The choices that `conversion.portable` makes for every format; `bits` of each matrix are for `auto-bits`."""

    name: str
    about: str
    dtype: Dtype = "F16"
    bits: Mapping[Tensor, int] | None = field(default=None, repr=False)

    @property
    def common(self) -> RowFormat:
        """4 or 8 bits in groups of 32."""
        return PortableFormat(8 if self.name == "int8" else 4)

    def choose(self, tensor: Tensor, spec: ModelSpec, dtype: Dtype, encoder: Encoder) -> Choice:  # noqa: ARG002
        """The lattice for matrices, float16 for the rest."""
        formats: dict[Storage, RowFormat] = {
            Storage.INT4: PortableFormat(4), Storage.INT5: AffineFormat(5, portable.BLOCK, "F16", "search"),
            Storage.INT6: AffineFormat(6, portable.BLOCK, "F16", "search"), Storage.INT8: PortableFormat(8),
            Storage.HALF: FORMATS["f16"],
        }  # fmt: skip
        form = formats[portable.storage_of(tensor, self.name, self.bits)]
        wanted = formats[portable.wanted_of(tensor, self.name, self.bits)]
        return Choice(form, None if form == wanted else wanted)


@dataclass(frozen=True)
class Affine:
    """Matrices of `bits` in groups of `group`; with `high` bits where the mixed recipes want more."""

    name: str
    about: str
    bits: int
    group: int = 64
    high: int = 0
    dtype: None = None

    @property
    def common(self) -> RowFormat:
        """The format of most matrices; its float type does not show in config.json."""
        return AffineFormat(self.bits, self.group, "F16")

    def choose(self, tensor: Tensor, spec: ModelSpec, dtype: Dtype, encoder: Encoder) -> Choice:
        """Affine where the rows are whole groups, of a smaller size if need be; floats for the rest."""
        plain = FORMATS[dtype.lower()]
        if not tensor.is_matrix:
            return Choice(plain)
        bits = self.high if self.high and more_bits(tensor, len(spec.layers)) else self.bits
        columns = tensor.shape[-1]
        fitting = [group for group in GROUPS if group <= self.group and columns % group == 0]
        wanted = AffineFormat(bits, self.group, dtype, encoder)
        if not fitting:
            return Choice(plain, wanted)
        form = AffineFormat(bits, max(fitting), dtype, encoder)
        return Choice(form, None if form == wanted else wanted)


@dataclass(frozen=True)
class Micro:
    """Matrices of small floats that share a scale of 8 bits."""

    name: Mode
    about: str
    dtype: None = None

    @property
    def common(self) -> RowFormat:
        """The format of all matrices whose rows are whole groups."""
        return MicroFormat(self.name, "BF16")

    def choose(self, tensor: Tensor, spec: ModelSpec, dtype: Dtype, encoder: Encoder) -> Choice:  # noqa: ARG002
        """The mode for matrices whose rows are whole groups and that MLX can run then, floats for the rest."""
        plain, form = FORMATS[dtype.lower()], MicroFormat(self.name, dtype)
        if not tensor.is_matrix:
            return Choice(plain)
        fits = form.fits(tensor.shape[-1]) and is_whole_pieces(tensor)
        return Choice(form) if fits else Choice(plain, form)


def is_whole_pieces(tensor: Tensor) -> bool:
    """Whether MLX on a CPU could work with a matrix in groups of 16: there it packs and unpacks 32 elements at a time.

    A linear layer is packed as a whole when a folder is loaded, of an embedding any number of rows is unpacked.
    """
    rows = 1 if tensor.role is Role.EMBED else tensor.shape[0]
    return rows * tensor.shape[-1] % PIECE == 0


def more_bits(tensor: Tensor, layers: int) -> bool:
    """mlx-lm's choice: an untied head, and value and down projections in the layers that matter most."""
    if tensor.role is Role.HEAD:
        return True
    if tensor.role not in (Role.V, Role.DOWN) or tensor.layer is None:
        return False
    i, eighth = tensor.layer, layers // 8
    return i < eighth or i >= 7 * layers // 8 or (i - eighth) % 3 == 2


def setting_of(form: RowFormat) -> dict[str, Any] | Literal[False]:
    """What `quantization` in config.json says of a module in the format `form`; False for floats."""
    match form:
        case AffineFormat(bits=bits, group=group):
            return {"group_size": group, "bits": bits, "mode": "affine"}
        case PortableFormat(bits=bits):
            return {"group_size": portable.BLOCK, "bits": bits, "mode": "affine"}
        case MicroFormat(mode=mode):
            bits, group = MODES[mode]
            return {"group_size": group, "bits": bits, "mode": mode}
    return False


def _schemes() -> list[Scheme]:
    floats = {"f32": "32-bit floats", "f16": "16-bit floats (IEEE half)", "bf16": "16-bit floats (bfloat16)"}
    micro = {
        "mxfp4": "4-bit floats, groups of 32, power-of-two scales (OCP MX)",
        "nvfp4": "4-bit floats, groups of 16, 8-bit float scales",
        "mxfp8": "8-bit floats, groups of 32, power-of-two scales (OCP MX)",
    }
    mixed = ((2, 6), (3, 4), (3, 6), (4, 6))
    defaults = {4: "; mlx-lm's default", 8: "; nearly lossless"}
    return [
        *(Floats(name, about, DTYPES[name]) for name, about in floats.items()),
        *(Portable(name, about) for name, about in portable.SCHEMES.items()),
        Portable(portable.AUTO_BITS, portable.AUTO_BITS_ABOUT),
        *(Affine(f"q{bits}", f"{bits} bits, groups of 64{defaults.get(bits, '')}", bits) for bits in AFFINE_BITS),
        *(
            Affine(f"q{bits}_g{group}", f"{bits} bits, groups of {group}", bits, group)
            for bits in AFFINE_BITS
            for group in (32, 128)
        ),
        *(
            Affine(
                f"mixed_{low}_{high}", f"{low} bits, {high} for v and down in some layers and the head", low, 64, high
            )
            for low, high in mixed
        ),
        *(Micro(mode, micro[mode]) for mode in get_args(Mode)),
    ]


SCHEMES: Mapping[str, Scheme] = {s.name: s for s in _schemes()}
ALIASES: Mapping[str, str] = {
    **{f"q{bits}_g64": f"q{bits}" for bits in AFFINE_BITS},
    "best4": "q4_g32",
    "float32": "f32",
    "float16": "f16",
    "bfloat16": "bf16",
}


def find_scheme(name: str) -> Scheme:
    """The scheme of that name, in any case.

    Raises:
        UsageError: unknown; names the known ones.
    """
    return named_scheme(name, SCHEMES, ALIASES, "MLX")
