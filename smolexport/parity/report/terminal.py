"""A comparison as tables for people at a terminal.

The tables need 100 columns and are printed that wide even where the console is narrower or no terminal: a figure is
never cut off.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING

from smolexport.parity.inputs import Candidate
from smolexport.parity.methods import PLAIN, Cell, columns, side_by_side
from smolexport.parity.report.names import ABSENT, error_text, number, reference_name, short_names, two_lines
from smolexport.parity.results import (
    NEAR_TIE,
    Accuracy,
    CandidateResult,
    Comparison,
    Estimate,
    Greedy,
    ReferenceResult,
)
from smolexport.text import one_line, printable

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

__all__ = ["render"]

_WIDTH = 100


def render(comparison: Comparison, console: Console) -> None:
    """Print the tables, the notes and one verdict line per missed threshold."""
    width = max(_WIDTH, console.width)
    tables = _accuracy_table, _methods_table, _attribution_table, _pairs_table, _speed_table
    for table in filter(None, (make(comparison) for make in tables)):
        if console.width < _WIDTH:
            table.width = width
        console.print(table, crop=False)
        console.print()
    for line in _lines(comparison):
        console.print(one_line(line), markup=False, highlight=False, soft_wrap=True)


def _names(comparison: Comparison) -> list[str]:
    models = [result.model for result in comparison.candidates]
    return short_names([(model.path, model.runtime.NAME) for model in models])


def _accuracy_table(comparison: Comparison) -> Table:
    """The noise floor first: no figure below it means anything."""
    text, reference = comparison.text, comparison.reference
    table = _table(
        f"Accuracy over {text.windows * text.scored:,} positions",
        ["KLD mean\nnats/tok", "median", "99 %", "max", "top-1\n%", "PPL", "PPL\nratio", "first greedy\ndivergence"],
    )
    if reference.floor:
        kind = f"f32 against {reference.model.scheme}"
        table.add_row(two_lines("noise floor", kind), *_accuracy_cells(reference.floor), ABSENT)
    own = _cell(reference.perplexity, "{:.4g}")
    table.add_row(_reference_label(comparison), *[ABSENT] * 5, own, ABSENT, ABSENT)
    for result, name in zip(comparison.candidates, _names(comparison), strict=True):
        table.add_row(_label(result.model, name), *_accuracy_cells(result.accuracy), _divergence(result.greedy))
    return table


def _accuracy_cells(accuracy: Accuracy) -> list[str]:
    kld = accuracy.kld
    return [
        _cell(kld.mean, "{:.3g}"),
        *(number(value, "{:.3g}") for value in (kld.median, kld.p99, kld.maximum)),
        _top1(accuracy),
        _cell(accuracy.candidate, "{:.4g}"),
        _cell(accuracy.ratio, "{:.4f}" if accuracy.ratio.value < 100 else "{:.3g}"),
    ]


def _methods_table(comparison: Comparison) -> Table | None:
    """Files that differ in nothing but the method of calibration, against the plainly rounded one."""
    rows = side_by_side(comparison.candidates)
    if not rows:
        return None
    names = columns(cell.method for row in rows for cell in row.cells)
    table = _table("Methods at equal bytes, mean KLD", map(printable, names), first="format")
    for row in rows:
        cells = {cell.method: _method_cell(cell) for cell in row.cells}
        label = two_lines(f"{row.format} {row.scheme}", row.runtime)
        table.add_row(label, *(cells.get(name, ABSENT) for name in names))
    return table


def _method_cell(cell: Cell) -> str:
    value = f"{cell.kld.value:.3g}"
    if cell.method == PLAIN or cell.ratio is None:
        return value
    return f"{value}\n[dim]{cell.ratio:.2f} x {PLAIN}[/dim]"


def _attribution_table(comparison: Comparison) -> Table | None:
    """Whose the deviation is: what rounding the weights did, and what the file's graph and runtime do."""
    if not any(result.attribution for result in comparison.candidates):
        return None
    table = _table(
        "Where the deviation comes from",
        ["KLD\nin all", "by\nquantization", "by exporter\nand runtime", "top-1 %\nquantization", "top-1 %\nexporter"],
    )
    floor = comparison.reference.floor
    if floor:
        table.add_row("noise floor", _cell(floor.kld.mean, "{:.3g}"), ABSENT, ABSENT, ABSENT, ABSENT)
    for result, name in zip(comparison.candidates, _names(comparison), strict=True):
        total, parts = _cell(result.accuracy.kld.mean, "{:.3g}"), result.attribution
        both = (parts.quantization, parts.exporter) if parts else ()
        table.add_row(
            _label(result.model, name),
            total,
            *([_cell(part.kld.mean, "{:.3g}") for part in both] or [ABSENT] * 2),
            *([_top1(part) for part in both] or [ABSENT] * 2),
        )
    return table


def _pairs_table(comparison: Comparison) -> Table | None:
    """Files that hold the same weights, against each other: their runtimes' difference."""
    if not comparison.pairs:
        return None
    table = _table("Same weights, two players", ["KLD mean\nnats/tok", "99 %", "max", "top-1\n%"])
    names, floor = _names(comparison), comparison.reference.floor
    rows = [("noise floor", floor)] if floor else []
    rows += [(two_lines(names[p.first], names[p.second], dim=False), p.accuracy) for p in comparison.pairs]
    for label, accuracy in rows:
        kld = accuracy.kld
        far = (number(value, "{:.3g}") for value in (kld.p99, kld.maximum))
        table.add_row(label, _cell(kld.mean, "{:.3g}"), *far, _top1(accuracy))
    return table


def _speed_table(comparison: Comparison) -> Table:
    reference = comparison.reference
    speed = reference.speed
    lengths = f" ({speed.prefill_tokens} and {speed.decode_tokens} tokens)" if speed else ""
    heads = ["size\nMB", "bits per\nweight", "load\ns", "first token\nms", "prefill\ntok/s", "decode\ntok/s"]
    shares = comparison.bandwidth is not None
    if shares:
        heads.append("of band-\nwidth")
    table = _table(f"Size and speed{lengths}", [*heads, "peak RSS\nMB"])
    rows: list[tuple[str, ReferenceResult | CandidateResult]] = [(_reference_label(comparison), reference)]
    named = zip(_names(comparison), comparison.candidates, strict=True)
    rows += [(_label(result.model, name), result) for name, result in named]
    for label, result in rows:
        speed = result.speed
        rates = (speed.ttft_ms, speed.prefill_tok_s, speed.decode_tok_s) if speed else (None, None, None)
        table.add_row(
            label,
            number(result.model.bytes / 1e6, "{:,.1f}"),
            number(result.model.bits_per_weight, "{:.2f}"),
            number(result.load_seconds, "{:.2f}"),
            *(_rate(rate) for rate in rates),
            *([number(result.bandwidth_share, "{:.0%}")] if shares else []),
            number(None if result.peak_rss_bytes is None else result.peak_rss_bytes / 1e6, "{:,.0f}"),
        )
    return table


def _table(title: str, heads: Iterable[str], first: str = "file") -> Table:
    from rich.table import Table

    # no lines, two spaces between columns: the width of 100 is for figures
    table = Table(title=title, box=None, padding=(0, 2, 1, 0), pad_edge=False, title_justify="left", title_style="bold")
    table.add_column(first, overflow="fold", header_style="bold")
    for head in heads:
        table.add_column(head, justify="right", no_wrap=True, header_style="bold")
    return table


def _label(model: Candidate, name: str, kind: str = "") -> str:
    return two_lines(name, f"{kind or model.format} {model.kind}, {model.runtime.NAME}")


def _reference_label(comparison: Comparison) -> str:
    model = comparison.reference.model
    return _label(model, reference_name(model.path), "reference")


def _rate(estimate: Estimate | None) -> str:
    """Three digits or all before the point; more would be noise."""
    return _cell(estimate, "{:,.0f}" if estimate and estimate.value >= 100 else "{:.3g}")


def _top1(accuracy: Accuracy) -> str:
    return _cell(Estimate(100 * accuracy.top1.value, 100 * accuracy.top1.error), "{:.2f}")


def _cell(estimate: Estimate | None, form: str) -> str:
    """A value with its error below it."""
    if estimate is None:
        return ABSENT
    if not math.isfinite(estimate.error):
        return form.format(estimate.value)
    return f"{form.format(estimate.value)}\n[dim]±{error_text(estimate.error)}[/dim]"


def _divergence(greedy: Greedy | None) -> str:
    """The earliest and the mean first difference; below it, how near a tie the earliest was, and how many ties."""
    if greedy is None:
        return ABSENT
    first = greedy.first
    if first is None:
        return f"none\n[dim]in {len(greedy.prompts)} x {greedy.tokens}[/dim]"
    ties = f"\n[dim]{greedy.near_ties} near tie{'s' * (greedy.near_ties > 1)}[/dim]" if greedy.near_ties else ""
    margin = number(first.margin, "{:.2g}")
    return f"{first.position}, mean {greedy.mean_agreed:.1f}\n[dim]margin {margin}[/dim]{ties}"


def _lines(comparison: Comparison) -> Iterable[str]:
    """Notes and verdicts."""
    text, thresholds = comparison.text, comparison.thresholds
    yield (
        f"{text.tokens:,} tokens of text, {text.windows} windows of {text.window}, "
        f"the last {text.scored} predictions of each scored"
    )
    yield from _explanations(comparison)
    yield from (f"note: {note}" for note in comparison.notes)
    for result, name in zip(comparison.candidates, _names(comparison), strict=True):
        yield from (f"note: {name}: {note}" for note in result.notes)
        yield from (f"MISSED: {name}: {miss}" for miss in result.misses)
    if thresholds.asked and comparison.passed:
        yield "PASSED: every file is within the thresholds"


def _explanations(comparison: Comparison) -> Iterable[str]:
    """What the columns that are there mean."""
    greedy = comparison.candidates[0].greedy
    if greedy:
        yield (
            f"first greedy divergence: index of the first other token, earliest and mean of {len(greedy.prompts)} "
            f"prompts ({greedy.tokens} where none differs)"
        )
        yield (
            "margin: gap between the reference's two largest logits at the earliest one; "
            f"near ties: prompts that part where it is below {NEAR_TIE:g}, which is no damage"
        )
    if side_by_side(comparison.candidates):
        yield (
            "methods at equal bytes: files that differ in nothing but their calibration, in nats per token; "
            f"{PLAIN}: plain rounding, also of files that name no method"
        )
    if comparison.reference.floor:
        yield "noise floor: the reference against its own weights in f32; smaller figures of a file mean nothing"
    if any(result.attribution for result in comparison.candidates):
        yield (
            "by quantization: the file's decoded weights on the reference's runtime, in f32; "
            "by exporter and runtime: the file against those"
        )
    if comparison.bandwidth is not None:
        yield (
            f"of bandwidth: decode rate over what reading all weights once per token allows "
            f"at the {comparison.bandwidth / 1e9:.1f} GB/s measured here"
        )
    yield "load: the first file of each runtime has its library's import in it"
