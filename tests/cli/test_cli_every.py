"""`smolexport all`: every format in one pass, under names of their own, in one folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from smolexport import fingerprint, inspect, plugins
from tests.cli.commands import assert_refused, call, tiny_checkpoint

INT4 = ["tiny-int4-mlx", "tiny-int4-onnx", "tiny-int4.gguf"]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_by_default_int4_in_every_format_here(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    outcome = call("all", tiny)
    assert (outcome.code, sorted(outcome.out.splitlines())) == (0, INT4), outcome.err
    assert names(tmp_path) == INT4
    assert {inspect(name).format for name in INT4} == set(plugins.converters())
    assert len({fingerprint(name) for name in INT4}) == 1
    for told in ("gguf int4 (llama): 20 tensors", "mlx int4 (llama): 20 tensors", "\nwrote "):
        assert told in outcome.err
    assert_refused(call("all", tiny), "exists already; pass --force")
    assert call("all", tiny, "--force").code == 0


def test_the_folder_is_made(tiny: Path, tmp_path: Path) -> None:
    outcome = call("all", tiny, "-q", "int8", "-o", tmp_path / "out", "--name", "x")
    assert sorted(outcome.out.splitlines()) == [f"{tmp_path}/out/x-int8{end}" for end in ("-mlx", "-onnx", ".gguf")]
    assert {inspect(line).name for line in outcome.out.splitlines()} == {"x"}


def test_some_formats(tiny: Path, tmp_path: Path) -> None:
    for word, made in (("mlx", [INT4[0]]), ("gguf", [INT4[2]]), (" mlx, gguf ", [INT4[0], INT4[2]])):
        folder = tmp_path / word.strip()
        folder.mkdir()
        assert call("all", tiny, "-o", folder, "--formats", word).code == 0
        assert names(folder) == made
    for word, said in (
        ("onxx", "no converter for the format 'onxx'; installed: gguf"),
        ("gguf,", "no converter for the format ''"),
        ("", "format"),
        ("gguf,gguf", "name each format once"),
    ):
        assert_refused(call("all", tiny, "-o", tmp_path, "--formats", word), said)


def test_json(tiny: Path, tmp_path: Path) -> None:
    rows = json.loads(call("all", tiny, "-o", tmp_path, "--json").out)
    assert sorted(Path(row["path"]).name for row in rows) == INT4
    for row in rows:
        found = inspect(row["path"])
        assert (row["format"], row["scheme"], row["bytes"]) == (found.format, found.scheme, found.bytes)
        assert row["weights"] == found.weights
        assert row["seconds"] >= 0
        assert "tensors" not in row


def test_dry_run(tiny: Path, tmp_path: Path) -> None:
    outcome = call("all", tiny, "-o", tmp_path / "out", "--dry-run")
    assert (outcome.code, outcome.err) == (0, "")
    assert [outcome.out.count(f"{name} int4 (llama): 20 tensors") for name in plugins.converters()] == [1, 1, 1]
    rows = json.loads(call("all", tiny, "-o", tmp_path / "out", "--dry-run", "--json").out)
    assert names(tmp_path) == []
    for row in rows:
        alone = call(row["format"], tiny, "-q", "int4", "-o", row["path"], "--dry-run", "--json")
        assert json.loads(alone.out) == row
        assert len(row["tensors"]) == 20


def test_strict(tmp_path: Path) -> None:
    """Rows of 172 are no whole blocks of 32; nothing is written, the folder is not made."""
    folder = tiny_checkpoint(tmp_path, intermediate_size=172)
    refused = call("all", folder, "-o", tmp_path / "out", "--strict")
    assert_refused(refused, "--strict: int4 does not fit", "row length 172")
    assert not (tmp_path / "out").exists()
    assert call("all", folder, "-o", tmp_path / "out").code == 0


def test_a_scheme_that_only_one_format_has(tiny: Path, tmp_path: Path) -> None:
    assert_refused(call("all", tiny, "-q", "q4_k", "-o", tmp_path), "--quant q4_k: MLX has no such scheme")
    assert call("all", tiny, "-q", "q4_k", "--formats", "gguf", "-o", tmp_path).code == 0
    assert names(tmp_path) == ["tiny-q4_k_m.gguf"]
