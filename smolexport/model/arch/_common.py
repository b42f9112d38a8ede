"""What the families share: sizes under transformers' names, SiLU, one kind of layer throughout."""

from __future__ import annotations

from smolexport.errors import ConfigError
from smolexport.model.arch._config import ConfigReader
from smolexport.model.arch._rope import read_rope
from smolexport.model.spec import Attention, Layer, Mlp, ModelSpec

MAX_LAYERS = 1024  # work and memory grow with it before a weight is seen, so a damaged config must not set it freely


def read_dense(
    config: ConfigReader,
    *,
    qkv_bias: bool = False,
    o_bias: bool = False,
    mlp_bias: bool = False,
    qk_norm: bool = False,
    window: int | None = None,
    default_head_dim: int | None = None,
    default_theta: float = 10_000.0,
    tied_by_default: bool = False,
) -> ModelSpec:
    """A decoder of equal layers whose sizes stand under the names that most families use.

    Args:
        config: reader of config.json.
        qkv_bias, o_bias, qk_norm: as in `Attention`.
        mlp_bias: biases of the feed-forward.
        window: of every layer; one that the context length does not exceed hides nothing and is dropped.
        default_head_dim: where the config has none; None = hidden_size / num_attention_heads.
        default_theta: of the rotary embedding, where the config has none.
        tied_by_default: whether the embedding is the head, where the config does not say.

    Raises:
        ConfigError: a size that is missing or contradictory, or an activation other than SiLU.
    """
    hidden = config.take("hidden_size", int)
    heads, kv_heads, head_dim = _heads(config, hidden, default_head_dim)
    count = config.take("num_hidden_layers", int)
    if count > MAX_LAYERS:
        raise ConfigError(f"config.json: num_hidden_layers {count} is more than the {MAX_LAYERS} of any known model")
    config.must_be("hidden_act", "silu", "swish", why="only SiLU is")
    mlp = Mlp(config.take("intermediate_size", int), bias=mlp_bias)
    context = config.take("max_position_embeddings", int)
    rope = read_rope(config, head_dim, context, default_theta)
    window = window if window is not None and window < context else None
    mixer = Attention(heads, kv_heads, head_dim, rope, window, qkv_bias, o_bias, qk_norm)
    return ModelSpec(
        model_type=config.take("model_type", str),
        vocab_size=config.take("vocab_size", int),
        hidden_size=hidden,
        layers=(Layer(mixer, mlp),) * count,
        tied=config.take("tie_word_embeddings", bool, tied_by_default),
        norm_eps=config.take("rms_norm_eps", float, 1e-6),
        context_length=context,
    )


def _heads(config: ConfigReader, hidden: int, default_head_dim: int | None) -> tuple[int, int, int]:
    """Query heads, key and value heads, elements of each."""
    heads = config.take("num_attention_heads", int)
    if default_head_dim is None and not config.has("head_dim") and hidden % heads:
        raise ConfigError(f"config.json: hidden_size {hidden} is not a multiple of num_attention_heads {heads}")
    head_dim = config.take("head_dim", int, default_head_dim or hidden // heads)
    if head_dim % 2:
        raise ConfigError(f"config.json: head_dim {head_dim} is odd; rotary embeddings need pairs")
    kv_heads = config.take("num_key_value_heads", int, heads)
    if heads % kv_heads:
        raise ConfigError(
            f"config.json: num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}"
        )
    return heads, kv_heads, head_dim


def refuse_windows(config: ConfigReader) -> None:
    """Refuse sliding-window attention; `sliding_window` alone does nothing in these families.

    Raises:
        ConfigError: `use_sliding_window` is true or a layer type is not full attention.
    """
    config.must_be("use_sliding_window", False, why="sliding-window attention is not exported")
    config.raw("sliding_window")
    types, layers = config.raw("layer_types"), config.take("num_hidden_layers", int)
    if types is not None and types != ["full_attention"] * min(layers, MAX_LAYERS):
        raise ConfigError(f"config.json: layer_types should be {layers} x 'full_attention'; no other kind is")
