"""Plays a checkpoint and its exported files on the same text and lays the figures side by side.

1. The reference is played once, or what it gave is found in the cache; from here on its logits are read from disk.
2. Files are scored in groups that hold the same weights, so that their runtimes can be told apart from their weights.
3. Speed is measured in turns, with all models open at once where memory holds them.
4. Peak memory is taken last, when the models are closed again, in a fresh process for each file.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from smolexport.calibration.statistics import Statistics
from smolexport.errors import UsageError
from smolexport.model import weights
from smolexport.parity import chat, machine
from smolexport.parity.base import Base, play, reach
from smolexport.parity.group import Member, TooSmall, decoded_bytes, play_group
from smolexport.parity.inputs import Candidate, Settings
from smolexport.parity.overlap import Overlap, check_runs, check_texts, note_on
from smolexport.parity.rates import bandwidth_share, peaks, speeds
from smolexport.parity.results import (
    CandidateResult,
    Comparison,
    Pair,
    ReferenceResult,
    Speed,
    TensorError,
    TextFacts,
    Thresholds,
)
from smolexport.parity.store import Shelf
from smolexport.parity.tensors import tensor_errors
from smolexport.parity.windows import Window

__all__ = ["Progress", "compare"]

Progress = Callable[[str, int, int], None]
"""Called with the stage's name, the steps done and the steps in all."""


@dataclass
class _Sheet:
    """What the stages gave, in the order of the candidates; `speeds` and `peaks` begin with the reference."""

    base: Base
    members: Sequence[Member]
    pairs: tuple[Pair, ...]
    fingerprints: Sequence[str]
    errors: Sequence[tuple[TensorError, ...]]
    notes: list[str]
    speeds: Sequence[Speed | None] = ()
    peaks: Sequence[tuple[int | None, str]] = ()
    bandwidth: float | None = None


def compare(
    reference: Candidate,
    candidates: Sequence[Candidate],
    *,
    text: str,
    settings: Settings | None = None,
    thresholds: Thresholds | None = None,
    cache: Path | None = None,
    statistics: Statistics | None = None,
    progress: Progress | None = None,
) -> Comparison:
    """Hold `candidates` against `reference` on `text`.

    The ids are the reference's tokenizer's; a candidate whose own tokenizer disagrees gets a note and is scored
    on the reference's ids all the same.

    Args:
        reference: the checkpoint with the runtime that plays it.
        candidates: exported files of it with their runtimes.
        text: what is scored; prompts are cut from it too.
        settings: how much is measured.
        thresholds: what every candidate must reach; a `Gate` asks each for its own.
        cache: folder where the reference's logits are kept, see `store.usual_folder`; None keeps nothing.
        statistics: what candidates were calibrated with; the scored tokens are looked for in their text.
        progress: told about each step.

    Raises:
        UsageError: no candidate, another vocabulary than the reference's, too short a text, or one that a candidate
            was calibrated on.
        CalibrationError: the text of `statistics` cannot be read.
        OutputError: the disk has no room for the reference's logits.
        SmolexportError: whatever a runtime raises while it opens or plays a file.
    """
    settings, thresholds = settings or Settings(), thresholds or Thresholds()
    settings = replace(settings, attribution=settings.attribution or thresholds.needs_attribution)
    tick = progress or _silent
    if not candidates:
        raise UsageError("no file to compare with the checkpoint: name at least one")
    check_texts(candidates, text.encode("utf-8", "surrogatepass"))
    with Shelf(cache) as shelf:
        sheet = _accuracy(reference, candidates, text, settings, shelf, tick, statistics)
    models = [reference, *candidates]
    context = min(sheet.base.context, reach(settings))
    sheet.speeds, told = speeds(models, np.array(sheet.base.ids, np.int64), context, settings, tick)
    sheet.notes += [told] if told else []
    sheet.bandwidth = machine.bandwidth(settings.threads) if settings.repetitions else None
    sheet.peaks = peaks(models, context, settings, tick)  # each is a model's alone: all are closed by now
    return _assemble(models, sheet, settings, thresholds)


def _silent(stage: str, done: int, total: int) -> None:
    """Progress that nobody asked for."""


def _accuracy(
    reference: Candidate,
    candidates: Sequence[Candidate],
    text: str,
    settings: Settings,
    shelf: Shelf,
    tick: Progress,
    statistics: Statistics | None,
) -> _Sheet:
    """Everything that is not time or memory; once more with shorter windows where a candidate holds too few tokens."""
    limit = None
    seen: list[Overlap] = []
    calibrated = statistics is not None and any(one.calibration for one in candidates)

    def look(windows: Sequence[Window]) -> None:
        if statistics is not None and calibrated:
            seen[:] = [check_runs(statistics, windows)]

    groups, fingerprints = _groups(candidates, settings, tick)
    errors = _errors(reference, candidates, settings)
    while True:
        base = play(reference, text, settings, shelf, limit, tick, look)
        try:
            members, pairs, notes = _play_groups(reference, base, candidates, groups, errors, settings, tick)
            break
        except TooSmall as small:
            limit = small.context
    notes += shelf.notes
    if statistics is not None and seen:
        notes += note_on(statistics, candidates, seen[0])
    return _Sheet(base, members, pairs, fingerprints, errors, notes)


def _groups(
    candidates: Sequence[Candidate], settings: Settings, tick: Progress
) -> tuple[Sequence[Sequence[int]], Sequence[str]]:
    """Places of the candidates that hold the same weights, and the fingerprint of each, empty where it is not known."""
    known: dict[Path, str] = {}
    groups: dict[str, list[int]] = {}
    marks = []
    for place, candidate in enumerate(candidates):
        tick("fingerprint", place, len(candidates))
        if candidate.weights is not None and candidate.path not in known:
            known[candidate.path] = weights.fingerprint(candidate.weights(), settings.threads or 1)
        marks.append(known.get(candidate.path, ""))
        groups.setdefault(marks[-1] or f"number {place}", []).append(place)
    tick("fingerprint", len(candidates), len(candidates))
    return list(groups.values()), marks


def _play_groups(
    reference: Candidate,
    base: Base,
    candidates: Sequence[Candidate],
    groups: Sequence[Sequence[int]],
    errors: Sequence[Sequence[TensorError]],
    settings: Settings,
    tick: Progress,
) -> tuple[list[Member], tuple[Pair, ...], list[str]]:
    """Members in the order of the candidates, pairs, and notes."""
    found: dict[int, Member] = {}
    pairs = []
    attribute, notes = _can_attribute(reference, candidates, settings)
    conversations, told = chat.ask(reference.path) if settings.chat else (None, "")
    notes += [told] if told else []
    for number, places in enumerate(groups):

        def shifted(stage: str, done: int, total: int, number: int = number) -> None:
            tick(stage, number * total + done, len(groups) * total)

        models = [candidates[place] for place in places]
        known = attribute and models[0].weights is not None
        members = play_group(
            reference, base, models, settings, shifted,
            attribute=known, foreign=_foreign(errors[places[0]]), conversations=conversations,
        )  # fmt: skip
        for place, member in zip(places, members, strict=True):
            found[place] = member
            pairs += [Pair(place, places[other], accuracy) for other, accuracy in member.pairs.items()]
    return [found[place] for place in range(len(candidates))], tuple(pairs), notes


def _can_attribute(reference: Candidate, candidates: Sequence[Candidate], settings: Settings) -> tuple[bool, list[str]]:
    """Whether deviations can be parted, and why not where that was asked for."""
    if not settings.attribution or reference.origin is None:
        return False, []
    import psutil

    needed = decoded_bytes(reference) + 2 * max(candidate.bytes for candidate in candidates)
    free = psutil.virtual_memory().available
    if needed <= free:
        return True, []
    lacking = f"{needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free"
    return False, [f"deviations are not parted into the weights' and the runtime's: float32 weights need {lacking}"]


def _errors(reference: Candidate, candidates: Sequence[Candidate], settings: Settings) -> list[tuple[TensorError, ...]]:
    """The error of each tensor of each candidate, none where a side cannot be read; a file is read once."""
    known: dict[Path, tuple[TensorError, ...]] = {}
    for one in candidates:
        if settings.attribution and reference.weights and one.weights and one.path not in known:
            known[one.path] = tensor_errors(reference.weights(), one.weights(), one.path)
    return [known.get(one.path, ()) if one.weights else () for one in candidates]


def _foreign(errors: Sequence[TensorError]) -> list[str]:
    """Names of the tensors that no rounding makes of the checkpoint's."""
    return [error.source for error in errors if not error.rounded]


def _foreign_note(errors: Sequence[TensorError]) -> str:
    """A line on them; empty where there is none."""
    names = _foreign(errors)
    if not names:
        return ""
    more = f" and {len(names) - 3} others" if len(names) > 3 else ""
    return (
        f"{', '.join(names[:3])}{more}: no rounding of the checkpoint's, which the file should hold; "
        "counted as the exporter's"
    )


def _assemble(models: Sequence[Candidate], sheet: _Sheet, settings: Settings, thresholds: Thresholds) -> Comparison:
    base, results = sheet.base, []
    for place, (model, member) in enumerate(zip(models[1:], sheet.members, strict=True)):
        others = [pair.accuracy for pair in sheet.pairs if place in (pair.first, pair.second)]
        peak, peak_note = sheet.peaks[place + 1]
        rate = sheet.speeds[place + 1]
        told = (
            *model.notes,
            _foreign_note(sheet.errors[place]),
            member.tokenizer_note,
            chat.note(member.chat),
            peak_note,
        )
        results.append(
            CandidateResult(
                model=model,
                accuracy=member.accuracy,
                greedy=member.greedy,
                speed=rate,
                load_seconds=member.load_seconds,
                peak_rss_bytes=peak,
                tokenizer_equal=not member.tokenizer_note,
                notes=tuple(filter(None, told)),
                misses=thresholds.thresholds_for(model).misses(member.accuracy, member.attribution, others),
                chat=member.chat,
                fingerprint=sheet.fingerprints[place],
                attribution=member.attribution,
                tensor_errors=sheet.errors[place],
                bandwidth_share=bandwidth_share(model, rate, sheet.bandwidth),
            )
        )
    reference = ReferenceResult(
        model=models[0],
        perplexity=results[0].accuracy.reference,
        speed=sheet.speeds[0],
        load_seconds=base.load_seconds,
        peak_rss_bytes=sheet.peaks[0][0],
        floor=base.floor,
        bandwidth_share=bandwidth_share(models[0], sheet.speeds[0], sheet.bandwidth),
    )
    window = base.windows[0]
    facts = TextFacts(len(base.ids), len(window.tokens), len(base.windows), window.scored)
    notes = (*models[0].notes, *_notes(facts, settings, base.context, sheet.peaks[0][1]), *sheet.notes)
    runtimes = {model.runtime.NAME: model.runtime for model in models}
    facts_of_machine = machine.environment(runtimes.values(), settings.threads)
    return Comparison(
        facts, thresholds, reference, tuple(results), notes, sheet.pairs, facts_of_machine, sheet.bandwidth
    )


def _notes(facts: TextFacts, settings: Settings, context: int, peak_note: str) -> tuple[str, ...]:
    """What a reader of the figures should know about how they were taken."""
    notes = [f"reference: {peak_note}"] if peak_note else []
    if facts.window < settings.window:
        cause = "the whole text" if facts.window == facts.tokens else f"the context of {context} tokens"
        notes.append(f"windows of {facts.window} tokens instead of {settings.window}: that is {cause}")
    if facts.windows * facts.scored < 100:
        notes.append(f"only {facts.windows * facts.scored} positions were scored: the far percentiles mean little")
    return tuple(notes)
