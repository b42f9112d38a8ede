"""Checkpoint folders with tokenizers: the real ones of the shared data, and ones trained here in a moment."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.torture import TORTURE

__all__ = ["BYTE_LEVEL", "REAL", "characters_document", "real_folder", "save", "train_byte_level", "train_characters"]

DATA = Path(__file__).resolve().parents[1].parent / "shared" / "data"
# name -> (vocab_size of the model, files of its folder in the shared data)
REAL: dict[str, tuple[int, list[str]]] = {
    "smollm2": (
        49152,
        ["smollm2-tokenizer/tokenizer.json"]
        + [
            f"smollm2-tokenizer/SmolLM2-135M-Instruct/{name}.json"
            for name in ("config", "generation_config", "tokenizer_config", "special_tokens_map")
        ],
    ),
    "smollm3": (
        128256,
        [f"smollm3-tokenizer/{n}" for n in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")],
    ),
    "qwen3": (151936, ["qwen-tokenizer/qwen3/tokenizer.json", "qwen-tokenizer/qwen3/tokenizer_config.json"]),
    "qwen2.5": (151936, ["qwen-tokenizer/qwen3/tokenizer.json", "qwen-tokenizer/qwen2.5/tokenizer_config.json"]),
    "stories260k": (
        512,
        [f"stories260K/hf_bf16/{n}.json" for n in ("tokenizer", "tokenizer_config", "generation_config", "config")],
    ),
}
CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
TAIL = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3 = rf"{CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{TAIL}"
QWEN2 = rf"{CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{TAIL}"


def _split(pattern: str) -> list[dict[str, Any]]:
    return [{"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}, _bytes(False)]


def _bytes(patterned: bool) -> dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": patterned}


BYTE_LEVEL: dict[str, list[dict[str, Any]]] = {
    "gpt2": [_bytes(True)],
    "digits": [{"type": "Digits", "individual_digits": True}, _bytes(True)],
    "llama3": _split(LLAMA3),
    "qwen2": _split(QWEN2),
    "qwen35": _split(
        rf"{CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|"
        r"\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
}


def real_folder(name: str, folder: Path) -> tuple[Path, int]:
    """A folder as on the hub, put together from the shared data, and the model's vocab_size."""
    size, files = REAL[name]
    folder.mkdir(parents=True, exist_ok=True)
    for file in files:
        if not (DATA / file).is_file():
            pytest.skip(f"{file} is not in the shared data")
        shutil.copy(DATA / file, folder / Path(file).name)
    if name == "qwen2.5":  # Qwen 2.5 has Qwen 3's tokenizer without the last four added tokens
        document = json.loads((folder / "tokenizer.json").read_text())
        document["added_tokens"] = [token for token in document["added_tokens"] if token["id"] < 151665]
        (folder / "tokenizer.json").write_text(json.dumps(document))
    return folder, size


def save(folder: Path, document: dict[str, Any], **companions: Any) -> Path:
    """Write tokenizer.json and other JSON files (tokenizer_config={...}) into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(document, ensure_ascii=False), encoding="utf-8")
    for name, content in companions.items():
        (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


def train_byte_level(steps: list[dict[str, Any]], vocab_size: int = 900) -> dict[str, Any]:
    """A byte-level BPE document, trained on the torture texts."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    blank = json.loads(Tokenizer(models.BPE()).to_str())
    blank["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": steps}
    blank["decoder"] = _bytes(True)
    tokenizer = Tokenizer.from_str(json.dumps(blank))
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*TORTURE.values()] * 4, trainer)
    document: dict[str, Any] = json.loads(tokenizer.to_str())
    return document


def train_characters(texts: list[str], vocab_size: int = 700) -> dict[str, Any]:
    """A SentencePiece-style document with byte fallback in the form of Llama 2, trained on `texts`."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, limit_alphabet=90, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    trained = json.loads(tokenizer.to_str())["model"]
    return characters_document(list(trained["vocab"]), trained["merges"])


def characters_document(texts: list[str], merges: list[Any]) -> dict[str, Any]:
    """tokenizer.json of the Llama 2 form: unk, BOS, EOS, 256 bytes, then `texts`."""
    special = ["<unk>", "<s>", "</s>"]
    listed = [*special, *(f"<0x{byte:02X}>" for byte in range(256)), *texts]
    piece = {"Sequence": {"id": "A", "type_id": 0}}
    start = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": index, "content": text, **flags} for index, text in enumerate(special)],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": "▁"},
                {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
            ],
        },
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [start, piece],
            "pair": [start, piece, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": "<unk>",
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": {text: index for index, text in enumerate(listed)},
            "merges": merges,
        },
    }
