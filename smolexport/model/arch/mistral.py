"""Mistral: Llama without biases, with one sliding window for all layers where the config sets it."""

from __future__ import annotations

from smolexport.model.arch._config import ConfigReader, read_dense
from smolexport.model.spec import ModelSpec

DEFAULT_WINDOW = 4096  # transformers' own, for a config without the key; null means no window


def read(config: ConfigReader) -> ModelSpec:
    """ModelSpec of a MistralForCausalLM config."""
    full = config.config.get("sliding_window", DEFAULT_WINDOW) is None
    return read_dense(config, window=None if full else config.take("sliding_window", int, DEFAULT_WINDOW))
