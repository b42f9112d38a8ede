"""Quantization schemes under llama.cpp's names, choosing tensor by tensor what llama.cpp's quantizer chooses.

A scheme is a base format and exceptions: the output matrix, and the projections that llama.cpp gives more bits in
some layers; a few exceptions depend on whether there is an importance matrix.  Facts: llama.cpp
`src/llama-quant.cpp`, for dense models; the layer arithmetic is integer division throughout.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from smolexport.conversion import portable
from smolexport.conversion.converter import Choice, has_more_bits, named_scheme
from smolexport.model.spec import ModelSpec, Role, Tensor
from smolexport.quant import FORMATS, BlockFormat
from smolexport_to_gguf.architectures import ROWS

# The format of rows that are not a multiple of the block; rows that are not a multiple of 32 become f16.
FALL_BACK = {"q2_k": "q4_0", "q3_k": "q4_0", "q4_k": "q5_0", "q5_k": "q5_1", "q6_k": "q8_0"}
NORMS = frozenset({Role.NORM_BEFORE_ATTENTION, Role.NORM_BEFORE_MLP, Role.FINAL_NORM, Role.Q_NORM, Role.K_NORM})


@dataclass(frozen=True)
class Projection:
    """A matrix of layer `i` of `n`, in a model with `group` query heads per key/value head, with an imatrix or not."""

    i: int
    n: int
    group: int
    weighed: bool

    def first(self, share: int) -> bool:
        """Whether the layer is in the first `share`-th part."""
        return self.i < self.n // share


Exception_ = Callable[[Projection], str | None]


@dataclass(frozen=True)
class Scheme:
    """One llama.cpp file type.

    Attributes:
        name: e.g. `q4_k_m`.
        base: format of every matrix without an exception.
        file_type: `general.file_type`.
        about: one line for people.
        exceptions: per role, the format of a projection, None = base.
        needs_importance: whether llama.cpp refuses it without an importance matrix.
        weighed: whether there is an importance matrix.
    """

    name: str
    base: str
    file_type: int
    about: str
    exceptions: Mapping[Role, Exception_] = field(default_factory=dict)
    needs_importance: bool = False
    weighed: bool = False

    @property
    def quantized(self) -> bool:
        """Whether the base format is quantized."""
        return self.base not in ("f32", "f16", "bf16")

    def choose(self, tensor: Tensor, spec: ModelSpec, bits: portable.Bits | None = None) -> Choice:  # noqa: ARG002
        """What to do with `tensor` of the model `spec`; `bits` of each matrix are for `auto-bits`."""
        requested = self._requested(tensor, spec)
        return Choice(_fit(requested, tensor.shape[-1]), requested)

    def _requested(self, tensor: Tensor, spec: ModelSpec) -> BlockFormat:
        if tensor.part != "weight" or tensor.role in NORMS:
            return FORMATS["f32"]
        if not self.quantized:
            return FORMATS[self.base]
        if tensor.role is (Role.EMBED if spec.tied else Role.HEAD):
            return FORMATS["q8_0" if self.base == "q8_0" else "q6_k"]
        group = spec.attention.num_attention_heads // spec.attention.num_key_value_heads
        exception = self.exceptions.get(tensor.role)
        projection = Projection(tensor.layer or 0, len(spec.layers), group, self.weighed)
        chosen = (exception(projection) if exception else None) or self.base
        if tensor.role is Role.V and _is_70b(spec) and chosen in ("q3_k", "q4_k"):
            chosen = "q5_k"
        return FORMATS[chosen]


@dataclass(frozen=True)
class PortableScheme(Scheme):
    """A scheme that `smolexport.conversion.portable` defines for all formats."""

    def choose(self, tensor: Tensor, spec: ModelSpec, bits: portable.Bits | None = None) -> Choice:  # noqa: ARG002
        """See `Scheme.choose`."""
        if not tensor.is_matrix:  # llama.cpp reads norms and biases as f32 only
            return Choice(FORMATS["f32"], rounded_through=FORMATS["f16"])
        return portable.choose(tensor, self.name, bits, lambda storage: storage.canonical)


def _fit(form: BlockFormat, columns: int) -> BlockFormat:
    fitting = (form, FORMATS[FALL_BACK.get(form.name, form.name)], FORMATS["f16"])
    return next(each for each in fitting if each.fits(columns))


def _is_70b(spec: ModelSpec) -> bool:
    """llama.cpp's test for the 70B models, whose value projections are small and get more bits."""
    grouped = spec.attention.num_attention_heads != spec.attention.num_key_value_heads
    name = ROWS[spec.model_type].name
    return len(spec.layers) == 80 and ((name == "llama" and grouped) or name == "qwen2")


def _always(name: str) -> Exception_:
    return lambda _: name


def _where_more_bits(name: str) -> Exception_:
    return lambda p: name if has_more_bits(p.i, p.n) else None


def _more_when_weighed(name: str) -> dict[Role, Exception_]:
    """With an importance matrix the first down projections of q4_0 and q5_0 get a minimum too."""
    better = {"q4_0": "q4_1", "q5_0": "q5_1"}.get(name)
    return {Role.DOWN: lambda p: better if p.weighed and p.first(8) else None} if better else {}


def _schemes() -> list[Scheme]:
    v, down, o = Role.V, Role.DOWN, Role.O
    plain = [
        ("f32", 0, "32-bit floats"),
        ("f16", 1, "16-bit floats (IEEE half)"),
        ("bf16", 32, "16-bit floats (bfloat16)"),
        ("q8_0", 7, "8 bits, blocks of 32; nearly lossless"),
        ("q4_0", 2, "4 bits, blocks of 32; fits every row, fast on CPUs and phones"),
        ("q4_1", 3, "4 bits with minimum, blocks of 32"),
        ("q5_0", 8, "5 bits, blocks of 32"),
        ("q5_1", 9, "5 bits with minimum, blocks of 32"),
        ("q6_k", 18, "6 bits, super-blocks of 256"),
    ]
    return [
        *(Scheme(name, name, code, about, _more_when_weighed(name)) for name, code, about in plain),
        PortableScheme("int8", "q8_0", 7, portable.SCHEMES["int8"]),
        PortableScheme("int4", "q4_0", 2, portable.SCHEMES["int4"]),
        PortableScheme(portable.AUTO_BITS, "q4_0", 2, portable.AUTO_BITS_ABOUT),
        Scheme("q2_k", "q2_k", 10, "2 bits, super-blocks of 256; small and lossy", {
            v: lambda p: "q4_k" if p.group >= 4 else "q3_k", down: _always("q3_k"), o: _always("q3_k")}),
        Scheme("q2_k_s", "q2_k", 21, "2 bits, super-blocks of 256, small mix; only with --imatrix", {
            v: lambda p: "q4_k" if p.group >= 4 else None, down: lambda p: "q4_k" if p.first(8) else None},
               needs_importance=True),
        Scheme("q3_k_s", "q3_k", 11, "3 bits, super-blocks of 256, small mix"),
        Scheme("q3_k_m", "q3_k", 12, "3 bits, super-blocks of 256, medium mix", {
            v: lambda p: "q5_k" if p.i < 2 else "q4_k",
            down: lambda p: "q5_k" if p.first(16) else "q4_k", o: _always("q4_k")}),
        Scheme("q3_k_l", "q3_k", 13, "3 bits, super-blocks of 256, large mix", dict.fromkeys(
            (v, down, o), _always("q5_k"))),
        Scheme("q4_k_s", "q4_k", 14, "4 bits, super-blocks of 256, small mix", {
            v: lambda p: "q5_k" if p.i < 4 else None, down: lambda p: "q5_k" if p.first(8) else None}),
        Scheme("q4_k_m", "q4_k", 15, "4 bits, super-blocks of 256, medium mix; the usual choice from 1B on",
               dict.fromkeys((v, down), _where_more_bits("q6_k"))),
        Scheme("q5_k_s", "q5_k", 16, "5 bits, super-blocks of 256, small mix"),
        Scheme("q5_k_m", "q5_k", 17, "5 bits, super-blocks of 256, medium mix",
               dict.fromkeys((v, down), _where_more_bits("q6_k"))),
        Scheme("iq4_nl", "iq4_nl", 25, "4 bits on a non-linear grid, blocks of 32; fits every row", {
            v: lambda p: "q5_k" if p.group >= 4 else None,
            down: lambda p: "q5_k" if p.first(8) and not p.weighed else None}),
    ]  # fmt: skip


SCHEMES: Mapping[str, Scheme] = {s.name: s for s in _schemes()}
ALIASES: Mapping[str, str] = {"q3_k": "q3_k_m", "q4_k": "q4_k_m", "q5_k": "q5_k_m", "best4": "q4_k_m"}


def find_scheme(name: str) -> Scheme:
    """The scheme of that name or alias, in any case; raises UsageError."""
    return named_scheme(name, SCHEMES, ALIASES, "GGUF")


def better_schemes(scheme: Scheme, bits: float, sizes: Mapping[str, float]) -> list[str]:
    """Better schemes if most tensors of `scheme`, at `bits` per weight, fall back: smaller ones, and the finer q8_0.

    `sizes` are the bits per weight of the candidates, f16 among them.
    """
    smaller = [name for name in ("q4_0", "iq4_nl") if name != scheme.name and sizes[name] < bits]
    finer = ["q8_0"] if scheme.name != "q8_0" and bits < sizes["q8_0"] < sizes["f16"] else []
    # Where no row fits a block of 32, every scheme is f16 under another name.
    return [*smaller, *finer] or ["f16"]
