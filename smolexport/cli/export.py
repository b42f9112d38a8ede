"""`smolexport gguf` and its like: one command per installed converter."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from smolexport.cli.options import (
    budget_options,
    calibration_of,
    calibration_options,
    checkpoint_argument,
    format_options,
    given_path,
    given_word,
    json_option,
    parse_settings,
    print_json,
    progress_bar,
    say,
    source_options,
    strict_option,
    threads_option,
)

if TYPE_CHECKING:
    from smolexport.conversion.pipeline import Export
    from smolexport.conversion.prepare import Job

QUANT = "Scheme, e.g. q8_0; `smolexport list` shows them; auto-bits is for --size and --target-kld."


# Flags of single formats; their values are options of the format, as those of --set.
OWN: Mapping[str, Callable[[Any], Any]] = {
    "gguf": click.option(
        "--imatrix", metavar="FILE", type=given_word,
        help="Importance matrix of llama.cpp, GGUF or .dat: which columns matter when scales are searched.",
    ),
}  # fmt: skip


def command_for(target: str) -> click.Command:
    """The command that writes `target`."""

    @click.command(target, help=_help(target), short_help=f"Export a checkpoint to {target.upper()}.")
    @checkpoint_argument
    @click.option("--quant", "-q", metavar="SCHEME", type=given_word, help=QUANT)
    @click.option("--out", "-o", metavar="PATH", type=given_path, help="Output file, or a folder for the default name.")
    @click.option("--name", help="What the file calls the model.")
    @click.option("--dry-run", is_flag=True, help="Print the whole plan and write nothing.")
    @strict_option
    @click.option("--force", "-f", is_flag=True, help="Replace an existing output.")
    @threads_option
    @OWN.get(target, lambda unchanged: unchanged)
    @calibration_options
    @budget_options
    @format_options
    @source_options
    @json_option
    def command(
        checkpoint: str,
        quant: str | None,
        out: Path | None,
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
        settings: tuple[str, ...],
        ignore_config: tuple[str, ...],
        revision: str | None,
        token: str | None,
        json: bool,
        **own: str | None,
    ) -> None:
        from smolexport.conversion.prepare import prepare

        calibration = calibration_of(method, stats, steps, size, target_kld, measure=not dry_run)
        job = prepare(
            target, checkpoint, out, quant=quant, name=name, options=_options(settings, own), strict=strict,
            ignore_config=ignore_config, revision=revision, token=token, force=None if dry_run else force,
            weights=not dry_run, calibration=calibration,
        )  # fmt: skip
        _show_plan(job, json) if dry_run else _write(job, force, threads, json)

    return command


def _write(job: Job, force: bool, threads: int | None, json: bool) -> None:
    from smolexport.heap import share_heap

    share_heap()
    [done] = write_jobs([job], force=force, threads=threads)
    if json:
        print_json({**facts(job), "bytes": done.bytes, "seconds": round(done.seconds, 3)})
    else:
        click.echo(str(done.path))


def _options(settings: tuple[str, ...], own: Mapping[str, str | None]) -> dict[str, Any]:
    """What --set and the format's own flags say; raises UsageError where they differ."""
    from smolexport.errors import UsageError

    options = parse_settings(settings)
    for key, value in own.items():
        if value is not None and options.setdefault(key, value) != value:
            raise UsageError(f"--{key} {value}: --set {key} says {options[key]}; give one of them")
    return options


def _help(target: str) -> str:
    return (
        f"Export a checkpoint to {target.upper()}.\n\nStreams the weights through the quantizer in bounded memory; "
        "needs neither PyTorch nor transformers. First says what is about to be written (sizes, bits per weight, "
        f"what does not fit and why). `smolexport list {target}` names the schemes.\n\nWith --stats of `smolexport "
        "calibrate`, --method rounds better at the same size, and --size 90MB or --target-kld 0.02 chooses the bits of "
        "each matrix by what its bytes gain."
    )


def write_jobs(jobs: list[Job], *, force: bool, threads: int | None) -> list[Export]:
    """Say what is about to be written, write it with a progress bar, say what it took."""
    from smolexport.conversion import pipeline
    from smolexport.files import leftovers

    for job in jobs:
        for line in leftovers(job.path):
            say(f"note: {line}")
        say(job.plan.summary())
    checkpoint = jobs[0].checkpoint
    if checkpoint:
        say(f"from {checkpoint.folder} ({checkpoint.dtype}, {checkpoint.nbytes / 1e6:.1f} MB)")
    jobs = _trained(jobs, threads)
    names = ", ".join(job.path.name for job in jobs)
    with progress_bar(f"writing {names}", sum(job.plan.nbytes for job in jobs)) as advance:
        done = pipeline.write_all(jobs, force=force, threads=threads, progress=advance)
    say(f"wrote {sum(d.bytes for d in done) / 1e6:.1f} MB in {done[0].seconds:.1f} s")
    return done


def _trained(jobs: list[Job], threads: int | None) -> list[Job]:
    """Train scales for jobs whose method does that, with a bar, and say what came of it."""
    from smolexport.conversion import pipeline

    quantizer = jobs[0].quantizer
    if quantizer is None or not quantizer.steps:
        return jobs
    with progress_bar("training scales", quantizer.steps, unit="steps") as advance:
        jobs = pipeline.trained(jobs, threads=threads, progress=advance)
    for outcome in quantizer.outcomes:
        say(str(outcome))
    return jobs


def _show_plan(job: Job, json: bool) -> None:
    if not json:
        click.echo(job.plan.render())
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
                "wanted": e.requested.name if e.requested else None,
            }
            for e in plan.entries
        ]
    return found
