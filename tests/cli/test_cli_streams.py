"""stdin, stdout and stderr that are closed, full or go nowhere: notes may be lost, data may not, outputs are whole."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from smolexport import export, plugins
from tests.cli.commands import START, TERMINAL, Outcome, environment, tiny_checkpoint

BROKEN = ("closed", "full", "gone")
LIBRARIES = [name for name in ("torch", "llamacpp") if plugins.missing(name)]
needs_players = pytest.mark.skipif(bool(LIBRARIES), reason=f"not installed: {', '.join(LIBRARIES)}")
needs_full = pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
# A library that prints to the descriptors of stdout and stderr, whatever they are, in the midst of an export.
NOISY = f"""
{TERMINAL}
import os
from smolexport.cli import main
from smolexport.conversion.writer import Sink
put = Sink.put
def noisy(*args):
    for number in (0, 1, 2):
        try:
            os.write(number, b"noise")
        except OSError:
            pass
    put(*args)
Sink.put = noisy
main()
"""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def exported(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file that exports of `tiny` should be equal to."""
    return export("gguf", tiny, tmp_path_factory.mktemp("exported") / "x.gguf", quant="q8_0").path


@contextmanager
def stream(kind: str) -> Iterator[int]:
    """A descriptor for a child's stdout or stderr; "closed" is left to the shell."""
    if kind == "gone":
        reader, writer = os.pipe()
        os.close(reader)
    else:
        writer = os.open("/dev/full" if kind == "full" else os.devnull, os.O_WRONLY)
    try:
        yield writer
    finally:
        os.close(writer)


def ended(
    *argv: str | Path, stdout: str = "", stderr: str = "", start: list[str] = START, env: dict[str, str] | None = None
) -> Outcome:
    """How a command ends with such a stdout or stderr."""
    closed = "".join(f" {number}>&-" for number, kind in ((1, stdout), (2, stderr)) if kind == "closed")
    command = ["sh", "-c", f'exec "$@"{closed}', "sh", *start, *map(str, argv)]
    with stream(stdout) as out, stream(stderr) as err:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=out if stdout else subprocess.PIPE,
            stderr=err if stderr else subprocess.PIPE,
            env=environment({"PYTHONUNBUFFERED": "", **(env or {})}),
            check=False,
            text=True,
            timeout=240,
        )
    return Outcome(done.returncode, done.stdout or "", done.stderr or "")


@needs_full
@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("stderr", BROKEN)
def test_notes_may_be_lost(stderr: str, unbuffered: str, tiny: Path, exported: Path, tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    env = {"PYTHONUNBUFFERED": unbuffered}
    assert ended("gguf", tiny, "-q", "q8_0", "-o", path, stderr=stderr, env=env) == Outcome(0, f"{path}\n", "")
    assert path.read_bytes() == exported.read_bytes()
    assert ended("gguf", tiny, "-q", "q9", stderr=stderr, env=env) == Outcome(2, "", "")


@needs_full
@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize(
    ("stdout", "code", "said"),
    [("closed", 2, "Bad file descriptor"), ("full", 2, "No space left on device"), ("gone", 0, "")],
)
def test_data_may_not_be_lost(
    stdout: str, code: int, said: str, unbuffered: str, tiny: Path, exported: Path, tmp_path: Path
) -> None:
    """Only who closes a pipe has read enough; the file is there all the same."""
    path = tmp_path / "x.gguf"
    env = {"PYTHONUNBUFFERED": unbuffered}
    outcome = ended("gguf", tiny, "-q", "q8_0", "-o", path, stdout=stdout, env=env)
    assert outcome.code == code
    assert [line for line in outcome.err.splitlines() if line.startswith("smolexport: ")] == (
        [f"smolexport: stdout: {said}"] if said else []
    )
    assert "Traceback" not in outcome.err
    assert "Exception" not in outcome.err
    assert path.read_bytes() == exported.read_bytes()
    refused = ended("gguf", tiny, "-q", "q9", stdout=stdout, env=env)  # nothing was to be printed
    assert (refused.code, refused.err.count("\n")) == (2, 1)
    assert "q9" in refused.err


@needs_full
@pytest.mark.parametrize("both", BROKEN)
def test_nowhere_to_print_at_all(both: str, tiny: Path, exported: Path, tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    outcome = ended("gguf", tiny, "-q", "q8_0", "-o", path, stdout=both, stderr=both)
    assert outcome == Outcome(0 if both == "gone" else 2, "", "")
    assert path.read_bytes() == exported.read_bytes()


@pytest.mark.parametrize("closed", ["0<&-", "1>&-", "2>&-", "0<&- 1>&- 2>&-"])
def test_nothing_prints_into_an_output(closed: str, tiny: Path, exported: Path, tmp_path: Path) -> None:
    """A file that is opened gets the lowest free number, and 1 and 2 are where libraries print."""
    path = tmp_path / "x.gguf"
    subprocess.run(
        ["sh", "-c", f'exec "$@" {closed}', "sh", sys.executable, "-c", NOISY, "gguf", str(tiny), "-q", "q8_0", "-o",
         str(path)],
        check=False, env=environment(), timeout=120, capture_output=True,
    )  # fmt: skip
    assert path.read_bytes() == exported.read_bytes()


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="needs pseudo-terminals")
def test_a_terminal_that_goes_away(tiny: Path, exported: Path, tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    ours, theirs = os.openpty()
    process = subprocess.Popen(
        [*START, "gguf", str(tiny), "-q", "q8_0", "-o", str(path)],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=theirs, env=environment(), start_new_session=True,
    )  # fmt: skip
    os.close(theirs)
    with suppress(OSError):
        assert os.read(ours, 1)  # the plan
    os.close(ours)
    out, _ = process.communicate(timeout=120)
    assert (process.returncode, out.decode()) == (0, f"{path}\n")
    assert path.read_bytes() == exported.read_bytes()


@needs_full
@needs_players
@pytest.mark.parametrize("kind", BROKEN)
def test_generating(kind: str, exported: Path) -> None:
    argv = ("generate", exported, "the quick", "-n", "4", "--threads", "1")
    expected = ended(*argv)
    assert expected.code == 0
    assert expected.out
    assert ended(*argv, stderr=kind) == Outcome(0, expected.out, "")
    assert ended(*argv, stdout=kind).code == (0 if kind == "gone" else 2)


@needs_full
@needs_players
@pytest.mark.parametrize(("stdout", "stderr", "code"), [("gone", "", 0), ("full", "full", 2), ("", "closed", 0)])
def test_comparing(stdout: str, stderr: str, code: int, tiny: Path, exported: Path, tmp_path: Path) -> None:
    """Reports are written whether or not the table finds a reader."""
    (tmp_path / "text").write_text("the quick brown fox jumps over the lazy dog " * 60, encoding="utf-8")
    outcome = ended(
        "compare", tiny, exported, "--text", tmp_path / "text", "--window", "64", "--max-windows", "2",
        "--threads", "1", "--greedy-tokens", "0", "--repetitions", "0", "--no-attribution", "--no-chat",
        "--no-cache", "--report", tmp_path / "x.json", "--junit", tmp_path / "x.xml", stdout=stdout, stderr=stderr,
    )  # fmt: skip
    assert (outcome.code, outcome.err) == (code, "")
    assert bool(outcome.out) is (stdout == "")
    assert {path.name for path in tmp_path.iterdir()} == {"text", "x.json", "x.xml"}
