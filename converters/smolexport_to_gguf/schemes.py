"""Quantization schemes under llama.cpp's names, choosing tensor by tensor what llama.cpp's quantizer chooses.

A scheme is a base format and exceptions: the output matrix, and the projections that llama.cpp gives more bits in
some layers; a few exceptions depend on whether there is an importance matrix.  Facts: llama.cpp
`src/llama-quant.cpp`, for dense models; the layer arithmetic is integer division throughout.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from smolexport.conversion import portable
from smolexport.conversion.converter import named_scheme
from smolexport.model.spec import ModelSpec, Role, Tensor
from smolexport.quant import FORMATS, BlockFormat
from smolexport_to_gguf.architectures import ROWS

# What a row that is not a multiple of the block gets instead; what does not even fit 32 becomes f16.
FALL_BACK = {"q2_k": "q4_0", "q3_k": "q4_0", "q4_k": "q5_0", "q5_k": "q5_1", "q6_k": "q8_0"}
NORMS = frozenset({Role.NORM_BEFORE_ATTENTION, Role.NORM_BEFORE_MLP, Role.FINAL_NORM, Role.Q_NORM, Role.K_NORM})


@dataclass(frozen=True)
class Place:
    """Where a projection stands: layer `i` of `n`, query heads per key/value head, with an importance matrix or not."""

    i: int
    n: int
    group: int
    weighed: bool

    @property
    def more_bits(self) -> bool:
        """llama.cpp's choice of layers that matter most: the first and last eighth, and every third between."""
        return self.i < self.n // 8 or self.i >= 7 * self.n // 8 or (self.i - self.n // 8) % 3 == 2

    def first(self, share: int) -> bool:
        """Whether the layer is in the first `share`-th part."""
        return self.i < self.n // share


Exception_ = Callable[[Place], str | None]


@dataclass(frozen=True)
class Scheme:
    """One llama.cpp file type.

    Attributes:
        name: e.g. `q4_k_m`.
        base: format of every matrix without an exception.
        file_type: `general.file_type`.
        about: one line for people.
        exceptions: per role, the format for a place, None = base.
        needs_importance: whether llama.cpp refuses it without an importance matrix.
    """

    name: str
    base: str
    file_type: int
    about: str
    exceptions: Mapping[Role, Exception_] = field(default_factory=dict)
    needs_importance: bool = False

    @property
    def quantized(self) -> bool:
        """Whether the base format is quantized."""
        return self.base not in ("f32", "f16", "bf16")

    def wants(self, tensor: Tensor, spec: ModelSpec, weighed: bool = False) -> BlockFormat:
        """The format that this scheme asks for, whatever the row length (but see the output matrix).

        Args:
            tensor: of the model.
            spec: the model.
            weighed: whether there is an importance matrix.
        """
        if tensor.part != "weight" or tensor.role in NORMS:
            return FORMATS["f32"]
        if not self.quantized:
            return FORMATS[self.base]
        output = Role.EMBED if spec.tied else Role.HEAD
        if tensor.role is output:
            return FORMATS[self._output(tensor.shape[-1])]
        group = spec.attention.num_attention_heads // spec.attention.num_key_value_heads
        place = Place(tensor.layer or 0, len(spec.layers), group, weighed)
        exception = self.exceptions.get(tensor.role)
        chosen = (exception(place) if exception else None) or self.base
        if tensor.role is Role.V and _is_70b(spec) and chosen in ("q3_k", "q4_k"):
            chosen = "q5_k"
        return FORMATS[chosen]

    def _output(self, columns: int) -> str:
        if columns % FORMATS[self.base].block:
            return "q8_0"
        return "q8_0" if self.base == "q8_0" else "q6_k"

    def choose(self, tensor: Tensor, spec: ModelSpec, weighed: bool = False) -> tuple[BlockFormat, BlockFormat | None]:
        """(format, wanted): `wanted` is what the row length did not allow, None when it did.  Arguments: `wants`."""
        wanted = self.wants(tensor, spec, weighed)
        columns = tensor.shape[-1]
        if self.quantized and tensor.role is (Role.EMBED if spec.tied else Role.HEAD):
            # The rule of the output matrix has the fall-back built in; name what a fitting row would have got.
            ideal = FORMATS["q8_0" if self.base == "q8_0" else "q6_k"]
            wanted_name = ideal if not ideal.fits(columns) else wanted
            form = _fit(wanted, columns)
            return form, (wanted_name if form is not wanted_name else None)
        form = _fit(wanted, columns)
        return form, (wanted if form is not wanted else None)

    def via(self, tensor: Tensor) -> BlockFormat | None:  # noqa: ARG002
        """The format that values are rounded to before they are stored; None = they are not."""
        return None


@dataclass(frozen=True)
class PortableScheme(Scheme):
    """A scheme whose choices `smolexport.conversion.portable` makes for all formats.  Vectors are f32 here, rounded to
    f16.

    Attributes:
        bits: of each matrix, for `auto-bits`.
    """

    bits: Mapping[Tensor, int] | None = field(default=None, repr=False)

    def wants(self, tensor: Tensor, spec: ModelSpec, weighed: bool = False) -> BlockFormat:  # noqa: ARG002
        """The portable format, whatever the row length."""
        return FORMATS["f32" if not tensor.is_matrix else portable.wanted_of(tensor, self.name, self.bits).value]

    def choose(self, tensor: Tensor, spec: ModelSpec, weighed: bool = False) -> tuple[BlockFormat, BlockFormat | None]:
        """(format, wanted), as in `Scheme.choose`."""
        wanted = self.wants(tensor, spec, weighed)
        form = wanted if not tensor.is_matrix else FORMATS[portable.storage_of(tensor, self.name, self.bits).value]
        return form, (wanted if form is not wanted else None)

    def via(self, tensor: Tensor) -> BlockFormat | None:
        """llama.cpp wants norms and biases as f32; their values are those that f16 can hold."""
        return None if tensor.is_matrix else FORMATS["f16"]


def _fit(form: BlockFormat, columns: int) -> BlockFormat:
    if not form.fits(columns):
        form = FORMATS[FALL_BACK.get(form.name, form.name)]
    return form if form.fits(columns) else FORMATS["f16"]


def _is_70b(spec: ModelSpec) -> bool:
    """llama.cpp's test for the 70B models, whose value projections are small and get more bits."""
    grouped = spec.attention.num_attention_heads != spec.attention.num_key_value_heads
    name = ROWS[spec.model_type].name
    return len(spec.layers) == 80 and ((name == "llama" and grouped) or name == "qwen2")


def _always(name: str) -> Exception_:
    return lambda _: name


def _where_more_bits(name: str) -> Exception_:
    return lambda place: name if place.more_bits else None


def _more_when_weighed(name: str) -> dict[Role, Exception_]:
    """With an importance matrix the first down projections of q4_0 and q5_0 get a minimum as well."""
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
    """The scheme of that name, in any case.

    Raises:
        UsageError: unknown; names the known ones.
    """
    return named_scheme(name, SCHEMES, ALIASES, "GGUF")


def better_schemes(scheme: Scheme, bits: float, sizes: Mapping[str, float]) -> list[str]:
    """Schemes worth taking instead when most tensors of `scheme` fall back: smaller ones, and the finer q8_0.

    Args:
        scheme: the scheme that falls back.
        bits: its effective bits per weight.
        sizes: effective bits per weight of the candidates, f16 among them.
    """
    smaller = [name for name in ("q4_0", "iq4_nl") if name != scheme.name and sizes[name] < bits]
    finer = ["q8_0"] if scheme.name != "q8_0" and bits < sizes["q8_0"] < sizes["f16"] else []
    # Where no row fits a block of 32, every scheme is f16 under another name.
    return [*smaller, *finer] or ["f16"]
