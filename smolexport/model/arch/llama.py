"""Llama (SmolLM2, Llama-3.2): rotary on every layer, biases only where the config switches them on."""

from __future__ import annotations

from smolexport.model.arch._config import ConfigReader, read_dense
from smolexport.model.spec import ModelSpec


def read(config: ConfigReader) -> ModelSpec:
    """ModelSpec of a LlamaForCausalLM config."""
    bias = config.take("attention_bias", bool, False)
    return read_dense(config, qkv_bias=bias, o_bias=bias, mlp_bias=config.take("mlp_bias", bool, False))
