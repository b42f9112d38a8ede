"""Speed and peak memory of several models: what `compare` and `bench` share."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack

import numpy as np
from numpy.typing import NDArray

from smolexport.model.spec import Role
from smolexport.parity import memory, speed
from smolexport.parity.base import Tick
from smolexport.parity.inputs import Candidate, Settings
from smolexport.parity.results import Speed
from smolexport.parity.turns import lack_of_room, opened

__all__ = ["bandwidth_share", "peaks", "speeds"]


def speeds(
    models: Sequence[Candidate], ids: NDArray[np.int64], context: int, settings: Settings, tick: Tick
) -> tuple[list[Speed | None], str]:
    """Speed of every model on the tokens `ids`, and a note on how it was taken; None where it is not asked for."""
    if settings.repetitions < 1:
        return [None] * len(models), ""
    total = settings.repetitions * len(models)
    steps = iter(range(1, total + 1))
    tick("speed", 0, total)
    note = lack_of_room(models)
    with ExitStack() as stack:
        players = [player for player, _ in opened(stack, models, context, settings, alone=bool(note))]
        return [*speed.measure(players, ids, settings, advance=lambda: tick("speed", next(steps), total))], note


def peaks(models: Sequence[Candidate], context: int, settings: Settings, tick: Tick) -> list[tuple[int | None, str]]:
    """Peak bytes of each model in a process of its own, or None and why."""
    if not settings.memory:
        return [(None, "")] * len(models)
    found = []
    for done, model in enumerate(models):
        tick("memory", done, len(models))
        found.append(memory.measure(model, threads=settings.threads, context=context))
    tick("memory", len(models), len(models))
    return found


def bandwidth_share(model: Candidate, rate: Speed | None, bandwidth: float | None) -> float | None:
    """Decode rate over the rate at which all weights that a token needs can be read; None where either is unknown."""
    if rate is None or bandwidth is None or model.weights is None:
        return None
    found = model.weights()
    untied = any(tensor.role is Role.HEAD for tensor in found)
    read = sum(tensor.size for tensor in found if not (untied and tensor.role is Role.EMBED))
    return rate.decode_tok_s.value * model.bits_per_weight / 8 * read / bandwidth
