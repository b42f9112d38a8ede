"""A comparison as tables for a terminal.

The tables need 100 columns and are printed at that width even if the console is narrower, so no figure is truncated.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from smolexport.parity.method_table import PLAIN, columns
from smolexport.parity.report.names import ABSENT, described, figure, number, percent, rate, two_lines
from smolexport.parity.results import NEAR_TIE, Accuracy, Comparison, Estimate, Greedy, MethodFile, ModelInfo
from smolexport.text import one_line, printable

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

_WIDTH = 100


def render(comparison: Comparison, console: Console) -> None:
    """Print the tables, the notes and one line per missed threshold."""
    width = max(_WIDTH, console.width)
    tables = _accuracy_table, _methods_table, _attribution_table, _pairs_table, _speed_table
    for table in filter(None, (make(comparison) for make in tables)):
        if console.width < _WIDTH:
            table.width = width
        console.print(table, crop=False)
        console.print()
    for line in _lines(comparison):
        console.print(one_line(line), markup=False, highlight=False, soft_wrap=True)


def _accuracy_table(comparison: Comparison) -> Table:
    """The noise floor comes first: smaller figures are not meaningful."""
    reference = comparison.reference
    table = _table(
        f"Accuracy over {comparison.text.scored_positions:,} positions",
        ["KLD mean\nnats/tok", "median", "99 %", "max", "top-1\n%", "PPL", "PPL\nratio", "first greedy\ndivergence"],
    )
    if reference.noise_floor:
        kind = f"f32 against {reference.model.scheme}"
        table.add_row(two_lines("noise floor", kind), *_accuracy_cells(reference.noise_floor), ABSENT)
    own = _estimate(reference.perplexity, "{:.4g}")
    table.add_row(_label(reference.model, "reference"), *[ABSENT] * 5, own, ABSENT, ABSENT)
    for result in comparison.candidates:
        table.add_row(_label(result.model), *_accuracy_cells(result.accuracy), _divergence(result.greedy))
    return table


def _accuracy_cells(accuracy: Accuracy) -> list[str]:
    kld = accuracy.kld
    return [
        _estimate(kld.mean, "{:.3g}"),
        *(f"{value:.3g}" for value in (kld.median, kld.p99, kld.max)),
        _cell(percent(accuracy.top1_agreement)),
        _estimate(accuracy.perplexity, "{:.4g}"),
        _estimate(accuracy.perplexity_ratio, "{:.4f}" if accuracy.perplexity_ratio.value < 100 else "{:.3g}"),
    ]


def _methods_table(comparison: Comparison) -> Table | None:
    """Files that differ only in their calibration method."""
    rows = comparison.methods
    if not rows:
        return None
    names = columns(file.method for row in rows for file in row.files)
    table = _table("Methods at equal size, mean KLD", map(printable, names), first="format")
    for row in rows:
        cells = {file.method: _method_cell(file) for file in row.files}
        label = two_lines(f"{row.format} {row.scheme}", row.runtime)
        table.add_row(label, *(cells.get(name, ABSENT) for name in names))
    return table


def _method_cell(file: MethodFile) -> str:
    value = f"{file.kld.value:.3g}"
    if file.method == PLAIN or file.ratio is None:
        return value
    return f"{value}\n[dim]{file.ratio:.2f} x {PLAIN}[/dim]"


def _attribution_table(comparison: Comparison) -> Table | None:
    """The deviation split into quantization error and exporter or runtime error."""
    if not any(result.attribution for result in comparison.candidates):
        return None
    table = _table(
        "Where the deviation comes from",
        ["KLD\nin total", "by\nquantization", "by exporter\nand runtime", "top-1 %\nquantization", "top-1 %\nexporter"],
    )
    floor = comparison.reference.noise_floor
    if floor:
        table.add_row("noise floor", _estimate(floor.kld.mean, "{:.3g}"), ABSENT, ABSENT, ABSENT, ABSENT)
    for result in comparison.candidates:
        parts = result.attribution
        both = (parts.quantization, parts.exporter) if parts else ()
        table.add_row(
            _label(result.model),
            _estimate(result.accuracy.kld.mean, "{:.3g}"),
            *([_estimate(part.kld.mean, "{:.3g}") for part in both] or [ABSENT] * 2),
            *([_cell(percent(part.top1_agreement)) for part in both] or [ABSENT] * 2),
        )
    return table


def _pairs_table(comparison: Comparison) -> Table | None:
    """Files with the same weights compared with each other: the difference between their runtimes."""
    if not comparison.pairs:
        return None
    table = _table("Same weights, two runtimes", ["KLD mean\nnats/tok", "99 %", "max", "top-1\n%"])
    names, floor = [result.model.name for result in comparison.candidates], comparison.reference.noise_floor
    rows = [("noise floor", floor)] if floor else []
    rows += [(two_lines(names[p.first], names[p.second], dim=False), p.accuracy) for p in comparison.pairs]
    for label, accuracy in rows:
        kld = accuracy.kld
        top1 = _cell(percent(accuracy.top1_agreement))
        table.add_row(label, _estimate(kld.mean, "{:.3g}"), f"{kld.p99:.3g}", f"{kld.max:.3g}", top1)
    return table


def _speed_table(comparison: Comparison) -> Table:
    reference = comparison.reference
    speed = reference.speed
    lengths = f" ({speed.prefill_tokens} and {speed.decode_tokens} tokens)" if speed else ""
    heads = ["size\nMB", "bits per\nweight", "load\ns", "first token\nms", "prefill\ntok/s", "decode\ntok/s"]
    shares = comparison.bandwidth_bytes_per_s is not None
    if shares:
        heads.append("of band-\nwidth")
    table = _table(f"Size and speed{lengths}", [*heads, "peak RSS\nMB"])
    for result in (reference, *comparison.candidates):
        speed = result.speed
        rates = (speed.ttft_ms, speed.prefill_tok_s, speed.decode_tok_s) if speed else (None, None, None)
        table.add_row(
            _label(result.model, "reference" if result is reference else ""),
            number(result.model.bytes / 1e6, "{:,.1f}"),
            number(result.model.bits_per_weight, "{:.2f}"),
            number(result.load_seconds, "{:.2f}"),
            *(_cell(rate(one)) for one in rates),
            *([number(result.bandwidth_share, "{:.0%}")] if shares else []),
            number(None if result.peak_rss_bytes is None else result.peak_rss_bytes / 1e6, "{:,.0f}"),
        )
    return table


def _table(title: str, heads: Iterable[str], first: str = "file") -> Table:
    from rich.table import Table

    # no lines and two spaces between columns leave the 100 columns for figures
    table = Table(title=title, box=None, padding=(0, 2, 1, 0), pad_edge=False, title_justify="left", title_style="bold")
    table.add_column(first, overflow="fold", header_style="bold")
    for head in heads:
        table.add_column(head, justify="right", no_wrap=True, header_style="bold")
    return table


def _label(model: ModelInfo, kind: str = "") -> str:
    return two_lines(model.name, described(model, kind))


def _estimate(estimate: Estimate, form: str) -> str:
    return _cell(figure(estimate, form))


def _cell(shown: tuple[str, str]) -> str:
    """A value with its error below it."""
    value, error = shown
    return f"{value}\n[dim]±{error}[/dim]" if error else value


def _divergence(greedy: Greedy | None) -> str:
    """The earliest and the mean first divergence; below it, the margin at the earliest one and the near ties."""
    if greedy is None:
        return ABSENT
    if greedy.first_divergence is None:
        return f"none\n[dim]in {len(greedy.prompts)} x {greedy.tokens}[/dim]"
    ties = f"\n[dim]{greedy.near_ties} near tie{'s' * (greedy.near_ties > 1)}[/dim]" if greedy.near_ties else ""
    margin = number(greedy.margin, "{:.2g}")
    return f"{greedy.first_divergence}, mean {greedy.mean_agreed_tokens:.1f}\n[dim]margin {margin}[/dim]{ties}"


def _lines(comparison: Comparison) -> Iterable[str]:
    """Notes and verdicts."""
    text = comparison.text
    yield (
        f"{text.tokens:,} tokens of text, {text.windows} windows of {text.window}, "
        f"the last {text.scored_per_window} predictions of each scored"
    )
    yield from _explanations(comparison)
    yield from (f"note: {note}" for note in comparison.notes)
    for result in comparison.candidates:
        yield from (f"note: {result.model.name}: {note}" for note in result.notes)
        yield from (f"MISSED: {result.model.name}: {miss}" for miss in result.missed)
    if comparison.passed and any(result.thresholds.values() for result in comparison.candidates):
        yield "PASSED: every file meets its thresholds"


def _explanations(comparison: Comparison) -> Iterable[str]:
    """Legend of the columns that are shown."""
    greedy = comparison.candidates[0].greedy
    if greedy:
        yield (
            f"first greedy divergence: index of the first token that differs, earliest and mean of "
            f"{len(greedy.prompts)} prompts ({greedy.tokens} if none differs)"
        )
        yield (
            "margin: gap between the reference's two largest logits at the earliest one; "
            f"near ties: prompts that diverge where it is below {NEAR_TIE:g}, which is not damage"
        )
    if comparison.methods:
        yield (
            "methods at equal size: files that differ only in their calibration method, in nats per token; "
            f"{PLAIN}: plain rounding, also for files that name no method"
        )
    if comparison.reference.noise_floor:
        yield "noise floor: the reference's weights in f32 against the reference; smaller figures are not meaningful"
    if any(result.attribution for result in comparison.candidates):
        yield (
            "by quantization: the file's decoded weights on the reference's runtime, in f32; "
            "by exporter and runtime: the file against its decoded weights"
        )
    if comparison.bandwidth_bytes_per_s is not None:
        yield (
            f"of bandwidth: decode rate over the rate that {comparison.bandwidth_bytes_per_s / 1e9:.1f} GB/s, measured "
            "here, allow for reading all weights once per token"
        )
    yield "load: includes the import of the runtime's library at its first file"
