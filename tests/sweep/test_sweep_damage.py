"""Damaged records and hashes of a sweep are as good as none: nothing fails over them, nothing wrong is shown."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
from rich.console import Console

from smolexport.sweep import record as records
from smolexport.sweep.plan import SweepConfig, Task
from smolexport.sweep.record import Hashes, TaskRecord
from smolexport.sweep.table import TaskRow, line, render_table, table_json
from tests.cli.commands import call
from tests.mutations import changed_json

MUTATIONS = 400
OPTIONS = ("--no-compare", "--formats", "gguf", "-q", "q8_0")


@pytest.fixture
def task(tmp_path: Path) -> Task:
    return Task("x", "x", "/x", "gguf", "int4", SweepConfig(str(tmp_path), text="Once"), fingerprint="f", origin="/x")


@pytest.fixture
def made(task: Task, tmp_path: Path) -> TaskRecord:
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "x-int4.gguf").write_bytes(b"1234")
    exported = {
        "inputs": records.export_inputs(task), "files": {"x-int4.gguf": {"bytes": 4, "sha256": "-"}}, "bytes": 4,
        "weights": 8, "bits_per_weight": 4.5, "notes": ["a note"], "seconds": 1,
    }  # fmt: skip
    compared = {
        "inputs": records.compare_inputs(task), "runtime": "llama.cpp", "fingerprint": None,
        "kld": {"mean": 0.5, "mean_error": 0.1, "p99": None}, "top1_agreement": 0.9, "top1_agreement_error": 0.1,
        "perplexity_ratio": 1.1, "perplexity_ratio_error": None, "tokenizer_equal": True, "notes": [], "seconds": 0.5,
    }  # fmt: skip
    return TaskRecord("/x", "gguf", "int4", "x/x-int4.gguf", exported, compared)


def use(task: Task, found: TaskRecord) -> None:
    """All that a sweep does with a record."""
    for state in ("new", "kept", "failed"):
        row = TaskRow(task, state, records.holding(task, found), found.error)
        json.dumps(table_json([row]), allow_nan=False)
        if row.record.exported:
            line(row)
        with Path("/dev/null").open("w") as nowhere:
            render_table([row], Console(file=nowhere, width=120))
    records.write_record(task, replace(found, error=""))


def test_records_with_any_part_changed(task: Task, made: TaskRecord) -> None:
    random, path, kept = Random(3), records.path_of(task), 0
    records.write_record(task, made)
    whole = json.loads(path.read_text())
    for _ in range(MUTATIONS):
        path.write_bytes(changed_json(random, whole))
        found = records.read_record(task)
        kept += found.exported is not None
        use(task, found)
    assert 0.05 < kept / MUTATIONS < 0.6


WRONG: dict[str, Any] = {
    "exported.bytes": ["4", True, float("nan"), float("inf"), 10**400, None, [4]],
    "exported.files": [
        {"a\0b": {"bytes": 4}}, {"\ud800": {"bytes": 4}}, {"/etc/passwd": {"bytes": 4}}, {"../x": {"bytes": 4}},
        {"x": {"bytes": "4"}}, {"x": 4}, ["x"],
    ],
    "exported.notes": [5, "note", [5], {"a": 1}],
    "exported.inputs": [{"checkpoint": [[]]}, {"checkpoint": {"a": 1}}, []],
    "exported.more": [[[]], {"a": 1}],
    "compared.kld": [{"mean": "0.5"}, {"mean": float("nan")}, {"mean": [0.5]}, 5],
    "compared.top1_agreement": ["0.9", None, float("nan")],
    "compared.perplexity_ratio": ["1", [1], 10**400],
    "compared.notes": [7],
    "target": ["/etc/passwd", "../x", "a\0b", "\ud800", 7, None],
    "source": [7, None, []],
}  # fmt: skip


PARTS = [(place, value) for place, values in WRONG.items() for value in values]


@pytest.mark.parametrize(("place", "value"), PARTS, ids=map(str, range(len(PARTS))))
def test_a_record_with_a_wrong_part_is_none(place: str, value: Any, task: Task, made: TaskRecord) -> None:
    records.write_record(task, made)
    path = records.path_of(task)
    found = json.loads(path.read_text())
    holder, _, key = place.rpartition(".")
    (found[holder] if holder else found)[key] = value
    path.write_text(json.dumps(found))
    assert records.read_record(task) == records.empty(task)


def test_records_nested_beyond_pythons_stack(task: Task, made: TaskRecord) -> None:
    records.write_record(task, made)
    path = records.path_of(task)
    for depth in (300, 3000, 300_000):
        text = json.dumps({**json.loads(records.dumped(made)), "exported": "HERE"})
        for start, end in (("[", "]"), ('{"inputs":', "}")):
            path.write_text(text.replace('"HERE"', f"{start * depth}1{end * depth}"))
            assert records.read_record(task) == records.empty(task)


def test_hashes_with_any_part_changed(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is not a hash with its dates is forgotten; another hash makes the checkpoint another one, never an error."""
    monkeypatch.setattr("smolexport.sweep.record.SETTLED", -1)
    path, random = tmp_path / "hashes.json", Random(4)
    hashes = Hashes(path)
    true = hashes.fingerprint(small)
    hashes.save()
    whole = json.loads(path.read_text())
    for _ in range(MUTATIONS // 4):
        path.write_bytes(changed_json(random, whole))
        damaged = Hashes(path)
        mark = damaged.fingerprint(small)
        assert mark == true or len(mark) == len(true)
        damaged.save()
    for value in ([], 5, [1, 2, 3, 4, "x"], [1, 2, 3, 4, [["x"]]], [1.0, 2, 3, 4, "0" * 64], [True, 2, 3, 4, "0" * 64]):
        path.write_text(json.dumps(dict.fromkeys(whole, value)))
        assert Hashes(path).fingerprint(small) == true
    path.write_text("[" * 100_000)
    assert Hashes(path).fingerprint(small) == true


def test_sweeps_over_damaged_records(small: Path, tmp_path: Path) -> None:
    """An output whose record is damaged is nobody's: replaced when asked for, and kept from then on."""
    out, random = tmp_path / "out", Random(5)
    assert call("sweep", small, "-o", out, *OPTIONS).code == 0
    [path] = (out / ".sweep" / "records").rglob("*.json")
    whole = json.loads(path.read_text())
    for _ in range(12):
        path.write_bytes(changed_json(random, whole))
        (out / ".sweep" / "hashes.json").write_bytes(b"[" * random.randrange(5000))
        dry = call("sweep", small, "-o", out, *OPTIONS, "--dry-run", "--json")
        assert (dry.code, dry.err) == (0, "")
        outcome = call("sweep", small, "-o", out, *OPTIONS, "--force" if random.random() < 0.2 else "--dry-run")
        assert outcome.code == 0, outcome.err
    path.write_text(json.dumps({**whole, "exported": {**whole["exported"], "seconds": "soon"}}))
    refused = call("sweep", small, "-o", out, *OPTIONS)
    assert refused.code == 1
    assert "exists already, not made by a sweep" in refused.err
    repaired = call("sweep", small, "-o", out, *OPTIONS, "--json", "--force")
    assert repaired.code == 0, repaired.err
    assert json.loads(repaired.out)["tasks"][0]["state"] == "new"
    assert json.loads(call("sweep", small, "-o", out, *OPTIONS, "--json").out)["tasks"][0]["state"] == "kept"
