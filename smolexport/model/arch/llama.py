"""Llama (SmolLM2, Llama-3.2): rotary on every layer, biases only where the config switches them on."""

from __future__ import annotations

from smolexport.model.arch._common import read_sizes
from smolexport.model.arch._config import ConfigReader
from smolexport.model.arch._rope import read_rope
from smolexport.model.spec import Layer, ModelSpec


def read(config: ConfigReader) -> ModelSpec:
    """ModelSpec of a LlamaForCausalLM config."""
    sizes = read_sizes(config)
    count, attention_bias = sizes.pop("num_hidden_layers"), config.take("attention_bias", bool, False)
    rope = read_rope(config, sizes["head_dim"], sizes["context_length"])
    return ModelSpec(
        model_type="llama",
        layers=(Layer(rope),) * count,
        qkv_bias=attention_bias,
        o_bias=attention_bias,
        mlp_bias=config.take("mlp_bias", bool, False),
        **sizes,
    )
