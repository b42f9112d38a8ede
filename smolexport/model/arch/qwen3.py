"""Qwen3 (dense): RMS-normalized query and key heads, head_dim of its own, no biases by default."""

from __future__ import annotations

from smolexport.model.arch._config import ConfigReader, read_dense, refuse_windows
from smolexport.model.spec import ModelSpec


def read(config: ConfigReader) -> ModelSpec:
    """ModelSpec of a Qwen3ForCausalLM config; head_dim is 128 unless the config says otherwise."""
    refuse_windows(config)
    bias = config.take("attention_bias", bool, False)
    return read_dense(config, qkv_bias=bias, o_bias=bias, qk_norm=True, default_head_dim=128)
