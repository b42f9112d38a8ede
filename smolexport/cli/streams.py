"""stdout and stderr of a command: data that cannot be written is an error, a note that cannot be written is not.

`secure` also keeps stdin, stdout and stderr from being what a command opens: where one of them was closed, the next
file would get its number, and whatever any library prints would go into that file.
"""

from __future__ import annotations

import errno
import io
import os
import sys
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from rich.console import Console

# The null device takes the place of what is closed.  Nothing can be written to one that is open for reading.
CLOSED = {0: os.O_RDONLY, 1: os.O_RDONLY, 2: os.O_WRONLY}


def secure() -> None:
    """Call this before any file is opened.  Streams that somebody has put in the place of the process's own stay."""
    for number, flags in CLOSED.items():  # in this order: a new descriptor is the lowest that is free
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, flags), True)
    for number, name in enumerate(("stdout", "stderr"), 1):
        stream = getattr(sys, name)
        if stream is getattr(sys, f"__{name}__"):
            setattr(sys, name, _secured(stream, number, name))
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _secured(stream: Any, number: int, name: str) -> TextIO:
    """`stream`, None for a closed one; characters that its encoding or a path's bytes lack come as escapes."""
    if stream is None:
        closed = io.BufferedWriter(_Raw(io.FileIO(number, "w", closefd=False), name))
        return io.TextIOWrapper(closed, "utf-8", "backslashreplace", line_buffering=True)
    unbuffered = stream.write_through  # as Python does it when asked to: then there is no buffer below the text
    raw = _Raw(stream.buffer if unbuffered else stream.buffer.raw, name)
    return io.TextIOWrapper(
        raw if unbuffered else io.BufferedWriter(raw), stream.encoding, "backslashreplace",
        line_buffering=stream.line_buffering, write_through=unbuffered,
    )  # fmt: skip


class _Raw(io.RawIOBase):
    """What is written to `raw`.  Where that fails, stderr goes on without it; stdout fails, once, by its name."""

    def __init__(self, raw: io.RawIOBase, name: str) -> None:
        self._raw, self.name, self._lost = raw, name, False

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._raw.fileno()

    def isatty(self) -> bool:
        return self._raw.isatty()

    def write(self, data: Any) -> int:
        # What is left is written when Python ends, which would make an exit code of its own of a second failure.
        if self._lost or not len(data):  # libraries try out a stream with nothing
            return len(data)
        try:
            written = self._raw.write(data)
            if written is None:
                raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        except OSError as error:
            if self.name == "stderr":
                return len(data)
            self._lost = True
            raise OSError(error.errno, error.strerror, self.name) from None
        return written


def console() -> Console:
    """Where tables go: stdout, as wide as the terminal or 120 columns."""
    from rich.console import Console

    class Table(Console):
        def on_broken_pipe(self) -> None:
            raise  # noqa: PLE0704 - what is being handled; the library would end the process with exit code 1

    return Table(width=None if sys.stdout.isatty() else 120)
