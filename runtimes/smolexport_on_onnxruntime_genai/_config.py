"""What genai_config.json may contain: what config.json says too, how to sample, and nothing that names another file."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from smolexport.errors import FileFormatError, UnsupportedError
from smolexport.model.checkpoint import read_json
from smolexport.text import label, show
from smolexport_on_onnxruntime.checks import CheckedGraph

FILE = "genai_config.json"
CACHES = ("key", "value")
INPUTS: Mapping[str, str] = {
    "input_ids": "input_ids",
    "attention_mask": "attention_mask",
    "position_ids": "position_ids",
    **{f"past_{part}_names": f"past_key_values.%d.{part}" for part in CACHES},
}
OUTPUTS: Mapping[str, str] = {"logits": "logits", **{f"present_{part}_names": f"present.%d.{part}" for part in CACHES}}
TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
# How the library would draw tokens, which it never does here: any numbers.
SEARCH = (
    "do_sample", "max_length", "min_length", "past_present_share_buffer", "repetition_penalty", "temperature", "top_k",
    "top_p",
)  # fmt: skip


def check_config(checked: CheckedGraph) -> None:
    """Compare the folder's genai_config.json with the sizes of its config.json and with the names of a decoder.

    Raises:
        CheckpointError: it is missing or not a JSON object.
        FileFormatError: a value that contradicts config.json or has a wrong type.
        UnsupportedError: a key that the library would follow and that no exported decoder needs.
    """
    file = checked.folder / FILE
    shapes = {
        "num_hidden_layers": checked.layers,
        "num_key_value_heads": checked.kv_heads,
        "head_size": checked.head_dim,
    }
    free = ("hidden_size", "num_attention_heads")
    whole = read_json(file, "ONNX Runtime GenAI cannot run the folder without it")
    config = _part(file, {"": whole}, "", ("model", "search"))
    search = _part(file, config, "search", SEARCH)
    model = _part(file, config, "model", ("type", "vocab_size", "context_length", "decoder", *TOKENS))
    parts = ("filename", "inputs", "outputs", "session_options")
    decoder = _part(file, model, "decoder", (*shapes, *free, *parts))
    inputs, outputs = _part(file, decoder, "inputs", INPUTS), _part(file, decoder, "outputs", OUTPUTS)
    options = _part(file, decoder, "session_options", ("log_id", "provider_options"))
    _same(file, {"type": "decoder", "vocab_size": checked.vocab_size}, model)
    _same(file, shapes, decoder)
    _same(file, {key: INPUTS[key] for key in INPUTS if key != "position_ids" or key in inputs}, inputs)
    _same(file, OUTPUTS, outputs)
    if options.get("provider_options", []) != []:
        raise UnsupportedError(f"{file}: provider_options must be empty: only the CPU is used here")
    if not isinstance(options.get("log_id", ""), str):
        raise FileFormatError(f"{file}: log_id is {show(options['log_id'])}, not text")
    for part, keys in ((model, ("context_length", *TOKENS)), (search, SEARCH), (decoder, free)):
        for key in keys:
            _numbers(file, key, part.get(key, 0))


def _part(file: Path, config: Mapping[str, Any], key: str, known: Collection[str]) -> Mapping[str, Any]:
    """The object `key`, empty if it is missing, with `known` keys only."""
    part = config.get(key, {})
    if not isinstance(part, dict):
        raise FileFormatError(f"{file}: {key} is {show(part)}, not an object")
    unknown = [name for name in part if name not in known]
    if unknown:
        place = f"{key}.{label(unknown[0])}".removeprefix(".")
        raise UnsupportedError(f"{file}: {place} is not known here; remove it, or export the model again")
    return part


def _same(file: Path, expected: Mapping[str, object], part: Mapping[str, Any]) -> None:
    for key, value in expected.items():
        found = part.get(key)
        if type(found) is not type(value) or found != value:
            raise FileFormatError(f"{file}: {key} is {show(found)}, expected {show(value)}")


def _numbers(file: Path, key: str, value: object) -> None:
    """A number or a short list of them: the library does not check others."""
    found = value if isinstance(value, list) else [value]
    if len(found) > 64 or any(not isinstance(n, (int, float)) or not abs(n) < 2**31 for n in found):
        raise FileFormatError(f"{file}: {key} is {show(value)}, not a number")
