"""Data on stdout, notes and progress on stderr: data that cannot be written is an error, a note is not."""

from __future__ import annotations

import errno
import io
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TextIO

import click

from smolexport.text import printable, prose

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import TaskID

    from smolexport.parity.inputs import Progress

MAX_LABEL = 60  # characters beside a bar
# The null device replaces a closed stream.  Opened for reading, so that writing data to it fails.
CLOSED = {0: os.O_RDONLY, 1: os.O_RDONLY, 2: os.O_WRONLY}


def secure() -> None:
    """Replace closed standard streams, and make stdout and stderr fail as this module promises.

    To be called before any file is opened: otherwise the next file would get the number of a closed stream, and
    whatever a library prints would go into that file.  Streams that replaced the process's own are kept.
    """
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
    """A checked `stream` (None: closed) that writes characters outside its encoding as escapes."""
    if stream is None:
        closed = io.BufferedWriter(_Raw(io.FileIO(number, "w", closefd=False), name))
        return io.TextIOWrapper(closed, "utf-8", "backslashreplace", line_buffering=True)
    unbuffered = stream.write_through  # as with `python -u`: then there is no buffer below the text
    raw = _Raw(stream.buffer if unbuffered else stream.buffer.raw, name)
    return io.TextIOWrapper(
        raw if unbuffered else io.BufferedWriter(raw), stream.encoding, "backslashreplace",
        line_buffering=stream.line_buffering, write_through=unbuffered,
    )  # fmt: skip


class _Raw(io.RawIOBase):
    """Writes to `raw`.  If that fails, stderr drops the data; stdout raises once, naming itself."""

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


def say(text: str) -> None:
    """Print a note on stderr; names in it may come from an untrusted file."""
    click.echo(prose(text), err=True)


def print_json(value: Any) -> None:
    """Print indented JSON on stdout, in ASCII: untrusted names may hold characters that a terminal obeys."""
    click.echo(json.dumps(value, indent=2, allow_nan=False))


def console() -> Console:
    """The console for tables: stdout, as wide as the terminal or 120 columns."""
    from rich.console import Console

    class Table(Console):
        def on_broken_pipe(self) -> None:
            raise  # noqa: PLE0704 - the error being handled; the library would end the process with exit code 1

    return Table(width=None if sys.stdout.isatty() else 120)


@contextmanager
def progress_bar(label: str, total: int, *, unit: str = "bytes") -> Iterator[Callable[[int], None]]:
    """A bar on stderr, if that is a terminal; yields the function that advances it."""
    if not sys.stderr.isatty():
        yield lambda _: None
        return
    from rich import progress
    from rich.console import Console

    amounts = (progress.TaskProgressColumn(), progress.TextColumn(unit))
    columns = (
        progress.TextColumn("{task.description}", markup=False),
        progress.BarColumn(),
        *((progress.DownloadColumn(), progress.TransferSpeedColumn()) if unit == "bytes" else amounts),
        progress.TimeRemainingColumn(),
    )
    with progress.Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(printable(label, MAX_LABEL), total=total)
        yield lambda count: bar.advance(task, count)


@contextmanager
def stages(quiet: bool) -> Iterator[Progress]:
    """A bar for each stage of a measurement on stderr, if that is a terminal; yields the function that moves them."""
    if quiet or not sys.stderr.isatty():
        yield lambda *_: None
        return
    from rich.console import Console
    from rich.progress import Progress as Bars

    with Bars(console=Console(stderr=True), transient=True) as bars:
        tasks: dict[str, TaskID] = {}

        def progress(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total)
            bars.update(tasks[stage], completed=done, total=total)

        yield progress
