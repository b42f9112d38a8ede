"""`smolexport bench`: speed of exported files on their runtimes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from smolexport.cli import options
from smolexport.cli.streams import console, print_json, stages
from smolexport.errors import UsageError
from smolexport.text import printable

if TYPE_CHECKING:
    from smolexport.parity.inputs import Candidate
    from smolexport.parity.speed import Bench


@click.command("bench", short_help="Measure the speed of files.")
@click.argument(
    "files", nargs=-1, required=True, type=options.given_word,
    help="Exported files or folders; a checkpoint folder or the word demo runs in bf16.",
)  # fmt: skip
@click.option("--prefill", "prefill_tokens", default=512, help="Tokens in the block for the prefill rate.")
@click.option("--decode", "decode_tokens", default=128, help="Tokens generated one by one for the decode rate.")
@click.option("--repetitions", default=5, help="Rounds; each round measures every file once.")
@options.threads
@options.runtimes
@options.runtime_settings
@options.json
def command(
    files: tuple[str, ...], runtimes: tuple[str, ...], settings: dict[str, Any], json: bool, **amounts: Any
) -> None:
    """Measure time to first token, prefill and decode rate, load time and peak memory.

    All files stay open and rounds are interleaved, so that a slow moment of the machine affects all files; if they do
    not fit in memory together, each file is reopened for its rounds, and a note says so. The decode rate is also given
    as a share of what the machine's memory bandwidth, measured in the same run, allows.
    """
    from smolexport.parity.inputs import Settings
    from smolexport.parity.report import to_json
    from smolexport.parity.speed import bench

    models = _models(files, settings, runtimes)
    with stages(json) as progress:
        result = bench(models, Settings(**amounts), progress)
    if json:
        print_json(to_json(result))
    else:
        _show(result)


def _models(files: tuple[str, ...], settings: dict[str, Any], runtimes: tuple[str, ...]) -> list[Candidate]:
    """The models to measure: checkpoints first."""
    from smolexport import plugins
    from smolexport.model.checkpoint import find_checkpoint
    from smolexport.parity.candidates import exported, reference

    checkpoints = [word for word in files if word == "demo" or plugins.is_checkpoint(Path(word))]
    rest = [Path(word) for word in files if word not in checkpoints]
    if not rest and (settings or runtimes):
        raise UsageError("--set and --runtime apply to exported files; a checkpoint always runs on torch in bf16")
    return [
        *(reference(find_checkpoint(word)) for word in checkpoints),
        *(exported(rest, settings, runtimes) if rest else ()),
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
