"""Comparison of exported files with their checkpoint: accuracy, speed and memory of all of them on the same text.

1. The reference runs once, or its output is read from the cache; from here on its logits are read from disk.
2. Candidates with the same weights are scored together, which separates their runtimes' errors from the weights'.
3. Speed is measured in interleaved rounds, with all models open at once if memory can hold them.
4. Peak memory is measured last, when all models are closed, in a fresh process per model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from smolexport.calibration.statistics import Statistics
from smolexport.errors import UsageError
from smolexport.model import weights
from smolexport.parity import chat, machine
from smolexport.parity.contamination import Overlap, check_runs, check_texts, note_on
from smolexport.parity.inputs import Candidate, Progress, Settings, no_progress
from smolexport.parity.logit_cache import LogitCache
from smolexport.parity.method_table import side_by_side
from smolexport.parity.metrics import by_position
from smolexport.parity.reference import ReferenceRun, required_context, run_reference
from smolexport.parity.report.names import model_infos, reference_name
from smolexport.parity.results import (
    CandidateResult,
    Comparison,
    ModelInfo,
    Pair,
    ReferenceResult,
    Speed,
    TextInfo,
    WeightError,
)
from smolexport.parity.scoring import ContextTooSmall, ScoredCandidate, decoded_bytes, score_group
from smolexport.parity.speed import bandwidth_share, peaks, speeds
from smolexport.parity.thresholds import Thresholds
from smolexport.parity.weight_errors import tensor_errors
from smolexport.parity.windows import Window


@dataclass
class _Measured:
    """Results of the stages, in the order of the candidates; `speeds` and `peaks` begin with the reference."""

    run: ReferenceRun
    scored: Sequence[ScoredCandidate]
    pairs: tuple[Pair, ...]
    fingerprints: Sequence[str | None]
    errors: Sequence[tuple[WeightError, ...]]
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
    """Compare `candidates` with `reference` on `text`.

    The reference's tokenizer encodes the text; a candidate whose own tokenizer gives other tokens gets a note.

    Args:
        reference: the checkpoint with its runtime.
        candidates: exported files of it with their runtimes.
        text: the text to score; prompts are cut from it too.
        settings: what to measure.
        thresholds: what every candidate must meet; a `Gate` has rules per format and scheme.
        cache: folder for the reference's logits, see `logit_cache.usual_folder`; None keeps nothing.
        statistics: calibration statistics of the candidates, to detect scored tokens in the calibration text.
        progress: called at each step.

    Raises:
        UsageError: no candidate, a vocabulary that differs from the reference's, a text that is too short or that a
            candidate was calibrated on.
        CalibrationError: the text of `statistics` cannot be read.
        OutputError: the disk has no room for the reference's logits.
        SmolexportError: any error of a runtime while it opens or runs a file.
    """
    settings, thresholds = settings or Settings(), thresholds or Thresholds()
    settings = replace(settings, attribution=settings.attribution or thresholds.needs_attribution())
    progress = progress or no_progress
    if not candidates:
        raise UsageError("no file to compare with the checkpoint: name at least one")
    check_texts(candidates, text.encode("utf-8", "surrogatepass"))
    with LogitCache(cache) as logit_cache:
        measured = _accuracy(reference, candidates, text, settings, logit_cache, progress, statistics)
    models = [reference, *candidates]
    context = min(measured.run.context, required_context(settings))
    measured.speeds = [None] * len(models)
    if settings.repetitions:
        found, note = speeds(models, np.array(measured.run.ids, np.int64), context, settings, progress)
        measured.speeds = [speed for speed, _ in found]
        measured.notes += [note] if note else []
        measured.bandwidth = machine.bandwidth(settings.threads)
    measured.peaks = peaks(models, context, settings, progress)
    return _assemble(models, measured, settings, thresholds)


def _accuracy(
    reference: Candidate,
    candidates: Sequence[Candidate],
    text: str,
    settings: Settings,
    cache: LogitCache,
    progress: Progress,
    statistics: Statistics | None,
) -> _Measured:
    """Score accuracy for all candidates.  If a candidate's context is shorter than the window, score again with windows
    that fit."""
    limit = None
    overlap: list[Overlap] = []
    calibrated = statistics is not None and any(one.calibration for one in candidates)

    def check(windows: Sequence[Window]) -> None:
        if statistics is not None and calibrated:
            overlap[:] = [check_runs(statistics, windows)]

    groups, fingerprints = _groups(candidates, settings, progress)
    errors = _errors(reference, candidates, settings)
    while True:
        run = run_reference(reference, text, settings, cache, limit, progress, check)
        try:
            scored, pairs, notes = _score_groups(reference, run, candidates, groups, errors, settings, progress)
            break
        except ContextTooSmall as small:
            limit = small.context
    notes += cache.notes
    if statistics is not None and overlap:
        notes += note_on(statistics, candidates, overlap[0])
    return _Measured(run, scored, pairs, fingerprints, errors, notes)


def _groups(
    candidates: Sequence[Candidate], settings: Settings, progress: Progress
) -> tuple[Sequence[Sequence[int]], Sequence[str | None]]:
    """Indices of the candidates of each group with the same weights, and the fingerprint of each candidate."""
    known: dict[Path, str] = {}
    groups: dict[str | int, list[int]] = {}
    fingerprints = []
    for index, candidate in enumerate(candidates):
        progress("fingerprint", index, len(candidates))
        if candidate.weights is not None and candidate.path not in known:
            known[candidate.path] = weights.fingerprint(candidate.weights(), settings.threads or 1)
        fingerprints.append(known.get(candidate.path))
        groups.setdefault(fingerprints[-1] or index, []).append(index)
    progress("fingerprint", len(candidates), len(candidates))
    return list(groups.values()), fingerprints


def _score_groups(
    reference: Candidate,
    run: ReferenceRun,
    candidates: Sequence[Candidate],
    groups: Sequence[Sequence[int]],
    errors: Sequence[Sequence[WeightError]],
    settings: Settings,
    progress: Progress,
) -> tuple[list[ScoredCandidate], tuple[Pair, ...], list[str]]:
    """Scored candidates in their order, pairs, and notes."""
    found: dict[int, ScoredCandidate] = {}
    pairs = []
    attribute, notes = _can_attribute(reference, candidates, settings)
    conversations, note = chat.ask(reference.path) if settings.chat else (None, "")
    notes += [note] if note else []
    for number, indices in enumerate(groups):

        def shifted(stage: str, done: int, total: int, number: int = number) -> None:
            progress(stage, number * total + done, len(groups) * total)

        models = [candidates[index] for index in indices]
        scored = score_group(
            reference, run, models, settings, shifted,
            attribute=attribute and models[0].weights is not None,
            mismatched=_mismatched(errors[indices[0]]), conversations=conversations,
        )  # fmt: skip
        for index, one in zip(indices, scored, strict=True):
            found[index] = one
            pairs += [Pair(index, indices[other], accuracy) for other, accuracy in one.pairs.items()]
    return [found[index] for index in range(len(candidates))], tuple(pairs), notes


def _can_attribute(reference: Candidate, candidates: Sequence[Candidate], settings: Settings) -> tuple[bool, list[str]]:
    """Whether deviations can be split into two parts; if requested and impossible, a note with the reason."""
    if not settings.attribution or reference.origin is None:
        return False, []
    import psutil

    needed = decoded_bytes(reference) + 2 * max(candidate.bytes for candidate in candidates)
    free = psutil.virtual_memory().available
    if needed <= free:
        return True, []
    lacking = f"float32 weights need {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free"
    return False, [f"deviations are not split into quantization error and runtime error: {lacking}"]


def _errors(reference: Candidate, candidates: Sequence[Candidate], settings: Settings) -> list[tuple[WeightError, ...]]:
    """The tensor errors of each candidate, none if its or the reference's weights cannot be read; reads a file once."""
    known: dict[Path, tuple[WeightError, ...]] = {}
    for one in candidates:
        if settings.attribution and reference.weights and one.weights and one.path not in known:
            known[one.path] = tensor_errors(reference.weights(), one.weights(), one.path)
    return [known.get(one.path, ()) if one.weights else () for one in candidates]


def _mismatched(errors: Sequence[WeightError]) -> list[str]:
    """Names of the tensors whose error rounding cannot explain."""
    return [error.source for error in errors if not error.rounded]


def _mismatch_note(errors: Sequence[WeightError]) -> str:
    """A note on these tensors; empty if there is none."""
    names = _mismatched(errors)
    if not names:
        return ""
    more = f" and {len(names) - 3} others" if len(names) > 3 else ""
    what = (
        "a rounded copy of the checkpoint's tensor" if len(names) == 1 else "rounded copies of the checkpoint's tensors"
    )
    return f"{', '.join(names[:3])}{more}: not {what}; the error is attributed to the exporter"


def _assemble(
    models: Sequence[Candidate], measured: _Measured, settings: Settings, thresholds: Thresholds
) -> Comparison:
    run, (peak, peak_note) = measured.run, measured.peaks[0]
    window = run.windows[0]
    text = TextInfo(len(run.ids), len(window.tokens), len(run.windows), window.scored)
    infos = model_infos(models[1:])
    results = tuple(
        _result(measured, text, thresholds, *one) for one in zip(range(len(infos)), models[1:], infos, strict=True)
    )
    reference = ReferenceResult(
        model=models[0].info(reference_name(models[0].path)),
        perplexity=results[0].accuracy.reference_perplexity,
        speed=measured.speeds[0],
        load_seconds=run.load_seconds,
        peak_rss_bytes=peak,
        noise_floor=run.noise_floor,
        bandwidth_share=bandwidth_share(models[0], measured.speeds[0], measured.bandwidth),
    )
    return Comparison(
        text=text,
        thresholds=thresholds,
        reference=reference,
        candidates=results,
        notes=(*models[0].notes, *_notes(text, settings, run.context, peak_note), *measured.notes),
        pairs=measured.pairs,
        methods=side_by_side(results),
        environment=machine.machine_facts([model.runtime for model in models], settings.threads),
        bandwidth_bytes_per_s=measured.bandwidth,
    )


def _result(
    measured: _Measured, text: TextInfo, thresholds: Thresholds, index: int, model: Candidate, info: ModelInfo
) -> CandidateResult:
    scored, errors, speed = measured.scored[index], measured.errors[index], measured.speeds[index + 1]
    pairs = [pair.accuracy for pair in measured.pairs if index in (pair.first, pair.second)]
    limits = thresholds.thresholds_for(info)
    peak, peak_note = measured.peaks[index + 1]
    notes = *model.notes, _mismatch_note(errors), scored.tokenizer_note, chat.note(scored.chat), peak_note
    return CandidateResult(
        model=info,
        accuracy=scored.accuracy,
        greedy=scored.greedy,
        speed=speed,
        load_seconds=scored.load_seconds,
        peak_rss_bytes=peak,
        tokenizer_equal=not scored.tokenizer_note,
        notes=tuple(filter(None, notes)),
        missed=limits.misses(scored.accuracy, scored.attribution, pairs),
        thresholds=limits,
        fingerprint=measured.fingerprints[index],
        attribution=scored.attribution,
        tensor_errors=errors,
        calibration_errors=tuple(model.calibration_errors),
        bandwidth_share=bandwidth_share(model, speed, measured.bandwidth),
        by_position=by_position(scored.accuracy, text),
        chat=scored.chat,
    )


def _notes(text: TextInfo, settings: Settings, context: int, peak_note: str) -> tuple[str, ...]:
    """Notes on the conditions of the measurement."""
    notes = [f"reference: {peak_note}"] if peak_note else []
    if text.window < settings.window:
        cause = "the whole text" if text.window == text.tokens else f"the context of {context} tokens"
        notes.append(f"windows of {text.window} tokens instead of {settings.window}: that is {cause}")
    if text.scored_positions < 100:
        notes.append(f"only {text.scored_positions} positions were scored: the high percentiles are not meaningful")
    return tuple(notes)
