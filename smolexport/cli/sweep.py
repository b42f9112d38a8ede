"""`smolexport sweep`: many checkpoints, formats and schemes, in processes or on a Ray cluster."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from smolexport.cli.options import (
    Integer,
    given_path,
    given_word,
    json_option,
    print_json,
    read_words,
    say,
    source_options,
)
from smolexport.cli.streams import console
from smolexport.text import one_line, printable

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from smolexport.sweep.engine import SweepEngine
    from smolexport.sweep.plan import Task
    from smolexport.sweep.table import TaskRow

SOME_FAILED = 1


@click.command("sweep", short_help="Export and compare many checkpoints, formats and schemes.")
@click.argument(
    "checkpoints", nargs=-1, required=True, type=given_word,
    help="Checkpoint folders, hub ids (owner/name), or the word demo.",
)  # fmt: skip
@click.option(
    "--quant", "-q", metavar="A,B", type=given_word, default="int4",
    help="Schemes, each for all formats that have it; FORMAT:SCHEME for one format.",
)  # fmt: skip
@click.option("--formats", metavar="A,B", type=given_word, help="Only these formats; default: every installed one.")
@click.option(
    "--out", "-o", metavar="FOLDER", type=given_path, required=True,
    help="Folder for the outputs and their records; made when missing.",
)  # fmt: skip
@click.option("--compare/--no-compare", default=True, help="Hold every output against its checkpoint in bf16.")
@click.option("--text", metavar="PATH", type=given_path, help="UTF-8 text to score; default: the demo's held-out text.")
@click.option("--window", default=512, type=Integer(min=4), help="Tokens per window; the second half is scored.")
@click.option("--max-windows", type=Integer(min=1), help="Score at most so many.")
@click.option(
    "--jobs", "-j", type=Integer(min=1),
    help="Tasks at a time, which share the processors; default: one for every four processors.",
)  # fmt: skip
@click.option("--engine", type=click.Choice(["local", "ray"]), default="local", help="Where tasks run.")
@click.option(
    "--address", metavar="ADDRESS", type=given_word,
    help="Of a Ray cluster, e.g. auto or HOST:6379; default: RAY_ADDRESS, else a cluster of this machine alone.",
)  # fmt: skip
@click.option("--dry-run", is_flag=True, help="Print what would be made and what is kept, and write nothing.")
@click.option("--force", "-f", is_flag=True, help="Do everything again, and replace whatever stands there.")
@source_options
@json_option
def command(
    checkpoints: tuple[str, ...],
    quant: str,
    formats: str | None,
    out: Path,
    compare: bool,
    text: Path | None,
    jobs: int | None,
    engine: str,
    address: str | None,
    dry_run: bool,
    json: bool,
    revision: str | None,
    token: str | None,
    **rest: Any,
) -> None:
    """Export every checkpoint to every format and scheme, compare each output with its checkpoint, print one table.

    Outputs go to FOLDER/NAME/, the table to FOLDER/sweep.json. Each output has a record; run the same line again and
    only what is missing, has failed, or whose checkpoint, text or version of smolexport is another now is done, so a
    sweep may be killed at any time. Outputs of another checkpoint of the same name are not replaced.
    A task whose process dies gets a new one, three in all. A task that fails does not stop the others; exit code 1
    then.

    With --engine ray tasks run on the machines of a Ray cluster (extra: ray), each of which needs smolexport and must
    see FOLDER and the checkpoints under the same paths: on shared storage.
    """
    from smolexport.demo import demo_text
    from smolexport.errors import UsageError
    from smolexport.sweep import plan

    if address is not None and engine != "ray":
        raise UsageError(f"--address {address}: is that of a Ray cluster; add --engine ray")
    names = None if formats is None else [word.strip() for word in formats.split(",")]
    wanted, skipped = plan.pairs(names, [word.strip() for word in quant.split(",")])
    words = (demo_text() if text is None else read_words(text)) if compare else None
    if not dry_run:
        _check_libraries(engine, {name for name, _ in wanted} if compare else set())
    sources = plan.find_sources(checkpoints, revision=revision, token=token, weights=not dry_run)
    rest["ignore_config"] = tuple(rest["ignore_config"])
    tasks = plan.tasks_of(sources, wanted, plan.SweepConfig(out=str(out.resolve()), text=words, **rest))
    for line in skipped:
        say(f"note: {line}")
    rows = _preview(sources, tasks, out) if dry_run else _sweep(sources, tasks, out, jobs, engine, address)
    _show(rows, json)
    if any(row.state == "failed" for row in rows):
        raise click.exceptions.Exit(SOME_FAILED)


def _check_libraries(engine: str, formats: set[str]) -> None:
    """Refuse before any work what cannot run here; what the machines of a cluster have, they tell themselves."""
    if engine == "ray":
        from smolexport.sweep.cluster import check_ray

        check_ray()
    elif formats:
        from smolexport.sweep.plan import check_runtimes

        check_runtimes(formats)


def _preview(sources: Sequence[Any], tasks: Sequence[Task], out: Path) -> list[TaskRow]:
    from smolexport.sweep.preview import preview

    return preview(sources, tasks, out)


def _sweep(
    sources: Sequence[Any], tasks: Sequence[Task], out: Path, jobs: int | None, engine: str, address: str | None
) -> list[TaskRow]:
    from smolexport.sweep.driver import sweep

    def place(lock: int | None) -> SweepEngine:
        if engine == "ray":
            from smolexport.sweep.cluster import Cluster

            found: SweepEngine = Cluster(jobs, address)
        else:
            from smolexport.sweep.local import Local

            found = Local(jobs, lock)
        say(f"{found.jobs} at a time, {found.threads} threads each")
        return found

    with _observer(len(tasks)) as observer:
        return sweep(sources, tasks, out.resolve(), place, observer)


class _Lines:
    """A line on stderr for each step that ends; a bar for all and a clock for each task at work on a terminal."""

    def __init__(self, total: int, bars: Progress | None) -> None:
        self._total, self._done, self._bars = total, 0, bars
        self._clocks: dict[str, TaskID] = {}
        self._all = bars.add_task("sweep", total=total) if bars else None

    def reading(self, name: str) -> None:
        if self._bars and self._all is not None:
            self._bars.update(self._all, description=f"reading {printable(name)}")

    def started(self, task: Task) -> None:
        if self._bars and self._all is not None:
            self._bars.update(self._all, description="sweep")
            self._clocks[task.title] = self._bars.add_task(f"  {printable(task.title)}", total=None)

    def again(self, task: Task, reason: str, number: int) -> None:
        self._say(f"{task.title}: {reason}; attempt {number}")
        self._stop(task)

    def ended(self, row: TaskRow) -> None:
        from smolexport.sweep.table import line

        self._done += 1
        self._say(f"[{self._done}/{self._total}] {line(row)}")
        self._stop(row.task)
        if self._bars and self._all is not None:
            self._bars.update(self._all, completed=self._done)

    def _stop(self, task: Task) -> None:
        clock = self._clocks.pop(task.title, None)
        if self._bars and clock is not None:
            self._bars.remove_task(clock)

    def _say(self, text: str) -> None:
        if self._bars:
            self._bars.console.print(one_line(text), markup=False, highlight=False, soft_wrap=True)
        else:
            say(one_line(text))


@contextmanager
def _observer(total: int) -> Iterator[_Lines]:
    """Whoever tells the user; with bars on stderr when that is a terminal."""
    import sys

    if not sys.stderr.isatty():
        yield _Lines(total, None)
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        yield _Lines(total, bars)


def _show(rows: Sequence[TaskRow], json: bool) -> None:
    """The table, or JSON, on stdout."""
    from smolexport.sweep.table import render_table, table_json

    if json:
        print_json(table_json(rows))
        return
    render_table(rows, console())
