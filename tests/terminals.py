"""Running a command with its stdout or stderr on a terminal."""

from __future__ import annotations

import os
import pty
import subprocess
from pathlib import Path
from typing import Literal

from tests.cli.commands import START, environment

__all__ = ["on_terminal"]


def on_terminal(stream: Literal["stdout", "stderr"], *argv: str | Path) -> tuple[str, str]:
    """What a command writes to a terminal as `stream`, and what it writes to a pipe as the other one."""
    ours, theirs = pty.openpty()
    other = "stderr" if stream == "stdout" else "stdout"
    options = {stream: theirs, other: subprocess.PIPE}
    with subprocess.Popen([*START, *map(str, argv)], env=environment(), **options) as process:
        os.close(theirs)
        shown = b""
        while True:
            try:
                piece = os.read(ours, 4096)
            except OSError:  # Linux says so where other systems give nothing
                break
            if not piece:
                break
            shown += piece
        piped = b"".join(process.communicate(timeout=60)[0 if other == "stdout" else 1 :][:1])
    os.close(ours)
    assert process.returncode == 0, (shown, piped)
    return shown.decode(), piped.decode()
