"""A limit of time for what might never end."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

__all__ = ["at_most"]


@contextmanager
def at_most(seconds: int) -> Iterator[None]:
    """Fail the test when the block takes longer."""

    def ring(*_: object) -> NoReturn:
        raise AssertionError(f"still at work after {seconds} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
