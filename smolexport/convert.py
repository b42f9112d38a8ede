"""The driver: read, check, plan, write.

Everything that can be refused is refused before the first weight is read.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

from smolexport.checkpoint import Checkpoint, find_checkpoint, open_checkpoint
from smolexport.converter import Converter
from smolexport.errors import UnsupportedError
from smolexport.plan import Plan
from smolexport.plugins import converter
from smolexport.tokenizer import read_tokenizer

__all__ = ["Export", "Job", "export", "prepare", "write"]


@dataclass(frozen=True)
class Job:
    """An export that is ready to be written: nothing has been, and nothing is known to stand against it."""

    converter: Converter
    checkpoint: Checkpoint
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

    Raises:
        SmolexportError: anything that stands against this export.
    """
    module = converter(target)
    scheme = module.find_scheme(quant or module.DEFAULT)
    folder = find_checkpoint(source, revision=revision, token=token)
    checkpoint = open_checkpoint(folder, ignore_config=ignore_config)
    reasons = module.check(checkpoint.spec)
    if reasons:
        raise UnsupportedError(f"{folder}: cannot be exported to {target}: {'; '.join(reasons)}")
    tokenizer = read_tokenizer(folder, checkpoint.spec.vocab_size)
    title = name or _title(source, folder)
    plan = module.plan(checkpoint.spec, tokenizer, scheme.name, name=title)
    if strict and plan.fallbacks:
        raise UnsupportedError(
            f"{folder}: --strict: {scheme.name} does not fit {len(plan.fallbacks)} tensors: "
            + "; ".join(plan.fallback_lines())
        )
    path = Path(out) if out else Path()
    if not out or path.is_dir():
        path = path / f"{_file_name(title)}-{scheme.name}{module.SUFFIX}"
    return Job(module, checkpoint, plan, path)


def _title(source: str | Path, folder: Path) -> str:
    """The hub name, or the folder's own, without path."""
    local = Path(source).is_dir()
    title = folder.resolve().name if local else str(source).rsplit("/", maxsplit=1)[-1]
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
        token=token,
    )  # fmt: skip
    return write(job, force=force, threads=threads, progress=progress)


def write(
    job: Job, *, force: bool = False, threads: int | None = None, progress: Callable[[int], None] | None = None
) -> Export:
    """Write a prepared job.  Raises OutputError, TensorError or CheckpointError."""
    started = time.perf_counter()
    files = job.converter.write(job.plan, job.checkpoint, job.path, threads=threads, force=force, progress=progress)
    size = sum(f.stat().st_size for f in files)
    return Export(job.path, tuple(files), job.plan, size, time.perf_counter() - started)
