"""Whole sweeps in processes: nothing is done twice, nothing is lost to a kill, nothing fails with its neighbour."""

from __future__ import annotations

import json
import os
import shutil
import signal
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

import smolexport
from smolexport import plugins
from smolexport.conversion.pipeline import export
from smolexport.demo import demo_text
from smolexport.errors import SessionError
from smolexport.parity.inputs import Settings
from smolexport.sweep import driver
from smolexport.sweep.local import Local
from smolexport.sweep.plan import SweepConfig, Task, find_sources, tasks_of
from smolexport.sweep.record import TaskRecord
from smolexport.sweep.table import SweepProgress
from tests.cli.commands import Outcome, assert_refused, call
from tests.sweep.processes import gone, started, writer

QUICK = ("--no-compare", "--jobs", "2")
SLOW = ("--formats", "gguf", "-q", "iq4_nl", "--no-compare", "--jobs", "1")


def rows(outcome: Outcome) -> dict[str, dict[str, Any]]:
    """The tasks of `--json`, by name, format and scheme."""
    return {f"{row['name']} {row['format']} {row['scheme']}": row for row in json.loads(outcome.out)["tasks"]}


def states(outcome: Outcome) -> dict[str, str]:
    return {name: row["state"] for name, row in rows(outcome).items()}


def done_now(outcome: Outcome) -> set[str]:
    return {name for name, state in states(outcome).items() if state == "new"}


def visible(out: Path) -> list[str]:
    """Everything outside of .sweep, half-written things too."""
    return sorted(path.relative_to(out).as_posix() for path in out.glob("*/*") if path.parent.name != ".sweep")


def test_nothing_is_done_twice(small: Path, other: Path, tmp_path: Path) -> None:
    """Everything is made once; afterwards only what changed, has gone or is new."""
    out = tmp_path / "out"
    wish = (small, other, "--formats", "gguf,onnx", "-q", "int8", "-o", out, "--json", *QUICK)
    first = call("sweep", *wish)
    assert first.code == 0, first.err
    assert len(done_now(first)) == 4
    assert visible(out) == [f"{name}/{name}-int8{end}" for name in ("other", "small") for end in ("-onnx", ".gguf")]
    assert {p.name for p in out.iterdir()} == {"other", "small", ".sweep", "sweep.json"}
    assert json.loads((out / "sweep.json").read_text()) == json.loads(first.out)
    for name, row in rows(first).items():
        about = smolexport.inspect(out / row["path"])
        assert name == f"{about.name} {about.format} {about.scheme}"
        assert (row["bytes"], row["bits_per_weight"]) == (about.bytes, pytest.approx(about.bits_per_weight, abs=1e-4))

    again = call("sweep", *wish)
    assert set(states(again).values()) == {"kept"}
    assert "at a time" not in again.err, "no engine was opened"
    assert [{**row, "state": ""} for row in rows(again).values()] == [
        {**row, "state": ""} for row in rows(first).values()
    ]

    (out / "small" / "small-int8.gguf").unlink()
    os.truncate(out / "other" / "other-int8-onnx" / "config.json", 3)
    assert done_now(call("sweep", *wish)) == {"small gguf int8", "other onnx int8"}
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"rope_theta": 1234.0}))
    changed = call("sweep", *wish)
    assert done_now(changed) == {"other gguf int8", "other onnx int8"}
    assert rows(changed)["other gguf int8"]["fingerprint"] != rows(first)["other gguf int8"]["fingerprint"]
    assert rows(changed)["small gguf int8"]["files"] == rows(first)["small gguf int8"]["files"]
    assert done_now(call("sweep", *wish, "-q", "int8,gguf:q8_0")) == {"small gguf q8_0", "other gguf q8_0"}
    forced = call("sweep", small, "--formats", "gguf", "-q", "int8", "-o", out, "--force", "--json", *QUICK)
    assert states(forced) == {"small gguf int8": "new"}


@pytest.mark.skipif(
    any(plugins.missing(name) for name in ("torch", "llamacpp", "onnxruntime")), reason="a runtime is not installed"
)
def test_a_trained_model_is_compared(twin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures are those of `compare`; two tasks at a time play the reference once."""
    monkeypatch.setenv("HF_ASSETS_CACHE", str(tmp_path / "cache"))
    wish = (twin, "--formats", "gguf,onnx", "-q", "int4", "--max-windows", "2", "--jobs", "2")
    outcome = call("sweep", *wish, "-o", tmp_path / "out", "--json")
    assert outcome.code == 0, outcome.err
    found = rows(outcome)
    assert len(found) == 2
    for name, row in found.items():
        assert 0 < row["kld"] < 0.03, name
        assert 0.86 < row["top1_agreement"] <= 1
        assert 0.95 < row["perplexity_ratio"] < 1.05
    assert found["twin gguf int4"]["weights_fingerprint"] == found["twin onnx int4"]["weights_fingerprint"] is not None
    entries = [path for path in (tmp_path / "cache").rglob("facts.json") if ".making" not in str(path)]
    assert len(entries) == 1
    settings = Settings(max_windows=2, greedy_tokens=0, repetitions=0, memory=False, attribution=False, threads=1)
    row = found["twin gguf int4"]
    alone = smolexport.compare(twin, [tmp_path / "out" / row["path"]], text=demo_text(), settings=settings)
    assert row["kld"] == pytest.approx(alone.candidates[0].accuracy.kld.mean.value, rel=1e-6)
    table = call("sweep", *wish, "-o", tmp_path / "out")
    assert f"{row['kld']:.5f}" in table.out
    assert table.out.count(" kept") == 2


def test_a_broken_checkpoint_fails_alone(small: Path, other: Path, tmp_path: Path) -> None:
    """One with damaged weights, one that is not there, and a sound one that a format cannot hold."""
    weights = other / "model.safetensors"
    os.truncate(weights, weights.stat().st_size // 2)
    lost = tmp_path / "lost"
    wish = (other, small, lost, "--formats", "gguf,mlx", "-q", "int8", "-o", tmp_path / "out", *QUICK)
    outcome = call("sweep", *wish, "--json")
    assert outcome.code == 1, outcome.err
    assert "Traceback" not in outcome.err
    assert [state == "new" for state in states(outcome).values()] == [False, False, True, True, False, False]
    for name, row in rows(outcome).items():
        if row["state"] == "failed":
            assert "\n" not in row["error"]
            wrong = f"{lost}: no such folder" if "lost" in name else "model.safetensors: is damaged"
            assert wrong in row["error"]
            assert row["path"] is None
    table = call("sweep", *wish)
    assert table.code == 1
    assert table.out.count("failed: ") == 2, "the same reason is told once"
    assert table.out.count(" kept") == 2
    shutil.rmtree(other)
    shutil.copytree(small, other)
    healed = call("sweep", *wish, "--json")
    assert done_now(healed) == {"other gguf int8", "other mlx int8"}


def test_a_format_that_cannot_hold_a_model_fails_alone(other: Path, tmp_path: Path) -> None:
    """llama.cpp has its own idea of which layers are without rotation."""
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"no_rope_layers": [0, 1, 1, 0]}))
    outcome = call("sweep", other, "-q", "int8", "-o", tmp_path / "out", "--json", *QUICK)
    assert outcome.code == 1
    assert states(outcome) == {"other gguf int8": "failed", "other mlx int8": "new", "other onnx int8": "new"}
    assert "cannot be exported to gguf" in rows(outcome)["other gguf int8"]["error"]


def test_a_killed_worker_loses_nothing(middling: Path, tmp_path: Path) -> None:
    with started(middling, *SLOW, "-o", tmp_path / "out", "--json") as process:
        writer(tmp_path / "out").send_signal(signal.SIGKILL)
        out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert "middling gguf iq4_nl: its process was ended by SIGKILL; attempt 2\n" in err
    [row] = json.loads(out)["tasks"]
    assert row["state"] == "new"
    alone = export("gguf", middling, tmp_path / "alone.gguf", quant="iq4_nl", name="middling").path
    assert (tmp_path / "out" / row["path"]).read_bytes() == alone.read_bytes()
    assert visible(tmp_path / "out") == ["middling/middling-iq4_nl.gguf"]
    assert not (tmp_path / "out" / ".sweep" / "work").exists()


def test_a_killed_sweep_goes_on(small: Path, middling: Path, tmp_path: Path) -> None:
    """Its processes end by themselves; what was done stays, what was half done is not seen."""
    out = tmp_path / "out"
    wish = (small, middling, *SLOW, "-o", out, "--json")
    with started(*wish) as process:
        worker = writer(out, name="middling")
        process.kill()
    assert visible(out) == ["small/small-iq4_nl.gguf"]
    date = (out / "small" / "small-iq4_nl.gguf").stat().st_mtime_ns
    with started(*wish) as again:  # at once: it waits for the processes of the first one
        printed, err = again.communicate(timeout=120)
    assert again.returncode == 0, err
    assert gone(worker)
    assert {row["name"]: row["state"] for row in json.loads(printed)["tasks"]} == {"small": "kept", "middling": "new"}
    assert (out / "small" / "small-iq4_nl.gguf").stat().st_mtime_ns == date
    alone = export("gguf", middling, tmp_path / "alone.gguf", quant="iq4_nl", name="middling").path
    assert (out / "middling" / "middling-iq4_nl.gguf").read_bytes() == alone.read_bytes()
    assert not (out / ".sweep" / "work").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_sweep_ends_its_workers(number: signal.Signals, middling: Path, tmp_path: Path) -> None:
    with started(middling, *SLOW, "-o", tmp_path / "out") as process:
        worker = writer(tmp_path / "out")
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, ""), err
    assert err.splitlines()[-1] == "smolexport: interrupted; nothing was left half-written"
    assert "Traceback" not in err
    assert gone(worker)
    assert [path for path in (tmp_path / "out").rglob("*gguf*") if path.suffix != ".json"] == []


def test_one_sweep_at_a_time_in_a_folder(
    small: Path, middling: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with started(middling, *SLOW, "-o", tmp_path / "out"):
        writer(tmp_path / "out")
        monkeypatch.setattr(driver, "GRACE", -5)  # no patience
        refused = call("sweep", small, "--formats", "gguf", "-o", tmp_path / "out", *QUICK)
        assert_refused(refused, f"{tmp_path}/out/.sweep/lock: is locked: another sweep runs in this folder")


class Deadly:
    """An engine in which processes die at once, but for the third of the task `spared`."""

    jobs, threads = 1, 1

    def __init__(self, spared: str) -> None:
        self.spared, self.real, self.names = spared, Local(1), list[str]()

    def start(self, task: Task) -> None:
        self.task = task
        self.names.append(task.name)
        if self.lives():
            self.real.start(task)

    def lives(self) -> bool:
        return self.task.name == self.spared and self.names.count(self.spared) == driver.ATTEMPTS

    def wait(self) -> tuple[Task, TaskRecord | str]:
        return self.real.wait() if self.lives() else (self.task, "its process was ended by SIGKILL")

    def close(self) -> None:
        self.real.close()


def test_a_task_is_given_up_after_some_deaths(small: Path, other: Path, tmp_path: Path) -> None:
    """Three processes for each task: the third of `small` lives."""
    out = tmp_path / "out"
    sources = find_sources([str(small), str(other)])
    tasks = tasks_of(sources, [("gguf", "int8")], SweepConfig(str(out)))
    engine = Deadly("small")
    [first, second] = driver.sweep(sources, tasks, out, lambda _: engine, SweepProgress(2))
    assert (first.state, second.state) == ("new", "failed")
    assert second.error.startswith("other gguf int8: its process was ended by SIGKILL, 3 times; if memory is short")
    assert engine.names == ["small"] * 3 + ["other"] * 3
    assert json.loads((out / "sweep.json").read_text())["tasks"][1]["error"] == second.error


def test_a_process_imports_nothing_from_the_working_folder(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which may be a stranger's checkpoint."""
    (tmp_path / "json.py").write_text("raise SystemExit(9)")
    monkeypatch.chdir(tmp_path)
    outcome = call("sweep", small, "--formats", "gguf", "-q", "int8", "-o", tmp_path / "out", "--json", *QUICK)
    assert done_now(outcome) == {"small gguf int8"}, outcome.err


def test_a_long_answer_is_read(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Longer than a pipe holds."""
    [task] = tasks_of(find_sources([str(small)]), [("gguf", "int8")], SweepConfig(str(tmp_path / "out")))
    long = tmp_path / "long"
    answer = json.dumps(asdict(TaskRecord("x", "gguf", "int8", error="x" * 100_000)))
    long.write_text(f"#!/bin/sh\necho '{answer}'\n")
    long.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(long))
    engine = Local(1)
    engine.start(task)
    ended, record = engine.wait()
    assert ended == task
    assert isinstance(record, TaskRecord)
    assert len(record.error) == 100_000


def test_what_a_process_cannot_tell(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It ends before it reads its task; it cannot be started at all."""
    [task] = tasks_of(find_sources([str(small)]), [("gguf", "int8")], SweepConfig(str(tmp_path / "out")))
    monkeypatch.setattr("sys.executable", shutil.which("false"))
    engine = Local(1)
    engine.start(task)
    assert engine.wait() == (task, "its process ended with code 1: no output on stderr")
    monkeypatch.setattr("sys.executable", str(tmp_path / "nothing"))
    with pytest.raises(SessionError, match="nothing: a process cannot be started: No such file"):
        engine.start(task)
    engine.close()
