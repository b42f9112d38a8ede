"""`smolexport compare`: exported files against their checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from smolexport.cli.options import (
    Checkpoint,
    IgnoreConfig,
    Json,
    Revision,
    RuntimeOptions,
    Threads,
    Token,
    given_path,
    parse_settings,
    print_json,
    read_words,
)

if TYPE_CHECKING:
    from smolexport.parity.compare import Progress
    from smolexport.parity.results import Candidate, Comparison, Settings, Thresholds

__all__ = ["command", "run", "show"]

PARITY_MISSED = 1

Files = Annotated[list[Path], typer.Argument(parser=given_path, help="Exported files or folders of that checkpoint.")]
Text = Annotated[
    Path | None,
    typer.Option(
        "--text",
        metavar="PATH",
        parser=given_path,
        help="UTF-8 text to score; default: the demo's held-out text.",
    ),
]


def command(
    checkpoint: Checkpoint,
    files: Files,
    text: Text = None,
    max_kld: Annotated[float | None, typer.Option("--max-kld", min=0, help="Fail above this mean KLD.")] = None,
    min_top1: Annotated[
        float | None, typer.Option("--min-top1", min=0, max=1, help="Fail below this top-1 agreement (0 to 1).")
    ] = None,
    max_ppl_ratio: Annotated[
        float | None, typer.Option("--max-ppl-ratio", min=0, help="Fail above this perplexity ratio.")
    ] = None,
    dtype: Annotated[str, typer.Option("--dtype", help="Arithmetic of the reference: bf16 or f32.")] = "bf16",
    window: Annotated[int, typer.Option("--window", help="Tokens per window; the second half is scored.")] = 512,
    max_windows: Annotated[int | None, typer.Option("--max-windows", min=1, help="Score at most so many.")] = None,
    greedy_tokens: Annotated[int, typer.Option("--greedy-tokens", help="Greedy tokens per prompt; 0: none.")] = 64,
    repetitions: Annotated[int, typer.Option("--repetitions", help="Speed measurements; 0: none.")] = 3,
    threads: Threads = None,
    runtimes: Annotated[
        list[str] | None,
        typer.Option("--runtime", help="Take this runtime for what it plays; repeatable: each file on each of them."),
    ] = None,
    settings: RuntimeOptions = None,
    ignore_config: IgnoreConfig = None,
    revision: Revision = None,
    token: Token = None,
    json: Json = False,
) -> None:
    """Compare exported files with the checkpoint: accuracy, greedy agreement, speed, memory.

    KLD is the divergence of the file's predictions from the reference's, in nats per token (0 = equal); top-1 the
    share of positions with the same best token. Exits with 1 when a threshold is missed.
    """
    from smolexport.demo import demo_text
    from smolexport.parity.candidates import exported, reference
    from smolexport.parity.results import Settings, Thresholds

    amount = Settings(
        window=window, max_windows=max_windows, greedy_tokens=greedy_tokens, repetitions=repetitions, threads=threads
    )
    limits = Thresholds(max_kld=max_kld, min_top1=min_top1, max_ppl_ratio=max_ppl_ratio)
    words, options = demo_text() if text is None else read_words(text), parse_settings(settings)
    base = reference(_folder(checkpoint, revision, token), dtype, ignore_config=ignore_config or ())
    candidates = exported(files, options, runtimes or ())
    result = run(base, candidates, words, settings=amount, thresholds=limits, quiet=json)
    show(result, json=json)
    if not result.passed:
        raise typer.Exit(PARITY_MISSED)


def _folder(checkpoint: str, revision: str | None, token: str | None) -> Path:
    from smolexport.checkpoint import find_checkpoint

    return find_checkpoint(checkpoint, revision=revision, token=token)


def run(
    base: Candidate,
    candidates: list[Candidate],
    text: str,
    *,
    settings: Settings,
    thresholds: Thresholds,
    quiet: bool = False,
) -> Comparison:
    """Compare with a progress bar on stderr; raises SmolexportError."""
    from smolexport.parity.compare import compare

    with _stages(quiet) as progress:
        return compare(base, candidates, text=text, settings=settings, thresholds=thresholds, progress=progress)


@contextmanager
def _stages(quiet: bool) -> Iterator[Progress | None]:
    """A bar per stage on stderr, when that is a terminal."""
    import sys

    if quiet or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import Progress as Bars
    from rich.progress import TaskID

    with Bars(console=Console(stderr=True), transient=True) as bars:
        tasks: dict[str, TaskID] = {}

        def tick(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total)
            bars.update(tasks[stage], completed=done, total=total)

        yield tick


def show(result: Comparison, *, json: bool) -> None:
    """Tables, or JSON, on stdout."""
    from smolexport.parity.report import render, to_json

    if json:
        print_json(to_json(result))
        return
    import sys

    from rich.console import Console

    render(result, Console(width=None if sys.stdout.isatty() else 120))
