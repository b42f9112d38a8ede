"""No byte from outside a checkpoint's folder gets into an output, and none of a model that took its place meanwhile."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from smolexport.conversion import encode
from smolexport.errors import CheckpointError
from smolexport.model.checkpoint import open_checkpoint
from smolexport.model.source_files import file_in, files_in, refuse_changes, refuse_links, stamps
from tests.cli.commands import Outcome, assert_refused, call, tiny_checkpoint

SECRET = "PRIVATE-KEY-b64-c2VjcmV0"
INDEX = "model.safetensors.index.json"
# Every name that any reader of a checkpoint looks for: ours, transformers' and the tokenizers' own.
NAMES = (
    """config.json generation_config.json tokenizer.json tokenizer_config.json special_tokens_map.json added_tokens.json
    vocab.json merges.txt chat_template.jinja chat_template.json additional_chat_templates/x.jinja README.md LICENSE
    LICENSE.txt model.safetensors"""
).split()
# Those whose text would be embedded or copied, were they read: each holds the secret in a form that passes as such.
CONTENT = {
    "generation_config.json": {"eos_token_id": 1, "note": SECRET},
    "tokenizer_config.json": {"chat_template": SECRET},
    "special_tokens_map.json": {"note": SECRET},
    "added_tokens.json": {},
    "vocab.json": {SECRET: 0},
    "chat_template.json": {"chat_template": SECRET},
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny_checkpoint(tmp_path)


def outside(tmp_path: Path, folder: Path, name: str) -> Path:
    """A private file of the user's that would do as the checkpoint's `name`."""
    private = tmp_path / "home" / "secrets" / "id"
    private.parent.mkdir(parents=True)
    place = folder / name
    if name in CONTENT:
        private.write_text(json.dumps(CONTENT[name]))
    elif place.exists():
        private.write_bytes(place.read_bytes())
        if name in ("config.json", "tokenizer.json"):
            document = json.loads(private.read_text())
            private.write_text(json.dumps(document | {"_name_or_path": SECRET, "truncation": None}))
    else:
        private.write_text(f"---\nlicense: {SECRET}\n---\n{SECRET}\n")
    return private


def linked(kind: str, folder: Path, name: str, private: Path) -> None:
    """Put a link to `private` at `name`; of kind `folder` by way of a linked folder above it."""
    place = folder / name
    if kind == "folder":
        copy = private.parent / Path(name).name
        private.rename(copy)
        shutil.rmtree(place.parent, ignore_errors=True)
        place.parent.symlink_to(copy.parent, target_is_directory=True)
        return
    place.parent.mkdir(exist_ok=True)
    place.unlink(missing_ok=True)
    if kind == "chain":
        (folder / "between").symlink_to(private)
        place.symlink_to("between")
    else:
        place.symlink_to(private if kind == "absolute" else os.path.relpath(private, place.parent))


def everything(*roots: Path) -> Iterator[tuple[Path, bytes]]:
    for root in roots:
        for path in [root, *root.rglob("*")] if root.is_dir() else [root] if root.exists() else []:
            if path.is_file():
                yield path, path.read_bytes()


def commands(folder: Path, out: Path) -> dict[str, Callable[[], Outcome]]:
    return {
        "gguf": lambda: call("gguf", folder, "-q", "f16", "-o", out / "x.gguf"),
        "mlx": lambda: call("mlx", folder, "-q", "f16", "-o", out / "m"),
        "onnx": lambda: call("onnx", folder, "-q", "f32", "-o", out / "o"),
        "all": lambda: call("all", folder, "-q", "int8", "-o", out / "all"),
        "plan": lambda: call("mlx", folder, "-q", "f16", "--dry-run"),
    }


KINDS = [(kind, name) for name in NAMES for kind in ("absolute", "relative", "chain")]
KINDS.append(("folder", "additional_chat_templates/x.jinja"))


@pytest.mark.parametrize(("kind", "name"), KINDS)
def test_no_export_reads_outside_of_the_checkpoint(kind: str, name: str, folder: Path, tmp_path: Path) -> None:
    if name.startswith("additional"):
        (folder / "chat_template.jinja").write_text("{{ messages }}")
    linked(kind, folder, name, outside(tmp_path, folder, name))
    out = tmp_path / "out"
    out.mkdir()
    for command, run in commands(folder, out).items():
        done = run()
        used = done.code == 2
        assert used or command == "gguf", (command, done)  # GGUF has no use for a licence
        if used:
            assert_refused(done, Path(name).name, "link")
        assert SECRET not in done.out + done.err
        assert [path for path, raw in everything(out) if SECRET.encode() in raw] == []


@pytest.mark.parametrize("name", [n for n in NAMES if not n.startswith("LICENSE") and n != "README.md"])
def test_no_other_command_reads_outside_of_the_checkpoint(name: str, folder: Path, tmp_path: Path) -> None:
    """Nor does transformers on our behalf."""
    pytest.importorskip("torch")
    out = tmp_path / "x.gguf"
    assert call("gguf", folder, "-q", "f16", "-o", out).code == 0
    if name.startswith("additional"):
        (folder / "chat_template.jinja").write_text("{{ messages }}")
    linked("absolute", folder, name, outside(tmp_path, folder, name))
    report = tmp_path / "report.json"
    text = tmp_path / "text.txt"
    text.write_text("once upon a time " * 200)
    for done in (
        call("compare", folder, out, "--text", text, "--window", "32", "--max-windows", "2", "--greedy-tokens", "0",
             "--repetitions", "0", "--report", report),
        call("generate", folder, "x", "-n", "2"),
        call("calibrate", folder, "--text", text, "--tokens", "64", "--window", "16", "-o", tmp_path / "stats"),
    ):  # fmt: skip
        # calibrate has no use for some of them; what has is refused
        assert done.code == 2 or "stats" in done.out, done
        assert done.code == 0 or "link" in done.err
        assert SECRET not in done.out + done.err
    assert [path for path, raw in everything(report, tmp_path / "stats") if SECRET.encode() in raw] == []


@pytest.mark.parametrize("target", ["mlx", "onnx"])
def test_templates_of_an_exported_folder_are_not_read_elsewhere(target: str, folder: Path, tmp_path: Path) -> None:
    """`compare` shows prompts that differ: it would show the file behind the link."""
    pytest.importorskip("torch"), pytest.importorskip("mlx_lm"), pytest.importorskip("onnxruntime")
    out = tmp_path / "out"
    assert call(target, folder, "-q", "f32", "-o", out).code == 0
    (tmp_path / "private").write_text(SECRET)
    (out / "chat_template.jinja").unlink(missing_ok=True)
    (out / "chat_template.jinja").symlink_to(tmp_path / "private")
    text = tmp_path / "text.txt"
    text.write_text("once upon a time " * 200)
    flags = "--window 32 --max-windows 2 --greedy-tokens 0 --repetitions 0 --no-attribution --json".split()
    done = call("compare", folder, out, "--text", text, *flags)
    assert SECRET not in done.out + done.err
    assert "link out of the" in done.out + done.err


@pytest.mark.parametrize("target", ["../secrets.safetensors", "/abs/secrets.safetensors", "deep/er.safetensors"])
def test_an_index_names_no_file_elsewhere(target: str, folder: Path, tmp_path: Path) -> None:
    places = {"../": folder.parent / "secrets.safetensors", "/ab": tmp_path / "abs.safetensors",
              "dee": folder / "deep" / "er.safetensors"}  # fmt: skip
    place = places[target[:3]]
    place.parent.mkdir(exist_ok=True)
    (folder / "model.safetensors").rename(place)
    named = str(place) if target.startswith("/") else target
    names = [p.name for p in open_checkpoint(tiny_checkpoint(tmp_path / "other")).stored.values()]
    (folder / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(names, named)}))
    assert_refused(call("gguf", folder, "-o", tmp_path / "x.gguf"), folder / INDEX, "names the file")


def test_a_shard_that_is_a_link_out_is_refused(folder: Path, tmp_path: Path) -> None:
    shard = (folder / "model.safetensors").rename(tmp_path / "elsewhere.safetensors")
    (folder / "model-1.safetensors").symlink_to(shard)
    (folder / INDEX).write_text(json.dumps({"weight_map": {"model.norm.weight": "model-1.safetensors"}}))
    assert_refused(call("gguf", folder, "-o", tmp_path / "x.gguf"), "model-1.safetensors: is a link out of")


def snapshot(tmp_path: Path, folder: Path) -> Path:
    """`folder` as the hub's library lays it: links into the blobs beside the snapshots."""
    blobs, made = tmp_path / "hub" / "blobs", tmp_path / "hub" / "snapshots" / "0123"
    blobs.mkdir(parents=True)
    for number, path in enumerate(sorted(p for p in folder.rglob("*") if p.is_file())):
        link = made / path.relative_to(folder)
        link.parent.mkdir(parents=True, exist_ok=True)
        blob = path.rename(blobs / str(number))
        link.symlink_to(os.path.relpath(blob, link.parent))
    return made


def test_a_snapshot_of_the_hub_is_exported(folder: Path, tmp_path: Path) -> None:
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "t.jinja").write_text("{{ tools }}")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    made = snapshot(tmp_path, folder)
    out = tmp_path / "out"
    out.mkdir()
    for name, run in commands(made, out).items():
        assert run().code == 0, name
    assert (out / "m" / "additional_chat_templates" / "t.jinja").read_text() == "{{ tools }}"


def test_blobs_that_are_a_link_themselves_are_not_the_cache(folder: Path, tmp_path: Path) -> None:
    made = snapshot(tmp_path, folder)
    (tmp_path / "hub" / "blobs").rename(tmp_path / "elsewhere")
    (tmp_path / "hub" / "blobs").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="is a link out of the checkpoint's folder"):
        open_checkpoint(made)


def test_links_inside_and_other_things(folder: Path, tmp_path: Path) -> None:
    (folder / "deep").mkdir()
    (folder / "config.json").rename(folder / "deep" / "c")
    (folder / "config.json").symlink_to("deep/c")
    assert file_in(folder, "config.json") == folder / "config.json"
    assert file_in(folder, "absent.json") is None
    (tmp_path / "short").symlink_to(folder)
    assert files_in(tmp_path / "short", "*.json")
    (folder / "round.json").symlink_to("round.json")
    os.mkfifo(folder / "pipe.json")
    for name, said in (("round.json", "round.json"), ("pipe.json", "not a regular file")):
        with pytest.raises(CheckpointError, match=said):
            file_in(folder, name)
    with pytest.raises(CheckpointError, match=r"pipe\.json"):
        refuse_links(folder)


def swapped(folder: Path) -> None:
    """Another model of the same shape takes the place, by renaming: sizes and names are the same."""
    other = tiny_checkpoint(folder.parent / "new", seed=1)
    (other / "model.safetensors").replace(folder / "model.safetensors")


CHANGES: dict[str, Callable[[Path], object]] = {
    "replaced": swapped,
    "rewritten": lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()),
    "config": lambda f: (f / "config.json").write_text((f / "config.json").read_text()),
    "tokenizer": lambda f: (f / "tokenizer.json").write_text((f / "tokenizer.json").read_text() + "\n"),
    "template removed": lambda f: (f / "tokenizer_config.json").unlink(),
    "index added": lambda f: (f / INDEX).write_text("{}"),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("target", ["gguf", "all"])
def test_a_source_that_changes_while_it_is_read(
    change: str, target: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chunks, done = encode.encoded_chunks, []

    def changing(*arguments: object) -> Iterator[object]:
        for chunk in chunks(*arguments):  # type: ignore[arg-type]
            yield chunk
            if not done:
                done.append(CHANGES[change](folder))

    monkeypatch.setattr("smolexport.conversion.pipeline.encoded_chunks", changing)
    out = tmp_path / "out"
    out.mkdir()
    ended = call(target, folder, "-q", "int8", "-o", out)
    assert ended.code == 2
    assert "changed while the checkpoint was read, and nothing was written" in ended.err.splitlines()[-1]
    assert list(out.iterdir()) == []


def test_what_others_write_into_the_folder_is_no_change(folder: Path) -> None:
    before = stamps(folder)
    (folder / "trainer_state.json").write_text("{}")
    (folder / "model-int4.gguf.calibration.json").write_text("{}")
    (folder / "optimizer.pt").write_bytes(b"")
    refuse_changes(folder, before)
