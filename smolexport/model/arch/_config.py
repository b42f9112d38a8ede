"""Reading config.json: every key is taken, known to be inert, or an error that names it.

A key that changes the computation and is silently ignored makes a file that loads, runs and is wrong.  So the
readers of the architectures *take* keys, and what remains at the end must stand in `INERT` or be null.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping
from typing import Any, TypeVar

from smolexport.errors import ConfigError
from smolexport.text import show

T = TypeVar("T", int, float, bool, str)

# Keys that never change what the network computes at inference: what transformers writes of itself, what trainers add …
INERT = frozenset(
    """_attn_implementation _attn_implementation_autoset _attn_implementation_internal _commit_hash
    _flash_attn_2_enabled _from_model_config _name_or_path architectures attention_dropout attn_implementation
    attn_pdrop auto_map bos_token_id chunk_size_feed_forward classifier_dropout cross_attention_hidden_size
    decoder_start_token_id dtype embd_pdrop embedding_dropout eos_token_id finetuning_task gradient_checkpointing
    hidden_dropout hidden_dropout_prob id2label initializer_range is_llama_config keys_to_ignore_at_inference label2id
    max_window_layers model_type name_or_path output_attentions output_hidden_states output_router_logits pad_token_id
    prefix pretraining_tp problem_type resid_pdrop residual_dropout return_dict sep_token_id task_specific_params
    tf_legacy_loss tokenizer_class torch_dtype torchscript transformers.js_config transformers_version unsloth_fixed
    unsloth_version use_bfloat16 use_cache xla_device""".split()
)
# How to sample: transformers before 4.50 wrote these into config.json, where trainers had set them.
SAMPLING = frozenset(
    """bad_words_ids begin_suppress_tokens diversity_penalty do_sample early_stopping encoder_no_repeat_ngram_size
    epsilon_cutoff eta_cutoff exponential_decay_length_penalty forced_bos_token_id forced_eos_token_id length_penalty
    max_length max_new_tokens min_length min_new_tokens min_p no_repeat_ngram_size num_beam_groups num_beams
    num_return_sequences output_scores remove_invalid_values renormalize_logits repetition_penalty
    return_dict_in_generate suppress_tokens temperature top_k top_p typical_p""".split()
)
CLAIMS = frozenset("compression_config quantization quantization_config".split())  # of the weights, checked with them
MOST_NAMED = 6
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
    "tie_encoder_decoder": (False,),
    "use_mrope": (False,),
}


class ConfigReader:
    """A config whose keys are taken one by one, with their types checked.

    Args:
        config: the parsed config.json.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.config = config
        self.left = config.keys() - INERT - SAMPLING - CLAIMS

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
        """Refuse the keys that were not taken, are not known to be inert, and are not null: all of them at once."""
        odd = {key: self.config[key] for key in sorted(self.left) if not self._inert(key)}
        if not odd:
            return
        named = [f"{show(key, 60)} = {show(value, 60)}" for key, value in odd.items()]
        more = f" and {len(named) - MOST_NAMED} more" if len(named) > MOST_NAMED else ""
        flags = " ".join(f"--ignore-config {shlex.quote(key)}" for key in odd if len(key) <= 60)
        many = len(named) > 1
        raise ConfigError(
            f"config.json: {'keys that are' if many else 'a key that is'} not understood and could change what the "
            f"model computes: {', '.join(named[:MOST_NAMED])}{more}; if {'all' if many else 'it'} "
            f"{'are' if many else 'is'} inert, pass {flags}"
        )

    def _inert(self, key: str) -> bool:
        value = self.config[key]
        return value is None or any(value == a and type(value) is type(a) for a in ONLY_AT.get(key, ()))


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
