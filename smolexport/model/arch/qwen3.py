"""Qwen3 (dense): RMS-normalised query and key heads, head_dim of its own, no biases by default."""

from __future__ import annotations

from smolexport.model.arch._common import read_sizes, refuse_windows
from smolexport.model.arch._config import ConfigReader
from smolexport.model.arch._rope import read_rope
from smolexport.model.spec import Layer, ModelSpec


def read(config: ConfigReader) -> ModelSpec:
    """ModelSpec of a Qwen3ForCausalLM config; head_dim is 128 unless the config says otherwise."""
    sizes = read_sizes(config, default_head_dim=128)
    count, attention_bias = sizes.pop("num_hidden_layers"), config.take("attention_bias", bool, False)
    refuse_windows(config, count)
    rope = read_rope(config, sizes["head_dim"], sizes["context_length"])
    return ModelSpec(
        model_type="qwen3",
        layers=(Layer(rope),) * count,
        qkv_bias=attention_bias,
        o_bias=attention_bias,
        qk_norm=True,
        **sizes,
    )
