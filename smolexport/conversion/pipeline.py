"""The driver: what `smolexport.conversion.prepare` made ready is read, encoded and written in one pass."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from smolexport.conversion.encode import Encoded, encoded_chunks, thread_count
from smolexport.conversion.plan import Plan
from smolexport.conversion.prepare import Job, check_output, output_size, prepare, prepare_all
from smolexport.conversion.writer import Sink
from smolexport.errors import UsageError
from smolexport.files import atomic_file, check_parent, check_space, made_folder
from smolexport.heap import give_back_heap
from smolexport.model.checkpoint import Checkpoint
from smolexport.model.source_files import refuse_changes
from smolexport.recipe import Recipe, sidecar_of

WAITING = 2  # chunks an output may lag behind before encoding waits for it


@dataclass(frozen=True)
class Export:
    """What an export did.

    Attributes:
        path: the file or folder.
        files: all files written.
        plan: what is in it.
        bytes: size on disk.
        seconds: wall time of the writing.
    """

    path: Path
    files: tuple[Path, ...]
    plan: Plan
    bytes: int
    seconds: float


def export(
    target: str,
    source: str | Path,
    out: str | Path | None = None,
    *,
    quant: str | None = None,
    name: str | None = None,
    options: Mapping[str, Any] | None = None,
    strict: bool = False,
    force: bool = False,
    threads: int | None = None,
    ignore_config: Collection[str] = (),
    revision: str | None = None,
    token: str | None = None,
    calibration: Recipe | None = None,
    progress: Callable[[int], None] | None = None,
) -> Export:
    """Export `source` as `target`; see `prepare` for the arguments.

    Args:
        force: replace an existing output.
        threads: encoding threads; None = the processors that may be used.
        progress: called with the bytes of each chunk written.

    Raises:
        SmolexportError: with one line that says what is wrong; nothing is left under the final name.
    """
    job = prepare(
        target, source, out, quant=quant, name=name, options=options, strict=strict, ignore_config=ignore_config,
        revision=revision, token=token, force=force, calibration=calibration,
    )  # fmt: skip
    return write(job, force=force, threads=threads, progress=progress)


def export_all(
    source: str | Path,
    out: str | Path | None = None,
    *,
    targets: Collection[str] | None = None,
    quant: str | None = None,
    name: str | None = None,
    strict: bool = False,
    force: bool = False,
    threads: int | None = None,
    ignore_config: Collection[str] = (),
    revision: str | None = None,
    token: str | None = None,
    calibration: Recipe | None = None,
    progress: Callable[[int], None] | None = None,
) -> list[Export]:
    """Export `source` to several formats in one pass over its weights; see `prepare_all` for the arguments.

    The folder `out` is made when it is missing.

    Raises:
        SmolexportError: with one line that says what is wrong.
    """
    folder = Path(out) if out else Path()
    check_parent(folder)
    jobs = prepare_all(
        source, folder, targets=targets, quant=quant, name=name, strict=strict, ignore_config=ignore_config,
        revision=revision, token=token, force=force if folder.is_dir() else None,
        calibration=calibration,
    )  # fmt: skip
    with made_folder(folder):
        return write_all(jobs, force=force, threads=threads, progress=progress)


def write(
    job: Job, *, force: bool = False, threads: int | None = None, progress: Callable[[int], None] | None = None
) -> Export:
    """Write a prepared job.  Raises OutputError, TensorError, CheckpointError; UsageError for one without weights."""
    [done] = write_all([job], force=force, threads=threads, progress=progress)
    return done


def write_all(
    jobs: Sequence[Job],
    *,
    force: bool = False,
    threads: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> list[Export]:
    """Write jobs of one checkpoint in one pass: each tensor is read once, and quantized once where a lattice is shared.

    Args:
        jobs: what `prepare_all` made.
        force: replace existing outputs.
        threads: encoding threads; None = the processors that may be used.
        progress: called with the bytes of each chunk written.

    Raises:
        OutputError, TensorError, CheckpointError: nothing appears, unless the very last step, the renaming of the
            finished outputs, fails for one after another has its name.  CheckpointError also for a checkpoint that
            changed since it was opened.
        CalibrationError: a statistic is missing or damaged.
        UsageError: jobs without weights, or of different checkpoints.
    """
    if not jobs:
        return []
    checkpoint = _common_checkpoint(jobs)
    started = time.perf_counter()
    for job in jobs:
        check_output(job.converter, job.path, job.plan, checkpoint.folder, force)
        check_space(job.path.parent, sum(output_size(j.plan) for j in jobs if j.path.parent == job.path.parent))
    jobs, quantizer = trained(jobs, threads=threads), jobs[0].quantizer
    source = (quantizer and quantizer.source) or checkpoint
    give_back_heap()  # what reading the tokenizer left there, before the kernels need theirs
    with ExitStack() as stack:
        sinks = [stack.enter_context(job.converter.output(job.plan, job.path, force=force)) for job in jobs]
        _put(sinks, encoded_chunks(source, [job.plan.entries for job in jobs], threads), progress)
        for sink in sinks:  # all of them, before the first one gets its name
            sink.flush()
        refuse_changes(checkpoint.folder, checkpoint.stamps)
        for job, sink in zip(jobs, sinks, strict=True):
            if quantizer:
                path = sidecar_of(job.path)
                stack.enter_context(atomic_file(path, force=True)).write(quantizer.report(job.plan))
                sink.paths.append(path)
    seconds = time.perf_counter() - started
    sizes = [sum(path.stat().st_size for path in sink.paths) for sink in sinks]
    return [
        Export(job.path, tuple(sink.paths), job.plan, size, seconds)
        for job, sink, size in zip(jobs, sinks, sizes, strict=True)
    ]


def trained(
    jobs: Sequence[Job], *, threads: int | None = None, progress: Callable[[int], None] = lambda _: None
) -> list[Job]:
    """Train the scales of jobs whose method is one that trains, e.g. `distil`; other jobs come back unchanged.

    `write_all` does it too, unless it has been done.

    Args:
        jobs: what `prepare_all` made.
        threads: encoding threads; None = the processors that may be used.
        progress: called with 1 for each step of a training.

    Raises:
        MissingDependencyError: the trainer's libraries are not installed.
        CalibrationError: a statistic is missing or damaged.
        UsageError: jobs without weights, or of different checkpoints.
    """
    _common_checkpoint(jobs)
    quantizer = jobs[0].quantizer
    if quantizer is None or not quantizer.steps or quantizer.outcomes:
        return list(jobs)
    outputs = quantizer.refine([job.plan.entries for job in jobs], thread_count(threads), progress)
    return [
        replace(job, plan=replace(job.plan, entries=tuple(entries))) for job, entries in zip(jobs, outputs, strict=True)
    ]


def _common_checkpoint(jobs: Sequence[Job]) -> Checkpoint:
    """That of all `jobs`; raises UsageError for jobs that cannot be written together."""
    checkpoint = jobs[0].checkpoint
    if checkpoint is None:
        raise UsageError(f"{jobs[0].path}: was prepared with weights=False, only to look at the plan; prepare it again")
    if any(job.checkpoint is not checkpoint for job in jobs):
        raise UsageError(f"{jobs[0].path}: jobs that are written together must come from one prepare_all")
    return checkpoint


def _put(sinks: Sequence[Sink], pieces: Iterable[Encoded], progress: Callable[[int], None] | None) -> None:
    """Write `pieces`, each output on a thread of its own, since to write takes the system longer than to encode."""
    waiting: deque[Future[None]] = deque()
    with ExitStack() as stack:
        writers = [stack.enter_context(ThreadPoolExecutor(1, thread_name_prefix="write")) for _ in sinks]
        for piece in pieces:
            put = sinks[piece.output].put
            waiting.append(writers[piece.output].submit(put, piece.entry.name, piece.start, piece.rows))
            if len(waiting) > WAITING * len(sinks):
                waiting.popleft().result()
            if progress:
                progress(piece.rows.nbytes)
        for written in waiting:
            written.result()
