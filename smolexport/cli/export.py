"""`smolexport gguf` and its like: one command per installed converter."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from smolexport.cli.options import (
    Checkpoint,
    FormatOptions,
    IgnoreConfig,
    Json,
    Revision,
    Threads,
    Token,
    given_path,
    given_word,
    parse_settings,
    print_json,
    progress_bar,
    say,
)

if TYPE_CHECKING:
    from smolexport.convert import Export, Job

__all__ = ["command_for", "facts", "help_of", "write_jobs"]


Quant = Annotated[
    str | None,
    typer.Option(
        "--quant",
        "-q",
        metavar="SCHEME",
        callback=given_word,
        help="Scheme, e.g. q8_0; `smolexport list` shows them.",
    ),
]
Out = Annotated[
    Path | None,
    typer.Option(
        "--out", "-o", metavar="PATH", parser=given_path, help="Output file, or a folder for the default name."
    ),
]


def help_of(target: str) -> str:
    """Help text of the command that writes `target`."""
    return (
        f"Export a checkpoint to {target.upper()}.\n\nStreams the weights through the quantizer in bounded memory; "
        "needs neither PyTorch nor transformers. First says what is about to be written (sizes, bits per weight, "
        f"what does not fit and why). `smolexport list {target}` names the schemes."
    )


def command_for(target: str) -> Callable[..., None]:
    """The command that writes `target`."""

    def command(
        checkpoint: Checkpoint,
        quant: Quant = None,
        out: Out = None,
        name: Annotated[str | None, typer.Option("--name", help="What the file calls the model.")] = None,
        dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the whole plan and write nothing.")] = False,
        strict: Annotated[
            bool, typer.Option("--strict", help="Refuse when a tensor's shape does not allow the scheme's format.")
        ] = False,
        force: Annotated[bool, typer.Option("--force", "-f", help="Replace an existing output.")] = False,
        threads: Threads = None,
        settings: FormatOptions = None,
        ignore_config: IgnoreConfig = None,
        revision: Revision = None,
        token: Token = None,
        json: Json = False,
    ) -> None:
        from smolexport import convert

        job = convert.prepare(
            target, checkpoint, out, quant=quant, name=name, options=parse_settings(settings), strict=strict,
            ignore_config=ignore_config or (), revision=revision, token=token, force=None if dry_run else force,
            weights=not dry_run,
        )  # fmt: skip
        if dry_run:
            _show_plan(job, json)
            return
        [done] = write_jobs([job], force=force, threads=threads)
        if json:
            print_json({**facts(job), "bytes": done.bytes, "seconds": round(done.seconds, 3)})
        else:
            typer.echo(str(done.path))

    return command


def write_jobs(jobs: list[Job], *, force: bool, threads: int | None) -> list[Export]:
    """Say what is about to be written, write it with a progress bar, say what it took."""
    from smolexport import convert
    from smolexport.output import leftovers

    for job in jobs:
        for line in leftovers(job.path):
            say(f"note: {line}")
        say(job.plan.summary())
    checkpoint = jobs[0].checkpoint
    if checkpoint:
        say(f"from {checkpoint.folder} ({checkpoint.dtype}, {checkpoint.nbytes / 1e6:.1f} MB)")
    names = ", ".join(job.path.name for job in jobs)
    with progress_bar(f"writing {names}", sum(job.plan.nbytes for job in jobs)) as advance:
        done = convert.write_all(jobs, force=force, threads=threads, progress=advance)
    say(f"wrote {sum(d.bytes for d in done) / 1e6:.1f} MB in {done[0].seconds:.1f} s")
    return done


def _show_plan(job: Job, json: bool) -> None:
    if not json:
        typer.echo(job.plan.render())
        return
    print_json(facts(job, tensors=True))


def facts(job: Job, *, tensors: bool = False) -> dict[str, object]:
    """A job as JSON; with `tensors`, each of them too."""
    plan = job.plan
    found: dict[str, object] = {
        "path": str(job.path),
        "format": plan.target,
        "architecture": plan.architecture,
        "scheme": plan.scheme,
        "weights": plan.weights,
        "tensor_bytes": plan.nbytes,
        "bits_per_weight": round(plan.bits_per_weight, 4),
        "formats": {name: {"tensors": n, "bytes": size} for name, (n, size) in plan.shares().items()},
        "fallbacks": len(plan.fallbacks),
        "notes": [*plan.fallback_lines(), *plan.notes],
    }
    if tensors:
        found["tensors"] = [
            {
                "name": e.name,
                "shape": list(e.shape),
                "format": e.format.name,
                "bytes": e.nbytes,
                "wanted": e.wanted.name if e.wanted else None,
            }
            for e in plan.entries
        ]
    return found
