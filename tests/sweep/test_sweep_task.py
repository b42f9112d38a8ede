"""One task in this process: what it refuses, and what it keeps of an earlier attempt."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from smolexport import plugins
from smolexport.conversion import pipeline
from smolexport.conversion.pipeline import export
from smolexport.sweep import record as records
from smolexport.sweep.plan import SweepConfig, Task
from smolexport.sweep.record import Hashes, signature
from smolexport.sweep.task import attempt

TEXT = "It was the best of times, it was the worst of times. " * 20


@pytest.fixture
def task(small: Path, tmp_path: Path) -> Task:
    """small to GGUF int8, not compared, in a folder that a sweep has prepared."""
    out = tmp_path / "out"
    (out / ".sweep").mkdir(parents=True)
    (out / ".sweep" / "mark-m").touch()
    mark = Hashes(tmp_path / "none").fingerprint(small)
    return Task("small", "small", str(small), "gguf", "int8", SweepConfig(str(out), mark="m"), mark, signature(small))


def output(task: Task) -> Path:
    return Path(task.config.out) / "small" / "small-int8.gguf"


@pytest.mark.parametrize("form", ["gguf", "mlx", "onnx"])
def test_an_output_is_what_an_export_makes(form: str, task: Task, small: Path, tmp_path: Path) -> None:
    given = replace(task, format=form)
    assert attempt(given).error == ""
    done = export(form, small, tmp_path / "alone", quant="int8", name="small")
    found = records.read_record(given)
    assert found.exported is not None
    target = Path(task.config.out) / found.target
    assert found.exported["bytes"] == sum(facts["bytes"] for facts in found.exported["files"].values())
    for file in done.files:
        own = target if done.path.is_file() else target / file.relative_to(done.path)
        assert own.read_bytes() == file.read_bytes(), file
    assert not list((Path(task.config.out) / ".sweep" / "work").rglob("*.*"))


def test_a_machine_that_sees_other_folders_is_refused(task: Task, tmp_path: Path) -> None:
    (tmp_path / "out" / ".sweep" / "mark-m").rename(tmp_path / "out" / ".sweep" / "mark-of-another-sweep")
    assert "must be on storage that all machines share" in attempt(task).error
    assert not records.path_of(task).exists(), "what another sweep has recorded stays"
    lost = replace(task, config=replace(task.config, out=str(tmp_path / "nowhere")))
    assert f"{tmp_path}/nowhere: is not the same folder on" in attempt(lost).error
    assert not (tmp_path / "nowhere").exists()


def test_a_machine_without_the_checkpoint_or_with_another_version_is_refused(task: Task) -> None:
    assert "/nowhere: does not exist on" in attempt(replace(task, folder="/nowhere")).error
    assert (
        "and 0.0 where the sweep was started"
        in attempt(replace(task, config=replace(task.config, version="0.0"))).error
    )
    assert not output(task).exists()


def test_a_checkpoint_that_changes_meanwhile_is_not_recorded(task: Task, small: Path) -> None:
    (small / "README.md").write_text("new")
    assert attempt(task).error.endswith("changed during the sweep; start it again")
    assert not output(task).exists()


def test_a_checkpoint_that_changes_while_it_is_compared_is_not_recorded(
    task: Task, small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def changing(*_: object) -> dict[str, Any]:
        (small / "README.md").write_text("new")
        return {}

    monkeypatch.setattr("smolexport.sweep.task._compare", changing)
    given = replace(task, config=replace(task.config, text="x"))
    assert attempt(given).error.endswith("changed during the sweep; start it again")
    found = records.read_record(given)
    assert found.exported is not None, "that was done before"
    assert found.compared is None


def test_only_what_a_sweep_made_is_replaced(task: Task) -> None:
    output(task).parent.mkdir()
    output(task).write_text("mine")
    assert "exists already, not made by a sweep; remove it or pass --force" in attempt(task).error
    assert output(task).read_text() == "mine"
    assert attempt(replace(task, config=replace(task.config, force=True))).error == ""
    assert output(task).read_bytes()[:4] == b"GGUF"
    before = output(task).stat().st_mtime_ns
    output(task).write_text("damaged")
    assert attempt(task).error == ""
    assert output(task).stat().st_mtime_ns > before


def test_an_output_of_another_checkpoint_is_not_replaced(task: Task, other: Path, tmp_path: Path) -> None:
    """Sweeps of run-1/small and of run-2/small into one folder."""
    given = replace(task, origin=task.folder)
    assert attempt(given).error == ""
    data = output(task).read_bytes()
    mark = Hashes(tmp_path / "none").fingerprint(other)
    stranger = replace(given, folder=str(other), origin=str(other), fingerprint=mark, seen=signature(other))
    said = f"{output(task)}: was made from {task.folder}; name both in one sweep, give another folder with -o"
    assert attempt(stranger).error.startswith(said)
    assert output(task).read_bytes() == data
    assert attempt(given).error == ""
    assert records.read_record(given).source == task.folder
    assert attempt(replace(stranger, config=replace(task.config, force=True))).error == ""
    assert output(task).read_bytes() != data


def test_a_sweep_that_is_over_names_nothing(task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine that the driver has given up, and that is still writing when the next sweep begins."""
    state = Path(task.config.out) / ".sweep"
    write = pipeline.write

    def slowly(*given: Any, **options: Any) -> Any:
        done = write(*given, **options)
        (state / "mark-m").rename(state / "mark-of-the-next")
        return done

    monkeypatch.setattr(pipeline, "write", slowly)
    assert attempt(task).error
    assert not output(task).exists()
    assert records.read_record(task).exported is None


def test_an_output_that_was_named_before_its_record_is_replaced(task: Task) -> None:
    """As after a kill between the two."""
    assert attempt(task).error == ""
    found = records.read_record(task)
    records.write_record(task, replace(found, exported=None))
    data = output(task).read_bytes()
    assert attempt(task).error == ""
    again = records.read_record(task).exported
    assert again is not None
    assert found.exported is not None
    assert again["files"] == found.exported["files"]
    assert output(task).read_bytes() == data


def test_a_folder_is_replaced_whole(task: Task) -> None:
    given = replace(task, format="onnx")
    assert attempt(given).error == ""
    folder = Path(task.config.out) / records.read_record(given).target
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    (folder / "config.json").unlink()
    assert attempt(given).error == ""
    after = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    assert after.keys() == before.keys()
    assert all(after[path] > before[path] for path in before)


def test_an_export_outlives_its_comparison(task: Task) -> None:
    """The comparison fails, is done with another text, and with a third: one export."""
    if any(plugins.missing(name) for name in ("torch", "llamacpp")):
        pytest.skip("torch or llama.cpp is not installed")
    short = replace(task, config=replace(task.config, text="x", window=64))
    line = attempt(short).error
    assert line
    assert "\n" not in line
    found = records.read_record(short)
    assert found == replace(records.empty(short), target="small/small-int8.gguf", exported=found.exported, error=line)
    assert (found.error, found.compared) == (line, None)
    assert found.exported is not None
    date = output(task).stat().st_mtime_ns
    marks = []
    for text in (TEXT, TEXT.upper()):
        given = replace(short, config=replace(short.config, text=text))
        assert attempt(given).error == ""
        again = records.read_record(given)
        assert (again.error, again.exported) == ("", found.exported)
        assert again.compared is not None
        assert 0 < again.compared["kld"]["mean"] < 0.1
        marks.append(again.compared["inputs"]["text"])
    assert len(set(marks)) == 2
    assert output(task).stat().st_mtime_ns == date
    json.dumps(again.compared, allow_nan=False)
