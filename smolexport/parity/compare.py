"""Comparison of exported files with their checkpoint: accuracy, speed and memory of all of them on the same text.

1. The reference runs once, or its output is read from the cache; from here on its logits are read from disk.
2. Candidates with the same weights are scored together, which separates their runtimes' errors from the weights'.
3. Speed is measured in interleaved rounds, with all models open at once if memory can hold them.
4. Peak memory is measured last, when all models are closed, in a fresh process per model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from smolexport.calibration.statistics import Statistics
from smolexport.errors import UsageError
from smolexport.model import weights
from smolexport.parity import chat, results
from smolexport.parity.candidates import model_infos, reference_name
from smolexport.parity.contamination import check_runs, check_texts, notes_on
from smolexport.parity.inputs import Candidate, Progress, Settings, no_progress
from smolexport.parity.logit_cache import LogitCache
from smolexport.parity.metrics import by_position
from smolexport.parity.peak_memory import peaks
from smolexport.parity.reference import ReferenceRun, run_reference
from smolexport.parity.results import PLAIN, CandidateResult, Comparison, MethodRow, WeightError
from smolexport.parity.scoring import ContextTooSmall, ScoredCandidate, score_group, tensor_errors
from smolexport.parity.speed import bandwidth_share, machine_facts, memory_bandwidth, speeds
from smolexport.parity.thresholds import Thresholds
from smolexport.parity.windows import Window


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
        thresholds: what every candidate must meet.
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
    if not candidates:
        raise UsageError("no file to compare with the checkpoint: name at least one")
    check_texts(candidates, text.encode("utf-8", "surrogatepass"))
    job = _Job(reference, candidates, settings, thresholds, progress or no_progress)
    with LogitCache(cache) as logit_cache:
        run, scored = job.score(text, logit_cache, statistics)
    return job.finish(run, scored)


@dataclass
class _Job:
    """A comparison in progress: its inputs, and what is known so far of the candidates' weights and of the whole."""

    reference: Candidate
    candidates: Sequence[Candidate]
    settings: Settings
    thresholds: Thresholds
    progress: Progress
    notes: list[str] = field(default_factory=list)
    fingerprints: list[str | None] = field(default_factory=list)
    errors: list[tuple[WeightError, ...]] = field(default_factory=list)
    pairs: list[results.Pair] = field(default_factory=list)

    def score(
        self, text: str, cache: LogitCache, statistics: Statistics | None
    ) -> tuple[ReferenceRun, list[ScoredCandidate]]:
        """Score accuracy for all candidates.  If a candidate's context is shorter than the window, score again with
        windows that fit."""
        limit = None
        overlaps: list[tuple[int, int]] = []

        def check(windows: Sequence[Window]) -> None:
            if statistics is not None and any(one.calibration for one in self.candidates):
                overlaps.append(check_runs(statistics, windows))

        self._read_weights()
        while True:
            run = run_reference(self.reference, text, self.settings, cache, limit, self.progress, check)
            try:
                scored = self._score_groups(run)
                break
            except ContextTooSmall as small:
                (limit,) = small.args
        self.notes += cache.notes
        if statistics is not None and overlaps:
            self.notes += notes_on(statistics, self.candidates, *overlaps[-1])
        return run, scored

    def _read_weights(self) -> None:
        """Fingerprint and tensor errors of each candidate as far as weights can be read; reads a file once."""
        reference, total = self.reference, len(self.candidates)
        prints: dict[Path, str] = {}
        errors: dict[Path, tuple[WeightError, ...]] = {}
        for done, one in enumerate(self.candidates):
            self.progress("fingerprint", done, total)
            if one.weights and one.path not in prints:
                prints[one.path] = weights.fingerprint(one.weights(), self.settings.threads or 1)
                if self.settings.attribution and reference.weights:
                    errors[one.path] = tensor_errors(reference.weights(), one.weights(), one.path)
        self.progress("fingerprint", total, total)
        self.fingerprints = [prints.get(one.path) if one.weights else None for one in self.candidates]
        self.errors = [errors.get(one.path, ()) if one.weights else () for one in self.candidates]

    def _score_groups(self, run: ReferenceRun) -> list[ScoredCandidate]:
        """Scored candidates in their order; also sets the pairs of those with the same weights, and the first notes."""
        groups: dict[str | int, list[int]] = {}
        for index, fingerprint in enumerate(self.fingerprints):
            groups.setdefault(fingerprint or index, []).append(index)
        found: dict[int, ScoredCandidate] = {}
        self.pairs = []
        lacking = _lacking_memory(self.reference, self.candidates) if self.settings.attribution else ""
        conversations, note = chat.ask(self.reference.path) if self.settings.chat else (None, "")
        self.notes = [line for line in (lacking, note) if line]
        for number, indices in enumerate(groups.values()):
            models = [self.candidates[index] for index in indices]
            attribute = bool(self.settings.attribution and not lacking and self.reference.origin and models[0].weights)
            scored = score_group(
                self.reference, run, models, self.settings, partial(self._shifted, number, len(groups)),
                attribute=attribute, mismatched=_mismatched(self.errors[indices[0]]), conversations=conversations,
            )  # fmt: skip
            for index, one in zip(indices, scored, strict=True):
                found[index] = one
                self.pairs += [results.Pair(index, indices[other], accuracy) for other, accuracy in one.pairs.items()]
        return [found[index] for index in range(len(found))]

    def _shifted(self, number: int, groups: int, stage: str, done: int, total: int) -> None:
        self.progress(stage, number * total + done, groups * total)

    def finish(self, run: ReferenceRun, scored: Sequence[ScoredCandidate]) -> Comparison:
        """Measure speed and memory, check the thresholds, and put everything together."""
        models, settings = [self.reference, *self.candidates], self.settings
        context, bandwidth = min(run.context, settings.context), None
        rates: list[Any] = [None] * len(models)
        if settings.repetitions:
            timed, note = speeds(models, np.array(run.ids, np.int64), context, settings, self.progress)
            rates = [speed for speed, _ in timed]
            self.notes += [note] if note else []
            bandwidth = memory_bandwidth(settings.threads)
        measured: list[dict[str, Any]] = []
        memory = peaks(models, context, settings, self.progress)
        for model, rate, (peak, _) in zip(models, rates, memory, strict=True):
            share = bandwidth_share(model, rate, bandwidth)
            measured.append({"speed": rate, "bandwidth_share": share, "peak_rss_bytes": peak})
        window = run.windows[0]
        text = results.TextInfo(len(run.ids), len(window.tokens), len(run.windows), window.scored)
        found = []
        for index, (one, info) in enumerate(zip(scored, model_infos(self.candidates), strict=True)):
            more = {**measured[index + 1], "by_position": by_position(one.accuracy, text)}
            found.append(self._result(index, info, one, memory[index + 1][1], more))
        return Comparison(
            text=text,
            thresholds=self.thresholds,
            reference=results.ReferenceResult(
                model=self.reference.info(reference_name(self.reference.path)),
                perplexity=found[0].accuracy.reference_perplexity,
                load_seconds=run.load_seconds,
                noise_floor=run.noise_floor,
                **measured[0],
            ),
            candidates=tuple(found),
            notes=(*self.reference.notes, *_conditions(text, settings, run.context, memory[0][1]), *self.notes),
            pairs=tuple(self.pairs),
            methods=side_by_side(found),
            environment=machine_facts([model.runtime for model in models], settings.threads),
            bandwidth_bytes_per_s=bandwidth,
        )

    def _result(
        self, index: int, info: results.ModelInfo, scored: ScoredCandidate, peak_note: str, measured: dict[str, Any]
    ) -> CandidateResult:
        pairs = [pair.accuracy for pair in self.pairs if index in (pair.first, pair.second)]
        model, errors, limits = self.candidates[index], self.errors[index], self.thresholds.thresholds_for(info)
        notes = *model.notes, _mismatch_note(errors), scored.tokenizer_note, chat.note(scored.chat), peak_note
        return CandidateResult(
            model=info,
            accuracy=scored.accuracy,
            greedy=scored.greedy,
            load_seconds=scored.load_seconds,
            tokenizer_equal=not scored.tokenizer_note,
            notes=tuple(filter(None, notes)),
            missed=limits.misses(scored.accuracy, scored.attribution, pairs),
            thresholds=limits,
            fingerprint=self.fingerprints[index],
            attribution=scored.attribution,
            tensor_errors=errors,
            calibration_errors=tuple(model.calibration_errors),
            chat=scored.chat,
            **measured,
        )


def _lacking_memory(reference: Candidate, candidates: Sequence[Candidate]) -> str:
    """A note if decoded weights do not fit into memory as float32; empty if they do."""
    import psutil

    if reference.origin is None:
        return ""
    decoded = sum(4 * tensor.size for tensor in reference.origin.spec.tensors())
    needed = decoded + 2 * max(candidate.bytes for candidate in candidates)
    free = psutil.virtual_memory().available
    if needed <= free:
        return ""
    lacking = f"float32 weights need {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free"
    return f"deviations are not split into quantization error and runtime error: {lacking}"


def _mismatched(errors: Sequence[WeightError]) -> list[str]:
    """Names of the tensors whose error rounding cannot explain."""
    return [error.source for error in errors if not error.rounded]


def _mismatch_note(errors: Sequence[WeightError]) -> str:
    names = _mismatched(errors)
    if not names:
        return ""
    more = f" and {len(names) - 3} others" if len(names) > 3 else ""
    what = "a rounded copy of the checkpoint's tensor"
    if len(names) > 1:
        what = "rounded copies of the checkpoint's tensors"
    return f"{', '.join(names[:3])}{more}: not {what}; the error is attributed to the exporter"


def _conditions(text: results.TextInfo, settings: Settings, context: int, peak_note: str) -> list[str]:
    """Notes on the conditions of the measurement."""
    notes = [f"reference: {peak_note}"] if peak_note else []
    if text.window < settings.window:
        cause = "the whole text" if text.window == text.tokens else f"the context of {context} tokens"
        notes.append(f"windows of {text.window} tokens instead of {settings.window}: that is {cause}")
    if text.scored_positions < 100:
        notes.append(f"only {text.scored_positions} positions were scored: the high percentiles are not meaningful")
    return notes


def side_by_side(candidates: Sequence[CandidateResult]) -> tuple[MethodRow, ...]:
    """Files that differ only in their calibration method: one row per group with at least two methods.

    A second file of the same method starts another row.
    """
    groups: dict[tuple[str, str, str, float], list[dict[str, int]]] = {}
    for place, result in enumerate(candidates):
        model = result.model
        # apart from metadata, the method does not change a file's size
        key = model.format, model.scheme, model.runtime, round(model.bits_per_weight, 2)
        method, rows = model.method or PLAIN, groups.setdefault(key, [])
        free = next((row for row in rows if method not in row), None)
        if free is None:
            rows.append({method: place})
        else:
            free[method] = place
    found = []
    for key, row in ((key, row) for key, rows in groups.items() for row in rows if len(row) > 1):
        klds = {method: candidates[place].accuracy.kld.mean for method, place in row.items()}
        plain = klds[PLAIN].value if PLAIN in klds else 0.0
        files = (
            results.MethodFile(m, row[m], kld, kld.value / plain if plain > 0 else None) for m, kld in klds.items()
        )
        found.append(MethodRow(*key, tuple(files)))
    return tuple(found)
