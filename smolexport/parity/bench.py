"""How fast files answer, without a reference: the speed part of a comparison alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np

from smolexport.errors import UsageError
from smolexport.parity import machine, speed
from smolexport.parity.base import Tick, reach
from smolexport.parity.inputs import Candidate, Settings
from smolexport.parity.rates import bandwidth_share, peaks
from smolexport.parity.results import Speed
from smolexport.parity.turns import lack_of_room, opened

__all__ = ["Bench", "BenchRow", "bench"]


@dataclass(frozen=True)
class BenchRow:
    """A model's figures; `bandwidth_share` as in `results.CandidateResult`."""

    model: Candidate
    speed: Speed
    load_seconds: float
    peak_rss_bytes: int | None
    bandwidth_share: float | None
    note: str


@dataclass(frozen=True)
class Bench:
    """All rows, what they were taken on, and a note on how; `bandwidth` in bytes per second."""

    rows: Sequence[BenchRow]
    bandwidth: float
    environment: Mapping[str, str]
    note: str = ""


def bench(models: Sequence[Candidate], settings: Settings, progress: Tick | None = None) -> Bench:
    """Measure `models` in turns, all open at once where memory holds them, on the same random tokens.

    Args:
        models: files, or checkpoints on the reference's runtime.
        settings: lengths, repetitions, threads.
        progress: told about each step.

    Raises:
        UsageError: no model, or no repetition.
        SmolexportError: whatever a runtime raises while it opens or plays a file.
    """
    if not models or settings.repetitions < 1:
        raise UsageError("nothing to measure: name at least one file, and at least one repetition")
    tick = progress or _silent
    context = max(settings.prompt_tokens + settings.decode_tokens, settings.prefill_tokens)
    total = settings.repetitions * len(models)
    steps = iter(range(1, total + 1))
    tick("speed", 0, total)
    note = lack_of_room(models)
    with ExitStack() as stack:
        sessions = opened(stack, models, context, settings, alone=bool(note))
        words = min(session.vocab_size for session, _ in sessions)
        ids = np.random.default_rng(0).integers(0, words, reach(settings))
        playing = [session for session, _ in sessions]
        found = speed.measure(playing, ids, settings, advance=lambda: tick("speed", next(steps), total))
    rate = machine.bandwidth(settings.threads)
    rows = [
        BenchRow(model, one, seconds, peak, bandwidth_share(model, one, rate), told)
        for model, one, (_, seconds), (peak, told) in zip(
            models, found, sessions, peaks(models, context, settings, tick), strict=True
        )
    ]
    runtimes = {model.runtime.NAME: model.runtime for model in models}
    return Bench(rows, rate, machine.environment(runtimes.values(), settings.threads), note)


def _silent(stage: str, done: int, total: int) -> None:
    """Progress that nobody asked for."""
