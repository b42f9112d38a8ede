"""Fresh Python processes, which can import what this one can and nothing from the folder that they run in; threads."""

from __future__ import annotations

import os
import sys


def fresh_python(module: str, *arguments: str) -> list[str]:
    """The command that runs `module` in a process of its own, within `environment`."""
    # -P: nothing is imported from the working folder, which may be a stranger's checkpoint
    return [sys.executable, "-P", "-W", "ignore", "-m", module, *arguments]


def environment(**more: str) -> dict[str, str]:
    """This process's environment and `more`, with all that can be imported here: a source tree, an editable install."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry), **more}


def thread_count(threads: int | None = None) -> int:
    """`threads`, or the processors that this process may use, at most 16."""
    if threads is not None:
        return max(1, threads)
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    return min(usable, 16)
