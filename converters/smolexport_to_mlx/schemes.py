"""Quantization schemes under the names of mlx-lm, and the portable ones.

Facts: mlx-lm 0.32.2 `utils.py` (which modules are quantized), `convert.py` (the mixed recipes); MLX's modes and groups.
mlx-lm silently leaves a module float if its rows are not a multiple of the group; here such rows get the next smaller
group that fits, and the plan says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from smolexport.conversion import portable
from smolexport.conversion.converter import Choice, has_more_bits, named_scheme
from smolexport.conversion.portable import Storage
from smolexport.model.spec import ModelSpec, Role, Tensor
from smolexport.quant import FORMATS, RowFormat
from smolexport.quant.planar import AFFINE_BITS, GROUPS, MODES, AffineFormat, MicroFormat, Mode, PortableFormat

Dtype = Literal["F32", "F16", "BF16"]
Encoder = Literal["mlx", "recode", "search"]
PIECE = 32  # elements that MLX on a CPU packs at a time, when the groups are smaller
DTYPES: Mapping[str, Dtype] = {"f32": "F32", "f16": "F16", "bf16": "BF16"}


@dataclass(frozen=True)
class Scheme:
    """A way to choose a format for every tensor.

    Attributes:
        name: in `--quant`.
        about: one line about it.
        dtype: float type of scales, norms and biases.
        fixed: the float type that it prescribes; None = the checkpoint's own.
        common: the format of modules that config.json does not name; None for a folder of floats.
    """

    name: str
    about: str
    dtype: Dtype = "BF16"
    fixed: Dtype | None = None
    common: RowFormat | None = None

    @property
    def plain(self) -> RowFormat:
        """The format of what is not quantized."""
        return FORMATS[self.dtype.lower()]

    def choose(self, tensor: Tensor, spec: ModelSpec, bits: portable.Bits | None = None) -> Choice:  # noqa: ARG002
        """What to do with `tensor` of the model `spec`: floats; `bits` of each matrix are for `auto-bits`."""
        return Choice(self.plain)


@dataclass(frozen=True)
class Portable(Scheme):
    """A scheme that `conversion.portable` defines for all formats."""

    def choose(self, tensor: Tensor, spec: ModelSpec, bits: portable.Bits | None = None) -> Choice:  # noqa: ARG002
        """See `Scheme.choose`."""
        formats: dict[Storage, RowFormat] = {
            Storage.INT4: PortableFormat(4), Storage.INT5: AffineFormat(5, portable.BLOCK, "F16", "search"),
            Storage.INT6: AffineFormat(6, portable.BLOCK, "F16", "search"), Storage.INT8: PortableFormat(8),
            Storage.HALF: FORMATS["f16"],
        }  # fmt: skip
        return portable.choose(tensor, self.name, bits, formats.__getitem__)


@dataclass(frozen=True)
class Affine(Scheme):
    """Matrices of `bits` in groups of `group`; with `high` bits where the mixed recipes have more."""

    bits: int = 4
    group: int = 64
    high: int = 0
    encoder: Encoder = "mlx"

    def choose(self, tensor: Tensor, spec: ModelSpec, bits: portable.Bits | None = None) -> Choice:  # noqa: ARG002
        """Affine if the rows are whole groups, of a smaller size if need be; else floats."""
        if not tensor.is_matrix:
            return Choice(self.plain)
        own = self.high if self.high and _has_more_bits(tensor, len(spec.layers)) else self.bits
        fitting = [group for group in GROUPS if group <= self.group and tensor.columns % group == 0]
        requested = AffineFormat(own, self.group, self.dtype, self.encoder)
        return Choice(replace(requested, group=max(fitting)) if fitting else self.plain, requested)


@dataclass(frozen=True)
class Micro(Scheme):
    """Matrices of small floats that share a scale of 8 bits."""

    mode: Mode = "mxfp4"

    def choose(self, tensor: Tensor, spec: ModelSpec, bits: portable.Bits | None = None) -> Choice:  # noqa: ARG002
        """The mode for matrices whose rows are whole groups and that MLX can run, else floats."""
        form = MicroFormat(self.mode, self.dtype)
        if not tensor.is_matrix:
            return Choice(self.plain)
        return Choice(form if form.fits(tensor.columns) and is_whole_pieces(tensor) else self.plain, form)


def is_whole_pieces(tensor: Tensor) -> bool:
    """Whether MLX on a CPU could work with a matrix in groups of 16: there it packs and unpacks 32 elements at a time.

    A linear layer is packed as a whole when a folder is loaded, of an embedding any number of rows is unpacked.
    """
    rows = 1 if tensor.role is Role.EMBED else tensor.shape[0]
    return rows * tensor.shape[-1] % PIECE == 0


def _has_more_bits(tensor: Tensor, layers: int) -> bool:
    """mlx-lm's choice: an untied head, and value and down projections in some layers."""
    if tensor.role is Role.HEAD:
        return True
    return tensor.role in (Role.V, Role.DOWN) and tensor.layer is not None and has_more_bits(tensor.layer, layers)


def setting_of(form: RowFormat) -> dict[str, Any] | Literal[False]:
    """The entry in `quantization` of config.json for a module in the format `form`; False for floats."""
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
    abouts = {**portable.SCHEMES, portable.AUTO_BITS: portable.AUTO_BITS_ABOUT}
    defaults = {4: "; mlx-lm's default", 8: "; nearly lossless"}
    affine = [(f"q{bits}", f"{bits} bits, groups of 64{defaults.get(bits, '')}", bits, 64, 0) for bits in AFFINE_BITS]
    affine += [
        (f"q{bits}_g{group}", f"{bits} bits, groups of {group}", bits, group, 0)
        for bits in AFFINE_BITS
        for group in (32, 128)
    ]
    affine += [
        (f"mixed_{low}_{high}", f"{low} bits, {high} for v and down in some layers and the head", low, 64, high)
        for low, high in ((2, 6), (3, 4), (3, 6), (4, 6))
    ]
    return [
        *(Scheme(name, about, fixed=DTYPES[name]) for name, about in floats.items()),
        *(
            Portable(name, about, fixed="F16", common=PortableFormat(8 if name == "int8" else 4))
            for name, about in abouts.items()
        ),
        *(
            Affine(name, about, common=AffineFormat(bits, group, "F16"), bits=bits, group=group, high=high)
            for name, about, bits, group, high in affine
        ),
        *(Micro(mode, micro[mode], common=MicroFormat(mode, "BF16"), mode=mode) for mode in get_args(Mode)),
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
    """The scheme of that name or alias, in any case; raises UsageError."""
    return named_scheme(name, SCHEMES, ALIASES, "MLX")
