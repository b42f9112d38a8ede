"""Sessions for interleaved measurement: all open at once, or one at a time if memory cannot hold them all."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from smolexport.parity.inputs import Candidate, Settings
from smolexport.run.session import Session

_WARM_UP = 8  # tokens


class TimedSession(Protocol):
    """The part of a `Session` that measuring speed needs."""

    @property
    def vocab_size(self) -> int:
        """Number of logits per row."""
        ...

    @property
    def context(self) -> int:
        """Context length in tokens."""
        ...

    def append(self, tokens: Sequence[int] | NDArray[np.integer], *, last_only: bool = False) -> NDArray[np.float32]:
        """Feed `tokens`; see `Session.append`."""
        ...

    def rewind(self, length: int) -> None:
        """Discard all tokens from position `length` on."""
        ...


def lack_of_memory(models: Sequence[Candidate]) -> str:
    """The reason why `models` cannot all be open at once; empty if they can."""
    import psutil

    needed = 2 * sum(model.bytes for model in models)  # weights may be repacked while they are loaded
    free = psutil.virtual_memory().available
    if len(models) == 1 or needed <= free:
        return ""
    lacking = f"all together need {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free"
    return f"speed: each model was reopened for each of its rounds: {lacking}"


def open_all(
    stack: ExitStack, models: Sequence[Candidate], context: int, settings: Settings, *, one_at_a_time: bool
) -> list[tuple[TimedSession, float]]:
    """All `models`, each with the seconds that opening took; `stack` closes them."""
    slot = _Slot()
    stack.callback(slot.close)
    found: list[tuple[TimedSession, float]] = []
    for model in models:
        start = time.perf_counter()
        session: TimedSession = (
            _Reopened(model, context, settings, slot)
            if one_at_a_time
            else stack.enter_context(_open(model, context, settings))
        )
        found.append((session, time.perf_counter() - start))
    return found


def _open(model: Candidate, context: int, settings: Settings) -> Session:
    open_session: Callable[..., Session] = model.runtime.open
    return open_session(model.path, threads=settings.threads, context=context, **model.options)


class _Slot:
    """Holds the one open session."""

    def __init__(self) -> None:
        self._owner: _Reopened | None = None
        self._session: Session | None = None

    def get(self, owner: _Reopened, make: Callable[[], Session]) -> Session:
        """The session of `owner`; opened and warmed up if another owner's session is open."""
        if self._session is None or self._owner is not owner:
            self.close()
            self._session, self._owner = make(), owner
            for tokens in ([0] * min(_WARM_UP, self._session.context - 1), [0]):
                self._session.append(tokens, last_only=True)
            self._session.rewind(0)
        return self._session

    def close(self) -> None:
        """Close the open session."""
        session, self._session, self._owner = self._session, None, None
        if session is not None:
            session.close()


class _Reopened:
    """A model that is open from its first use in a round until another model is used.

    The first call of a round is `rewind`, before the clock starts, so no figure includes loading.
    """

    def __init__(self, model: Candidate, context: int, settings: Settings, slot: _Slot) -> None:
        self._slot, self._make = slot, lambda: _open(model, context, settings)
        session = self._session()
        self.context, self.vocab_size = session.context, session.vocab_size

    def _session(self) -> Session:
        return self._slot.get(self, self._make)

    def append(self, tokens: Sequence[int] | NDArray[np.integer], *, last_only: bool = False) -> NDArray[np.float32]:
        return self._session().append(tokens, last_only=last_only)

    def rewind(self, length: int) -> None:
        self._session().rewind(length)
