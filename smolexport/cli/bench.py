"""`smolexport bench`: how fast exported files answer, each on its runtime."""

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
    from smolexport.parity.bench import Bench
    from smolexport.parity.inputs import Candidate
    from smolexport.parity.results import Estimate

__all__ = ["command"]


@click.command("bench", short_help="Measure how fast files answer.")
@click.argument(
    "files", nargs=-1, required=True, type=given_word,
    help="Exported files or folders; a checkpoint folder or the word demo is played in bf16.",
)  # fmt: skip
@click.option("--prefill", default=512, help="Tokens of the prompt whose rate is taken.")
@click.option("--decode", default=128, help="Tokens generated one by one.")
@click.option("--repetitions", default=5, help="Rounds; one round takes every file once.")
@threads_option
@click.option(
    "--runtime", "runtimes", metavar="NAME", multiple=True,
    help="Take this runtime for what it plays; repeatable: each file on each of them.",
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

    Files are measured in turns, so that a slow moment of the machine meets every one, and are all open meanwhile; where
    memory does not hold them, each is opened anew for its turns, and a note says so. The decode rate is also given as a
    share of what the machine's memory bandwidth, measured in the same run, allows.
    """
    from smolexport.parity.bench import bench
    from smolexport.parity.inputs import Settings

    amount = Settings(prefill_tokens=prefill, decode_tokens=decode, repetitions=repetitions, threads=threads)
    models = _models(files, parse_settings(settings), runtimes)
    with stages(json) as progress:
        result = bench(models, amount, progress)
    if json:
        print_json(_as_json(result))
    else:
        _show(result)


def _models(files: tuple[str, ...], options: dict[str, Any], runtimes: tuple[str, ...]) -> list[Candidate]:
    """What is to be played: checkpoints first."""
    from smolexport import plugins
    from smolexport.errors import UsageError
    from smolexport.model.checkpoint import find_checkpoint
    from smolexport.parity.candidates import exported, reference

    checkpoints = [word for word in files if word == "demo" or plugins.is_checkpoint(Path(word))]
    rest = [Path(word) for word in files if word not in checkpoints]
    if not rest and (options or runtimes):
        raise UsageError("--set and --runtime are for exported files; a checkpoint is played by torch in bf16")
    return [
        *(reference(find_checkpoint(word)) for word in checkpoints),
        *(exported(rest, options, runtimes) if rest else ()),
    ]


def _as_json(result: Bench) -> dict[str, Any]:
    """Plain JSON values: tokens per second, milliseconds, seconds, bytes."""
    from smolexport.parity.report.sheet import model_json, speed_json

    rows = [
        {
            **model_json(row.model, row.model.path.name),
            "speed": speed_json(row.speed),
            "bandwidth_share": row.bandwidth_share,
            "load_seconds": row.load_seconds,
            "peak_rss_bytes": row.peak_rss_bytes,
            "notes": [row.note] if row.note else [],
        }
        for row in result.rows
    ]
    return {
        "models": rows,
        "bandwidth_bytes_per_second": result.bandwidth,
        "environment": dict(result.environment),
        "notes": [result.note] if result.note else [],
    }


def _show(result: Bench) -> None:
    """A table on stdout, and what it was taken on."""
    from rich.table import Table

    from smolexport.parity.report.names import two_lines

    first = result.rows[0].speed
    table = Table(box=None, padding=(0, 2, 1, 0), pad_edge=False)
    table.add_column("file", overflow="fold")
    prefill, decode = f"prefill {first.prefill_tokens}\ntok/s", f"decode {first.decode_tokens}\ntok/s"
    for column in ("size\nMB", "load\ns", "first token\nms", prefill, decode, "of the\nbandwidth", "peak RSS\nMB"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in result.rows:
        model, rate = row.model, row.speed
        table.add_row(
            two_lines(model.path.name, f"{model.format} {model.kind}, {model.runtime.NAME}"),
            f"{model.bytes / 1e6:,.1f}",
            f"{row.load_seconds:.2f}",
            *map(_cell, (rate.ttft_ms, rate.prefill_tok_s, rate.decode_tok_s)),
            "-" if row.bandwidth_share is None else f"{100 * row.bandwidth_share:.0f} %",
            "-" if row.peak_rss_bytes is None else f"{row.peak_rss_bytes / 1e6:,.0f}",
        )
    console().print(table, crop=False)
    if result.note:
        click.echo(f"note: {printable(result.note)}")
    for row in result.rows:
        if row.note:
            click.echo(f"note: {printable(f'{row.model.path.name}: {row.note}')}")
    facts = result.environment
    click.echo(f"{facts['processor']}, {facts['threads']} threads, {result.bandwidth / 1e9:.1f} GB/s read from memory")


def _cell(estimate: Estimate) -> str:
    """A value with its standard error, where there is one, below it; three digits or all before the point."""
    import math

    value = f"{estimate.value:,.0f}" if estimate.value >= 100 else f"{estimate.value:.3g}"
    return f"{value}\n[dim]±{estimate.error:.2g}[/dim]" if math.isfinite(estimate.error) else value
