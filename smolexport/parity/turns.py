"""Models that are measured in turns: all open at once, or where memory does not hold them, each for its turn alone."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack

import numpy as np
from numpy.typing import NDArray

from smolexport.parity.inputs import Candidate, Settings
from smolexport.parity.speed import Player
from smolexport.run.session import Session

__all__ = ["lack_of_room", "opened"]

_WARM_UP = 8  # tokens


def lack_of_room(models: Sequence[Candidate]) -> str:
    """Why `models` cannot all be open at once; empty where they can."""
    import psutil

    needed = 2 * sum(model.bytes for model in models)  # weights may be packed anew while they are loaded
    free = psutil.virtual_memory().available
    if len(models) == 1 or needed <= free:
        return ""
    lacking = f"all at once need {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free"
    return f"for speed each model was opened anew for each of its turns: {lacking}"


def opened(
    stack: ExitStack, models: Sequence[Candidate], context: int, settings: Settings, *, alone: bool
) -> list[tuple[Player, float]]:
    """All `models`, open on `stack`, or with `alone` at most one at a time; each with the seconds that opening took."""
    room = _Room()
    stack.callback(room.leave)
    found: list[tuple[Player, float]] = []
    for model in models:
        start = time.perf_counter()
        player = (
            _Guest(model, context, settings, room) if alone else stack.enter_context(_open(model, context, settings))
        )
        found.append((player, time.perf_counter() - start))
    return found


def _open(model: Candidate, context: int, settings: Settings) -> Session:
    open_session: Callable[..., Session] = model.runtime.open
    return open_session(model.path, threads=settings.threads, context=context, **model.options)


class _Room:
    """Holds one guest's session."""

    def __init__(self) -> None:
        self._guest: _Guest | None = None
        self._session: Session | None = None

    def enter(self, guest: _Guest, make: Callable[[], Session]) -> Session:
        """The session of `guest`, made, and warmed up, where another one's is here."""
        if self._session is None or self._guest is not guest:
            self.leave()
            self._session, self._guest = make(), guest
            for tokens in ([0] * min(_WARM_UP, self._session.context - 1), [0]):
                self._session.append(tokens, last_only=True)
            self._session.rewind(0)
        return self._session

    def leave(self) -> None:
        """Close the session that is here."""
        session, self._session, self._guest = self._session, None, None
        if session is not None:
            session.close()


class _Guest:
    """A model that is open from its first use in a turn until another one's turn.

    A turn's first call is `rewind`, before the clock starts: loading is in no figure.
    """

    def __init__(self, model: Candidate, context: int, settings: Settings, room: _Room) -> None:
        self._room, self._make = room, lambda: _open(model, context, settings)
        session = self._session()
        self.context, self.vocab_size = session.context, session.vocab_size

    def _session(self) -> Session:
        return self._room.enter(self, self._make)

    def append(self, tokens: Sequence[int] | NDArray[np.integer], *, last_only: bool = False) -> NDArray[np.float32]:
        return self._session().append(tokens, last_only=last_only)

    def rewind(self, length: int) -> None:
        self._session().rewind(length)
