"""Speed of files without a reference: the speed part of a comparison alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from smolexport.errors import UsageError
from smolexport.parity import machine
from smolexport.parity.inputs import Candidate, Progress, Settings, no_progress
from smolexport.parity.report.names import model_infos
from smolexport.parity.results import ModelResult, NonNegative, Speed
from smolexport.parity.speed import bandwidth_share, peaks, speeds


@dataclass(frozen=True)
class BenchRow(ModelResult):
    """Figures of one model."""

    speed: Speed
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Bench:
    """Speed of several models; members as in `results.Comparison`."""

    models: Sequence[BenchRow]
    bandwidth_bytes_per_s: NonNegative
    environment: Mapping[str, str]
    notes: tuple[str, ...]


def bench(models: Sequence[Candidate], settings: Settings, progress: Progress = no_progress) -> Bench:
    """Measure `models` in interleaved rounds on the same random tokens, all open at once if memory can hold them.

    Args:
        models: files, or checkpoints on the reference's runtime.
        settings: lengths, repetitions, threads.
        progress: called at each step.

    Raises:
        UsageError: no model, or no repetition.
        SmolexportError: any error of a runtime while it opens or runs a file.
    """
    if not models or settings.repetitions < 1:
        raise UsageError("nothing to measure: name at least one file, and at least one repetition")
    context = max(settings.prompt_tokens + settings.decode_tokens, settings.prefill_tokens)
    found, note = speeds(models, None, context, settings, progress)
    rate = machine.bandwidth(settings.threads)
    rows = [
        BenchRow(info, speed, bandwidth_share(model, speed, rate), seconds, peak, (unknown,) if unknown else ())
        for model, info, (speed, seconds), (peak, unknown) in zip(
            models, model_infos(models), found, peaks(models, context, settings, progress), strict=True
        )
    ]
    environment = machine.machine_facts([model.runtime for model in models], settings.threads)
    return Bench(rows, rate, environment, (note,) if note else ())
