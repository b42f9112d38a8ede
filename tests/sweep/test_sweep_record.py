"""What makes a task done: the same checkpoint, the same wishes, the output still there."""

from __future__ import annotations

import json
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from smolexport.model.identity import files_of
from smolexport.sweep import record as records
from smolexport.sweep.plan import SweepConfig, Task
from smolexport.sweep.record import Hashes, TaskRecord, signature

AGO = time.time() - 1000


def settle(folder: Path) -> None:
    """As if the files had been written long ago."""
    for path in files_of(folder):
        os.utime(path, (AGO, AGO))


def test_a_fingerprint_is_that_of_names_and_contents(small: Path, tmp_path: Path) -> None:
    def mark() -> str:
        return Hashes(tmp_path / "none").fingerprint(small)

    first = mark()
    settle(small)
    assert mark() == first, "dates do not count"
    (small / "notes.txt").write_text("nothing that an export reads")
    assert mark() == first
    (small / "chat_template.jinja").write_text("{{ messages }}")
    assert mark() != first
    (small / "chat_template.jinja").rename(small / "other.jinja")
    second = mark()
    (small / "other.jinja").unlink()
    assert first == mark() != second


def test_files_are_hashed_again_when_they_changed(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "SETTLED", -1)
    settle(small)
    path, weights = tmp_path / "hashes.json", small / "model.safetensors"
    hashes = Hashes(path)
    first, seen = hashes.fingerprint(small), signature(small)
    hashes.save()
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert Hashes(path).fingerprint(small) != first, "of the same size, written later"
    assert signature(small) != seen
    os.utime(weights, (AGO, AGO))
    assert Hashes(path).fingerprint(small) != first, "of the same size and date, which somebody has set"
    hashes = Hashes(path)
    second = hashes.fingerprint(small)
    hashes.save()
    known = json.loads(path.read_text())
    known[str(weights)][-1] = "0" * 64
    path.write_text(json.dumps(known))
    assert Hashes(path).fingerprint(small) != second, "size and dates as known: not read"
    path.write_text('{"x": [1]')
    assert Hashes(path).fingerprint(small) == second, "nothing is known any more"


def test_a_file_that_was_just_written_is_not_trusted(small: Path, tmp_path: Path) -> None:
    """A second write could leave it the same date."""
    hashes = Hashes(tmp_path / "hashes.json")
    (small / "config.json").write_bytes((small / "config.json").read_bytes())
    hashes.fingerprint(small)
    hashes.save()
    assert str(small / "config.json") not in json.loads((tmp_path / "hashes.json").read_text())


@pytest.fixture
def task(tmp_path: Path) -> Task:
    return Task("x", "x", "/x", "gguf", "int4", SweepConfig(str(tmp_path), text="Once"), fingerprint="f", origin="/x")


def made(task: Task, tmp_path: Path) -> TaskRecord:
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "x-int4.gguf").write_bytes(b"1234")
    files = {"x-int4.gguf": {"bytes": 4, "sha256": "-"}}
    exported = {"inputs": records.export_inputs(task), "files": files, "bytes": 4, "bits_per_weight": 4.5, "seconds": 1}
    figures = {"kld": {"mean": 0.5}, "top1_agreement": 1.0, "seconds": 0.5}
    compared = {"inputs": records.compare_inputs(task), **figures}
    return TaskRecord("/x", "gguf", "int4", "x/x-int4.gguf", exported, compared)


def test_done(task: Task, tmp_path: Path) -> None:
    found = made(task, tmp_path)
    records.write_record(task, found)
    assert records.read_record(task) == found
    assert records.done(task, found) == (True, True)
    assert records.done(task, replace(found, compared=None)) == (True, False)
    assert records.done(task, replace(found, exported=None)) == (False, False)
    config = task.config
    for changed in (
        replace(task, fingerprint="g"),
        replace(task, config=replace(config, version="0")),
        replace(task, config=replace(config, ignore_config=("a",))),
        replace(task, scheme="int8"),
    ):
        assert records.done(changed, found) == (False, False)
    for changed in (
        replace(config, text="Twice"),
        replace(config, window=64),
        replace(config, max_windows=1),
    ):
        assert records.done(replace(task, config=changed), found) == (True, False)
    other_place = replace(config, force=True, mark="m", text=None)
    assert records.done(replace(task, threads=9, config=other_place), found) == (True, True)
    (tmp_path / "x" / "x-int4.gguf").write_bytes(b"123")
    assert records.done(task, found) == (False, False)
    (tmp_path / "x" / "x-int4.gguf").unlink()
    assert records.done(task, found) == (False, False)


@pytest.mark.parametrize(
    "damage",
    [
        "",
        "[]",
        "{}",
        '{"source": 1, "format": "", "scheme": "", "target": "", "exported": null, "compared": null, "error": ""}',
        '{"source": "", "format": "", "scheme": "", "target": "", "exported": [], "compared": null, "error": ""}',
        '{"source": "", "format": "", "scheme": "", "target": "", "exported": {}, "compared": null, "error": ""}',
        "\0",
    ],
)
def test_a_damaged_record_is_none(damage: str, task: Task) -> None:
    records.path_of(task).parent.mkdir(parents=True)
    records.path_of(task).write_text(damage)
    found = records.read_record(task)
    assert found == TaskRecord("/x", "gguf", "int4")
    assert records.done(task, found) == (False, False)


@pytest.mark.parametrize("files", [None, {}, [], {"x": 4}, {"x": {}}, {"x": {"bytes": "4"}}])
def test_damaged_files_in_a_record_are_no_output(files: Any, task: Task, tmp_path: Path) -> None:
    found = made(task, tmp_path)
    exported = {**(found.exported or {}), "files": files}
    assert records.done(task, replace(found, exported=exported)) == (False, False)


def test_what_does_not_hold_is_not_told(task: Task, tmp_path: Path) -> None:
    found = made(task, tmp_path)
    assert records.holding(task, found) == found
    another = replace(task, config=replace(task.config, text="Twice"))
    assert records.holding(another, found) == replace(found, compared=None)
    assert records.holding(replace(task, fingerprint="g"), found) == replace(found, exported=None, compared=None)


@pytest.mark.parametrize(("part", "name"), [("exported", "bytes"), ("exported", "seconds"), ("compared", "kld")])
def test_a_record_without_a_figure_is_none(part: str, name: str, task: Task, tmp_path: Path) -> None:
    found = json.loads(records.dumped(made(task, tmp_path)))
    assert records.parsed(json.dumps(found)) == TaskRecord(**found)
    del found[part][name]
    with pytest.raises(ValueError, match="is not a record"):
        records.parsed(json.dumps(found))
