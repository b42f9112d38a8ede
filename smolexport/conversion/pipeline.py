"""The driver: reads, encodes and writes prepared jobs in one pass over their checkpoint."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Unpack

from smolexport.conversion.encode import Encoded, encoded_chunks
from smolexport.conversion.plan import Plan
from smolexport.conversion.prepare import ExportKeywords, Job, check_targets, prepare, prepare_all
from smolexport.conversion.writer import Sink, open_output
from smolexport.errors import UsageError
from smolexport.files import atomic_file, made_folder
from smolexport.heap import give_back_heap
from smolexport.model.checkpoint import Checkpoint
from smolexport.model.source_files import refuse_changes
from smolexport.processes import thread_count
from smolexport.recipe import sidecar_of

WAITING = 2  # chunks that an output may lag behind before encoding waits for it


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
    threads: int | None = None,
    progress: Callable[[int], None] | None = None,
    **keywords: Unpack[ExportKeywords],
) -> Export:
    """Export a checkpoint as one format: `export("gguf", "owner/name", quant="q4_k_m")`.

    Args:
        target: format name, e.g. `gguf`.
        source: checkpoint folder, hub id, or `demo`.
        out: target path; a folder gets the default name inside it; None = default name in the current folder.
        threads: encoding threads; None = the available processors.
        progress: called with the bytes of each chunk written.
        **keywords: `quant` (scheme name), `name` (what the file calls the model), `options` (of the format, by name),
            `strict` (no fallback formats), `force` (replace an existing output), `ignore_config` (inert keys of
            config.json), `revision`, `token` (of the hub), `calibration`; see `ExportRequest`.

    Raises:
        SmolexportError: one line that says what is wrong; nothing is left under the final name.
    """
    force = keywords["force"] = bool(keywords.get("force"))
    return write(prepare(target, source, out, **keywords), force=force, threads=threads, progress=progress)


def export_all(
    source: str | Path,
    out: str | Path | None = None,
    *,
    targets: Collection[str] | None = None,
    threads: int | None = None,
    progress: Callable[[int], None] | None = None,
    **keywords: Unpack[ExportKeywords],
) -> list[Export]:
    """Export a checkpoint to several formats in one pass over its weights.

    Args:
        source: as for `export`, like all that is not named here.
        out: the folder that gets all outputs under their default names; created if missing.
        targets: format names; None = every installed converter.
        threads: encoding threads.
        progress: called with the bytes of each chunk written.
        **keywords: as for `export`; `quant` is a scheme that all formats have, default int4.

    Raises:
        SmolexportError: one line that says what is wrong.
    """
    folder = Path(out) if out else Path()
    force = keywords["force"] = bool(keywords.get("force"))
    jobs = prepare_all(source, folder, targets=targets, **keywords)
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
    """Write jobs of one checkpoint in one pass: each tensor is read once, and quantized once for a canonical format.

    Args:
        jobs: from one `prepare_all`.
        force: replace existing outputs; targets that `prepare` did not check with it are checked here.
        threads: encoding threads; None = the available processors.
        progress: called with the bytes of each chunk written.

    Raises:
        OutputError, TensorError, CheckpointError: nothing appears, unless renaming one of the finished outputs fails
            after another has been renamed.  CheckpointError also if the checkpoint changed since it was opened.
        CalibrationError: a statistic is missing or damaged.
        UsageError: jobs without weights, or of different checkpoints.
    """
    if not jobs:
        return []
    checkpoint = _common_checkpoint(jobs)
    started = time.perf_counter()
    check_targets([job for job in jobs if job.force is not force], checkpoint.folder, force=force)
    jobs, quantizer = trained(jobs, threads=threads), jobs[0].quantizer
    source = (quantizer and quantizer.source) or checkpoint
    give_back_heap()  # what reading the tokenizer left, before the kernels need memory
    with ExitStack() as stack:
        outputs = (open_output(job.plan, job.path, force=force, replaceable=job.replaceable) for job in jobs)
        sinks = [stack.enter_context(output) for output in outputs]
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
    """Train the scales of jobs whose method trains, e.g. `distil`; other jobs are returned unchanged.

    `write_all` does so too, unless it has been done.  `progress` is called with 1 for each training step.

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
    checkpoint = jobs[0].checkpoint
    if checkpoint is None:
        raise UsageError(f"{jobs[0].path}: was prepared with weights=False, for its plan only; prepare it again")
    if any(job.checkpoint is not checkpoint for job in jobs):
        raise UsageError(f"{jobs[0].path}: jobs that are written together must come from one prepare_all")
    return checkpoint


def _put(sinks: Sequence[Sink], pieces: Iterable[Encoded], progress: Callable[[int], None] | None) -> None:
    """Write `pieces`, each output on a thread of its own, since writing can take longer than encoding."""
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
