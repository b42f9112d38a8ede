"""Tokens that stand beside tokenizer.json, in every format: each reader's ids are those of transformers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from smolexport import plugins
from smolexport.conversion.pipeline import export
from smolexport.tokenizer import open_tokenizer, read_tokenizer
from tests.cases_for_tests import made_case

SCHEMES = {"gguf": "q8_0", "mlx": "q8", "onnx": "int8"}
READERS = {"gguf": ["llamacpp"], "mlx": ["mlx", "torch"], "onnx": ["onnxruntime_genai", "torch"]}
TEXT = "a <|tool|> b <note> c"
IDS = [67, 223, 4096, 271, 223, 4097, 278]

pytestmark = pytest.mark.skipif(
    any(plugins.missing(name) for name in ("torch", "llamacpp", "mlx", "onnxruntime", "onnxruntime_genai")),
    reason="a runtime is not installed",
)


def encoders(kind: str, path: Path) -> dict[str, Callable[[str], list[int]]]:
    """Every reader of an output by its name: libraries with their own tokenizers, and our codec."""
    found = {name: plugins.runtime(name).open_chat(path).encode for name in READERS[kind]}
    if kind != "gguf":
        size = json.loads((path / "config.json").read_text())["vocab_size"]
        found["codec"] = open_tokenizer(path, read_tokenizer(path, size)).encode
    return found


def exported(kind: str, source: Path, folder: Path) -> tuple[Path, tuple[str, ...]]:
    """An output of `source`, and the notes of its export."""
    job = export(kind, source, folder / f"x{plugins.converter(kind).SUFFIX}", quant=SCHEMES[kind])
    return job.path, job.plan.notes


def edited(folder: Path, name: str, **changes: Any) -> None:
    path = folder / name
    old = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**old, **changes}))


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_case("72", tmp_path_factory.mktemp("72") / "model")


@pytest.mark.parametrize("kind", SCHEMES)
def test_added_tokens_json(kind: str, case: Path, tmp_path: Path) -> None:
    path, notes = exported(kind, case, tmp_path)
    found = {reader: encode(TEXT) for reader, encode in encoders(kind, path).items()}
    assert found == dict.fromkeys(found, IDS)
    assert any("'<|tool|>' (4096), '<note>' (4097)" in note for note in notes)


SETTINGS: dict[str, dict[str, Any]] = {
    "listed": {"added_tokens_decoder": {"4150": {"content": "<|tool|>"}, "4151": {"content": "<note>"}}},
    "special": {"pad_token": "<|tool|>", "image_token": "<note>"},
    "extra": {"additional_special_tokens": ["<|tool|>", "<note>"]},
    "flags": {"added_tokens_decoder": {"2": {"content": "<|im_end|>", "lstrip": True, "special": True}}},
}


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("kind", SCHEMES)
def test_tokens_of_tokenizer_config(kind: str, name: str, case: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(case, tmp_path / "model")
    (folder / "added_tokens.json").unlink()
    edited(folder, "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast", **SETTINGS[name])
    text = "a <|im_end|> b" if name == "flags" else TEXT
    expected = plugins.runtime("torch").open_chat(folder).encode(text)
    assert expected == ([67, 2, 271] if name == "flags" else IDS)
    if (kind, name) == ("gguf", "flags"):
        return  # llama.cpp strips nothing, see test_gguf_token_limits.py
    path, notes = exported(kind, folder, tmp_path)
    found = {reader: encode(text) for reader, encode in encoders(kind, path).items()}
    if name == "flags":
        found.pop("onnxruntime_genai", None)  # it strips no spaces on the left
    assert found == dict.fromkeys(found, expected)
    assert any(note.startswith("tokenizer_config.json: tokens that tokenizer.json lacks") for note in notes)


@pytest.mark.parametrize("kind", SCHEMES)
def test_special_tokens_map(kind: str, case: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(case, tmp_path / "model")
    (folder / "added_tokens.json").unlink()
    edited(folder, "special_tokens_map.json", pad_token="<|tool|>", additional_special_tokens=["<note>"])
    path, _ = exported(kind, folder, tmp_path)
    found = {reader: encode(TEXT) for reader, encode in encoders(kind, path).items()}
    assert found == dict.fromkeys(found, IDS)


@pytest.mark.parametrize("kind", SCHEMES)
def test_tokens_without_a_row_are_spelled_by_every_reader(kind: str, case: Path, tmp_path: Path) -> None:
    """mlx-lm and transformers would look up a row that does not exist."""
    folder = shutil.copytree(case, tmp_path / "model")
    edited(folder, "added_tokens.json", **{f"<{number}>": number for number in range(4098, 4162)})
    edited(folder, "tokenizer_config.json", pad_token="<|none|>")
    path, notes = exported(kind, folder, tmp_path)
    text = "<4159> <4160> <4161> <|none|>"
    found = {reader: encode(text) for reader, encode in encoders(kind, path).items()}
    for ids in found.values():
        assert 4159 in ids
        assert max(ids) < 4160
        assert ids == next(iter(found.values()))
    (note,) = [note for note in notes if "no row" in note and note.startswith("added_tokens.json")]
    assert "'<4160>', '<4161>'" in note
    assert any("no row" in note and "'<|none|>'" in note for note in notes)


@pytest.mark.parametrize("kind", ["mlx", "onnx"])
def test_files_are_copied_where_nothing_was_merged(kind: str, demo: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(demo, tmp_path / "model")
    edited(folder, "added_tokens.json", **{"<|im_end|>": 2})
    path, notes = exported(kind, folder, tmp_path)
    for name in ("tokenizer.json", "added_tokens.json"):
        assert (path / name).read_bytes() == (folder / name).read_bytes()
    assert not [note for note in notes if "rewritten" in note]
