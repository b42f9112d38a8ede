"""Fresh Python processes: they can import what this one can, and nothing from the folder that it runs in."""

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
