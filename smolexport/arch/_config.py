"""Reading config.json: every key is taken, known to be inert, or an error that names it.

A key that changes the computation and is silently ignored makes a file that loads, runs and is wrong.  So the
readers of the architectures *take* keys, and what remains at the end must stand in `INERT` or be null.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any, TypeVar

from smolexport.errors import ConfigError
from smolexport.text import label, show

__all__ = ["ConfigReader"]

T = TypeVar("T", int, float, bool, str)

# Keys that never change what the network computes at inference.
INERT = frozenset(
    """_attn_implementation _attn_implementation_internal _commit_hash _from_model_config _name_or_path architectures
    attention_dropout bos_token_id chunk_size_feed_forward do_sample dtype eos_token_id id2label initializer_range
    is_llama_config label2id max_length max_window_layers model_type name_or_path output_attentions output_hidden_states
    pad_token_id pretraining_tp problem_type return_dict temperature tokenizer_class top_k top_p torch_dtype
    transformers.js_config transformers_version unsloth_fixed unsloth_version use_cache""".split()
)
MAX_INT = 2**31 - 1
MIN_REAL, MAX_REAL = 1e-20, 1e20
# Keys that are inert at one value and change the computation at any other.
ONLY_AT: Mapping[str, tuple[object, ...]] = {
    "add_cross_attention": (False,),
    "is_decoder": (False, True),
    "is_encoder_decoder": (False,),
    "neftune_noise_alpha": (0, 0.0),
    "partial_rotary_factor": (1, 1.0),
    "pruned_heads": ({},),
    "rope_interleaved": (False,),
    "use_mrope": (False,),
}


class ConfigReader:
    """A config whose keys are taken one by one, with their types checked.

    Args:
        config: the parsed config.json.
        ignore: keys that the caller vouches for as inert.
    """

    def __init__(self, config: Mapping[str, Any], ignore: Collection[str] = ()) -> None:
        self.config = config
        self.left = {k for k in config if k not in INERT and k not in ignore}

    def has(self, key: str) -> bool:
        """Whether `key` is present with a value other than null."""
        return self.config.get(key) is not None

    def raw(self, key: str) -> Any:
        """The value of `key` as it stands, None when absent; counts as taken."""
        self.left.discard(key)
        return self.config.get(key)

    def take(self, key: str, kind: type[T], default: T | None = None) -> T:
        """The value of `key` as `kind`; `default` when absent or null.  A size must be positive.

        Raises:
            ConfigError: absent without a default, of another type, or out of range.
        """
        value = self.raw(key)
        if value is None:
            if default is None:
                raise ConfigError(f"config.json: the key '{key}' is missing")
            return default
        return checked(key, value, kind)

    def must_be(self, key: str, *allowed: object, why: str) -> None:
        """Refuse `key` at any value but `allowed` or null."""
        value = self.raw(key)
        if value is not None and not any(value == a and type(value) is type(a) for a in allowed):
            raise ConfigError(f"config.json: {key} = {show(value)} is not supported: {why}")

    def finish(self) -> None:
        """Refuse every key that was not taken, is not known to be inert, and is not null."""
        if self.config.get("quantization_config") is not None:
            raise ConfigError("config.json: quantization_config: the weights are quantized already; take the original")
        for key in sorted(self.left):
            value = self.config[key]
            if value is None or any(value == a and type(value) is type(a) for a in ONLY_AT.get(key, ())):
                continue
            raise ConfigError(
                f"config.json: the key {show(key)} = {show(value)} is not understood and could change what the model "
                f"computes; if it is inert, pass --ignore-config {label(key)}"
            )


def checked(key: str, value: Any, kind: type[T]) -> T:
    """`value` as `kind`: an int serves as a float, a bool never as a number, numbers are finite and positive."""
    if isinstance(value, int) and abs(value) > MAX_INT:
        raise ConfigError(f"config.json: {key} is a number of {value.bit_length()} bits; no model is that large")
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not isinstance(value, kind) or (kind is not bool and isinstance(value, bool)):
        raise ConfigError(f"config.json: {key} = {show(value)} should be of type {kind.__name__}")
    if isinstance(value, (int, float)) and not isinstance(value, bool) and not (0 < value < math.inf):
        raise ConfigError(f"config.json: {key} = {value!r} should be positive and finite")
    if isinstance(value, float) and not MIN_REAL <= value <= MAX_REAL:
        raise ConfigError(f"config.json: {key} = {value!r} is beyond what float32 arithmetic can use")
    return value
