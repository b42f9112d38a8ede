"""`smolexport bench`: speed of exported files on their runtimes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from smolexport.cli.compare import stages
from smolexport.cli.options import (
    given_word,
    json_option,
    parse_settings,
    print_json,
    runtime_options,
    threads_option,
)
from smolexport.cli.streams import console
from smolexport.text import printable

if TYPE_CHECKING:
    from smolexport.parity.inputs import Candidate
    from smolexport.parity.speed import Bench


@click.command("bench", short_help="Measure the speed of files.")
@click.argument(
    "files", nargs=-1, required=True, type=given_word,
    help="Exported files or folders; a checkpoint folder or the word demo runs in bf16.",
)  # fmt: skip
@click.option("--prefill", default=512, help="Tokens of the block for the prefill rate.")
@click.option("--decode", default=128, help="Tokens generated one by one for the decode rate.")
@click.option("--repetitions", default=5, help="Rounds; each round measures every file once.")
@threads_option
@click.option(
    "--runtime", "runtimes", metavar="NAME", multiple=True,
    help="Run files on this runtime; repeatable: each file on each runtime that can run it.",
)  # fmt: skip
@runtime_options
@json_option
def command(
    files: tuple[str, ...],
    prefill: int,
    decode: int,
    repetitions: int,
    threads: int | None,
    runtimes: tuple[str, ...],
    settings: tuple[str, ...],
    json: bool,
) -> None:
    """Measure time to first token, prefill and decode rate, load time and peak memory.

    Rounds are interleaved, so that a slow moment of the machine affects all files, and all files stay open; if memory
    cannot hold them, each file is reopened for its rounds, and a note says so. The decode rate is also given as a share
    of what the machine's memory bandwidth, measured in the same run, allows.
    """
    from smolexport.parity.inputs import Settings, no_progress
    from smolexport.parity.report import to_json
    from smolexport.parity.speed import bench

    amount = Settings(prefill_tokens=prefill, decode_tokens=decode, repetitions=repetitions, threads=threads)
    models = _models(files, parse_settings(settings), runtimes)
    with stages(json) as progress:
        result = bench(models, amount, progress or no_progress)
    if json:
        print_json(to_json(result))
    else:
        _show(result)


def _models(files: tuple[str, ...], options: dict[str, Any], runtimes: tuple[str, ...]) -> list[Candidate]:
    """The models to measure: checkpoints first."""
    from smolexport import plugins
    from smolexport.errors import UsageError
    from smolexport.model.checkpoint import find_checkpoint
    from smolexport.parity.candidates import exported, reference

    checkpoints = [word for word in files if word == "demo" or plugins.is_checkpoint(Path(word))]
    rest = [Path(word) for word in files if word not in checkpoints]
    if not rest and (options or runtimes):
        raise UsageError("--set and --runtime apply to exported files; a checkpoint always runs on torch in bf16")
    return [
        *(reference(find_checkpoint(word)) for word in checkpoints),
        *(exported(rest, options, runtimes) if rest else ()),
    ]


def _show(result: Bench) -> None:
    """Print a table and the machine on stdout."""
    from smolexport.parity.report.tables import speed_table
    from smolexport.parity.report.terminal import print_table

    print_table(speed_table(result.models, result.bandwidth_bytes_per_s), console())
    notes = [*result.notes, *(f"{row.model.name}: {note}" for row in result.models for note in row.notes)]
    for note in notes:
        click.echo(f"note: {printable(note)}")
    facts = result.environment
    click.echo(
        f"{facts['processor']}, {facts['threads']} threads, {result.bandwidth_bytes_per_s / 1e9:.1f} GB/s of memory"
    )
