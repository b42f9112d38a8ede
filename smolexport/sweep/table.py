"""The result of a sweep: a row for each task, as plain JSON and as text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from smolexport.conversion.model_card import installed_version
from smolexport.sweep.plan import Task
from smolexport.sweep.record import TaskRecord
from smolexport.text import one_line, printable

if TYPE_CHECKING:
    from rich.console import Console

SCHEMA = 1
State = Literal["new", "kept", "failed", "to do"]


@dataclass(frozen=True)
class TaskRow:
    """What became of a task.

    Attributes:
        task: the task.
        state: `new`, `kept` from an earlier sweep, or `failed`; before a sweep, `to do`.
        record: what is known of it.
        error: why it failed.
    """

    task: Task
    state: State
    record: TaskRecord
    error: str = ""


def table_json(rows: Sequence[TaskRow]) -> dict[str, Any]:
    """Plain JSON values; what is not known is None.

    `path` is relative to the folder of the sweep; `seconds` are those of the attempt that made what is there.
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
        "bytes": made.get("bytes"),
        "bits_per_weight": made.get("bits_per_weight"),
        "files": made.get("files"),
        "notes": [*(made.get("notes") or ()), *(compared.get("notes") or ())],
        "runtime": compared.get("runtime"),
        "weights_fingerprint": compared.get("fingerprint"),
        "kld": kld.get("mean"),
        "kld_error": kld.get("mean_error"),
        "top1_agreement": compared.get("top1_agreement"),
        "top1_agreement_error": compared.get("top1_agreement_error"),
        "perplexity_ratio": compared.get("perplexity_ratio"),
        "perplexity_ratio_error": compared.get("perplexity_ratio_error"),
        "seconds": round(made["seconds"] + compared.get("seconds", 0.0), 3) if "seconds" in made else None,
    }


def line(row: TaskRow) -> str:
    """A task that has ended, in one line."""
    found = _row_json(row)
    if row.state == "failed":
        return f"{row.task.title}: failed: {row.error.removeprefix(f'{row.task.title}: ')}"
    figures = [f"{found['bytes'] / 1e6:.1f} MB", f"{found['bits_per_weight']:.2f} bits per weight"]
    figures += [] if found["kld"] is None else [f"KLD {found['kld']:.5f}"]
    return f"{row.task.title}: {', '.join(figures)}, {'kept' if row.state == 'kept' else _seconds(found['seconds'])}"


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
            Text(printable(row.task.name)),
            Text(printable(row.task.format)),
            Text(printable(row.task.scheme)),
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
        console.print(f"failed: {one_line(error)}", markup=False, highlight=False, soft_wrap=True)


def _cell(value: float | None, form: str, factor: float = 1.0) -> str:
    return "-" if value is None else form.format(factor * value)


def _seconds(value: float) -> str:
    return f"{value:.1f} s"
