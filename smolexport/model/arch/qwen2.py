"""Qwen2 and Qwen2.5: Llama with biases on the query, key and value projections."""

from __future__ import annotations

from smolexport.model.arch._common import read_sizes, refuse_windows
from smolexport.model.arch._config import ConfigReader
from smolexport.model.arch._rope import read_rope
from smolexport.model.spec import Layer, ModelSpec


def read(config: ConfigReader) -> ModelSpec:
    """ModelSpec of a Qwen2ForCausalLM config."""
    sizes = read_sizes(config)
    count = sizes.pop("num_hidden_layers")
    refuse_windows(config, count)
    rope = read_rope(config, sizes["head_dim"], sizes["context_length"])
    return ModelSpec(model_type="qwen2", layers=(Layer(rope),) * count, qkv_bias=True, **sizes)
