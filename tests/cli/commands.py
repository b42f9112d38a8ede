"""Running the command line in tests, and what every refusal must look like."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

from smolexport.cli import main
from smolexport.testing.checkpoints import write_checkpoint, write_tokenizer

__all__ = ["ROOT", "Outcome", "assert_refused", "call", "run", "tiny_checkpoint"]

ROOT = Path(__file__).resolve().parents[2]
SOURCES = os.pathsep.join(str(ROOT / part) for part in (".", "converters", "runtimes"))
# A job started in the background of a shell inherits that Ctrl-C is ignored; a terminal's does not.
TERMINAL = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
# As on a disk that fills: the first writes pass, a later one is refused.
LIMITED = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))
from smolexport.cli import main
main(sys.argv[1:])
"""
START = [sys.executable, "-c", f"{TERMINAL}; from smolexport.cli import main; main()"]


@dataclass(frozen=True)
class Outcome:
    """How a command ended."""

    code: int
    out: str
    err: str


def call(*argv: str | Path, stdin: str | bytes = "") -> Outcome:
    """Run a command in this process: fast, and everything but the process itself is real."""
    given = io.TextIOWrapper(io.BytesIO(stdin.encode() if isinstance(stdin, str) else stdin), encoding="utf-8")
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True) for _ in range(2))
    before, code = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}, 0
    try:
        with redirect_stdout(out), redirect_stderr(err), patch("sys.stdin", given):
            main([str(a) for a in argv])
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return Outcome(code, *(stream.buffer.getvalue().decode() for stream in (out, err)))


def environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment of a child that imports this working tree."""
    return {**os.environ, "PYTHONPATH": SOURCES, "COLUMNS": "120", **(extra or {})}


def run(*argv: str | Path, env: Mapping[str, str] | None = None, stdin: str = "", cwd: Path | None = None) -> Outcome:
    """Run a command in a process of its own."""
    done = subprocess.run(
        [*START, *map(str, argv)],
        check=False, capture_output=True, text=True, input=stdin, env=environment(env), timeout=120, cwd=cwd,
    )  # fmt: skip
    return Outcome(done.returncode, done.stdout, done.stderr)


def assert_refused(outcome: Outcome, *words: str | Path, planned: bool = False) -> None:
    """Exit code 2, nothing on stdout, one line on stderr that holds all `words` (after the plan, if `planned`)."""
    assert "Traceback" not in outcome.err, outcome.err
    lines = outcome.err.splitlines()
    assert outcome.code == 2, outcome
    assert outcome.out == ""
    assert [line.startswith("smolexport: ") for line in lines].count(True) == 1, outcome.err
    assert lines[-1].startswith("smolexport: ")
    assert planned or len(lines) == 1, outcome.err
    assert lines[-1].isprintable()
    for word in words:
        assert str(word) in lines[-1], f"{word!r} not in {lines[-1]!r}"


def tiny_checkpoint(folder: Path, model_type: str = "llama", **options: Any) -> Path:
    """A whole checkpoint of two layers (unless `options` say otherwise), with its tokenizer, in `folder`."""
    tokens = write_tokenizer(folder / "tokenizer")
    return write_checkpoint(folder / "tiny", model_type, tokenizer=tokens, **{"num_hidden_layers": 2, **options})
