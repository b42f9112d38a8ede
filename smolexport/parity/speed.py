"""How fast models answer, measured in turns so that a drifting machine hits all of them alike.

One round takes every model once: a prompt up to the first chosen token, single steps from there, and one long
block on an empty context.  Rounds start with another model each time.  A first short round that is not counted
lets libraries compile, allocate and read the file.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from smolexport.parity.inputs import Settings
from smolexport.parity.results import Estimate, Speed

__all__ = ["Player", "measure"]

_WARM_UP_STEPS = 2


class Player(Protocol):
    """As much of a `Session` as measuring needs."""

    @property
    def vocab_size(self) -> int:
        """Width of a row of logits."""
        ...

    @property
    def context(self) -> int:
        """Most tokens that it holds."""
        ...

    def append(self, tokens: Sequence[int] | NDArray[np.integer], *, last_only: bool = False) -> NDArray[np.float32]:
        """Feed `tokens`; see `Session.append`."""
        ...

    def rewind(self, length: int) -> None:
        """Forget all tokens from position `length` on."""
        ...


def measure(
    sessions: Sequence[Player],
    tokens: NDArray[np.int64],
    settings: Settings,
    *,
    clock: Callable[[], float] = time.perf_counter,
    advance: Callable[[], None] = lambda: None,
) -> list[Speed]:
    """Measure all `sessions` on `tokens`, which are repeated where they are fewer than a block.

    Lengths are cut to the smallest context.  `advance` is called after each model of each round.
    """
    context = min(session.context for session in sessions)
    prompt = np.resize(tokens, min(settings.prompt_tokens, context - 1))
    block = np.resize(tokens, min(settings.prefill_tokens, context))
    steps = min(settings.decode_tokens, context - len(prompt))
    for session in sessions:
        _generate(session, prompt, min(steps, _WARM_UP_STEPS), clock)
    samples: list[list[tuple[float, float, float]]] = [[] for _ in sessions]
    for turn in range(settings.repetitions):
        for place in range(len(sessions)):
            index = (place + turn) % len(sessions)
            session = sessions[index]
            first, rest = _generate(session, prompt, steps, clock)
            samples[index].append((first * 1e3, len(block) / _prefill(session, block, clock), steps / rest))
            advance()
    return [_speed(rows, len(prompt), len(block), steps) for rows in samples]


def _speed(rows: Sequence[tuple[float, float, float]], prompt: int, block: int, steps: int) -> Speed:
    ttft, prefill, decode = (_estimate(column) for column in zip(*rows, strict=True))
    return Speed(
        ttft_ms=ttft,
        prefill_tok_s=prefill,
        decode_tok_s=decode,
        prompt_tokens=prompt,
        prefill_tokens=block,
        decode_tokens=steps,
        repetitions=len(rows),
    )


def _generate(
    session: Player, prompt: NDArray[np.int64], steps: int, clock: Callable[[], float]
) -> tuple[float, float]:
    """Seconds until the first token is chosen, and for `steps` more."""
    session.rewind(0)
    start = clock()
    token = int(session.append(prompt, last_only=True)[-1].argmax())
    first = clock()
    for _ in range(steps):
        token = int(session.append([token], last_only=True)[-1].argmax())
    return first - start, clock() - first


def _prefill(session: Player, block: NDArray[np.int64], clock: Callable[[], float]) -> float:
    session.rewind(0)
    start = clock()
    session.append(block, last_only=True)
    return clock() - start


def _estimate(values: Sequence[float]) -> Estimate:
    error = float(np.std(values, ddof=1) / np.sqrt(len(values))) if len(values) > 1 else float("nan")
    return Estimate(float(np.mean(values)), error)
