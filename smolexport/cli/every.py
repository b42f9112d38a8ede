"""`smolexport all`: one checkpoint, every format, one pass."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from smolexport.cli.options import (
    Checkpoint,
    IgnoreConfig,
    Json,
    Revision,
    Threads,
    Token,
    given_path,
    given_word,
    print_json,
)

if TYPE_CHECKING:
    from smolexport.convert import Job

__all__ = ["command"]


def command(
    checkpoint: Checkpoint,
    quant: Annotated[
        str,
        typer.Option("--quant", "-q", metavar="SCHEME", callback=given_word, help="A scheme that all formats have."),
    ] = "int4",
    out: Annotated[
        Path, typer.Option("--out", "-o", parser=given_path, help="Folder for the outputs; made when missing.")
    ] = Path(),
    formats: Annotated[
        str | None, typer.Option("--formats", metavar="A,B", help="Only these formats; default: every installed one.")
    ] = None,
    name: Annotated[str | None, typer.Option("--name", help="What the files call the model.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plans and write nothing.")] = False,
    strict: Annotated[
        bool, typer.Option("--strict", help="Refuse when a tensor's shape does not allow the scheme's format.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", "-f", help="Replace existing outputs.")] = False,
    threads: Threads = None,
    ignore_config: IgnoreConfig = None,
    revision: Revision = None,
    token: Token = None,
    json: Json = False,
) -> None:
    """Export a checkpoint to every format in one pass over its weights.

    Each tensor is read once. int4 and int8 are portable: all files hold the same integers and scales, quantized once,
    and `smolexport inspect` prints the same weights fingerprint for all of them.
    """
    from smolexport import convert

    targets = [word.strip() for word in formats.split(",")] if formats is not None else None
    jobs = convert.prepare_all(
        checkpoint, out, targets=targets, quant=quant, name=name, strict=strict, ignore_config=ignore_config or (),
        revision=revision, token=token, force=force if out.is_dir() and not dry_run else None, weights=not dry_run,
    )  # fmt: skip
    if dry_run:
        _show_plans(jobs, json)
        return
    _write(jobs, out, force, threads, json)


def _write(jobs: list[Job], out: Path, force: bool, threads: int | None, json: bool) -> None:
    from smolexport.cli.export import facts, write_jobs
    from smolexport.output import made_folder

    with made_folder(out):
        done = write_jobs(jobs, force=force, threads=threads)
    if json:
        rows = zip(jobs, done, strict=True)
        print_json([{**facts(job), "bytes": one.bytes, "seconds": round(one.seconds, 3)} for job, one in rows])
        return
    for one in done:
        typer.echo(str(one.path))


def _show_plans(jobs: list[Job], json: bool) -> None:
    from smolexport.cli.export import facts

    if json:
        print_json([facts(job, tensors=True) for job in jobs])
    else:
        typer.echo("\n\n".join(job.plan.render() for job in jobs))
