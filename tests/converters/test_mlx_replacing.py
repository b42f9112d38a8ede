"""What an MLX export replaces: with `--force` an earlier export, never anything else; and what names it may have."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

import smolexport
import smolexport_to_mlx
from smolexport.conversion.pipeline import write
from smolexport.conversion.prepare import prepare
from smolexport.errors import OutputError
from smolexport_to_mlx.container import read_header
from tests.cli.commands import assert_refused, call, tiny_checkpoint
from tests.converters.mlx_models import open_model
from tests.converters.test_mlx_hostile import rewrite
from tests.mlx_for_tests import mlx_lm


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def exported(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return smolexport.export("mlx", tiny, tmp_path_factory.mktemp("out") / "x", quant="q4_g32").path


@pytest.fixture
def folder(exported: Path, tmp_path: Path) -> Path:
    """A copy that may be changed."""
    return Path(shutil.copytree(exported, tmp_path / "folder"))


def test_what_stands_at_the_target(tiny: Path, exported: Path, tmp_path: Path) -> None:
    """Only an earlier export is ever replaced, and only with --force."""
    (tmp_path / "file").write_text("precious")
    (tmp_path / "things").mkdir()
    (tmp_path / "things" / "letter").write_text("precious")
    (tmp_path / "link").symlink_to(tmp_path / "things")
    shutil.copytree(exported, tmp_path / "earlier")
    (tmp_path / "empty").mkdir()
    assert_refused(call("mlx", tiny, "-o", tmp_path / "file", "--force"), "is not a folder")
    assert_refused(call("mlx", tiny, "-o", tmp_path / "earlier"), "earlier: exists already; pass --force")
    assert_refused(call("mlx", tiny, "-o", tmp_path / "missing" / "x"), "missing: no such folder")
    before = (tmp_path / "earlier" / "config.json").read_bytes()
    done = call("mlx", tiny, "-q", "q8", "-o", tmp_path / "earlier", "--force")
    assert done.out == f"{tmp_path / 'earlier'}\n"
    assert (tmp_path / "earlier" / "config.json").read_bytes() != before
    inside = call("mlx", tiny, "-o", tmp_path / "things")
    assert inside.out.startswith(str(tmp_path / "things"))
    assert (tmp_path / "things" / "letter").read_text() == "precious"
    assert (tmp_path / "file").read_text() == "precious"
    from smolexport.files import check_target

    for place in ("things", "link"):
        with pytest.raises(OutputError):
            check_target(tmp_path / place, 1, force=True, replaceable=smolexport_to_mlx.replaceable)
    check_target(tmp_path / "empty", 1, replaceable=smolexport_to_mlx.replaceable)


FOREIGN: dict[str, Callable[[Path], object]] = {
    "a note": lambda f: (f / "notes.txt").write_text("precious"),
    "a hidden file": lambda f: (f / ".env").write_text("precious"),
    "a backup": lambda f: shutil.copy(f / "model.safetensors", f / "model_before.safetensors"),
    "a repository": lambda f: (f / ".git").mkdir(),
    "a folder of results": lambda f: (f / "LICENSES").mkdir(),
    "something beside the templates": lambda f: [
        (f / "additional_chat_templates").mkdir(), (f / "additional_chat_templates" / "x.txt").write_text("precious")],
    "a file that is a link": lambda f: [
        shutil.move(f / "README.md", f.parent / "card"), (f / "README.md").symlink_to(f.parent / "card")],
    "weights that are a link": lambda f: [
        shutil.move(f / "model.safetensors", f.parent / "weights"),
        (f / "model.safetensors").symlink_to(f.parent / "weights")],
    "a link to nothing": lambda f: (f / "vocab.json").symlink_to("nowhere"),
    "made by mlx-lm": lambda f: rewrite(f / "model.safetensors", lambda h: h["__metadata__"].pop("smolexport.scheme")),
    "other weights": lambda f: shutil.copy(f.parent / "mlx-lm", f / "model-00002-of-00002.safetensors"),
    "damaged": lambda f: (f / "model.safetensors").write_bytes(b"no"),
    "no weights": lambda f: (f / "model.safetensors").unlink(),
}  # fmt: skip


@pytest.mark.parametrize("foreign", FOREIGN)
def test_a_folder_that_somebody_changed_is_not_replaced(foreign: str, tiny: Path, folder: Path) -> None:
    shutil.copy(folder / "model.safetensors", folder.parent / "mlx-lm")
    rewrite(folder.parent / "mlx-lm", lambda h: h.pop("__metadata__"))
    (folder / "LICENSE.md").write_text("ours, as companions go")
    assert smolexport_to_mlx.replaceable(folder)
    FOREIGN[foreign](folder)
    assert not smolexport_to_mlx.replaceable(folder)
    before = {p: p.lstat().st_mtime_ns for p in folder.rglob("*")}
    job = prepare("mlx", tiny, folder.parent / "elsewhere")
    with pytest.raises(OutputError, match="never replaced"):
        write(replace(job, path=folder), force=True)
    assert {p: p.lstat().st_mtime_ns for p in folder.rglob("*")} == before


def test_a_link_to_an_earlier_export_is_not_replaced(folder: Path) -> None:
    (folder.parent / "link").symlink_to(folder)
    assert not smolexport_to_mlx.replaceable(folder.parent / "link")
    assert not smolexport_to_mlx.replaceable(folder / "config.json")
    assert not smolexport_to_mlx.replaceable(folder / "missing")


def test_every_file_of_an_export_may_be_replaced(tmp_path: Path) -> None:
    """Whatever the checkpoint brings along."""
    source = tiny_checkpoint(tmp_path)
    (source / "additional_chat_templates").mkdir()
    (source / "chat_template.jinja").write_text("{{ messages }}")
    for name in ("LICENSE", "LICENSE.txt", "merges.txt", "additional_chat_templates/tool.jinja", "README.md"):
        (source / name).write_text("words")
    for name in ("vocab.json", "added_tokens.json", "special_tokens_map.json", "generation_config.json"):
        (source / name).write_text("{}")
    for scheme in ("q4_g32", "q8_g32"):
        made = smolexport.export("mlx", source, tmp_path / "x", quant=scheme, force=True).path
        assert smolexport_to_mlx.replaceable(made)
    assert smolexport.inspect(tmp_path / "x").scheme == "q8_g32"
    assert (tmp_path / "x" / "additional_chat_templates" / "tool.jinja").is_file()


@pytest.mark.parametrize("name", ["\udcffx", "\ud83d", "a\udcff\ud800b"])
def test_a_name_that_is_no_text_makes_a_folder_that_is_read(name: str, tiny: Path, tmp_path: Path) -> None:
    """Half a surrogate pair is in no file: readers in C++ and Swift take no such JSON."""
    job = prepare("mlx", tiny, tmp_path / "x", quant="q4_g32")
    write(replace(job, plan=smolexport_to_mlx.plan(replace(open_model(tiny), name=name), "q4_g32")))
    header = (tmp_path / "x" / "model.safetensors").read_bytes()
    header = header[8 : 8 + int.from_bytes(header[:8], "little")]
    assert b"\\ud" not in header
    assert json.loads(header)["__metadata__"]["smolexport.name"] == name.encode("utf-8", "replace").decode()
    assert read_header(tmp_path / "x" / "model.safetensors")[0]["smolexport.scheme"] == "q4_g32"
    smolexport.inspect(tmp_path / "x")


def test_a_name_from_the_command_line_that_is_no_text(tiny: Path, tmp_path: Path) -> None:
    """As `--name $'\\xffx'` arrives; every file of the folder is UTF-8 and every JSON without half pairs."""
    made = smolexport.export("mlx", tiny, tmp_path / "x", quant="q4_g32", name="\udcffx").path
    for path in made.rglob("*.json"):
        assert "\\ud" not in path.read_bytes().decode("utf-8")
    (made / "README.md").read_bytes().decode("utf-8")
    mlx_lm("utils").load_model(made)


def test_a_checkpoint_is_never_replaced_by_its_own_export(tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path)
    before = {p.name: p.read_bytes() for p in source.iterdir()}
    job = prepare("mlx", source, tmp_path / "elsewhere")
    with pytest.raises(OutputError, match="never replaced"):
        write(replace(job, path=source), force=True)
    assert {p.name: p.read_bytes() for p in source.iterdir()} == before
