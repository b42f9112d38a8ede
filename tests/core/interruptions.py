"""Runs a command again and again and stops it at random moments; one line of JSON tells what each run left.

    python -m tests.core.interruptions SEED RUNS FOLDER COMMAND...

A word of the command that begins with OUT/ is a path in a folder of the run's own.  Each run is a fork of this process,
which has done the command, so that the moments fall into the work and not into imports.  The first line is of a run
that was not stopped; with --force among the words, the others find what it made.  Every other one gets a second signal
soon after the first.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from smolexport import cli

SIGNALS = (signal.SIGINT, signal.SIGTERM)
SOON = 0.03  # seconds


def command(place: Path, words: list[str]) -> float:
    """Do it in this process, with a folder of its own for temporary files; returns the seconds."""
    tempfile.tempdir, start = str(place / "scratch"), time.perf_counter()
    with suppress(SystemExit):
        cli.main(argv(place, words))
    return time.perf_counter() - start


def child(place: Path, words: list[str]) -> None:
    """What the process of a run does; ends it as any command ends."""
    os.dup2(os.open(place / "err", os.O_WRONLY | os.O_CREAT), 2)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    tempfile.tempdir, outcome = str(place / "scratch"), cli._outcome

    def ready(argv: Any) -> Any:
        """Signals wait until somebody catches them."""
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        return outcome(argv)

    cli._outcome = ready
    cli.main(argv(place, words))


def argv(place: Path, words: list[str]) -> list[str]:
    """The command's words, with OUT in this place."""
    return [str(place / word) if word.startswith("OUT/") else word for word in words]


def stopped(place: Path, words: list[str], moments: list[float], number: signal.Signals) -> dict[str, Any]:
    """How a run ends that gets this signal after so many seconds each."""
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    process = os.fork()
    if not process:
        child(place, words)
    for moment in moments:
        time.sleep(moment)
        if os.waitid(os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            os.kill(process, number)
    _, status = os.waitpid(process, 0)
    return {"code": os.waitstatus_to_exitcode(status), "err": (place / "err").read_text("utf-8")}


def left(place: Path) -> dict[str, Any]:
    """What is there: outputs, with sizes and hashes of files, and temporary files."""
    out, scratch = place / "OUT", place / "scratch"
    found = sorted(out.rglob("*"))
    return {
        "files": {str(p.relative_to(out)): [p.stat().st_size, digest(p)] for p in found if p.is_file()},
        "folders": [str(p.relative_to(out)) for p in found if p.is_dir()],
        "scratch": sorted(path.name for path in scratch.iterdir()),
    }


def digest(path: Path) -> str:
    """Of a file's bytes."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def made(folder: Path, earlier: Path | None = None) -> Path:
    """A place for a run, with the outputs of an `earlier` one."""
    (folder / "scratch").mkdir(parents=True)
    shutil.copytree(earlier / "OUT", folder / "OUT") if earlier else (folder / "OUT").mkdir()
    return folder


def main(seed: str, runs: str, folder: str, *words: str) -> None:
    """One line for each run."""
    moments = random.Random(int(seed))
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    command(made(Path(folder) / "first"), list(words))
    seconds = command(whole := made(Path(folder) / "whole"), list(words))
    out.write(json.dumps(left(whole)) + "\n")
    for number in range(int(runs)):
        when = [moments.uniform(0, 1.2 * seconds), moments.uniform(0, SOON)][: 1 + number % 2]
        place = made(Path(folder) / str(number), whole if "--force" in words else None)
        outcome = stopped(place, list(words), when, moments.choice(SIGNALS))
        out.write(json.dumps({**outcome, **left(place)}) + "\n")
        shutil.rmtree(place)


if __name__ == "__main__":
    main(*sys.argv[1:])
