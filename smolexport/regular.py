"""Opening what people name and what comes from strangers: regular files alone, since reading a pipe waits for ever."""

from __future__ import annotations

import errno
import stat
from io import BufferedReader
from pathlib import Path

__all__ = ["open_regular"]


def open_regular(path: Path) -> BufferedReader:
    """`path`, opened for reading; raises OSError, also for a pipe or a device, which is never opened."""
    mode = path.stat().st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):  # of a folder the system says so itself
        raise OSError(errno.EINVAL, "is not a regular file", str(path))
    return path.open("rb")
