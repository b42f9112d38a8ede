"""`smolexport gguf` and its like, a command for each installed converter; `smolexport all` for all of them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from smolexport.cli import options
from smolexport.cli.streams import print_json, progress_bar, say
from smolexport.errors import UsageError

if TYPE_CHECKING:
    from smolexport.conversion.pipeline import Export
    from smolexport.conversion.prepare import Job

HELP = """Export a checkpoint to {format}.

Streams the weights through the quantizer in bounded memory; needs neither PyTorch nor transformers. First prints what
will be written: size, bits per weight, and which tensors need another format and why. `smolexport list {target}` shows
the schemes.

With --stats from `smolexport calibrate`, --method reduces the rounding error at the same size, and --size 90MB or
--target-kld 0.02 chooses the bits of each matrix by what its bytes gain.
"""
REQUEST = options.together(
    click.option("--name", help="Name of the model in the output."),
    click.option("--dry-run", is_flag=True, help="Print the whole plan and write nothing."),
    click.option("--strict", is_flag=True, help="Refuse if a tensor's shape does not allow the scheme's format."),
    click.option("--force", "-f", is_flag=True, help="Replace an existing output."),
    options.threads,
)
IMATRIX = click.option(
    "--imatrix", metavar="FILE", type=options.given_word,
    help="Importance matrix of llama.cpp, GGUF or .dat: how much each column counts when scales are searched.",
)  # fmt: skip


def command_for(target: str) -> click.Command:
    """The command that writes the format `target`."""
    own = IMATRIX if target == "gguf" else options.together()
    quant = "Scheme, e.g. q8_0; `smolexport list` shows them; auto-bits is for --size and --target-kld."

    @click.command(
        target,
        help=HELP.format(format=target.upper(), target=target),
        short_help=f"Export a checkpoint to {target.upper()}.",
    )
    @options.checkpoint
    @click.option("--quant", "-q", metavar="SCHEME", type=options.given_word, help=quant)
    @click.option(
        "--out", "-o", metavar="PATH", type=options.given_path, help="Output file, or a folder for the default name."
    )
    @REQUEST
    @own
    @options.calibration
    @options.format_settings
    @options.source
    @options.json
    def command(
        checkpoint: str, out: Path | None, settings: dict[str, Any], imatrix: str | None = None, **rest: Any
    ) -> None:
        from smolexport.conversion.prepare import prepare

        if imatrix is not None and settings.setdefault("imatrix", imatrix) != imatrix:
            raise UsageError(f"--imatrix {imatrix}: --set imatrix says {settings['imatrix']}; give one of them")
        _run(lambda **request: [prepare(target, checkpoint, out, options=settings, **request)], None, **rest)

    return command


@click.command("all", short_help="Export a checkpoint to every format in one pass.")
@options.checkpoint
@click.option(
    "--quant", "-q", metavar="SCHEME", type=options.given_word,
    help="A scheme that all formats have; default: int4, or auto-bits under a budget.",
)  # fmt: skip
@click.option(
    "--out", "-o", metavar="FOLDER", type=options.given_path, default=".",
    help="Folder for the outputs; created if missing.",
)  # fmt: skip
@click.option(
    "--formats", "targets", metavar="A,B", type=options.words, help="Only these formats; default: every installed one."
)
@REQUEST
@options.calibration
@options.source
@options.json
def every_format(checkpoint: str, out: Path, **rest: Any) -> None:
    """Export a checkpoint to every format in one pass over its weights.

    Each tensor is read once. int4 and int8 are portable: all files hold the same integers and scales, quantized once,
    and `smolexport inspect` prints the same weights fingerprint for all of them. Under a budget, --size or
    --target-kld, the bits of each matrix are chosen once for all formats: 8 or 4 if ONNX is one of them, otherwise
    8, 6, 5 or 4.
    """
    from smolexport.conversion.prepare import prepare_all

    def plan(force: bool | None, **request: Any) -> list[Job]:
        return prepare_all(checkpoint, out, force=force if out.is_dir() else None, **request)

    _run(plan, out, **rest)


def _run(
    plan: Callable[..., list[Job]],
    folder: Path | None,
    *,
    dry_run: bool,
    force: bool,
    threads: int | None,
    json: bool,
    **request: Any,
) -> None:
    """Plan, and write unless that is all; `folder`: of several outputs, None for a single one."""
    from smolexport.files import made_folder
    from smolexport.heap import share_heap

    chosen = (request.pop(name) for name in options.CALIBRATION)
    calibration = options.calibration_of(*chosen, measure=not dry_run)
    jobs = plan(force=None if dry_run else force, weights=not dry_run, calibration=calibration, **request)
    rows = [_facts(job, tensors=dry_run) for job in jobs]
    if dry_run:
        text = "\n\n".join(job.plan.render() for job in jobs)
    else:
        share_heap()
        with made_folder(folder) if folder else nullcontext():
            done = write_jobs(jobs, force=force, threads=threads)
        rows = [
            {**row, "bytes": one.bytes, "seconds": round(one.seconds, 3)} for row, one in zip(rows, done, strict=True)
        ]
        text = "\n".join(str(one.path) for one in done)
    if json:
        print_json(rows if folder else rows[0])
    else:
        click.echo(text)


def write_jobs(jobs: list[Job], *, force: bool, threads: int | None) -> list[Export]:
    """Write the outputs with a progress bar; print what will be written, and what was, as notes."""
    from smolexport.conversion import pipeline
    from smolexport.files import leftovers

    for job in jobs:
        for line in leftovers(job.path):
            say(f"note: {line}")
        say(job.plan.summary())
    if checkpoint := jobs[0].checkpoint:
        say(f"from {checkpoint.folder} ({checkpoint.dtype}, {checkpoint.nbytes / 1e6:.1f} MB)")
    quantizer = jobs[0].quantizer
    if quantizer and quantizer.steps:
        with progress_bar("training scales", quantizer.steps, unit="steps") as advance:
            jobs = pipeline.trained(jobs, threads=threads, progress=advance)
        for outcome in quantizer.outcomes:
            say(str(outcome))
    names = ", ".join(job.path.name for job in jobs)
    with progress_bar(f"writing {names}", sum(job.plan.nbytes for job in jobs)) as advance:
        done = pipeline.write_all(jobs, force=force, threads=threads, progress=advance)
    say(f"wrote {sum(d.bytes for d in done) / 1e6:.1f} MB in {done[0].seconds:.1f} s")
    return done


def _facts(job: Job, *, tensors: bool) -> dict[str, object]:
    """A job as JSON values; with `tensors`, each of them too."""
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
