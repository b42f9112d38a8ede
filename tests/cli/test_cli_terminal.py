"""Nothing that a stranger wrote drives the terminal: a model's text, names in files, names of folders."""

from __future__ import annotations

import json
import re
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from smolexport.quant import FORMATS
from smolexport.tokenizer.codec import byte_characters
from smolexport_to_gguf.container import header_bytes
from tests.cli.commands import assert_refused, call, run, tiny_checkpoint
from tests.terminals import on_terminal

OBEYED = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u202a-\u202e\u2066-\u2069]")
EVIL = "a\x1b[2J\x9b1m\u202e\x7fb"
SHOWN = r"a\x1b[2J\x9b1m\u202e\x7fb"
TEXT = "\x1b]0;hi\x07\u009bxy\n\u202ez\t"  # a title, a C1 control, a reordering; no byte twice but the last two pairs
QUICK = ("--no-compare", "--formats", "gguf", "-q", "q8_0", "--jobs", "1")


@pytest.fixture(scope="module")
def speaker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GGUF file of a model that says `TEXT` after a Q, whatever the sampler: each byte names the next one."""
    folder = tmp_path_factory.mktemp("speaker")
    checkpoint = tiny_checkpoint(folder, dtype="f32", tie_word_embeddings=False)
    vocabulary = json.loads((checkpoint / "tokenizer.json").read_text())["model"]["vocab"]
    ids = [vocabulary[{b: c for c, b in byte_characters().items()}[byte]] for byte in b"Q" + TEXT.encode()]
    assert len(set(ids)) == len(ids) == len(TEXT.encode()) + 1
    tensors = load_file(checkpoint / "model.safetensors")
    for name, values in tensors.items():
        if name.endswith(("o_proj.weight", "down_proj.weight", "embed_tokens.weight", "lm_head.weight")):
            values[:] = 0
        elif values.ndim == 1:
            values[:] = 1
    for place, (now, then) in enumerate(pairwise(ids)):
        tensors["model.embed_tokens.weight"][now, place] = tensors["lm_head.weight"][then, place] = 1
    save_file({name: np.ascontiguousarray(v) for name, v in tensors.items()}, checkpoint / "model.safetensors")
    assert call("gguf", checkpoint, "-q", "f32", "-o", folder / "speaker.gguf").code == 0
    return folder / "speaker.gguf"


def test_generated_text_on_a_terminal_and_elsewhere(speaker: Path) -> None:
    wish = ("generate", speaker, "Q", "-n", str(len(TEXT.encode())))
    shown, notes = on_terminal("stdout", *wish)
    assert shown == "\\x1b]0;hi\\x07\\x9bxy\r\n\\u202ez\t\r\n"
    assert not OBEYED.search(notes.replace("\n", ""))
    assert run(*wish).out == f"{TEXT}\n", "in a pipe byte by byte"
    told = run(*wish, "--json").out
    assert told.isascii()
    assert not OBEYED.search(told.replace("\n", ""))
    assert json.loads(told)["text"] == TEXT


@pytest.fixture
def evil(tmp_path: Path) -> Path:
    """A checkpoint in a folder of an evil name."""
    return Path(shutil.move(tiny_checkpoint(tmp_path), tmp_path / EVIL))


@pytest.mark.parametrize("json_too", [(), ("--json",)], ids=["text", "json"])
def test_a_sweeps_table_and_lines(evil: Path, tmp_path: Path, json_too: tuple[str, ...]) -> None:
    for wish in (("--dry-run",), (), ()):  # to do, new, kept
        outcome = call("sweep", evil, "-o", tmp_path / "out", *QUICK, *wish, *json_too)
        assert outcome.code == 0, outcome.err
        assert not OBEYED.search((outcome.out + outcome.err).replace("\n", ""))
        shown = json.loads(outcome.out)["tasks"][0]["name"] if json_too else outcome.out.replace("\n", "")
        assert (EVIL if json_too else SHOWN) in shown
    failed = call("sweep", tmp_path / f"{EVIL}[red]", "-o", tmp_path / "out", *QUICK, *json_too)
    assert failed.code == 1
    assert not OBEYED.search((failed.out + failed.err).replace("\n", ""))


def test_a_sweep_on_a_terminal(evil: Path, tmp_path: Path) -> None:
    shown, _ = on_terminal("stderr", "sweep", evil, "-o", tmp_path / "out", *QUICK)
    assert SHOWN in shown
    assert "\x1b[2J" not in shown, "what rich writes itself stays"
    assert not set("\x9b\u202e\x7f") & set(shown)


def test_names_beside_a_bar_are_no_markup(tmp_path: Path) -> None:
    checkpoint = Path(shutil.move(tiny_checkpoint(tmp_path), tmp_path / "a[bold]b"))
    shown, _ = on_terminal("stderr", "gguf", checkpoint, "-q", "q8_0", "-o", tmp_path / "out.gguf", "--name", EVIL)
    assert "wrote" in shown
    shown, _ = on_terminal("stderr", "gguf", checkpoint, "-q", "q8_0", "-o", tmp_path / "c[red]d.gguf")
    assert "writing c[red]d.gguf" in shown


@pytest.mark.parametrize("target", ["gguf", "mlx", "onnx"])
def test_plans_and_what_is_read_back(target: str, tmp_path: Path) -> None:
    """Names and texts of a checkpoint in the plan, and in the file that is made of it."""
    checkpoint = tiny_checkpoint(tmp_path, _name_or_path=EVIL, id2label={"0": EVIL})
    templates = checkpoint / "additional_chat_templates"
    templates.mkdir()
    (templates / f"{EVIL}.jinja").write_text("{{ messages }}")
    out = tmp_path / "out"
    wishes = (
        (target, checkpoint, "--dry-run"), (target, checkpoint, "-o", out, "--name", EVIL), ("inspect", out),
        ("inspect", out, "--json"),
    )  # fmt: skip
    for wish in wishes:
        outcome = call(*wish)
        assert outcome.code == 0, outcome.err
        assert not OBEYED.search((outcome.out + outcome.err).replace("\n", ""))
        assert EVIL not in outcome.out
    assert (json.loads(outcome.out)["name"]) == EVIL


LONG = "x" * 100_000


def config(folder: Path, **keys: Any) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))
    return folder


def tensor(folder: Path, name: str) -> Path:
    path = folder / "model.safetensors"
    save_file({**load_file(path), name: np.zeros((4, 4), np.float32)}, path)
    return folder


def index(folder: Path, name: str) -> Path:
    (folder / "model.safetensors").unlink()  # which would come before the index
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    return folder


def tokens(folder: Path, **model: Any) -> Path:
    path = folder / "tokenizer.json"
    found = json.loads(path.read_text())
    found["model"] |= model
    path.write_text(json.dumps(found))
    return folder


LENGTHY = {
    "a key": lambda f: config(f, **{LONG: 1}),
    "a value": lambda f: config(f, hidden_act=LONG),
    "a list": lambda f: config(f, rope_scaling=[1] * 100_000),
    "a model type": lambda f: config(f, model_type=LONG),
    "a rope type": lambda f: config(f, rope_scaling={"rope_type": LONG}),
    "a rope parameter": lambda f: config(f, rope_scaling={"rope_type": "linear", "factor": 2.0, LONG: LONG}),
    "two rope types": lambda f: config(f, rope_scaling={"rope_type": LONG, "type": LONG[1:]}),
    "a tensor": lambda f: tensor(f, LONG),
    "a weight file": lambda f: index(f, f"{LONG}.safetensors"),
    "a weight file elsewhere": lambda f: index(f, f"../{LONG}"),
    "a kind of tokenizer": lambda f: tokens(f, type=LONG),
    "a token's id": lambda f: tokens(f, vocab={LONG: LONG}),
    "a merge": lambda f: tokens(f, merges=[LONG]),
    "an unknown token": lambda f: tokens(f, unk_token=LONG),
}


@pytest.mark.parametrize("what", LENGTHY)
def test_long_names_and_values_are_shortened(what: str, tmp_path: Path) -> None:
    folder = LENGTHY[what](tiny_checkpoint(tmp_path))
    outcome = call("gguf", folder, "-o", tmp_path / "x.gguf")
    assert_refused(outcome, folder)
    assert len(outcome.err) < 500 + 3 * len(str(folder))


def test_long_names_in_exported_files(tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint(tmp_path)
    row = [("t" * 60_000, (4,), FORMATS["f32"])]
    for architecture in ("llama", LONG):
        keys = [("general.architecture", "string", architecture), ("llama.block_count", "u32", 1)]
        keys += [
            ("llama.attention.head_count", "u32", 1),
            ("llama.embedding_length", "u32", 4),
            ("k" * 60_000, "u32", 1),
        ]
        (tmp_path / f"{architecture[:5]}.gguf").write_bytes(header_bytes(keys, row) + bytes(32))
    assert call("mlx", checkpoint, "-q", "q8", "-o", tmp_path / "mlx").code == 0
    weights = tmp_path / "mlx" / "model.safetensors"
    save_file({**load_file(weights), LONG: np.zeros((4, 4), np.int32)}, weights, {"format": "mlx"})
    (tmp_path / "gate.toml").write_text(f"[{LONG}]\nmax_kld = 1\n")
    for file in ("llama.gguf", "xxxxx.gguf", "mlx"):
        outcome = call("inspect", tmp_path / file)
        assert outcome.code == 0, outcome.err
        assert "no weights fingerprint" in outcome.err
        assert max(map(len, (outcome.out + outcome.err).splitlines())) < 400 + len(str(tmp_path))
    outcome = call("compare", "demo", tmp_path / "llama.gguf", "--gate", tmp_path / "gate.toml")
    assert_refused(outcome, tmp_path / "gate.toml")
    assert len(outcome.err) < 500 + len(str(tmp_path))
