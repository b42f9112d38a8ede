"""What the four families share: the sizes under transformers' names, full attention, SiLU."""

from __future__ import annotations

from typing import Any

from smolexport.errors import ConfigError
from smolexport.model.arch._config import ConfigReader

__all__ = ["read_sizes", "refuse_windows"]

MAX_LAYERS = 1024  # work and memory grow with it before a weight is seen, so a damaged config must not set it freely


def read_sizes(
    config: ConfigReader, *, tied_by_default: bool = False, default_head_dim: int | None = None
) -> dict[str, Any]:
    """The keyword arguments of `ModelSpec` that every family spells alike, and `num_hidden_layers` beside them.

    Raises:
        ConfigError: a size that is missing, contradictory, or an activation other than SiLU.
    """
    heads = config.take("num_attention_heads", int)
    hidden = config.take("hidden_size", int)
    if default_head_dim is None and not config.has("head_dim") and hidden % heads:
        raise ConfigError(f"config.json: hidden_size {hidden} is no multiple of num_attention_heads {heads}")
    head_dim = config.take("head_dim", int, default_head_dim or hidden // heads)
    if head_dim % 2:
        raise ConfigError(f"config.json: head_dim {head_dim} is odd; rotary embeddings need pairs")
    kv_heads = config.take("num_key_value_heads", int, heads)
    if heads % kv_heads:
        raise ConfigError(f"config.json: num_attention_heads {heads} is no multiple of num_key_value_heads {kv_heads}")
    layers = config.take("num_hidden_layers", int)
    if layers > MAX_LAYERS:
        raise ConfigError(f"config.json: num_hidden_layers {layers} is more than the {MAX_LAYERS} of any known model")
    config.must_be("hidden_act", "silu", "swish", why="only SiLU is")
    return {
        "vocab_size": config.take("vocab_size", int),
        "hidden_size": hidden,
        "intermediate_size": config.take("intermediate_size", int),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "num_hidden_layers": layers,
        "tied": config.take("tie_word_embeddings", bool, tied_by_default),
        "norm_eps": config.take("rms_norm_eps", float, 1e-6),
        "context_length": config.take("max_position_embeddings", int),
    }


def refuse_windows(config: ConfigReader, layers: int) -> None:
    """Refuse sliding-window attention; `sliding_window` alone does nothing in these families.

    Raises:
        ConfigError: `use_sliding_window` is true or a layer type is not full attention.
    """
    config.must_be("use_sliding_window", False, why="sliding-window attention is not exported")
    config.raw("sliding_window")
    types = config.raw("layer_types")
    if types is not None and types != ["full_attention"] * layers:
        raise ConfigError(f"config.json: layer_types should be {layers} x 'full_attention'; no other kind is")
