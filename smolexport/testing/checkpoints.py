"""Tiny checkpoints of every architecture: random, but with statistics that expose mistakes.

Norm weights differ from 1 and from each other, biases are not zero, attention is far from uniform, and the entropy
of the next token is well below log(vocab_size): a wrong rotation, a dropped bias or a swapped norm changes the
logits by far more than rounding does.
"""

from __future__ import annotations

import json
import math
import shutil
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from smolexport.conversion.source_model import SourceModel, claimed_dtype
from smolexport.errors import UsageError
from smolexport.model.arch import load_spec
from smolexport.model.checkpoint import Checkpoint
from smolexport.model.spec import ModelSpec, Role, Tensor
from smolexport.model.weights import as_stored
from smolexport.tokenizer import read_tokenizer

DTYPES: Mapping[str, np.dtype[Any]] = {
    "bf16": np.dtype(ml_dtypes.bfloat16),
    "f16": np.dtype(np.float16),
    "f32": np.dtype(np.float32),
}

COMMON: Mapping[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": 2,  # transformers' own default for smollm3 lies outside a small vocabulary
}
FAMILIES: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "llama": ("LlamaForCausalLM", {"attention_bias": False, "mlp_bias": False}),
    # A window that the context length does not exceed, as published: it hides nothing.
    "mistral": ("MistralForCausalLM", {"sliding_window": 512, "head_dim": 32}),
    "smollm3": (
        "SmolLM3ForCausalLM",
        {"num_hidden_layers": 8, "rope_theta": 5e6, "no_rope_layer_interval": 4, "attention_bias": False},
    ),
    "qwen2": ("Qwen2ForCausalLM", {"rope_theta": 1e6, "rms_norm_eps": 1e-6, "use_sliding_window": False}),
    # Heads x head_dim differs from hidden_size, as in the small published models.
    "qwen3": ("Qwen3ForCausalLM", {"rope_theta": 1e6, "rms_norm_eps": 1e-6, "head_dim": 32, "attention_bias": False}),
}
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "generation_config.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
)


def tiny_config(model_type: str, *, dtype: str = "bf16", old_style: bool = True, **overrides: Any) -> dict[str, Any]:
    """The config.json of a model with a few hundred thousand parameters.

    Args:
        model_type: a key of `FAMILIES`; UsageError for any other.
        dtype: what the config claims.
        old_style: `rope_theta` beside `rope_scaling`; otherwise both in `rope_parameters`, as transformers 5 writes.
        overrides: keys that replace those of `COMMON` and `FAMILIES`; rope keys in the old style.
    """
    if model_type not in FAMILIES:
        raise UsageError(f"model_type {model_type!r} should be one of: {', '.join(FAMILIES)}")
    architecture, own = FAMILIES[model_type]
    config = {"architectures": [architecture], "model_type": model_type, **COMMON, **own, **overrides}
    if model_type == "smollm3" and "no_rope_layers" not in config:
        step = config["no_rope_layer_interval"]
        config["no_rope_layers"] = [int((i + 1) % step != 0) for i in range(config["num_hidden_layers"])]
    config["torch_dtype" if old_style else "dtype"] = DTYPES[dtype].name
    if not old_style:
        theta, scaling = config.pop("rope_theta"), config.pop("rope_scaling")
        config["rope_parameters"] = {"rope_theta": theta, "rope_type": "default", **(scaling or {})}
    return config


def write_checkpoint(
    folder: Path,
    model_type: str,
    *,
    dtype: str = "bf16",
    seed: int = 0,
    shards: int = 1,
    old_style: bool = True,
    tokenizer: Path | None = None,
    **overrides: Any,
) -> Path:
    """Write config.json and random safetensors; return `folder`.

    Args:
        folder: created if missing.
        model_type: see `tiny_config`, also for `old_style` and `overrides`.
        dtype: `bf16`, `f16` or `f32`, of all tensors.
        seed: of the weights; each tensor has its own stream.
        shards: number of safetensors files; more than 1 come with an index.
        tokenizer: folder whose tokenizer files are copied; sets vocab_size unless overridden.

    Raises:
        UsageError: an unknown model_type or dtype.
        ConfigError: overrides that describe no valid model.
    """
    if dtype not in DTYPES:
        raise UsageError(f"dtype {dtype!r} should be one of: {', '.join(DTYPES)}")
    folder.mkdir(parents=True, exist_ok=True)
    if tokenizer is not None:
        for file in (tokenizer / name for name in TOKENIZER_FILES):
            if file.exists():
                shutil.copy(file, folder / file.name)
        content = json.loads((tokenizer / "tokenizer.json").read_text(encoding="utf-8"))
        ids = [*content["model"]["vocab"].values(), *(token["id"] for token in content.get("added_tokens", ()))]
        overrides.setdefault("vocab_size", max(ids) + 1)
    config = tiny_config(model_type, dtype=dtype, old_style=old_style, **overrides)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    tensors = list(random_tensors(load_spec(config), seed=seed, dtype=dtype))
    places: dict[str, str] = {}
    for number in range(shards):
        part = dict(tensors[number * len(tensors) // shards : (number + 1) * len(tensors) // shards])
        name = "model.safetensors" if shards == 1 else f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        write_safetensors(folder / name, part)
        places |= dict.fromkeys(part, name)
    if shards > 1:
        index = {"metadata": {"total_size": sum(a.nbytes for _, a in tensors)}, "weight_map": places}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    return folder


def random_tensors(spec: ModelSpec, *, seed: int = 0, dtype: str = "f32") -> Iterator[tuple[str, NDArray[Any]]]:
    """Name and array of every tensor of `spec`, as a checkpoint stores them, in its order."""
    arrays = (
        (tensor, _random(tensor, spec, np.random.default_rng([seed, index])).astype(DTYPES[dtype]))
        for index, tensor in enumerate(spec.tensors())
    )
    yield from as_stored(spec, arrays)


def _random(tensor: Tensor, spec: ModelSpec, random: np.random.Generator) -> NDArray[np.float32]:
    # Logits with a standard deviation of 3, whichever matrix makes them.
    sharpness = 3 / math.sqrt(spec.hidden_size)
    if tensor.part == "bias":
        return random.normal(0, 0.5, tensor.shape).astype(np.float32)
    if not tensor.is_matrix:
        scale = sharpness if tensor.role is Role.FINAL_NORM and spec.tied else 1.0
        return (scale * random.uniform(0.5, 1.5, tensor.shape)).astype(np.float32)
    deviation = {Role.EMBED: 1.0, Role.HEAD: sharpness}.get(tensor.role, 1.5 / math.sqrt(tensor.columns))
    return random.normal(0, deviation, tensor.shape).astype(np.float32)


def write_safetensors(path: Path, tensors: Mapping[str, NDArray[Any]]) -> None:
    """Write one safetensors file; bfloat16 (ml_dtypes), float16 and float32."""
    codes = {dtype: name.upper() for name, dtype in DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, array in tensors.items():
        start, end = end, end + array.nbytes
        header[name] = {"dtype": codes[array.dtype], "shape": list(array.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for array in tensors.values():
            file.write(np.ascontiguousarray(array).tobytes())


SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
WORDS = "the and of to in a is that it was he for on as with his be at you I by had not but from she or".split()
TOKENIZER_CONFIG: Mapping[str, Any] = {
    "tokenizer_class": "GPT2Tokenizer", "add_prefix_space": False, "bos_token": SPECIAL[0], "eos_token": SPECIAL[2],
    "pad_token": SPECIAL[2], "unk_token": SPECIAL[0], "clean_up_tokenization_spaces": False,
}  # fmt: skip
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def write_tokenizer(folder: Path, vocab_size: int = 320) -> Path:
    """Write tokenizer.json and tokenizer_config.json of an untrained byte-level BPE like SmolLM2's; return `folder`.

    Digits are split one by one, ids 0, 1 and 2 are the ChatML tokens, and merges spell common English words and then
    pairs of letters.

    Args:
        folder: created if missing.
        vocab_size: exact number of tokens, from 259 (bytes and special tokens only) to about 1,000; UsageError for a
            size that the merges do not reach.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    merges: list[tuple[str, str]] = []
    for left, right in _merges():
        if len(tokens) < vocab_size and left + right not in tokens:
            tokens.append(left + right)
            merges.append((left, right))
    if len(tokens) != vocab_size:
        raise UsageError(f"vocab_size {vocab_size} cannot be built; between 259 and {len(tokens)} can")
    tokenizer = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    flags = {**dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False), "special": True}
    added = {str(i): {"content": text, **flags} for i, text in enumerate(SPECIAL)}
    config = {**TOKENIZER_CONFIG, "added_tokens_decoder": added, "chat_template": CHAT_TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2))
    return folder


def _merges() -> Iterator[tuple[str, str]]:
    """Pairs whose parts exist already: words letter by letter, then all pairs of letters."""
    for word in WORDS:
        spelled = "Ġ" + word
        for end in range(1, len(spelled)):
            yield spelled[:end], spelled[end]
    letters = "etaoinshrdlcumwfgypbvkjxqz"
    yield from ((left, right) for left in letters for right in letters)


def model_of(checkpoint: Checkpoint, name: str = "tiny") -> SourceModel:
    """The input of a converter's `plan`, from an opened checkpoint with a tokenizer."""
    tokenizer = read_tokenizer(checkpoint.folder, checkpoint.spec.vocab_size)
    dtype = claimed_dtype(checkpoint.config) or checkpoint.dtype
    return SourceModel(checkpoint.spec, tokenizer, name, checkpoint.folder, checkpoint.config, dtype)
