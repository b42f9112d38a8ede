"""Reading config.json: every key is taken, known to be inert, or an error that names it.

A key that changes the computation and is silently ignored makes a file that loads, runs and is wrong.  So the
architectures *take* keys, and whatever remains at the end must be in `INERT` or null.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping
from typing import Any, TypeVar

from smolexport.errors import ConfigError
from smolexport.model.rope import Linear, Llama3, Rope, Scaling, Yarn
from smolexport.model.spec import Attention, Layer, Mlp, ModelSpec
from smolexport.text import show

T = TypeVar("T", int, float, bool, str)

# Keys that never change what the network computes at inference: bookkeeping of transformers and of trainers …
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
CLAIMS = frozenset("compression_config quantization quantization_config".split())  # checked with the weights
MOST_NAMED = 6
MAX_INT = 2**31 - 1
MAX_LAYERS = 1024  # memory and time grow with it before a weight is read, so a damaged config must not set it freely
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
        config: the parsed config.json, or an object in it.
        what: name of its keys in messages.
    """

    def __init__(self, config: Mapping[str, Any], what: str = "") -> None:
        self.config, self.what = config, what
        self.left = set(config) if what else config.keys() - INERT - SAMPLING - CLAIMS

    def has(self, key: str) -> bool:
        """Whether `key` is present with a value other than null."""
        return self.config.get(key) is not None

    def raw(self, key: str) -> Any:
        """The unchecked value of `key`, None when absent; counts as taken."""
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
                raise ConfigError(f"config.json: the {self.what or 'key'} '{key}' is missing")
            return default
        return checked(f"{self.what} {key}".lstrip(), value, kind)

    def must_be(self, key: str, *allowed: object, why: str) -> None:
        """Refuse `key` at any value but `allowed` or null."""
        value = self.raw(key)
        if value is not None and not any(value == a and type(value) is type(a) for a in allowed):
            raise ConfigError(f"config.json: {key} = {show(value)} is not supported: {why}")

    def finish(self) -> None:
        """Refuse all keys that were not taken, are not known to be inert, and are not null."""
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
        raise ConfigError(f"config.json: {key} = {show(value)} must be of type {kind.__name__}")
    if isinstance(value, (int, float)) and not isinstance(value, bool) and not (0 < value < math.inf):
        raise ConfigError(f"config.json: {key} = {value!r} must be positive and finite")
    if isinstance(value, float) and not MIN_REAL <= value <= MAX_REAL:
        raise ConfigError(f"config.json: {key} = {value!r} is beyond what float32 arithmetic can use")
    return value


def read_dense(
    config: ConfigReader,
    *,
    qkv_bias: bool = False,
    o_bias: bool = False,
    mlp_bias: bool = False,
    qk_norm: bool = False,
    window: int | None = None,
    default_head_dim: int | None = None,
    default_theta: float = 10_000.0,
    tied_by_default: bool = False,
) -> ModelSpec:
    """A decoder of equal layers with transformers' usual names for its sizes, and SiLU.

    Args:
        config: reader of config.json.
        qkv_bias, o_bias, qk_norm: as in `Attention`.
        mlp_bias: biases of the feed-forward.
        window: of every layer; dropped if the context length does not exceed it.
        default_head_dim: for a config without one; None = hidden_size / num_attention_heads.
        default_theta: of the rotary embedding, for a config without one.
        tied_by_default: whether the embedding is the head, for a config that does not say.

    Raises:
        ConfigError: a size that is missing or contradictory, or an activation other than SiLU.
    """
    hidden = config.take("hidden_size", int)
    heads, kv_heads, head_dim = _heads(config, hidden, default_head_dim)
    count = config.take("num_hidden_layers", int)
    if count > MAX_LAYERS:
        raise ConfigError(f"config.json: num_hidden_layers {count} is more than the {MAX_LAYERS} of any known model")
    config.must_be("hidden_act", "silu", "swish", why="only SiLU is")
    mlp = Mlp(config.take("intermediate_size", int), bias=mlp_bias)
    context = config.take("max_position_embeddings", int)
    rope = _read_rope(config, head_dim, context, default_theta)
    window = window if window is not None and window < context else None
    mixer = Attention(heads, kv_heads, head_dim, rope, window, qkv_bias, o_bias, qk_norm)
    return ModelSpec(
        model_type=config.take("model_type", str),
        vocab_size=config.take("vocab_size", int),
        hidden_size=hidden,
        layers=(Layer(mixer, mlp),) * count,
        tied=config.take("tie_word_embeddings", bool, tied_by_default),
        norm_eps=config.take("rms_norm_eps", float, 1e-6),
        context_length=context,
    )


def _heads(config: ConfigReader, hidden: int, default_head_dim: int | None) -> tuple[int, int, int]:
    """Query heads, key and value heads, head_dim."""
    heads = config.take("num_attention_heads", int)
    if default_head_dim is None and not config.has("head_dim") and hidden % heads:
        raise ConfigError(f"config.json: hidden_size {hidden} is not a multiple of num_attention_heads {heads}")
    head_dim = config.take("head_dim", int, default_head_dim or hidden // heads)
    if head_dim % 2:
        raise ConfigError(f"config.json: head_dim {head_dim} is odd; rotary embeddings need pairs")
    kv_heads = config.take("num_key_value_heads", int, heads)
    if heads % kv_heads:
        raise ConfigError(
            f"config.json: num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}"
        )
    return heads, kv_heads, head_dim


def refuse_windows(config: ConfigReader) -> None:
    """Raise ConfigError for sliding-window attention; `sliding_window` alone has no effect in these families."""
    config.must_be("use_sliding_window", False, why="sliding-window attention is not exported")
    config.raw("sliding_window")
    types, layers = config.raw("layer_types"), config.take("num_hidden_layers", int)
    if types is not None and types != ["full_attention"] * min(layers, MAX_LAYERS):
        raise ConfigError(f"config.json: layer_types must be {layers} x 'full_attention'; no other kind is")


def _read_rope(config: ConfigReader, head_dim: int, context_length: int, default_theta: float) -> Rope:
    """The rotary embedding, in both spellings; defaults are those of transformers' `modeling_rope_utils`.

    Up to transformers 4: `rope_theta` beside `rope_scaling` (None, or a dict with `type` or `rope_type`).
    From transformers 5: one dict `rope_parameters` that holds `rope_theta` too.
    """
    theta_beside = config.raw("rope_theta")
    p = ConfigReader(_rope_parameters(config), "rope parameter")
    theta = p.take("rope_theta", float, checked("rope_theta", theta_beside or default_theta, float))
    if theta <= 1:
        raise ConfigError(f"config.json: rope_theta = {theta} must be above 1")
    if theta_beside is not None and theta != theta_beside:
        raise ConfigError(
            f"config.json: rope_theta is {theta_beside}, but {theta} in rope_parameters; keep the true one"
        )
    old, new = p.raw("type"), p.raw("rope_type")
    if old is not None and new is not None and old != new:
        raise ConfigError(f"config.json: the rope type is {show(old)} by 'type' and {show(new)} by 'rope_type'")
    if p.take("partial_rotary_factor", float, 1.0) != 1.0:
        raise ConfigError("config.json: partial_rotary_factor other than 1 is not supported")
    kind = str(new or old or "default")
    scaling = _scaling(kind, p, context_length)
    if left := sorted(key for key in p.left if p.has(key)):
        raise ConfigError(
            f"config.json: the rope parameter {show(left[0])} = {show(p.config[left[0]])} is not understood "
            f"for rope type {show(kind)}"
        )
    return Rope(theta, head_dim, scaling)


def _rope_parameters(config: ConfigReader) -> dict[str, Any]:
    scaling, parameters = config.raw("rope_scaling"), config.raw("rope_parameters")
    for name, value in (("rope_scaling", scaling), ("rope_parameters", parameters)):
        if value is not None and not isinstance(value, dict):
            raise ConfigError(f"config.json: {name} = {show(value)} must be an object")
    if scaling and parameters:
        theta = parameters.get("rope_theta")
        if {**scaling, "rope_theta": theta} != {**parameters, "rope_theta": theta}:
            raise ConfigError("config.json: rope_scaling and rope_parameters contradict each other; keep the true one")
    return dict(parameters or scaling or {})


def _scaling(kind: str, p: ConfigReader, context_length: int) -> Scaling:
    match kind:
        case "default" | "none":
            # transformers leaves these behind when a scaling is switched off; without a type they do nothing.
            for key in ("factor", "original_max_position_embeddings"):
                p.raw(key)
            return None
        case "linear":
            return Linear(p.take("factor", float))
        case "llama3":
            low, high = p.take("low_freq_factor", float, 1.0), p.take("high_freq_factor", float, 4.0)
            if low >= high:
                raise ConfigError(f"config.json: low_freq_factor {low} must be below high_freq_factor {high}")
            return Llama3(
                factor=p.take("factor", float, 8.0),
                low_freq_factor=low,
                high_freq_factor=high,
                original_context_length=_whole(p, "original_max_position_embeddings", context_length),
            )
        case "yarn":
            return _yarn(p, context_length)
        case _:
            raise ConfigError(
                f"config.json: rope type {show(kind)} is not supported; known: default, linear, llama3, yarn"
                + (" (its angles depend on the sequence length)" if kind in ("dynamic", "longrope") else "")
            )


def _whole(p: ConfigReader, key: str, default: int) -> int:
    value = p.take(key, float, float(default))
    if value != int(value) or value > MAX_INT:
        raise ConfigError(f"config.json: the rope parameter {key} = {value} must be a whole number of tokens")
    return int(value)


def _yarn(p: ConfigReader, context_length: int) -> Yarn:
    original = _whole(p, "original_max_position_embeddings", context_length)
    factor = p.take("factor", float, context_length / original)
    if factor < 1:
        raise ConfigError(f"config.json: the rope parameter factor = {factor} must be at least 1 for YaRN")
    mscale, mscale_all = p.raw("mscale"), p.raw("mscale_all_dim")
    magnitude = _magnitude(factor)
    if mscale and mscale_all:
        numerator, denominator = (
            checked(f"rope parameter {key}", value, float)
            for key, value in (("mscale", mscale), ("mscale_all_dim", mscale_all))
        )
        magnitude = _magnitude(factor, numerator) / _magnitude(factor, denominator)
    return Yarn(
        factor=factor,
        original_context_length=original,
        attention_factor=p.take("attention_factor", float, magnitude),
        beta_fast=p.take("beta_fast", float, 32.0),
        beta_slow=p.take("beta_slow", float, 1.0),
        truncate=p.take("truncate", bool, True),
    )


def _magnitude(factor: float, mscale: float = 1.0) -> float:
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0
