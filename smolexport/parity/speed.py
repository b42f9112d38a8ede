"""Speed of models, measured in interleaved rounds so that a drift of the machine affects all of them equally.

One round measures every model once: a prompt up to the first chosen token, single steps from there, and one long block
in an empty context.  Each round starts with a different model.  A short warm-up, not counted, lets libraries compile,
allocate and read the file.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack

import numpy as np
from numpy.typing import NDArray

from smolexport.model.spec import Role
from smolexport.parity import peak_memory
from smolexport.parity.inputs import Candidate, Progress, Settings
from smolexport.parity.interleave import TimedSession, lack_of_memory, open_all
from smolexport.parity.results import Estimate, Speed

_WARM_UP_STEPS = 2


def speeds(
    models: Sequence[Candidate], ids: NDArray[np.int64] | None, context: int, settings: Settings, progress: Progress
) -> tuple[list[tuple[Speed, float]], str]:
    """Speed of every model with the seconds that opening it took, and a note on the method, empty if all were open.

    Args:
        models: what to measure; every session holds `context` tokens.
        ids: tokens to feed; None feeds random ones.
        context: tokens that every session holds.
        settings: lengths, repetitions, threads.
        progress: called at each step.
    """
    total = settings.repetitions * len(models)
    steps = iter(range(1, total + 1))
    progress("speed", 0, total)
    note = lack_of_memory(models)
    with ExitStack() as stack:
        opened = open_all(stack, models, context, settings, one_at_a_time=bool(note))
        sessions = [session for session, _ in opened]
        if ids is None:
            ids = np.random.default_rng(0).integers(0, min(session.vocab_size for session in sessions), context)
        found = measure(sessions, ids, settings, advance=lambda: progress("speed", next(steps), total))
    return [(speed, seconds) for speed, (_, seconds) in zip(found, opened, strict=True)], note


def peaks(
    models: Sequence[Candidate], context: int, settings: Settings, progress: Progress
) -> list[tuple[int | None, str]]:
    """Peak resident bytes of each model in a fresh process, or None and the reason; None alone if not asked for."""
    if not settings.memory:
        return [(None, "")] * len(models)
    found = []
    for done, model in enumerate(models):
        progress("memory", done, len(models))
        found.append(peak_memory.measure_peak(model, threads=settings.threads, context=context))
    progress("memory", len(models), len(models))
    return found


def bandwidth_share(model: Candidate, rate: Speed | None, bandwidth: float | None) -> float | None:
    """Decode rate over the rate at which memory allows all weights of a token to be read; None if either is unknown."""
    if rate is None or bandwidth is None or model.weights is None:
        return None
    found = model.weights()
    untied = any(tensor.role is Role.HEAD for tensor in found)
    read = sum(tensor.size for tensor in found if not (untied and tensor.role is Role.EMBED))
    return rate.decode_tok_s.value * model.bits_per_weight / 8 * read / bandwidth


def measure(
    sessions: Sequence[TimedSession],
    tokens: NDArray[np.int64],
    settings: Settings,
    *,
    clock: Callable[[], float] = time.perf_counter,
    advance: Callable[[], None] = lambda: None,
) -> list[Speed]:
    """Measure all `sessions` on `tokens`, repeated if they are fewer than a block.

    Lengths are limited to the smallest context.  `advance` is called after each model of each round.
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
    session: TimedSession, prompt: NDArray[np.int64], steps: int, clock: Callable[[], float]
) -> tuple[float, float]:
    """Seconds until the first token is chosen, and for `steps` more."""
    session.rewind(0)
    start = clock()
    token = int(session.append(prompt, last_only=True)[-1].argmax())
    first = clock()
    for _ in range(steps):
        token = int(session.append([token], last_only=True)[-1].argmax())
    return first - start, clock() - first


def _prefill(session: TimedSession, block: NDArray[np.int64], clock: Callable[[], float]) -> float:
    session.rewind(0)
    start = clock()
    session.append(block, last_only=True)
    return clock() - start


def _estimate(values: Sequence[float]) -> Estimate:
    error = float(np.std(values, ddof=1) / np.sqrt(len(values))) if len(values) > 1 else float("nan")
    return Estimate(float(np.mean(values)), error)
