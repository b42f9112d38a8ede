"""Running a piece of Python in a process of its own, on this working tree."""

from __future__ import annotations

import subprocess
import sys

from tests.cli.commands import environment

__all__ = ["python"]


def python(code: str, *argv: str) -> str:
    """What `code` prints on stdout in a fresh interpreter; fails with its stderr."""
    done = subprocess.run(
        [sys.executable, "-c", code, *argv],
        check=False, capture_output=True, text=True, env=environment(), timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout
