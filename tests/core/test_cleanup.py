"""Signals at any moment: what was made for a while goes, and what cannot go is named."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from smolexport import cli, plugins
from smolexport.cleanup import Provisional, undo_all
from smolexport.files import atomic_file, atomic_folder, made_folder, scratch_folder
from tests.cli.commands import TERMINAL, environment, tiny_checkpoint

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="signals of POSIX")
SAID = "smolexport: interrupted; nothing was left half-written"


def names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


class Signal(BaseException):
    """What a handler would raise."""


def file(place: Path) -> None:
    with atomic_file(place / "x") as out:
        out.write(b"whole")


def folder(place: Path) -> None:
    with atomic_folder(place / "x") as out:
        (out / "a").write_text("whole")


def replaced(place: Path) -> None:
    with atomic_folder(place / "x", replaceable=lambda _: True) as out:
        (out / "a").write_text("whole")


def inside(place: Path) -> None:
    with made_folder(place / "x"), atomic_file(place / "x" / "a") as out:
        out.write(b"whole")


def scratch(place: Path) -> None:
    with scratch_folder("x-", place) as out:
        (out / "a").write_text("half")


def steps(work: Callable[[Path], None], place: Path) -> Iterator[None]:
    """Do `work` again and again and stop it at each line, call and return of any function, then undo what is left."""
    for at in count(1):
        seen = 0

        def trace(_frame: FrameType, _event: str, _arg: Any) -> Any:
            nonlocal seen
            seen += 1
            if seen == at:  # noqa: B023
                raise Signal
            return trace

        sys.settrace(trace)
        try:
            work(place)
        except Signal:
            pass
        finally:
            sys.settrace(None)
        assert undo_all() == []
        yield
        if seen < at:
            return


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # a signal while a generator is closed
@pytest.mark.parametrize(
    ("work", "allowed"),
    [(file, [[], ["x"]]), (folder, [[], ["x", "x/a"]]), (inside, [[], ["x", "x/a"]]), (scratch, [[]])],
)
def test_a_signal_at_any_step(work: Callable[[Path], None], allowed: list[list[str]], tmp_path: Path) -> None:
    outcomes = list[list[str]]()
    for _ in steps(work, tmp_path):
        outcomes.append(found := names(tmp_path))
        for path in tmp_path.rglob("*"):
            assert path.is_dir() or path.read_text() == "whole"
        if found:
            shutil.rmtree(tmp_path / "x") if (tmp_path / "x").is_dir() else (tmp_path / "x").unlink()
    assert len(outcomes) > 100
    assert [some for some in allowed if some in outcomes] == allowed
    assert [some for some in outcomes if some not in allowed] == []


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_signal_at_any_step_of_a_replacement(tmp_path: Path) -> None:
    """Either folder stands there, whole."""
    kept, made = 0, 0
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "a").write_text("old")
    for _ in steps(replaced, tmp_path):
        assert names(tmp_path) == ["x", "x/a"]
        found = (tmp_path / "x" / "a").read_text()
        assert found in ("old", "whole")
        kept, made = kept + (found == "old"), made + (found == "whole")
        (tmp_path / "x" / "a").write_text("old")
    assert kept > 100
    assert made > 10


def test_what_stays_and_what_goes(tmp_path: Path) -> None:
    one = tmp_path / "one"
    with Provisional(one.unlink, one):
        one.touch()
    assert undo_all() == names(tmp_path) == []
    with Provisional(one.unlink, one, keep=True):
        one.touch()
    assert undo_all() == []
    assert names(tmp_path) == ["one"]
    with pytest.raises(ValueError, match="stop"), Provisional(one.unlink, one, keep=True):
        raise ValueError("stop")
    assert undo_all() == names(tmp_path) == []


def test_what_cannot_be_undone_is_named_until_it_can(tmp_path: Path) -> None:
    """The latest first: a folder goes after what is in it."""
    busy = True

    def undo() -> None:
        if busy:
            raise PermissionError(13, "Permission denied")
        (tmp_path / "a" / "b").unlink()

    with Provisional((tmp_path / "a").rmdir, tmp_path / "a"), Provisional(undo, tmp_path / "a" / "b"):
        (tmp_path / "a").mkdir()
        (tmp_path / "a" / "b").touch()
    assert undo_all() == [tmp_path / "a", tmp_path / "a" / "b"]
    said = cli._interrupted()
    assert said == f"interrupted; remove what could not be removed: {tmp_path / 'a'}, {tmp_path / 'a' / 'b'}"
    busy = False
    assert cli._interrupted() == "interrupted; nothing was left half-written"
    assert names(tmp_path) == []


def test_a_child_does_not_undo_what_its_parent_makes(tmp_path: Path) -> None:
    with atomic_file(tmp_path / "x") as out:
        process = os.fork()
        if not process:
            undo_all()
            os._exit(0)
        os.waitpid(process, 0)
        out.write(b"whole")
    assert names(tmp_path) == ["x"]


def ended(code: str, *argv: str, signals: int) -> tuple[int, str]:
    """Exit code and stderr of a command that is sent so many signals, each after a line on stdout."""
    process = subprocess.Popen(
        [sys.executable, "-c", f"{TERMINAL}\n{code}\nfrom smolexport.cli import main\nmain()", *argv],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(),
    )  # fmt: skip
    assert process.stdout
    for _ in range(signals):
        assert process.stdout.readline() == "now\n"
        process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=120)
    return process.returncode, err


SLOW = """
import time
from smolexport.conversion.writer import Sink
def put(*args):
    try:
        print("now", flush=True)
        time.sleep(60)
    finally:
        print("now", flush=True)
        time.sleep(60 * SLOW)
Sink.flush = put
"""


def test_the_second_signal_ends_at_once_and_leaves_nothing(tmp_path: Path) -> None:
    """As where a library does not come back, or a disk is slow."""
    source, start = tiny_checkpoint(tmp_path), time.monotonic()
    argv = ("gguf", str(source), "-q", "q8_0", "-o", str(tmp_path / "out.gguf"))
    code, err = ended(SLOW.replace("SLOW", "1"), *argv, signals=2)
    assert (code, err.splitlines()[-1]) == (130, SAID)
    assert "Traceback" not in err
    assert time.monotonic() - start < 60
    assert [name for name in names(tmp_path) if "out.gguf" in name] == []


SWALLOWED = """
import signal, time
from smolexport.conversion.writer import Sink
class Dying:
    def __del__(self):
        signal.raise_signal(signal.SIGTERM)
def flush(self):
    Dying()
    time.sleep(1)
Sink.flush = flush
"""


def test_a_signal_that_meets_a_destructor(tmp_path: Path) -> None:
    """No exception gets out of it; the work is stopped all the same, and nothing is said of it."""
    argv = ("gguf", str(tiny_checkpoint(tmp_path)), "-q", "q8_0", "-o", str(tmp_path / "out.gguf"))
    code, err = ended(SWALLOWED, *argv, signals=0)
    assert (code, err.splitlines()[-1]) == (130, SAID)
    assert "ignored" not in err
    assert not (tmp_path / "out.gguf").exists()


WORKER = """
import sys, time
from pathlib import Path
from smolexport.files import atomic_file
from smolexport.sweep import local, task
def attempt(_):
    with atomic_file(Path(sys.argv[1])):
        try:
            print("now", flush=True)
            time.sleep(60)
        finally:
            print("now", flush=True)
            time.sleep(60)
task.attempt, local.Task, local.SweepConfig = attempt, lambda **_: None, lambda **_: None
local.main()
"""


def test_the_process_of_a_sweep_leaves_nothing_either(tmp_path: Path) -> None:
    pipe = subprocess.PIPE
    argv = [sys.executable, "-c", WORKER, str(tmp_path / "x")]
    with subprocess.Popen(argv, stdin=pipe, stderr=pipe, text=True, env=environment()) as process:
        assert process.stdin
        assert process.stderr
        process.stdin.write('{"config": {}}\n')
        process.stdin.flush()
        for _ in range(2):
            assert process.stderr.readline() == "now\n"
            process.terminate()
        assert process.wait(timeout=30) == 143
    assert names(tmp_path) == []


def test_what_a_signal_leaves_is_named(tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path)
    stuck = """
from pathlib import Path
unlink = Path.unlink
def refuse(self, missing_ok=False):
    if self.suffix == ".partial":
        raise PermissionError(13, "Permission denied")
    unlink(self, missing_ok)
Path.unlink = refuse
"""
    argv = ("gguf", str(source), "-q", "q8_0", "-o", str(tmp_path / "out.gguf"))
    code, err = ended(SLOW.replace("SLOW", "0") + stuck, *argv, signals=1)
    [left] = [path for path in tmp_path.iterdir() if "out.gguf" in path.name]
    assert code == 130
    assert err.splitlines()[-1] == f"smolexport: interrupted; remove what could not be removed: {left}"


def storm(runs: int, place: Path, *words: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What is left of a run that was not stopped, and of `runs` that were; see `interruptions`."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.core.interruptions", "7", str(runs), str(place), *words],
        check=False, capture_output=True, text=True, env=environment(), timeout=600,
        cwd=Path(__file__).resolve().parents[2],
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    whole, *rest = map(json.loads, done.stdout.splitlines())
    assert len(rest) == runs
    assert whole["scratch"] == []
    for one in rest:
        # A signal that comes when Python has put away its handlers ends the process, which has cleaned up by then.
        assert one["code"] in (0, 130, -signal.SIGINT, -signal.SIGTERM), one
        assert one["scratch"] == [], one
        assert "Traceback" not in one["err"], one
        assert "Exception" not in one["err"], one
        assert one["code"] != 130 or one["err"].endswith(SAID + "\n"), one
        assert one["code"] != 0 or one["files"] == whole["files"], one
    assert any(SAID in one["err"] for one in rest)
    return whole, rest


@pytest.mark.parametrize(
    ("words", "runs"),
    [
        ("gguf demo -q q8_0 -o OUT/x.gguf", 20),
        ("mlx demo -o OUT/x", 10),
        ("mlx demo -o OUT/x --force", 10),
        ("onnx demo -o OUT/x", 10),
        ("all demo -o OUT/new", 20),
    ],
)
def test_exports_stopped_at_random_moments(words: str, runs: int, tmp_path: Path) -> None:
    """Each output is there, whole, or not at all."""
    whole, rest = storm(runs, tmp_path / "runs", *words.split())
    outputs = {re.match(r"(new/)?[^/]+", name)[0] for name in whole["files"]}  # type: ignore[index]
    for one in rest:
        there = {output for output in outputs if any(f"{name}/".startswith(f"{output}/") for name in one["files"])}
        expected = {
            name: found
            for name, found in whole["files"].items()
            if any(f"{name}/".startswith(f"{output}/") for output in there)
        }
        assert one["files"] == expected, one
        assert one["files"] or one["folders"] == [], one
        assert "--force" not in words or there == outputs, one


@pytest.mark.skipif(bool(plugins.missing("torch")), reason="torch is not installed")
def test_calibration_stopped_at_random_moments(tmp_path: Path) -> None:
    """Statistics and hidden states that the next run goes on with: whole files, or none."""
    source, text = tiny_checkpoint(tmp_path, num_hidden_layers=3), tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog " * 400, encoding="utf-8")
    options = ("--text", str(text), "--tokens", "2048", "--window", "64", "--threads", "1", "-o", "OUT/s")
    whole, rest = storm(16, tmp_path / "runs", "calibrate", str(source), *options)
    manifest = json.loads((tmp_path / "runs" / "whole" / "OUT" / "s" / "manifest.json").read_text("utf-8"))
    hidden_size = json.loads((source / "config.json").read_text("utf-8"))["hidden_size"]
    seen = set()
    for one in rest:
        for name, found in one["files"].items():
            if name.startswith("s/hidden-"):
                assert found[0] == 4 * manifest["windows"] * manifest["window"] * hidden_size, one
            else:
                assert found == whole["files"][name], one
        assert "s/tokens.safetensors" not in one["files"] or "s/manifest.json" in one["files"], one
        assert one["files"] or one["folders"] == [], one
        seen.add(len(one["files"]))
    assert len(seen) > 2
