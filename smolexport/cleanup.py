"""Removal of half-written files when work is interrupted, and the signals that interrupt it.

A signal raises its exception between any two steps: before a `with` or a `finally` takes effect, or in the midst of
one.  So everything temporary is registered here before it is made, and unregistered when it is gone.  The rest is
undone when the command or the interpreter ends.
"""

from __future__ import annotations

import atexit
import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn, Self

SOON = 0.01  # seconds

_provisional: dict[int, Provisional] = {}


class Provisional:
    """A block that makes something on disk, which is undone when the block ends."""

    def __init__(self, undo: Callable[[], object], *paths: Path, keep: bool = False) -> None:
        """Register it.

        `undo` may be called at any time, even before anything is made, and repeatedly; afterwards none of the `paths`
        exists.  With `keep` it is called only if the block ends in an error.
        """
        self.paths, self._undo, self._keep = paths, undo, keep
        _provisional[id(self)] = self

    def __enter__(self) -> Self:
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        if error is None and self._keep:
            self.forget()
        else:
            self.undo()

    def forget(self) -> None:
        """Keep it from now on."""
        _provisional.pop(id(self), None)

    def undo(self) -> None:
        """Undo it; what cannot be undone now stays registered."""
        try:
            self._undo()
        except FileNotFoundError:  # nothing was made
            pass
        except OSError:
            return
        if not any(map(os.path.lexists, self.paths)):
            self.forget()


def undo_all() -> list[Path]:
    """Undo everything registered, the latest first; returns the paths that exist nevertheless."""
    for one in reversed(list(_provisional.values())):
        one.undo()
    return [path for one in list(_provisional.values()) for path in one.paths if os.path.lexists(path)]


atexit.register(undo_all)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_provisional.clear)  # a child must not undo what its parent makes


class Stopper:
    """A signal handler: the first signal raises an exception, the next one ends the process at once."""

    def __init__(self, error: Callable[[], BaseException], end: Callable[[], NoReturn]) -> None:
        """`error` makes the exception; `end` undoes everything and exits."""
        self._error, self._end, self._stopping, self._hook = error, end, False, sys.unraisablehook

    def install(self, *numbers: signal.Signals) -> None:
        """Handle these signals, except those that are ignored, as under nohup."""
        for number in numbers:
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self)
        sys.unraisablehook = self._swallowed

    def finish(self) -> None:
        """Nothing is left to unwind: from now on the first signal ends the process."""
        self._stopping = True
        sys.unraisablehook = self._hook

    def __call__(self, *_: object) -> NoReturn:
        """Handle a signal."""
        if self._stopping:
            self._end()
        self._stopping, self._raised = True, self._error()
        raise self._raised

    def _swallowed(self, found: sys.UnraisableHookArgs) -> None:
        """Send the signal again if it met a destructor or a callback, from which no exception escapes."""
        if not self._stopping or found.exc_value is not self._raised:
            self._hook(found)
            return
        self._stopping = False
        threading.Timer(SOON, signal.raise_signal, (signal.SIGTERM,)).start()
