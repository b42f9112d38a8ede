"""A comparison as tables for a terminal.

The tables need 100 columns and are printed at that width even if the console is narrower, so no figure is truncated.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from smolexport.parity.report.tables import Cell, Table, tables
from smolexport.parity.results import Comparison
from smolexport.text import one_line, printable

if TYPE_CHECKING:
    from rich.console import Console

_WIDTH = 100


def render(comparison: Comparison, console: Console) -> None:
    """Print the tables, their legends, the notes and one line per missed threshold."""
    for table in tables(comparison):
        print_table(table, console)
    for line in _lines(comparison):
        console.print(one_line(line), markup=False, highlight=False, soft_wrap=True)


def print_table(table: Table, console: Console) -> None:
    """Print `table` without its legend, and an empty line."""
    import rich.table
    from rich.markup import escape

    # no lines and two spaces between columns leave the 100 columns for figures
    drawn = rich.table.Table(
        title=table.title, title_justify="left", title_style="bold", box=None, padding=(0, 2, 1, 0), pad_edge=False
    )
    drawn.add_column(table.heads[0], overflow="fold", header_style="bold")
    for head in table.heads[2:]:
        drawn.add_column(escape(head.replace(",\n", "\n")), justify="right", no_wrap=True, header_style="bold")
    for row in table.rows:
        label = _lines_of(Cell(escape(printable(row.name)), notes=(escape(printable(row.detail)),)))
        drawn.add_row(label, *map(_lines_of, row.cells))
    if console.width < _WIDTH:
        drawn.width = _WIDTH
    console.print(drawn, crop=False)
    console.print()


def _lines_of(cell: Cell) -> str:
    """A value, and dim below it its error and its remarks."""
    below = [*([f"±{cell.error}"] if cell.error else []), *cell.notes]
    return "\n".join([cell.value, *(f"[dim]{line}[/dim]" for line in below)])


def _lines(comparison: Comparison) -> Iterable[str]:
    """Legends, notes and verdicts."""
    text = comparison.text
    yield (
        f"{text.tokens:,} tokens of text, {text.windows} windows of {text.window}, "
        f"the last {text.scored_per_window} predictions of each scored"
    )
    for table in tables(comparison):
        yield from table.legend
    yield from (f"note: {note}" for note in comparison.notes)
    for result in comparison.candidates:
        yield from (f"note: {result.model.name}: {note}" for note in result.notes)
        yield from (f"MISSED: {result.model.name}: {miss}" for miss in result.missed)
    if comparison.passed and any(result.thresholds.values() for result in comparison.candidates):
        yield "PASSED: every file meets its thresholds"
