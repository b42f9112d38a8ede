"""A comparison as Markdown, for a model card."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence

from smolexport.parity.report.tables import Cell, Row, Table, tables
from smolexport.parity.results import Comparison
from smolexport.parity.thresholds import Thresholds
from smolexport.text import printable

FLAGS = "max_kld", "min_top1", "max_ppl_ratio"  # thresholds with an option of `compare`


def render_markdown(comparison: Comparison) -> str:
    """The tables in GitHub's Markdown; then missed thresholds and the conditions."""
    parts = [*map(_table, tables(comparison)), _verdicts(comparison), _conditions(comparison)]
    return "\n\n".join(filter(None, parts)) + "\n"


def command_line(comparison: Comparison) -> str:
    """The command that reproduces the figures: names instead of paths, without options that change no figure."""
    reference, text = comparison.reference.model, comparison.text
    # a file on several runtimes is named once
    files = dict.fromkeys(
        str(result.model.path).replace("\\", "/").rpartition("/")[2] for result in comparison.candidates
    )
    words = ["smolexport", "compare", reference.name, *files, "--dtype", reference.scheme]
    words += ["--window", str(text.window)]
    words += ["--max-windows", str(text.windows)] if text.windows < text.tokens // text.window else []
    words += _threshold_options([result.thresholds for result in comparison.candidates])
    return shlex.join(printable(word) for word in words)


def _threshold_options(limits: Sequence[Thresholds]) -> list[str]:
    """Options for thresholds that all files share; `--gate` if some have no option or differ between files."""
    values = limits[0].values()
    if any(other != limits[0] for other in limits) or values.keys() - set(FLAGS):
        return ["--gate", "parity.toml"]
    return [word for name, limit in values.items() for word in (f"--{name.replace('_', '-')}", f"{limit:g}")]


def _table(table: Table) -> str:
    heads = [_text(head.replace("-\n", "").replace("\n", " ")) for head in table.heads]
    rule = [":--" if place < 2 else "--:" for place in range(len(heads))]
    lines = [f"| {' | '.join(cells)} |" for cells in (heads, rule, *map(_row, table.rows))]
    return "\n\n".join(filter(None, (f"{table.title}:", "\n".join(lines), _text(" ".join(table.legend)))))


def _row(row: Row) -> list[str]:
    name = _code(row.name) if row.kind == "file" else f"*{_text(row.name)}*"
    return [name, _text(row.detail), *map(_cell, row.cells)]


def _cell(cell: Cell) -> str:
    value = " ± ".join(filter(None, (cell.value, cell.error)))
    return f"{value} ({', '.join(cell.notes)})" if cell.notes else value


def _verdicts(comparison: Comparison) -> str:
    results = comparison.candidates
    lines = [f"- missed: {_code(result.model.name)}: {_text(miss)}" for result in results for miss in result.missed]
    if not lines and any(result.thresholds.values() for result in results):
        lines = ["- passed: every file meets its thresholds"]
    return "\n".join(lines)


def _conditions(comparison: Comparison) -> str:
    text = comparison.text
    lines = [
        f"Measured with {_code(command_line(comparison))} on {text.tokens:,} tokens of text: {text.windows} windows "
        f"of {text.window} tokens, the last {text.scored_per_window} predictions of each scored."
    ]
    if comparison.environment:
        lines.append("; ".join(f"{_text(key)}: {_text(value)}" for key, value in comparison.environment.items()) + ".")
    notes = [*comparison.notes, *(f"{one.model.name}: {note}" for one in comparison.candidates for note in one.notes)]
    lines += ["\n".join(f"- {_text(note)}" for note in notes)] if notes else []
    return "\n\n".join(lines)


def _code(name: str) -> str:
    """`name` as code, or escaped if it holds characters that would end the code or the cell."""
    name = printable(name)
    return _text(name) if not name.strip() or "`" in name or "|" in name else f"`{name}`"


def _text(words: str) -> str:
    """Untrusted text, escaped so that nothing in it is Markdown or HTML."""
    escaped = re.sub(r"([\\`*_{}\[\]()#+!|~$])", r"\\\1", printable(words))
    return escaped.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace("://", ":&#47;/")
