"""`smolexport sweep`: many checkpoints, formats and schemes, in processes or on a Ray cluster."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from smolexport.cli import options
from smolexport.cli.streams import console, print_json, say
from smolexport.errors import UsageError

if TYPE_CHECKING:
    from smolexport.sweep.driver import SweepEngine
    from smolexport.sweep.plan import SweepSource, Task
    from smolexport.sweep.table import TaskRow

SOME_FAILED = 1


@click.command("sweep", short_help="Export and compare many checkpoints, formats and schemes.")
@click.argument(
    "checkpoints", nargs=-1, required=True, type=options.given_word,
    help="Checkpoint folders, hub ids (owner/name), or the word demo.",
)  # fmt: skip
@click.option(
    "--quant", "-q", "schemes", metavar="A,B", type=options.words, default="int4",
    help="Schemes, each for all formats that have it; FORMAT:SCHEME for one format.",
)  # fmt: skip
@click.option("--formats", metavar="A,B", type=options.words, help="Only these formats; default: every installed one.")
@click.option(
    "--out", "-o", metavar="FOLDER", type=options.given_path, required=True,
    help="Folder for the outputs and their records; created if missing.",
)  # fmt: skip
@click.option("--compare/--no-compare", default=True, help="Compare every output with its checkpoint in bf16.")
@options.text
@click.option(
    "--window", default=512, type=options.Integer(min=4), help="Tokens per window; the second half is scored."
)
@click.option("--max-windows", type=options.Integer(min=1), help="Score at most this many windows.")
@click.option(
    "--jobs", "-j", type=options.Integer(min=1),
    help="Tasks at a time, which share the processors; default: one for every four processors.",
)  # fmt: skip
@click.option("--engine", type=click.Choice(["local", "ray"]), default="local", help="Where tasks run.")
@click.option(
    "--address", metavar="ADDRESS", type=options.given_word,
    help="Address of a Ray cluster, e.g. auto or HOST:6379; default: RAY_ADDRESS, else a new cluster on this machine.",
)  # fmt: skip
@click.option("--dry-run", is_flag=True, help="Print what would be exported and what is kept, and write nothing.")
@click.option("--force", "-f", is_flag=True, help="Redo everything, and replace existing outputs, whoever made them.")
@options.source
@options.json
def command(
    checkpoints: tuple[str, ...],
    schemes: list[str],
    formats: list[str] | None,
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

    Outputs go to FOLDER/NAME/, the table to FOLDER/sweep.json. A sweep may be killed at any time: each output has a
    record, and the same command again redoes only what is missing or failed, or whose checkpoint, text or version of
    smolexport has changed. Outputs of another checkpoint of the same name are not replaced. A task whose process dies
    is started again, three times in all. A task that fails does not stop the others; the exit code is then 1.

    With --engine ray tasks run on the machines of a Ray cluster (extra: ray). Each needs smolexport, and must see
    FOLDER and the checkpoints under the same paths: on shared storage.
    """
    from smolexport.demo import demo_text
    from smolexport.sweep import driver, plan, table

    if address is not None and engine != "ray":
        raise UsageError(f"--address {address}: applies only to a Ray cluster; add --engine ray")
    requested, skipped = plan.pairs(formats, schemes)
    words = (demo_text() if text is None else options.read_words(text)) if compare else None
    if not dry_run:
        plan.check_libraries({name for name, _ in requested} if compare else (), ray=engine == "ray")
    sources = plan.find_sources(checkpoints, revision=revision, token=token, weights=not dry_run)
    config = plan.SweepConfig(out=str(out.resolve()), text=words, **rest)
    tasks = plan.tasks_of(sources, requested, config)
    for line in skipped:
        say(f"note: {line}")
    rows = driver.preview(sources, tasks, out) if dry_run else _sweep(sources, tasks, out, jobs, engine, address)
    if json:
        print_json(table.table_json(rows))
    else:
        table.render_table(rows, console())
    if any(row.state == "failed" for row in rows):
        raise click.exceptions.Exit(SOME_FAILED)


def _sweep(
    sources: Sequence[SweepSource],
    tasks: Sequence[Task],
    out: Path,
    jobs: int | None,
    engine: str,
    address: str | None,
) -> list[TaskRow]:
    from smolexport.sweep.driver import sweep
    from smolexport.sweep.table import SweepProgress

    def opened(lock: int | None) -> SweepEngine:
        if engine == "ray":
            from smolexport.sweep.cluster import Cluster

            found: SweepEngine = Cluster(jobs, address)
        else:
            from smolexport.sweep.local import Local

            found = Local(jobs, lock)
        say(f"{found.jobs} at a time, {found.threads} threads each")
        return found

    with SweepProgress(len(tasks)) as progress:
        return sweep(sources, tasks, out.resolve(), opened, progress)
