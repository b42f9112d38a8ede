"""`smolexport all`: one checkpoint, every format, one pass."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from smolexport.cli.options import (
    budget_options,
    calibration_of,
    calibration_options,
    checkpoint_argument,
    given_path,
    given_word,
    json_option,
    print_json,
    source_options,
    strict_option,
    threads_option,
)

if TYPE_CHECKING:
    from smolexport.conversion.prepare import Job


@click.command("all", short_help="Export a checkpoint to every format in one pass.")
@checkpoint_argument
@click.option(
    "--quant",
    "-q",
    metavar="SCHEME",
    type=given_word,
    help="A scheme that all formats have; default: int4, or auto-bits under a budget.",
)
@click.option(
    "--out", "-o", metavar="FOLDER", type=given_path, default=".", help="Folder for the outputs; made when missing."
)
@click.option("--formats", metavar="A,B", help="Only these formats; default: every installed one.")
@click.option("--name", help="What the files call the model.")
@click.option("--dry-run", is_flag=True, help="Print the plans and write nothing.")
@strict_option
@click.option("--force", "-f", is_flag=True, help="Replace existing outputs.")
@threads_option
@calibration_options
@budget_options
@source_options
@json_option
def command(
    checkpoint: str,
    quant: str | None,
    out: Path,
    formats: str | None,
    name: str | None,
    dry_run: bool,
    strict: bool,
    force: bool,
    threads: int | None,
    method: str,
    stats: Path | None,
    steps: int | None,
    size: int | None,
    target_kld: float | None,
    ignore_config: tuple[str, ...],
    revision: str | None,
    token: str | None,
    json: bool,
) -> None:
    """Export a checkpoint to every format in one pass over its weights.

    Each tensor is read once. int4 and int8 are portable: all files hold the same integers and scales, quantized once,
    and `smolexport inspect` prints the same weights fingerprint for all of them. So they do under a budget, --size or
    --target-kld, where ONNX is among the formats: one decision, 8 or 4 bits, for all; without ONNX also 6 and 5.
    """
    from smolexport.conversion.prepare import prepare_all

    targets = [word.strip() for word in formats.split(",")] if formats is not None else None
    jobs = prepare_all(
        checkpoint, out, targets=targets, quant=quant, name=name, strict=strict, ignore_config=ignore_config,
        revision=revision, token=token, force=None if dry_run else force, weights=not dry_run,
        calibration=calibration_of(method, stats, steps, size, target_kld, measure=not dry_run),
    )  # fmt: skip
    if dry_run:
        _show_plans(jobs, json)
        return
    _write(jobs, out, force, threads, json)


def _write(jobs: list[Job], out: Path, force: bool, threads: int | None, json: bool) -> None:
    from smolexport.cli.export import facts, write_jobs
    from smolexport.files import made_folder
    from smolexport.heap import share_heap

    share_heap()
    with made_folder(out):
        done = write_jobs(jobs, force=force, threads=threads)
    if json:
        rows = zip(jobs, done, strict=True)
        print_json([{**facts(job), "bytes": one.bytes, "seconds": round(one.seconds, 3)} for job, one in rows])
        return
    for one in done:
        click.echo(str(one.path))


def _show_plans(jobs: list[Job], json: bool) -> None:
    from smolexport.cli.export import facts

    if json:
        print_json([facts(job, tensors=True) for job in jobs])
    else:
        click.echo("\n\n".join(job.plan.render() for job in jobs))
