"""How llama.cpp sees each architecture: its name, its pairing of rotary dimensions, what its graph cannot compute.

One row per `model_type`.  Facts: llama.cpp `src/models/*.cpp`, `src/llama-model.cpp`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from smolexport.conversion.converter import other_head_dim, refusals, several_ropes
from smolexport.model.rope import Linear, Llama3, Yarn
from smolexport.model.spec import ModelSpec, Role, Tensor


@dataclass(frozen=True)
class Row:
    """Facts about one llama.cpp architecture.

    Attributes:
        name: `general.architecture`.
        pairs: rotary dimensions are adjacent pairs, so rows of q and k are reordered.
        rope_factors: the graph reads `rope_freqs.weight`.
        nope_every: every n-th layer has no rotary embedding, hard-coded; 0 = none.
        computed: what the graph computes beside, or instead of, `COMPUTED`.
        square: the loader assumes num_attention_heads * head_dim == hidden_size.
        since: month of the first llama.cpp release that runs it.
    """

    name: str
    pairs: bool = False
    rope_factors: bool = False
    nope_every: int = 0
    computed: Mapping[str, tuple[object, ...]] = field(default_factory=dict)
    square: bool = False
    since: str = ""


COMPUTED: Mapping[str, tuple[object, ...]] = {
    "mixer.window": (None,), "mixer.o_bias": (False,), "mixer.qk_norm": (False,), "mlp.activation": ("silu",),
    "mlp.bias": (False,),
}  # fmt: skip
LLAMA = Row("llama", pairs=True, rope_factors=True, computed={"mixer.o_bias": (False, True), "mlp.bias": (False, True)})
ROWS: Mapping[str, Row] = {
    "llama": LLAMA,
    "mistral": LLAMA,
    "smollm3": Row("smollm3", pairs=True, nope_every=4, since="July 2025"),
    "qwen2": Row("qwen2", square=True),
    "qwen3": Row("qwen3", computed={"mixer.qk_norm": (True,)}, since="April 2025"),
}

NAMES: Mapping[Role, str] = {
    Role.EMBED: "token_embd",
    Role.NORM_BEFORE_ATTENTION: "blk.{}.attn_norm",
    Role.Q: "blk.{}.attn_q",
    Role.K: "blk.{}.attn_k",
    Role.V: "blk.{}.attn_v",
    Role.Q_NORM: "blk.{}.attn_q_norm",
    Role.K_NORM: "blk.{}.attn_k_norm",
    Role.O: "blk.{}.attn_output",
    Role.NORM_BEFORE_MLP: "blk.{}.ffn_norm",
    Role.GATE: "blk.{}.ffn_gate",
    Role.UP: "blk.{}.ffn_up",
    Role.DOWN: "blk.{}.ffn_down",
    Role.FINAL_NORM: "output_norm",
    Role.HEAD: "output",
}


def output_name(tensor: Tensor) -> str:
    """Name of `tensor` in a GGUF file."""
    return f"{NAMES[tensor.role].format(*tensor.index)}.{tensor.part}"


def check(spec: ModelSpec) -> list[str]:
    """Reasons why llama.cpp would refuse `spec` or silently compute something else; empty if it is fine."""
    row = ROWS.get(spec.model_type)
    if row is None:
        return [f"GGUF has no architecture for model_type '{spec.model_type}'; known: {', '.join(ROWS)}"]
    return refusals(f"llama.cpp's {row.name} graph", spec, {**COMPUTED, **row.computed}, _reasons(spec, row))


def _reasons(spec: ModelSpec, row: Row) -> Iterator[str]:
    rotated = [int(layer.mixer.rope is not None) for layer in spec.layers]
    fixed = [int(not row.nope_every or number % row.nope_every != 0) for number in range(1, len(spec.layers) + 1)]
    if rotated != fixed:
        yield f"applies rotary embeddings on layers {fixed} (hard-coded), the checkpoint on layers {rotated}"
    yield from several_ropes(spec)
    match spec.rope.scaling if spec.rope and not row.rope_factors else None:
        case Llama3():
            yield "cannot apply llama3 rope scaling"
        case Yarn() as yarn if not is_plain_yarn(yarn):
            yield (
                "runs YaRN with beta_fast 32, beta_slow 1 and rounded limits only, the checkpoint has "
                f"{yarn.beta_fast:g}, {yarn.beta_slow:g}, truncate {str(yarn.truncate).lower()}"
            )
    if row.square:
        yield from other_head_dim(spec)


def is_plain_yarn(scaling: Yarn | Linear | Llama3 | None) -> bool:
    """Whether llama.cpp computes this YaRN from its factor alone (the magnitude has a key of its own)."""
    return isinstance(scaling, Yarn) and (scaling.beta_fast, scaling.beta_slow, scaling.truncate) == (32, 1, True)
