"""Watching the processes of a sweep from outside, and ending them."""

from __future__ import annotations

import contextlib
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.cli.commands import START, environment

__all__ = ["gone", "started", "writer"]

FEW = "import os; hasattr(os, 'sched_setaffinity') and os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])"


@contextlib.contextmanager
def started(*argv: str | Path) -> Iterator[subprocess.Popen[str]]:
    """`smolexport sweep` in a process of its own, which does not outlive the block.

    On two processors at most: on a large machine the work would be over before anybody could observer it.
    """
    command = [*START[:-1], f"{FEW}; {START[-1]}", "sweep", *map(str, argv)]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=environment(), **pipes) as process:
        try:
            yield process
        finally:
            process.kill()


def gone(process: psutil.Process) -> bool:
    """Whether it has ended, though nobody may have asked how."""
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def writer(out: Path, name: str = "*", scheme: str = "*", patience: float = 90) -> psutil.Process:
    """The process that is writing a GGUF file in the sweep's folder `out`, once the file holds some weights.

    `name` and `scheme` are those of its task.
    """
    end = time.monotonic() + patience
    while time.monotonic() < end:
        for partial in (out / ".sweep" / "work").glob(f"*/{name}/gguf-{scheme}/.*.partial"):
            with contextlib.suppress(OSError):
                if partial.stat().st_blocks * 512 > 100_000:
                    found = holder(partial)
                    if found is not None:
                        return found
        time.sleep(0.02)
    pytest.fail(f"nothing was written in {out}: {sorted(out.rglob('*'))}")


def holder(path: Path) -> psutil.Process | None:
    """The process of a task that has `path` open."""
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            words = " ".join(process.cmdline())
            if ("sweep.local" in words or "ray::" in words) and any(
                file.path == str(path) for file in process.open_files()
            ):
                return process
    return None
