"""One at a time, between processes: held by the system, which lets go when the holder ends, however it does."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from smolexport.errors import OutputError

STEP = 0.05  # seconds between two attempts


@contextmanager
def held(path: Path, patience: float | None = None, refusal: str = "is in use") -> Iterator[int | None]:
    """Hold the lock on the file `path`, which is made and stays; yields its descriptor.

    A child that inherits the descriptor holds the lock too.  Where the system has no such locks nothing is
    held, and None yielded.

    Args:
        path: the file.
        patience: seconds to wait for another holder; None = as long as it takes.
        refusal: what to say of `path` when that was not enough.

    Raises:
        OutputError: another process holds it, or the file cannot be made.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        yield None
        return
    try:
        file = path.open("ab")
    except OSError as error:
        raise OutputError(f"{path}: {error.strerror or error}") from error
    with file:
        end = None if patience is None else time.monotonic() + patience
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if end is not None and time.monotonic() > end:
                    raise OutputError(f"{path}: {refusal}") from None
                time.sleep(STEP)
            except OSError:  # a file system without locks
                break
        yield file.fileno()
