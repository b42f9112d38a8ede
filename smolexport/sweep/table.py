"""The result of a sweep, a row for each task, as JSON and as a table; and the progress on stderr before that."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Self

from smolexport.conversion.model_card import installed_version
from smolexport.sweep.plan import Task
from smolexport.sweep.record import TaskRecord
from smolexport.text import one_line, printable

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import TaskID

SCHEMA = 1
FIGURES = ("top1_agreement", "top1_agreement_error", "perplexity_ratio", "perplexity_ratio_error")


@dataclass(frozen=True)
class TaskRow:
    """The outcome of a task; before a sweep, `to do`."""

    task: Task
    state: Literal["new", "kept", "failed", "to do"]
    record: TaskRecord
    error: str = ""


def table_json(rows: Sequence[TaskRow]) -> dict[str, Any]:
    """Plain JSON values; None for what is not known.

    `path` is relative to the folder of the sweep; `seconds` are those of the attempt that made the output.
    """
    return {"schema": SCHEMA, "smolexport": installed_version(), "tasks": [_row_json(row) for row in rows]}


def _row_json(row: TaskRow) -> dict[str, Any]:
    made, compared = row.record.exported or {}, row.record.compared or {}
    kld = compared.get("kld") or {}
    return {
        "checkpoint": row.task.source,
        "fingerprint": row.task.fingerprint or None,
        "name": row.task.name,
        "format": row.task.format,
        "scheme": row.task.scheme,
        "state": row.state,
        "error": row.error or None,
        "path": row.record.target if made else None,
        **{key: made.get(key) for key in ("bytes", "bits_per_weight", "files")},
        "notes": [*(made.get("notes") or ()), *(compared.get("notes") or ())],
        "runtime": compared.get("runtime"),
        "weights_fingerprint": compared.get("fingerprint"),
        "kld": kld.get("mean"),
        "kld_error": kld.get("mean_error"),
        **{key: compared.get(key) for key in FIGURES},
        "seconds": round(made["seconds"] + compared.get("seconds", 0.0), 3) if "seconds" in made else None,
    }


def line(row: TaskRow) -> str:
    """A task that has ended, in one line."""
    found = _row_json(row)
    if row.state == "failed":
        return f"{row.task.title}: failed: {row.error.removeprefix(f'{row.task.title}: ')}"
    figures = [f"{found['bytes'] / 1e6:.1f} MB", f"{found['bits_per_weight']:.2f} bits per weight"]
    figures += [] if found["kld"] is None else [f"KLD {found['kld']:.5f}"]
    figures.append("kept" if row.state == "kept" else f"{found['seconds']:.1f} s")
    return f"{row.task.title}: {', '.join(figures)}"


def render_table(rows: Sequence[TaskRow], console: Console) -> None:
    """A table, and below it what went wrong."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    table.add_column("checkpoint", overflow="fold")
    table.add_column("format")
    table.add_column("scheme")
    for column in ("MB", "bits/weight", "KLD", "top-1", "PPL ratio", "seconds"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("state")
    for row in rows:
        found = _row_json(row)
        table.add_row(
            *(Text(printable(word)) for word in (row.task.name, row.task.format, row.task.scheme)),
            _cell(found["bytes"], "{:,.1f}", 1e-6),
            _cell(found["bits_per_weight"], "{:.2f}"),
            _cell(found["kld"], "{:.5f}"),
            _cell(found["top1_agreement"], "{:.1f} %", 100),
            _cell(found["perplexity_ratio"], "{:.4f}"),
            _cell(found["seconds"], "{:.1f}"),
            row.state,
        )
    console.print(table, crop=False)
    for error in dict.fromkeys(row.error for row in rows if row.error):
        console.print(Text(f"failed: {one_line(error)}"), soft_wrap=True)


def _cell(value: float | None, form: str, factor: float = 1.0) -> str:
    return "-" if value is None else form.format(factor * value)


class SweepProgress:
    """A line on stderr for each step that ends; on a terminal also a bar for all tasks and a clock for each at work."""

    def __init__(self, total: int) -> None:
        """`total`: tasks."""
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        label = TextColumn("{task.description}", markup=False)
        self._bars = Progress(
            label, BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
            console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty(),
        )  # fmt: skip
        self._total, self._done = total, 0
        self._all = self._bars.add_task("sweep", total=total)
        self._clocks: dict[str, TaskID] = {}

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def reading(self, name: str) -> None:
        """The checkpoint's fingerprint is being taken."""
        self._bars.update(self._all, description=f"reading {printable(name)}")

    def started(self, task: Task) -> None:
        """A process works on it."""
        self._bars.update(self._all, description="sweep")
        self._clocks[task.title] = self._bars.add_task(f"  {printable(task.title)}", total=None)

    def again(self, task: Task, reason: str, number: int) -> None:
        """Its process died; attempt `number` follows."""
        self._say(f"{task.title}: {reason}; attempt {number}")
        self._bars.remove_task(self._clocks.pop(task.title))

    def ended(self, row: TaskRow) -> None:
        """It is done, or has failed for good."""
        self._done += 1
        self._say(f"[{self._done}/{self._total}] {line(row)}")
        if row.task.title in self._clocks:
            self._bars.remove_task(self._clocks.pop(row.task.title))
        self._bars.update(self._all, completed=self._done)

    def _say(self, text: str) -> None:
        from rich.text import Text

        self._bars.console.print(Text(one_line(text)), soft_wrap=True)
