"""The tables of a report, described once; `terminal`, `markdown` and `html` draw them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from smolexport.calibration.methods import methods
from smolexport.parity import results
from smolexport.parity.results import PLAIN, Accuracy, Comparison, Estimate, Greedy
from smolexport.text import printable

ABSENT = "-"


class Cell(NamedTuple):
    """A figure as text, its standard error (empty if unknown), and remarks below it."""

    value: str = ABSENT
    error: str = ""
    notes: tuple[str, ...] = ()


class Row(NamedTuple):
    """A row; name and detail are untrusted text.  Kind: `file`, `reference` or `noise floor`."""

    name: str
    detail: str
    cells: Sequence[Cell]
    kind: str = "file"
    missed: bool = False


class Table(NamedTuple):
    """Rows with their heads, two for name and detail and one per cell; the legend explains them in sentences."""

    title: str
    heads: Sequence[str]
    rows: Sequence[Row]
    legend: Sequence[str]


def tables(comparison: Comparison) -> list[Table]:
    """All tables that `comparison` has figures for."""
    models = [comparison.reference, *comparison.candidates]
    found = (
        _accuracy(comparison),
        _methods(comparison),
        _attribution(comparison),
        _pairs(comparison),
        speed_table(models, comparison.bandwidth_bytes_per_s),
    )
    return [table for table in found if any(row.kind == "file" for row in table.rows)]


def described(model: results.ModelInfo, kind: str = "") -> str:
    """What a model is: `gguf int4 gptq, llama.cpp`; `kind` replaces the format."""
    method = f" {model.method}" if model.method else ""
    return f"{kind or model.format} {model.scheme}{method}, {model.runtime}"


def method_rank(method: str | None) -> int:
    """Rank of a calibration method, plainest first; None is plain rounding."""
    names = list(methods())
    return names.index(method) if method in names else 0 if method is None else len(names)


def number(value: float | None, form: str) -> Cell:
    """A figure without error in the format `form`, a dash for None."""
    return Cell() if value is None else Cell(form.format(value))


def figure(estimate: Estimate | None, form: str = "{:.3g}") -> Cell:
    """A value, and its error in two significant digits or all before the decimal point."""
    if estimate is None:
        return Cell()
    error = estimate.error
    shown = f"{error:,.0f}" if error >= 10 or error == 0 else f"{error:.2g}"
    return Cell(form.format(estimate.value), shown if math.isfinite(error) else "")


def rate_figure(rate: Estimate | None) -> Cell:
    """A rate in three digits, or all before the decimal point."""
    return figure(rate, "{:,.0f}" if rate and rate.value >= 100 else "{:.3g}")


def speed_table(models: Sequence[results.ModelResult], bandwidth: float | None) -> Table:
    """Size, speed and memory of `models`; `bandwidth` is the measured memory bandwidth, bytes per second."""
    heads = "size,\nMB", "bits per\nweight", "load,\ns", "first token,\nms", "prefill,\ntok/s", "decode,\ntok/s"
    rows = []
    for result in models:
        model, speed, peak = result.model, result.speed, result.peak_rss_bytes
        rates = (speed.ttft_ms, speed.prefill_tok_s, speed.decode_tok_s) if speed else (None, None, None)
        kind = "reference" if isinstance(result, results.ReferenceResult) else "file"
        cells = [
            number(model.bytes / 1e6, "{:,.1f}"),
            number(model.bits_per_weight, "{:.2f}"),
            number(result.load_seconds, "{:.2f}"),
            *map(rate_figure, rates),
            number(result.bandwidth_share, "{:.0%}"),
            number(None if peak is None else peak / 1e6, "{:,.0f}"),
        ]
        rows.append(Row(model.name, described(model, kind if kind == "reference" else ""), cells, kind))
    legend = ["load: includes the import of the runtime's library at its first file."]
    if bandwidth is not None:
        legend.append(
            f"of bandwidth: decode rate over the rate that {bandwidth / 1e9:.1f} GB/s, measured here, would allow if "
            "every token reads all weights once."
        )
    first = next((result.speed for result in models if result.speed), None)
    lengths = f" (prefill of {first.prefill_tokens} tokens, decode of {first.decode_tokens})" if first else ""
    return _table(f"Size and speed{lengths}", [*heads, "of band-\nwidth", "peak RSS,\nMB"], rows, legend)


def _table(
    title: str,
    heads: Sequence[str],
    rows: Sequence[Row],
    legend: Sequence[str],
    label: tuple[str, str] = ("file", "format"),
) -> Table:
    """A table without the columns that have no figure."""
    kept = [place for place in range(len(heads)) if any(row.cells[place].value != ABSENT for row in rows)]
    rows = [row._replace(cells=[row.cells[place] for place in kept]) for row in rows]
    return Table(title, [*label, *(heads[place] for place in kept)], rows, legend)


def _floor(comparison: Comparison, cells: Callable[[Accuracy], Sequence[Cell]]) -> list[Row]:
    """The row of the noise floor, if it was measured; it comes first, because smaller figures are not meaningful."""
    floor, scheme = comparison.reference.noise_floor, comparison.reference.model.scheme
    return [Row("noise floor", f"f32 against {scheme}", cells(floor), "noise floor")] if floor else []


def _accuracy(comparison: Comparison) -> Table:
    reference, greedy = comparison.reference, comparison.candidates[0].greedy
    heads = "KLD,\nnats/tok", "median", "99 %", "max", "top-1,\n%", "PPL", "PPL\nratio", "first greedy\ndivergence"
    rows = _floor(comparison, lambda floor: [*_accuracy_cells(floor), Cell()])
    own = [*[Cell()] * 5, figure(reference.perplexity, "{:.4g}"), Cell(), Cell()]
    rows.append(Row(reference.model.name, described(reference.model, "reference"), own, "reference"))
    for result in comparison.candidates:
        cells = [*_accuracy_cells(result.accuracy), _divergence(result.greedy)]
        rows.append(Row(result.model.name, described(result.model), cells, missed=not result.passed))
    legend = [
        "KLD: divergence of the predictions from the reference's, 0 if they are equal; mean, median, 99 % and largest.",
        "top-1: share of positions with the same most likely token; PPL: perplexity; ±: one standard error.",
    ]
    if greedy:
        legend += [
            "first greedy divergence: index of the first token that differs, earliest and mean of "
            f"{len(greedy.prompts)} prompts ({greedy.tokens} if none differs).",
            "margin: gap between the reference's two largest logits at the earliest one; near ties: prompts that "
            f"diverge where it is below {results.NEAR_TIE:g}, which is not damage.",
        ]
    if reference.noise_floor:
        legend.append(
            "noise floor: the reference's weights in f32 against the reference; smaller figures are not meaningful."
        )
    return _table(f"Accuracy over {comparison.text.scored_positions:,} positions", heads, rows, legend)


def _accuracy_cells(accuracy: Accuracy) -> list[Cell]:
    kld, ratio = accuracy.kld, accuracy.perplexity_ratio
    return [
        figure(kld.mean),
        *(number(value, "{:.3g}") for value in (kld.median, kld.p99, kld.max)),
        _top1(accuracy),
        figure(accuracy.perplexity, "{:.4g}"),
        figure(ratio, "{:.4f}" if ratio.value < 100 else "{:.3g}"),
    ]


def _top1(accuracy: Accuracy) -> Cell:
    share = accuracy.top1_agreement
    return figure(Estimate(100 * share.value, 100 * share.error), "{:.2f}")


def _divergence(greedy: Greedy | None) -> Cell:
    """The earliest and the mean first divergence, the margin at the earliest one, and the near ties."""
    if greedy is None:
        return Cell()
    if greedy.first_divergence is None:
        return Cell("none", notes=(f"in {len(greedy.prompts)} x {greedy.tokens}",))
    ties = (f"{greedy.near_ties} near tie{'s' * (greedy.near_ties > 1)}",) if greedy.near_ties else ()
    first = f"{greedy.first_divergence}, mean {greedy.mean_agreed_tokens:.1f}"
    return Cell(first, notes=(f"margin {number(greedy.margin, '{:.2g}').value}", *ties))


def _methods(comparison: Comparison) -> Table:
    """Files that differ only in their calibration method."""
    names = sorted(dict.fromkeys(file.method for row in comparison.methods for file in row.files), key=method_rank)
    rows = []
    for row in comparison.methods:
        cells = {}
        for file in row.files:
            plain = file.method == PLAIN or file.ratio is None
            cells[file.method] = figure(file.kld)._replace(notes=() if plain else (f"{file.ratio:.2f} x {PLAIN}",))
        rows.append(Row(f"{row.format} {row.scheme}", row.runtime, [cells.get(name, Cell()) for name in names]))
    legend = [
        "methods: files that differ only in their calibration method; mean KLD, nats per token, and its ratio to plain "
        f"rounding's. {PLAIN}: plain rounding, also for files that name no method."
    ]
    return _table("Calibration methods at equal size", list(map(printable, names)), rows, legend, ("format", "runtime"))


def _attribution(comparison: Comparison) -> Table:
    """The deviation split into quantization error and exporter or runtime error."""
    heads = (
        "KLD\nin total",
        "by\nquantization",
        "by exporter\nand runtime",
        "quantization\ntop-1, %",
        "exporter\ntop-1, %",
    )
    rows = _floor(comparison, lambda floor: [figure(floor.kld.mean), *[Cell()] * 4])
    for result in comparison.candidates:
        if result.attribution:
            parts = result.attribution.quantization, result.attribution.exporter
            klds = [figure(part.kld.mean) for part in (result.accuracy, *parts)]
            rows.append(Row(result.model.name, described(result.model), [*klds, *map(_top1, parts)]))
    legend = [
        "by quantization: the file's decoded weights on the reference's runtime, in f32, against the reference.",
        "by exporter and runtime: the file against its decoded weights.",
    ]
    return _table("Where the deviation comes from", heads, rows, legend)


def _pairs(comparison: Comparison) -> Table:
    """Files with the same weights compared with each other: the difference between their runtimes."""

    def cells(accuracy: Accuracy) -> list[Cell]:
        kld = accuracy.kld
        return [figure(kld.mean), number(kld.p99, "{:.3g}"), number(kld.max, "{:.3g}"), _top1(accuracy)]

    names = [result.model.name for result in comparison.candidates]
    rows = _floor(comparison, cells)
    rows += [Row(names[pair.first], names[pair.second], cells(pair.accuracy)) for pair in comparison.pairs]
    heads = "KLD,\nnats/tok", "99 %", "max", "top-1,\n%"
    return _table("Same weights, two runtimes", heads, rows, [], ("file", "against"))
