"""The one generate loop for every runtime: prefill, decode, stop, and the time it took.

    for event in stream(session, "Once upon a time", max_tokens=64):
        match event:
            case Piece(): print(event.text, end="", flush=True)
            case Generation(): print(event.timing)

Notation: n = tokens of the prompt, t = tokens generated.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from time import perf_counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from smolexport.errors import UsageError
from smolexport.run.sampling import Sampler, Sampling
from smolexport.run.session import Session, TextDecoder


class StopReason(Enum):
    """Why a generation ended."""

    STOP_TOKEN = "stop_token"  # noqa: S105
    STOP_STRING = "stop_string"
    MAX_TOKENS = "max_tokens"
    CONTEXT = "context"


@dataclass(frozen=True)
class Timing:
    """Time of the runtime and the sampler, without what the caller spends between two events.

    Args:
        prompt_tokens: n.
        ttft_ms: milliseconds from the call to the first token: tokenizing, prefill, first draw.
        prefill_seconds: of the one append of the prompt.
        decode_tokens: t - 1, the tokens after the first.
        decode_seconds: for those.
    """

    prompt_tokens: int
    ttft_ms: float
    prefill_seconds: float
    decode_tokens: int
    decode_seconds: float

    @property
    def prefill_tok_s(self) -> float:
        """Tokens of the prompt per second."""
        return self.prompt_tokens / max(self.prefill_seconds, 1e-9)

    @property
    def decode_tok_s(self) -> float | None:
        """Tokens per second after the first; None when there was only one."""
        return self.decode_tokens / max(self.decode_seconds, 1e-9) if self.decode_tokens else None


@dataclass(frozen=True)
class Piece:
    """One token, and the text that it completes (often its own, sometimes none or more)."""

    token: int
    text: str


@dataclass(frozen=True)
class Generation:
    """A finished generation.

    Args:
        tokens: all t tokens chosen, a final stop token included.
        text: their text up to the stop; equal to the joined texts of the pieces plus `tail`.
        tail: the end of the text, held back until no stop text could begin in it.
        stop_reason: why it ended.
        timing: how long it took.
    """

    tokens: tuple[int, ...]
    text: str
    tail: str
    stop_reason: StopReason
    timing: Timing


def generate(session: Session, prompt: str | Sequence[int] | NDArray[np.integer], **options: Any) -> Generation:
    """Run `stream` to its end and return its last event.  Arguments and errors as there."""
    return next(event for event in stream(session, prompt, **options) if isinstance(event, Generation))


def stream(
    session: Session,
    prompt: str | Sequence[int] | NDArray[np.integer],
    *,
    sampling: Sampling | None = None,
    max_tokens: int = 128,
    stop: Collection[str] = (),
    stop_tokens: Collection[int] | None = None,
    with_text: bool = True,
) -> Iterator[Piece | Generation]:
    """Continue `prompt`: a `Piece` per token, then one `Generation`.

    The prompt is appended to what the session holds.  The last token is chosen but not appended, so afterwards the
    session holds n + t - 1 tokens more.  Arguments are checked at the call, before the first event is requested.

    Args:
        session: an open session of any runtime.
        prompt: text, encoded by the session's codec, or ids.
        sampling: None: greedy.
        max_tokens: most tokens to choose; at least 1.
        stop: texts that end the generation and are left out of its text.
        stop_tokens: ids that end it; None: the codec's own; empty: none.
        with_text: False decodes nothing; with ids as prompt and given `stop_tokens` no codec is needed then.

    Raises:
        UsageError: an empty prompt, an empty stop text, stop texts without text, or max_tokens below 1.
        SessionError: from the session; ContextOverflowError when the prompt does not fit.
    """
    started = perf_counter()
    if max_tokens < 1:
        raise UsageError(f"max_tokens = {max_tokens} must be at least 1")
    if any(not text for text in stop):
        raise UsageError("an empty stop text would end every generation at once; leave it out")
    if stop and not with_text:
        raise UsageError("stop texts need with_text=True")
    ids = session.codec.encode(prompt) if isinstance(prompt, str) else [int(i) for i in prompt]
    if not ids:
        raise UsageError("the prompt is empty; give at least one token")
    ends = session.codec.stop_tokens if stop_tokens is None else frozenset(stop_tokens)
    spent = perf_counter() - started
    text = _Text(session.codec.decoder() if with_text else None, stop)
    return _run(session, ids, Sampler(sampling or Sampling()), text, max_tokens, ends, spent)


def _run(
    session: Session,
    ids: list[int],
    sampler: Sampler,
    text: _Text,
    max_tokens: int,
    ends: Collection[int],
    spent: float,
) -> Iterator[Piece | Generation]:
    """The events of `stream`, of which `spent` seconds went into checks and tokenizing."""
    history, count = list(ids), len(ids)
    started = perf_counter()
    logits = session.append(ids, last_only=True)
    prefill = perf_counter() - started
    token = sampler.choose(logits[-1], history)
    first, decode = spent + perf_counter() - started, 0.0
    while True:
        history.append(token)
        reason: StopReason | None
        if token in ends:
            reason, piece = StopReason.STOP_TOKEN, ""
        else:
            piece = text.push(token)
            reason = _reason(session, text, len(history) - count, max_tokens)
        yield Piece(token, piece)
        if reason is not None:
            break
        started = perf_counter()
        logits = session.append([token], last_only=True)
        token = sampler.choose(logits[-1], history)
        decode += perf_counter() - started
    tail = text.finish()
    if text.stopped:  # perhaps only now: the last bytes may complete a stop text
        reason = StopReason.STOP_STRING
    tokens = tuple(history[count:])
    timing = Timing(count, first * 1e3, prefill, len(tokens) - 1, decode)
    yield Generation(tokens, text.certain, tail, reason, timing)


def _reason(session: Session, text: _Text, chosen: int, max_tokens: int) -> StopReason | None:
    if text.stopped:
        return StopReason.STOP_STRING
    if chosen >= max_tokens:
        return StopReason.MAX_TOKENS
    return StopReason.CONTEXT if session.length >= session.context else None


class _Text:
    """The text so far; its end is held back while a stop text could begin there.

    The first stop text *to be completed* ends it, whatever the token boundaries.  Without a decoder it stays empty.
    """

    def __init__(self, decoder: TextDecoder | None, stop: Collection[str]) -> None:
        self._decoder, self._stop = decoder, tuple(stop)
        self._held = ""
        self.certain = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """Add a token, return the text that is certain now."""
        return self._release(self._decoder.push(token) if self._decoder else "", final=False)

    def finish(self) -> str:
        """Return what is held back."""
        return self._release(self._decoder.flush() if self._decoder else "", final=True)

    def _release(self, new: str, *, final: bool) -> str:
        if self.stopped:
            return ""
        self._held += new
        matches = [(at + len(s), at) for s in self._stop if (at := self._held.find(s)) >= 0]
        if matches:
            self.stopped = True
            cut = min(matches)[1]
        else:
            cut = len(self._held) - (0 if final else self._possible_start())
        out, self._held = self._held[:cut], "" if self.stopped else self._held[cut:]
        self.certain += out
        return out

    def _possible_start(self) -> int:
        """Length of the longest end of the held text that is a proper prefix of a stop text."""
        longest = max((len(s) for s in self._stop), default=1) - 1
        for length in range(min(longest, len(self._held)), 0, -1):
            if any(s.startswith(self._held[-length:]) for s in self._stop):
                return length
        return 0
