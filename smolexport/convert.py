"""The driver: read, check, plan, write.

Everything that can be refused is refused before the first weight is read; of a hub id, what the small files show
before the first weight is downloaded.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from smolexport.checkpoint import Checkpoint, find_checkpoint, open_checkpoint, read_config
from smolexport.converter import Converter
from smolexport.errors import CheckpointError, ConfigError, OutputError, UnsupportedError, UsageError
from smolexport.memory import give_back_heap
from smolexport.model import Model, claimed_dtype
from smolexport.output import check_parent, check_space, check_target, made_folder, refuse_own_source
from smolexport.plan import Plan
from smolexport.plugins import checked_options, converter, converters
from smolexport.sink import Sink
from smolexport.spec import ModelSpec
from smolexport.stream import Encoded, encoded_chunks
from smolexport.tokenizer import read_tokenizer

__all__ = ["Export", "Job", "export", "export_all", "prepare", "prepare_all", "write", "write_all"]

# Without weights nothing vouches for vocab_size, and a list of that length is built.  Known models stay below 2^19.
MAX_VOCABULARY = 1 << 22
WAITING = 2  # chunks an output may lag behind before encoding waits for it


@dataclass(frozen=True)
class Job:
    """An export that is ready to be written: nothing has been, and nothing is known to stand against it.

    `checkpoint` is None where `prepare` was told to leave the weights on the hub: a plan to look at, not to write.
    """

    converter: Converter
    checkpoint: Checkpoint | None
    plan: Plan
    path: Path


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


@dataclass(frozen=True)
class Wish:
    """What `prepare` and `prepare_all` are asked for alike; see there."""

    source: str | Path
    quant: str | None
    name: str | None
    options: Mapping[str, Any]
    strict: bool
    ignore_config: Collection[str]
    revision: str | None
    token: str | None
    force: bool | None
    weights: bool


def prepare(
    target: str,
    source: str | Path,
    out: str | Path | None = None,
    *,
    quant: str | None = None,
    name: str | None = None,
    options: Mapping[str, Any] | None = None,
    strict: bool = False,
    ignore_config: Collection[str] = (),
    revision: str | None = None,
    token: str | None = None,
    force: bool | None = None,
    weights: bool = True,
) -> Job:
    """Read headers, check and plan; no weight is read and nothing is written.

    Args:
        target: format name, e.g. `gguf`.
        source: checkpoint folder, hub id, or `demo`.
        out: target path; a folder gets the default name inside it; None = default name in the current folder.
        quant: scheme name; None = the format's default.
        name: what the file calls the model; None = the checkpoint's own name.
        options: further options of the format; its converter's `OPTIONS` names them.
        strict: refuse when a tensor cannot get the format that the scheme asks for.
        ignore_config: keys of config.json that the caller vouches for as inert.
        revision: hub revision.
        token: hub token.
        force: an existing target may be replaced; None = leave it to `write` to look at the target.
        weights: False = the weights of a hub id stay there, unchecked, and the job cannot be written.

    Raises:
        SmolexportError: anything that stands against this export.
    """
    wish = Wish(source, quant, name, options or {}, strict, ignore_config, revision, token, force, weights)
    [job] = _prepare([target], wish, lambda default, module: _path(out, default, module))
    return job


def prepare_all(
    source: str | Path,
    out: str | Path | None = None,
    *,
    targets: Collection[str] | None = None,
    quant: str = "int4",
    name: str | None = None,
    strict: bool = False,
    ignore_config: Collection[str] = (),
    revision: str | None = None,
    token: str | None = None,
    force: bool | None = None,
    weights: bool = True,
) -> list[Job]:
    """Prepare an export to several formats, which `write_all` does in one pass over the checkpoint.

    Args:
        source: as for `prepare`, like the arguments that are not named here.
        out: the folder that gets all outputs under their default names.
        targets: format names; None = every installed converter.
        quant: a scheme that all of them have.

    Raises:
        SmolexportError: anything that stands against one of the exports.
    """
    folder = Path(out) if out else Path()
    if weights:
        check_parent(folder)
    wish = Wish(source, quant, name, {}, strict, ignore_config, revision, token, force, weights)
    return _prepare(list(converters() if targets is None else targets), wish, lambda default, _: folder / default)


def _prepare(targets: Sequence[str], wish: Wish, place: Callable[[str, Converter], Path]) -> list[Job]:
    if not targets or len(set(targets)) < len(targets):
        raise UsageError(f"formats {', '.join(targets) or 'none'}: name each format once, and at least one")
    modules = [converter(target) for target in targets]
    schemes = [module.find_scheme(wish.quant or module.DEFAULT).name for module in modules]
    for module in modules:
        checked_options(module.plan, wish.options, module.FORMAT, module.OPTIONS)
    source = wish.source
    folder = find_checkpoint(source, revision=wish.revision, token=wish.token, weights=False)
    remote = source != "demo" and folder != Path(source)
    checkpoint = None if remote else open_checkpoint(folder, ignore_config=wish.ignore_config)
    model = _model(wish, folder, checkpoint)
    jobs = []
    for module, scheme in zip(modules, schemes, strict=True):
        plan = _plan(module, model, scheme, wish)
        path = place(f"{_file_name(model.name)}-{scheme}{module.SUFFIX}", module)
        if wish.force is not None:
            _check_target(module, path, plan, folder, wish.force)
        jobs.append(Job(module, checkpoint, plan, path))
    if not (remote and wish.weights):
        return jobs
    whole = find_checkpoint(source, revision=wish.revision, token=wish.token)
    if whole != folder:
        raise CheckpointError(f"{source}: changed on the hub during the download; start the export again")
    checkpoint = open_checkpoint(whole, ignore_config=wish.ignore_config)
    model = replace(model, dtype=claimed_dtype(model.config) or checkpoint.dtype)  # now the weights can tell
    plans = (_plan(job.converter, model, job.plan.scheme, wish) for job in jobs)
    return [replace(job, checkpoint=checkpoint, plan=plan) for job, plan in zip(jobs, plans, strict=True)]


def _check_target(module: Converter, path: Path, plan: Plan, source: Path, force: bool) -> None:
    """Refuse a target before the work; raises OutputError."""
    try:
        refuse_own_source(path, source, folder=module.FOLDER, ours=module.recognises)
    except OSError as error:  # a name that no file can have
        raise OutputError(f"{path}: {error.strerror or error}; give another name with -o") from error
    check_target(path, _size(plan), force=force, replaceable=module.replaceable if module.FOLDER else None)


def _size(plan: Plan) -> int:
    return plan.nbytes + sum(companion.nbytes for companion in plan.companions)


def _model(wish: Wish, folder: Path, checkpoint: Checkpoint | None) -> Model:
    """The small files, read; raises CheckpointError."""
    if checkpoint:
        config, spec = checkpoint.config, checkpoint.spec
    else:
        config, spec = _spec_alone(folder, wish.ignore_config)
    return Model(
        spec=spec,
        tokenizer=read_tokenizer(folder, spec.vocab_size),
        name=(wish.name or _title(wish.source, folder)).encode("utf-8", "replace").decode(),  # bytes of a strange path
        folder=folder,
        config=config,
        dtype=claimed_dtype(config) or (checkpoint.dtype if checkpoint else "BF16"),
        origin=None if checkpoint else str(wish.source),
    )


def _spec_alone(folder: Path, ignore_config: Collection[str]) -> tuple[Mapping[str, Any], ModelSpec]:
    """config.json and the spec where no headers bear it out yet."""
    config, spec = read_config(folder, ignore_config=ignore_config)
    if spec.vocab_size > MAX_VOCABULARY:
        raise ConfigError(
            f"{folder}: config.json: vocab_size {spec.vocab_size} is more than the {MAX_VOCABULARY} that are planned "
            "without weights; if it is right, download the checkpoint and give its folder"
        )
    return config, spec


def _plan(module: Converter, model: Model, scheme: str, wish: Wish) -> Plan:
    """Check and plan; raises UnsupportedError and whatever the converter refuses."""
    reasons = module.check(model.spec)
    if reasons:
        raise UnsupportedError(f"{model.folder}: cannot be exported to {module.FORMAT}: {'; '.join(reasons)}")
    plan = module.plan(model, scheme, **wish.options)
    if wish.strict and plan.fallbacks:
        raise UnsupportedError(
            f"{model.folder}: --strict: {scheme} does not fit {len(plan.fallbacks)} tensors: "
            + "; ".join(plan.fallback_lines())
        )
    return plan


def _path(out: str | Path | None, default: str, module: Converter) -> Path:
    """The target: `out`, or `default` in the folder `out`, unless that is an earlier output of the converter."""
    if out is not None and not str(out):
        raise OutputError("-o: is empty; give a name")
    path = Path(out) if out is not None else Path()
    try:
        inside = path.is_dir() and not (module.FOLDER and out is not None and module.replaceable(path))
        return path / default if inside else path
    except OSError as error:  # a name that no file can have
        raise OutputError(f"{path}: {error.strerror or error}; give another name with -o") from error


def _title(source: str | Path, folder: Path) -> str:
    """The hub name, or the folder's own, without path."""
    title = folder.resolve().name if folder == Path(source) else str(source).rsplit("/", maxsplit=1)[-1]
    return title or "model"


def _file_name(title: str) -> str:
    """`title` as part of a file name: it may name no other folder."""
    return "".join(c if c.isprintable() and c not in '/\\:*?"<>|' else "-" for c in title)


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
        revision=revision, token=token, force=force,
    )  # fmt: skip
    return write(job, force=force, threads=threads, progress=progress)


def export_all(
    source: str | Path,
    out: str | Path | None = None,
    *,
    targets: Collection[str] | None = None,
    quant: str = "int4",
    name: str | None = None,
    strict: bool = False,
    force: bool = False,
    threads: int | None = None,
    ignore_config: Collection[str] = (),
    revision: str | None = None,
    token: str | None = None,
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
            finished outputs, fails for one after another has its name.
        UsageError: jobs without weights, or of different checkpoints.
    """
    if not jobs:
        return []
    checkpoint = jobs[0].checkpoint
    if checkpoint is None:
        raise UsageError(f"{jobs[0].path}: was prepared with weights=False, only to look at the plan; prepare it again")
    if any(job.checkpoint is not checkpoint for job in jobs):
        raise UsageError(f"{jobs[0].path}: jobs that are written together must come from one prepare_all")
    started = time.perf_counter()
    for job in jobs:
        _check_target(job.converter, job.path, job.plan, checkpoint.folder, force)
        check_space(job.path.parent, sum(_size(j.plan) for j in jobs if j.path.parent == job.path.parent))
    give_back_heap()  # what reading the tokenizer left there, before the kernels need theirs
    with ExitStack() as stack:
        sinks = [stack.enter_context(job.converter.output(job.plan, job.path, force=force)) for job in jobs]
        _put(sinks, encoded_chunks(checkpoint, [job.plan.entries for job in jobs], threads), progress)
        for sink in sinks:  # all of them, before the first one gets its name
            sink.flush()
    seconds = time.perf_counter() - started
    sizes = [sum(path.stat().st_size for path in sink.paths) for sink in sinks]
    return [
        Export(job.path, tuple(sink.paths), job.plan, size, seconds)
        for job, sink, size in zip(jobs, sinks, sizes, strict=True)
    ]


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
