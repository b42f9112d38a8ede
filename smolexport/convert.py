"""The driver: read, check, plan, write.

Everything that can be refused is refused before the first weight is read; of a hub id, what the small files show
before the first weight is downloaded.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

from smolexport.checkpoint import Checkpoint, find_checkpoint, open_checkpoint, read_config
from smolexport.converter import Converter
from smolexport.errors import CheckpointError, ConfigError, OutputError, UnsupportedError, UsageError
from smolexport.output import check_target
from smolexport.plan import Plan
from smolexport.plugins import converter
from smolexport.spec import ModelSpec
from smolexport.tokenizer import read_tokenizer

__all__ = ["Export", "Job", "export", "prepare", "write"]

# Without weights nothing vouches for vocab_size, and a list of that length is built.  Known models stay below 2^19.
MAX_VOCABULARY = 1 << 22


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


def prepare(
    target: str,
    source: str | Path,
    out: str | Path | None = None,
    *,
    quant: str | None = None,
    name: str | None = None,
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
        strict: refuse when a tensor cannot get the format that the scheme asks for.
        ignore_config: keys of config.json that the caller vouches for as inert.
        revision: hub revision.
        token: hub token.
        force: an existing target may be replaced; None = leave it to `write` to look at the target.
        weights: False = the weights of a hub id stay there, unchecked, and the job cannot be written.

    Raises:
        SmolexportError: anything that stands against this export.
    """
    module = converter(target)
    scheme = module.find_scheme(quant or module.DEFAULT).name
    folder = find_checkpoint(source, revision=revision, token=token, weights=False)
    remote = source != "demo" and folder != Path(source)
    checkpoint = None if remote else open_checkpoint(folder, ignore_config=ignore_config)
    spec = checkpoint.spec if checkpoint else _spec_alone(folder, ignore_config)
    title = name or _title(source, folder)
    plan = _plan(module, folder, spec, scheme, title, strict)
    path = _path(out, f"{_file_name(title)}-{scheme}{module.SUFFIX}")
    if force is not None:
        check_target(path, plan.nbytes, force=force)
    if remote and weights:
        whole = find_checkpoint(source, revision=revision, token=token)
        if whole != folder:
            raise CheckpointError(f"{source}: changed on the hub during the download; start the export again")
        checkpoint = open_checkpoint(whole, ignore_config=ignore_config)
    return Job(module, checkpoint, plan, path)


def _spec_alone(folder: Path, ignore_config: Collection[str]) -> ModelSpec:
    """The spec where no headers bear it out yet."""
    _, spec = read_config(folder, ignore_config=ignore_config)
    if spec.vocab_size > MAX_VOCABULARY:
        raise ConfigError(
            f"{folder}: config.json: vocab_size {spec.vocab_size} is more than the {MAX_VOCABULARY} that are planned "
            "without weights; if it is right, download the checkpoint and give its folder"
        )
    return spec


def _plan(module: Converter, folder: Path, spec: ModelSpec, scheme: str, title: str, strict: bool) -> Plan:
    """Check and plan; raises UnsupportedError and TokenizerError."""
    reasons = module.check(spec)
    if reasons:
        raise UnsupportedError(f"{folder}: cannot be exported to {module.FORMAT}: {'; '.join(reasons)}")
    plan = module.plan(spec, read_tokenizer(folder, spec.vocab_size), scheme, name=title)
    if strict and plan.fallbacks:
        raise UnsupportedError(
            f"{folder}: --strict: {scheme} does not fit {len(plan.fallbacks)} tensors: "
            + "; ".join(plan.fallback_lines())
        )
    return plan


def _path(out: str | Path | None, default: str) -> Path:
    """The target: `out`, or `default` in the folder `out`."""
    path = Path(out) if out else Path()
    try:
        return path / default if path.is_dir() else path
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
        target, source, out, quant=quant, name=name, strict=strict, ignore_config=ignore_config, revision=revision,
        token=token, force=force,
    )  # fmt: skip
    return write(job, force=force, threads=threads, progress=progress)


def write(
    job: Job, *, force: bool = False, threads: int | None = None, progress: Callable[[int], None] | None = None
) -> Export:
    """Write a prepared job.  Raises OutputError, TensorError, CheckpointError; UsageError for one without weights."""
    if job.checkpoint is None:
        raise UsageError(f"{job.path}: was prepared with weights=False, only to look at the plan; prepare it again")
    started = time.perf_counter()
    files = job.converter.write(job.plan, job.checkpoint, job.path, threads=threads, force=force, progress=progress)
    size = sum(f.stat().st_size for f in files)
    return Export(job.path, tuple(files), job.plan, size, time.perf_counter() - started)
