"""The small files of an MLX folder: copied byte for byte, with few exceptions that are said aloud."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from smolexport.conversion.plan import OutputFile
from smolexport.conversion.source_model import SourceModel
from smolexport.errors import CheckpointError, TokenizerError
from smolexport.testing.checkpoints import CHAT_TEMPLATE, write_checkpoint, write_tokenizer
from smolexport_to_mlx.folder import compose, copied
from tests.converters.mlx_models import open_model
from tests.mlx_for_tests import mlx_lm, needs_mlx
from tests.tokenizers_for_tests import characters_document, real_folder
from tests.tokenizers_for_tests import save as save_tokenizer

GENERATION = {"bos_token_id": 0, "eos_token_id": [0, 2], "temperature": 0.6}
OPTIONAL = {
    "special_tokens_map.json": b'{"eos_token": "<|im_end|>"}\r\n',
    "added_tokens.json": b"{}",
    "vocab.json": b'{"a":0}',
    "merges.txt": b"#version: 0.2\na b\n",
    "LICENSE": b"do as you like\n",
    "LICENSE.txt": b"\xff\xfe not even text",
    "generation_config.json": json.dumps(GENERATION).encode(),
}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A tiny checkpoint with tokenizer files."""
    folder = write_checkpoint(tmp_path / "source", "llama", num_hidden_layers=1)
    return write_tokenizer(folder)


def edit(path: Path, **changes: Any) -> None:
    """Change keys of a JSON file; `...` removes one."""
    content = json.loads(path.read_text(encoding="utf-8")) | changes
    path.write_text(json.dumps({k: v for k, v in content.items() if v is not ...}, indent=2), encoding="utf-8")


def companions(model: SourceModel) -> tuple[OutputFile, ...]:
    return tuple(copied(model)[0].values())


def notes(model: SourceModel) -> list[str]:
    return list(copied(model)[1])


def content_of(files: tuple[OutputFile, ...]) -> dict[str, bytes]:
    return {f.name: f.content.read_bytes() if isinstance(f.content, Path) else f.content for f in files}


def found_in(folder: Path) -> dict[str, bytes]:
    return content_of(companions(open_model(folder)))


def test_files_are_copied_byte_for_byte(source: Path) -> None:
    for name, raw in OPTIONAL.items():
        (source / name).write_bytes(raw)
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "tool_use.jinja").write_bytes(b"{{ tools }}\r\n")
    (source / "chat_template.jinja").write_bytes(b"{{ messages }}\r\n")
    for name in ("README.md", "training_args.bin", "modeling_evil.py", "optimizer.pt", "notes.txt", "other.json"):
        (source / name).write_bytes(b"not for the folder")
    model = open_model(source)
    files = companions(model)
    expected = {*OPTIONAL, "tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
                "additional_chat_templates/tool_use.jinja"}  # fmt: skip
    assert [f.name for f in files] == sorted(expected)
    assert all(isinstance(f.content, Path) for f in files)
    assert content_of(files) == {name: (source / name).read_bytes() for name in expected}
    assert notes(model) == []


@pytest.mark.parametrize("name", ["smollm2", "smollm3", "qwen3"])
def test_published_tokenizers_need_no_change(tmp_path: Path, name: str) -> None:
    """All that is added is a template in its second place and, where it is missing, a generation_config."""
    folder, size = real_folder(name, tmp_path / name)
    write_checkpoint(tmp_path / "w", "llama", num_hidden_layers=1, vocab_size=512)
    config = json.loads((tmp_path / "w" / "config.json").read_text())
    if not (folder / "config.json").exists():
        (folder / "config.json").write_text(json.dumps({**config, "vocab_size": size}))
    made = found_in(folder)
    for file in (f for f in folder.iterdir() if f.name != "config.json"):
        assert made[file.name] == file.read_bytes(), file.name
    assert set(made) >= {"tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"}
    assert "config.json" not in made


def test_links_of_a_download_count_as_files(source: Path, tmp_path: Path) -> None:
    """Every file a link into the cache's blobs, as the hub's library lays them; the snapshot may be linked itself."""
    blobs, snapshot = tmp_path / "models--a--b" / "blobs", tmp_path / "models--a--b" / "snapshots" / "0123abc"
    blobs.mkdir(parents=True)
    for name, raw in OPTIONAL.items():
        (source / name).write_bytes(raw)
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "tool_use.jinja").write_bytes(b"{{ tools }}")
    (source / "chat_template.jinja").write_bytes(b"{{ messages }}")
    expected = found_in(source)
    for number, path in enumerate(sorted(p for p in source.rglob("*") if p.is_file())):
        link, blob = snapshot / path.relative_to(source), blobs / f"{number:040x}"
        link.parent.mkdir(parents=True, exist_ok=True)
        path.rename(blob)
        link.symlink_to(os.path.relpath(blob, link.parent))
    (tmp_path / "short").symlink_to(snapshot)
    for folder in (snapshot, tmp_path / "short"):
        assert found_in(folder) == expected
    assert set(expected) >= {*OPTIONAL, "tokenizer.json", "chat_template.jinja"}


def test_links_within_the_checkpoint_count_as_files(source: Path) -> None:
    (source / "legal").mkdir()
    (source / "legal" / "text").write_bytes(b"do as you like")
    (source / "LICENSE").symlink_to(source / "legal" / "text")
    made = found_in(source)
    assert made["LICENSE"] == b"do as you like"


COPIED = ("LICENSE", "LICENSE.md", "merges.txt", "chat_template.jinja", "vocab.json", "added_tokens.json",
          "tokenizer.json", "tokenizer_config.json", "generation_config.json", "special_tokens_map.json",
          "chat_template.json", "README.md", "additional_chat_templates/x.jinja")  # fmt: skip


@pytest.mark.parametrize("name", COPIED)
def test_links_out_of_the_checkpoint_are_refused(source: Path, tmp_path: Path, name: str) -> None:
    secret = tmp_path / "blobs" / "key"  # a folder of that name is no cache by itself
    secret.parent.mkdir()
    secret.write_text('{"secret": 1}')
    model = open_model(source)
    (source / name).parent.mkdir(exist_ok=True)
    (source / name).unlink(missing_ok=True)
    (source / name).symlink_to(secret)
    for call in (companions, notes):
        with pytest.raises(CheckpointError, match=f"{re.escape(name)}: is a link out of the checkpoint's folder"):
            call(model)


def test_a_linked_folder_of_templates_is_refused(source: Path, tmp_path: Path) -> None:
    (tmp_path / "private").mkdir()
    (tmp_path / "private" / "x.jinja").write_text("secret")
    model = open_model(source)
    (source / "additional_chat_templates").symlink_to(tmp_path / "private")
    with pytest.raises(CheckpointError, match=r"x\.jinja: is a link out of the checkpoint's folder"):
        companions(model)


def test_a_link_to_nothing_is_refused(source: Path) -> None:
    model = open_model(source)
    (source / "vocab.json").symlink_to("nowhere")
    with pytest.raises(CheckpointError, match=r"vocab\.json: is a link to nothing"):
        companions(model)


def test_a_template_gets_its_second_place(source: Path) -> None:
    made = found_in(source)
    assert made["chat_template.jinja"] == CHAT_TEMPLATE.encode()
    assert made["tokenizer_config.json"] == (source / "tokenizer_config.json").read_bytes()
    odd = "{# ünï #}\r\n{{ messages }}\n\n"
    edit(source / "tokenizer_config.json", chat_template=odd)
    assert found_in(source)["chat_template.jinja"] == odd.encode()
    edit(source / "tokenizer_config.json", chat_template=...)
    assert "chat_template.jinja" not in found_in(source)
    (source / "chat_template.json").write_text(json.dumps({"chat_template": "{{ x }}"}))
    made = found_in(source)
    assert made["chat_template.jinja"] == b"{{ x }}"
    assert made["chat_template.json"] == (source / "chat_template.json").read_bytes()


def test_named_templates_stay_where_they_are(source: Path) -> None:
    """A chat_template.jinja beside them would hide the others from transformers."""
    named = [{"name": "default", "template": "{{ a }}"}, {"name": "tool_use", "template": "{{ b }}"}]
    edit(source / "tokenizer_config.json", chat_template=named)
    made = found_in(source)
    assert "chat_template.jinja" not in made
    assert made["tokenizer_config.json"] == (source / "tokenizer_config.json").read_bytes()


def test_a_template_of_its_own_file_leaves_the_config_alone(source: Path) -> None:
    edit(source / "tokenizer_config.json", chat_template=...)
    (source / "chat_template.jinja").write_bytes(b"{{ messages }}")
    made = found_in(source)
    assert made["chat_template.jinja"] == b"{{ messages }}"
    assert made["tokenizer_config.json"] == (source / "tokenizer_config.json").read_bytes()


@pytest.mark.parametrize("decoy", [False, True])
def test_the_class_that_only_transformers_5_knows(source: Path, decoy: bool) -> None:
    path = source / "tokenizer_config.json"
    edit(path, tokenizer_class="TokenizersBackend", backend="tokenizers", is_local=True, ümlaut="ß \U0001f600")
    if decoy:  # the same words where they mean something else
        edit(path, extra={"tokenizer_class": "TokenizersBackend"})
    before = path.read_bytes()
    model = open_model(source)
    made = content_of(companions(model))["tokenizer_config.json"]
    wanted = {**json.loads(before), "tokenizer_class": "PreTrainedTokenizerFast"}
    assert json.loads(made) == wanted
    assert list(json.loads(made)) == list(json.loads(before))
    if not decoy:
        assert made == before.replace(b'"TokenizersBackend"', b'"PreTrainedTokenizerFast"')
    assert any("TokenizersBackend became PreTrainedTokenizerFast" in line for line in notes(model))
    assert path.read_bytes() == before


@pytest.mark.parametrize("value", [..., None, ""])
def test_a_missing_class_is_added(source: Path, value: Any) -> None:
    edit(source / "tokenizer_config.json", tokenizer_class=value)
    model = open_model(source)
    made = json.loads(content_of(companions(model))["tokenizer_config.json"])
    before = json.loads((source / "tokenizer_config.json").read_text())
    assert made == {**before, "tokenizer_class": "PreTrainedTokenizerFast"}
    assert any("tokenizer_class PreTrainedTokenizerFast was added" in line for line in notes(model))


def test_a_missing_tokenizer_config_is_made(source: Path) -> None:
    """swift-transformers loads no tokenizer without; transformers takes the special tokens from it."""
    (source / "tokenizer_config.json").unlink()
    edit(source / "config.json", bos_token_id=0, eos_token_id=2, pad_token_id=2)
    made = json.loads(found_in(source)["tokenizer_config.json"])
    assert made == {
        "bos_token": "<|endoftext|>",
        "eos_token": "<|im_end|>",
        "pad_token": "<|im_end|>",
        "tokenizer_class": "PreTrainedTokenizerFast",
    }


def test_a_sentencepiece_tokenizer_gets_no_class(tmp_path: Path) -> None:
    texts = [chr(c) for c in range(ord("a"), ord("z"))] + ["▁"]
    folder = save_tokenizer(tmp_path, characters_document(texts, []), tokenizer_config={"eos_token": "</s>"})
    write_checkpoint(tmp_path, "llama", num_hidden_layers=1, vocab_size=259 + len(texts), bos_token_id=1)
    model = open_model(folder)
    assert content_of(companions(model))["tokenizer_config.json"] == (folder / "tokenizer_config.json").read_bytes()
    assert any("has no tokenizer_class" in line for line in notes(model))


def test_a_missing_generation_config_is_made(source: Path) -> None:
    model = open_model(source)
    made = json.loads(content_of(companions(model))["generation_config.json"])
    assert made == {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 2}
    assert notes(model) == ["generation_config.json is missing; one with the ids of the special tokens was added"]
    edit(source / "config.json", eos_token_id=0)  # the chat ends with <|im_end|>, which the config forgets
    model = open_model(source)
    made = json.loads(content_of(companions(model))["generation_config.json"])
    assert made["eos_token_id"] == [0, 2]
    assert len(notes(model)) == 1


STOPS: list[tuple[Any, Any, str | None]] = [
    ([0, 2], 0, None),
    (2, 0, None),  # 0 is the tokenizer's own
    (0, 2, "mlx-swift will not stop at 2 ('<|im_end|>'): eos_token_id is 0 in generation_config.json, 2 in config"),
    (0, 0, "mlx-lm and mlx-swift will not stop at 2 ('<|im_end|>')"),
    (None, 0, "mlx-lm and mlx-swift will not stop at 2 ('<|im_end|>'): eos_token_id is None"),
    (1, 2, "mlx-lm and mlx-swift will not stop at 2 ('<|im_end|>')"),
    ([1, 7], [2, 9], "mlx-lm and mlx-swift will not stop at 2 ('<|im_end|>'), 9 ("),
    ([], 2, "mlx-swift will not stop at 2"),
    (..., 0, None),  # made anew, with every stop token
]


def forgetful(source: Path, generation: Any, config: Any) -> SourceModel:
    """A checkpoint whose chat ends with token 2 and whose tokenizer stops at 0; the configs say what they say."""
    edit(source / "tokenizer_config.json", eos_token="<|endoftext|>")
    if generation is not ...:
        (source / "generation_config.json").write_text(json.dumps({"eos_token_id": generation}))
    edit(source / "config.json", eos_token_id=config)
    return open_model(source)


@pytest.mark.parametrize(("generation", "config", "expected"), STOPS)
def test_stop_tokens_that_mlx_misses_are_named(
    source: Path, generation: Any, config: Any, expected: str | None
) -> None:
    model = forgetful(source, generation, config)
    found = [line for line in notes(model) if "will not stop" in line]
    assert len(found) == (expected is not None)
    assert expected is None or found[0].startswith(expected)
    if generation is not ...:
        made = content_of(companions(model))["generation_config.json"]
        assert made == (source / "generation_config.json").read_bytes()


@needs_mlx
@pytest.mark.parametrize(("generation", "config", "expected"), STOPS)
def test_mlx_stops_where_the_notes_say(
    source: Path, tmp_path: Path, generation: Any, config: Any, expected: str | None
) -> None:
    """mlx-lm's own tokenizer on the folder: its stop tokens are the checkpoint's, less those in a note."""
    utils, model = mlx_lm("utils"), forgetful(source, generation, config)
    folder = write_folder(model, tmp_path / "out")
    tokenizer = utils.load_tokenizer(folder, eos_token_ids=utils.load_config(folder).get("eos_token_id"))
    missing = set(model.tokenizer.stop_tokens) - tokenizer.eos_token_ids
    assert missing == {i for i in (2, 9) if expected and "mlx-lm" in expected and f" {i} (" in expected}


def write_folder(model: SourceModel, folder: Path) -> Path:
    folder.mkdir()
    for name, raw in content_of(companions(model)).items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(raw)
    (folder / "config.json").write_text(json.dumps(compose(model, None, "BF16")))
    return folder


@pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="transformers is not installed")
@pytest.mark.parametrize("name", [..., "TokenizersBackend", "PreTrainedTokenizerFast"])
def test_transformers_reads_the_same_tokenizer(source: Path, tmp_path: Path, name: Any) -> None:
    from transformers import AutoTokenizer

    edit(source / "tokenizer_config.json", tokenizer_class=name)
    ours = AutoTokenizer.from_pretrained(write_folder(open_model(source), tmp_path / "out"))
    theirs = AutoTokenizer.from_pretrained(source)
    text = "the and 123 of\n<|im_start|>user ünï"
    assert ours(text).input_ids == theirs(text).input_ids
    chat = [{"role": "user", "content": "it was"}]
    assert ours.apply_chat_template(chat, tokenize=False) == theirs.apply_chat_template(chat, tokenize=False)
    assert (ours.eos_token_id, ours.bos_token_id) == (2, 0)


@pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="transformers is not installed")
def test_a_real_sentencepiece_tokenizer_survives_its_new_class(shared: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    source = shared / "stories260K" / "hf_bf16"
    model = open_model(source)
    assert any("TokenizersBackend became" in line for line in notes(model))
    ours = AutoTokenizer.from_pretrained(write_folder(model, tmp_path / "out"))
    theirs = AutoTokenizer.from_pretrained(source)
    for text in ("Once upon a time, there was a girl.", "  ünï 42\n\tx", "<s>Tom</s> ran"):
        assert ours(text).input_ids == theirs(text).input_ids
        assert ours.decode(ours(text).input_ids) == theirs.decode(theirs(text).input_ids)


def test_folders_that_match_a_pattern_are_passed_over(source: Path) -> None:
    for name in ("LICENSES", "additional_chat_templates/x.jinja"):
        (source / name).mkdir(parents=True)
    assert not {"LICENSES", "additional_chat_templates/x.jinja"} & {f.name for f in companions(open_model(source))}


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir], ids=["pipe", "folder"])
def test_things_that_are_not_files_are_refused(source: Path, make: Callable[[Path], None]) -> None:
    model = open_model(source)
    make(source / "added_tokens.json")
    with pytest.raises(CheckpointError, match=r"added_tokens\.json: is not a regular file"):
        companions(model)


@pytest.mark.parametrize("name", ["tokenizer_config.json", "vocab.json", "LICENSE", "chat_template.jinja"])
def test_enormous_files_are_refused_unread(source: Path, name: str) -> None:
    model = open_model(source)
    with (source / name).open("r+b" if (source / name).exists() else "wb") as file:
        file.truncate(100 << 20)
    tracemalloc.start()
    with pytest.raises(CheckpointError, match=f"{name}: 104,857,600 bytes, more than such a file ever needs"):
        companions(model)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


@pytest.mark.parametrize("raw", [b"[]", b'{"a": ', b'{"a": 1, "a": 2}', b"\xff", b'{"a":' * 100_000])
@pytest.mark.parametrize("name", ["tokenizer_config.json", "generation_config.json"])
def test_damaged_files_are_one_line(source: Path, name: str, raw: bytes) -> None:
    model = open_model(source)
    (source / name).write_bytes(raw)
    for call in (companions, notes):
        with pytest.raises(TokenizerError) as caught:
            call(model)
        assert name in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root reads everything")
def test_unreadable_files_are_one_line(source: Path) -> None:
    model = open_model(source)
    (source / "tokenizer.json").chmod(0)
    with pytest.raises(CheckpointError, match=r"tokenizer.json: Permission denied"):
        companions(model)


def test_an_unreadable_card_is_noted(source: Path) -> None:
    (source / "README.md").write_bytes(b"---\nlicense: [mit\n---\n")
    assert any("README.md: its head cannot be read" in line for line in notes(open_model(source)))
