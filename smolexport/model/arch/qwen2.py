"""Qwen2 and Qwen2.5: Llama with biases on the query, key and value projections."""

from __future__ import annotations

from smolexport.model.arch._config import ConfigReader, read_dense, refuse_windows
from smolexport.model.spec import ModelSpec


def read(config: ConfigReader) -> ModelSpec:
    """ModelSpec of a Qwen2ForCausalLM config."""
    refuse_windows(config)
    return read_dense(config, qkv_bias=True)
