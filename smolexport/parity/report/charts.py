"""The charts of the page, drawn from a comparison.  A chart without figures to show is left out.

The colour shows a file's format; among files of one format, dashes and marker show scheme and method in the order of
bits per weight, so that the same scheme and method has the same style in all formats.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smolexport.parity.report.svg import INKS, SERIES, log_scale, place_labels, short_power, to_svg
from smolexport.parity.report.tables import method_rank, rate_figure
from smolexport.parity.results import CalibrationEffect, CandidateResult, Comparison, Estimate, ModelInfo

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_WIDE = 9.6  # inches, the width of the page
_FAR = 20  # a noise floor so many times below all files is not drawn: it would compress the curves
_DASHES: tuple[Any, ...] = (
    "-", (0, (4, 1.5)), (0, (1.2, 1.4)), (0, (6, 1.5, 1.2, 1.5)), (0, (2.5, 1)), (0, (8, 2)), (0, (3, 1, 1, 1, 1, 1)),
    (0, (1, 3)),
)  # fmt: skip
_MARKERS = "osD^vPX*"


@dataclass(frozen=True)
class Chart:
    """A chart: its unique key, heading, how to read it, and the element `svg`."""

    key: str
    title: str
    caption: str
    svg: str


@dataclass(frozen=True)
class Style:
    """Name, colour, dashes and marker of a file."""

    name: str
    colour: str
    dashes: Any
    marker: str

    @property
    def names(self) -> str:
        """The names of all files with this style, on one line."""
        return self.name.replace("\n", ", ")

    def line(self, **more: Any) -> dict[str, Any]:
        """Arguments for a labelled line with markers."""
        return {
            "color": self.colour, "linestyle": self.dashes, "marker": self.marker, "label": self.name,
            "markeredgewidth": 0, **more,
        }  # fmt: skip


Styled = Sequence[tuple[CandidateResult, Style]]


def charts(comparison: Comparison) -> list[Chart]:
    """All charts that `comparison` has figures for; needs matplotlib."""
    import matplotlib

    files = list(zip(comparison.candidates, styles_of([file.model for file in comparison.candidates]), strict=True))
    # whatever the user's own settings of matplotlib are
    with matplotlib.rc_context(fname=Path(__file__).with_name("charts.mplstyle")):
        found = (
            _size(comparison, files),
            _attribution(comparison, files),
            _distribution(comparison, files),
            _layers(files),
            _calibration(files),
            _positions(files),
            _speed(comparison, files),
        )
    return [chart for chart in found if chart is not None]


def styles_of(models: Sequence[ModelInfo]) -> list[Style]:
    """A style for each model."""
    formats = list(dict.fromkeys(model.format for model in models))
    found = []
    for model in models:
        rank = sorted({_kind(one) for one in models if one.format == model.format}).index(_kind(model))
        colour = INKS[f"series-{formats.index(model.format) % SERIES}"]
        found.append(Style(_shorter(model.name), colour, _DASHES[rank % len(_DASHES)], _MARKERS[rank % len(_MARKERS)]))
    return found


def _kind(model: ModelInfo) -> tuple[float, int, str, int, str]:
    """What distinguishes files of one format, in the order of their styles: size, scheme, method."""
    bits = -round(model.bits_per_weight, 1)
    return bits, len(model.scheme), model.scheme, method_rank(model.method), model.method or ""


def _shorter(name: str, most: int = 34) -> str:
    """A long name without its middle; the end shows the scheme."""
    return name if len(name) <= most else f"{name[: most // 2 - 1]}…{name[-most // 2 :]}"


def _drawable(value: float) -> bool:
    """Whether a log scale can show `value`."""
    return math.isfinite(value) and value > 0


def _floor(comparison: Comparison) -> float | None:
    """Mean divergence of the noise floor, if a log scale can show it."""
    floor = comparison.reference.noise_floor
    return floor.kld.mean.value if floor and _drawable(floor.kld.mean.value) else None


def _text(value: float) -> str:
    """A figure in an alternative text."""
    return short_power(f"{value:.2g}") if math.isfinite(value) else "unknown"


def _figure(height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(_WIDE, height), layout="constrained")


def _rows(axes: Axes, names: Sequence[str]) -> None:
    """Name the rows of a bar chart, first one on top."""
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.4, -0.6)


def _sharing(files: Styled, key: Callable[[CandidateResult], Hashable]) -> Styled:
    """The first file of each `key`, named after all that share it and without a format's colour if they are several.

    Files with the key None are left out.
    """
    found: dict[Hashable, tuple[CandidateResult, Style]] = {}
    for file, own in files:
        if (mark := key(file)) is not None:
            first, shared = found.get(mark, (file, own))
            several = {"name": f"{shared.name}\n{own.name}", "colour": INKS["floor"]} if mark in found else {}
            found[mark] = first, replace(shared, **several)
    return list(found.values())


def _floor_line(axes: Axes, floor: float, *, across: bool) -> None:
    """A labelled line at the noise floor."""
    line = axes.axhline if across else axes.axvline
    line(floor, color=INKS["floor"], linewidth=1.2, linestyle=(0, (5, 3)), zorder=1)
    spot: Any = {"xy": (floor, 1), "xycoords": ("data", "axes fraction"), "xytext": (0, 3), "ha": "center"}
    if across:
        spot = {"xy": (0, floor), "xycoords": ("axes fraction", "data"), "xytext": (4, 3)}
    axes.annotate("noise floor", **spot, textcoords="offset points", color=INKS["muted"], fontsize=7.5)


def _size(comparison: Comparison, files: Styled) -> Chart | None:
    """Divergence against size: a point per file, with a line through the sizes of each format and method."""
    shown = [(file, own) for file, own in files if _drawable(file.accuracy.kld.mean.value)]
    if not shown:
        return None
    points = [(file.model.bytes / 1e6, file.accuracy.kld.mean.value) for file, _ in shown]
    lines = _size_lines(shown)
    named = len({method for _, _, method in lines}) > 1 or any(len(group) > 1 for group in lines.values())
    figure = _figure(4.4)
    axes = figure.add_subplot()
    log_scale(axes, "y")
    for (name, _, method), group in lines.items():
        spots = sorted((file.model.bytes / 1e6, file.accuracy.kld.mean.value) for file, _ in group)
        axes.plot(
            *zip(*spots, strict=True), color=group[0][1].colour, linestyle=_DASHES[method_rank(method) % len(_DASHES)],
            linewidth=1.2, label=f"{name} {method or 'rtn'}" if named else None,
        )  # fmt: skip
    for (file, own), point in zip(shown, points, strict=True):
        mean, error = file.accuracy.kld.mean.value, file.accuracy.kld.mean.error
        # stays above zero, for the log scale
        bar = [[min(error, 0.95 * mean)], [error]] if math.isfinite(error) else None
        axes.errorbar(*point, yerr=bar, **own.line(markersize=6, linewidth=1, label=None))
    axes.margins(x=0.18, y=0.14)
    floor = _floor(comparison)
    if floor and floor * _FAR >= min(kld for _, kld in points):
        _floor_line(axes, floor, across=True)
    axes.set(xlabel="size, MB", ylabel="mean KLD, nats per token")
    axes.grid(True, axis="both")
    if named:
        figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper", handlelength=3)
    # with format and method in the legend, a point needs only its scheme
    kinds = [f"{file.model.scheme} {file.model.method or ''}".rstrip() for file, _ in shown]
    names = kinds if named else [own.name for _, own in shown]
    place_labels(figure, axes, points, names, [own.colour for _, own in shown])
    sizes = "; ".join(
        f"{file.model.name} {size:.1f} MB, {kld:.2g}" for (file, _), (size, kld) in zip(shown, points, strict=True)
    )
    joined = " A line joins the sizes of one format and method: at equal size, lower is better." if named else ""
    caption = f"Lower left is better: smaller, and closer to the reference.{joined}"
    alt = f"{'Curves' if named else 'Scatter'} of mean KLD against size of all files: {sizes}."
    return Chart("size", "Divergence against size", caption, to_svg(figure, "size", alt))


def _size_lines(shown: Styled) -> dict[tuple[str, str, str | None], list[tuple[CandidateResult, Style]]]:
    """Files by format (with the runtime if a format runs on several) and method."""
    models = [file.model for file, _ in shown]
    several = len({(model.format, model.runtime) for model in models}) > len({model.format for model in models})
    found: dict[tuple[str, str, str | None], list[tuple[CandidateResult, Style]]] = {}
    for file, own in shown:
        model = file.model
        name = f"{model.format} on {model.runtime}" if several else model.format
        found.setdefault((name, model.runtime, model.method), []).append((file, own))
    return dict(sorted(found.items(), key=lambda one: (one[0][:2], method_rank(one[0][2]))))


def _attribution(comparison: Comparison, files: Styled) -> Chart | None:
    shown = [
        (own.name, file.attribution.quantization.kld.mean.value, file.attribution.exporter.kld.mean.value)
        for file, own in files
        if file.attribution
    ]
    positive = [mean for _, *means in shown for mean in means if _drawable(mean)]
    if not positive:
        return None
    floor = _floor(comparison)
    # a value that a log scale cannot show is drawn at the edge of the chart
    left = max(1e-9, min([*positive, *([floor] if floor else [])]) / 4)
    figure = _figure(1.1 + 0.42 * len(shown))
    axes = figure.add_subplot()
    log_scale(axes, "x")
    axes.grid(True, axis="x")
    for row, (_, *means) in enumerate(shown):
        bars = (("quantization", "part-a", row - 0.19), ("exporter", "part-b", row + 0.19))
        for mean, (part, ink, place) in zip(means, bars, strict=True):
            right = max(mean, left) if math.isfinite(mean) else left
            bar = axes.barh(place, right - left, 0.34, left=left, color=INKS[ink], label=None if row else part)
            text = _text(mean) if math.isfinite(mean) else "not finite"
            box = {"facecolor": INKS["surface"], "edgecolor": "none", "pad": 0.6}  # over the floor's line
            axes.bar_label(bar, [text], padding=4, fontsize=7.5, bbox=box)
    axes.tick_params(axis="y", length=0)
    _rows(axes, [name for name, *_ in shown])
    axes.set(xlim=(left, max(positive) * 2.5), xlabel="mean KLD, nats per token")
    if floor:
        _floor_line(axes, floor, across=False)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper right", ncols=2)
    parts = "; ".join(f"{name} {_text(first)} and {_text(second)}" for name, first, second in shown)
    alt = f"Bars on a log scale, mean KLD by quantization and by exporter: {parts}."
    return Chart(
        "attribution",
        "Quantization and exporter error",
        "Quantization: the effect of rounding the weights. Exporter: the effect of graph, metadata and runtime beyond "
        "that, including activations rounded to 8 bits; far above the noise floor it is a fault.",
        to_svg(figure, "attribution", alt),
    )


def _distribution(comparison: Comparison, files: Styled) -> Chart | None:
    edges, floor = comparison.kld_edges, comparison.reference.noise_floor
    rows = [(floor, "noise floor", INKS["floor"])] if floor else []
    rows += [(file.accuracy, own.name, own.colour) for file, own in files]
    filled = [bin_ for one, _, _ in rows for bin_, count in enumerate(one.kld_histogram.counts) if count]
    if not filled:
        return None
    figure = _figure(0.8 + 0.44 * len(rows))
    axes = figure.add_subplot()
    log_scale(axes, "x")
    axes.grid(True, axis="x")
    for row, (accuracy, _, colour) in enumerate(rows):
        base, counts, kld = -float(row), accuracy.kld_histogram.counts, accuracy.kld
        tops = [base + 0.85 * count / (max(counts) or 1) for count in counts]
        axes.stairs(tops, edges, baseline=base, fill=True, color=colour, alpha=0.28, linewidth=0)
        axes.stairs(tops, edges, baseline=base, color=colour, linewidth=1.1)
        for value, dashes in ((kld.median, ":"), (kld.mean.value, "-"), (kld.p99, (0, (3, 1.5)))):
            if _drawable(value):
                axes.plot([value] * 2, [base, base + 0.42], color=INKS["ink"], lw=1.4, ls=dashes)
    axes.set_yticks([0.3 - row for row in range(len(rows))], [name for _, name, _ in rows])
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    limits = edges[min(filled)], edges[max(filled) + 1]
    axes.set(xlim=limits, ylim=(-len(rows) + 0.9, 1.0), xlabel="KLD of a position, nats per token")
    spans = "; ".join(f"{name} from median {_text(a.kld.median)} to 99 % {_text(a.kld.p99)}" for a, name, _ in rows)
    return Chart(
        "distribution",
        "Distribution of the divergence",
        "Each row shows one file's scored positions. Vertical lines: median (dotted), mean (solid), 99 % (dashed).",
        to_svg(figure, "distribution", f"Histograms of KLD per position on a log scale: {spans}."),
    )


def _layers(files: Styled) -> Chart | None:
    """Error of the weights by layer, and of the tensors outside the layers; one line per fingerprint."""

    def key(file: CandidateResult) -> Hashable:
        return (file.fingerprint or id(file)) if any(_drawable(e.relative) for e in file.tensor_errors) else None

    shown = _sharing(files, key)
    if not shown:
        return None
    # norms and biases stay floats: tensors that no file changed are left out
    every = [error for file, _ in shown for error in file.tensor_errors]
    outside = list(dict.fromkeys(e.source for e in every if e.layer is None and _drawable(e.relative)))
    figure = _figure(3.3)
    wide = [3.4, max(0.55 * len(outside), 0.7)] if outside else [1]
    plots = figure.subplots(1, len(wide), sharey=True, width_ratios=wide, squeeze=False)[0]
    ranges = []
    for file, own in shown:
        means = _by_layer(file)
        plots[0].plot(list(means), list(means.values()), **own.line(markersize=3.2))
        ranges += [f"{own.names} {min(means.values()):.2g} to {max(means.values()):.2g} %"] if means else []
        for error in file.tensor_errors:
            if error.source in outside and math.isfinite(error.relative):
                plots[1].plot(outside.index(error.source), 100 * error.relative, **own.line(markersize=6))
    plots[0].set(ylabel="relative error of the weights, %", ylim=(0, None))
    if outside:
        stems = [source.removesuffix(".weight").rpartition(".")[2] for source in outside]
        plots[1].set_xticks(range(len(outside)), [_shorter(stem, 16) for stem in stems], rotation=20)
        plots[1].set_xlim(-0.6, len(outside) - 0.4)
    _finish_layers(figure, plots)
    return Chart(
        "layers",
        "Quantization error by layer",
        "Root of the summed squared differences between decoded and original weights, relative to the weights; "
        "files with the same weights share a line.",
        to_svg(figure, "layers", f"Relative error of the weights by layer: {'; '.join(ranges)}."),
    )


def _finish_layers(figure: Figure, plots: Sequence[Axes]) -> None:
    """Whole layers on the first plot's axis, lines across all plots, and a legend of the first plot's curves."""
    plots[0].set_xlabel("layer")
    plots[0].locator_params(axis="x", integer=True)
    for axes in plots:
        axes.grid(True, axis="y")
    handles = plots[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside right upper", handlelength=2.6, labelspacing=0.9)


def _by_layer(file: CandidateResult) -> dict[int, float]:
    """Root mean square of the relative errors in each layer, weighted by the tensors' sizes, percent."""
    sums: dict[int, tuple[float, int]] = {}
    for error in file.tensor_errors:
        if error.layer is not None and math.isfinite(error.relative):
            total, weights = sums.get(error.layer, (0.0, 0))
            sums[error.layer] = total + error.weights * error.relative**2, weights + error.weights
    return {layer: 100 * math.sqrt(total / weights) for layer, (total, weights) in sorted(sums.items()) if weights}


def _effects(file: CandidateResult) -> tuple[CalibrationEffect, ...]:
    """The errors before and after calibration that a log scale can show."""
    return tuple(effect for effect in file.calibration_errors if effect.before > 0 and effect.after > 0)


def _means(effects: Sequence[CalibrationEffect], key: str) -> dict[Any, tuple[float, float]]:
    """Mean errors before and after by `layer` or by `kind`; tensors outside the layers have no layer."""
    groups: dict[Any, list[CalibrationEffect]] = {}
    for effect in effects:
        groups.setdefault(getattr(effect, key), []).append(effect)
    return {place: _mean(group) for place, group in groups.items() if place is not None}


def _mean(effects: Sequence[CalibrationEffect]) -> tuple[float, float]:
    return statistics.fmean(effect.before for effect in effects), statistics.fmean(effect.after for effect in effects)


def _calibration(files: Styled) -> Chart | None:
    """One line for all files with the same errors: their weights are the same."""
    shown = [(_effects(file), own) for file, own in _sharing(files, lambda file: _effects(file) or None)]
    if not shown:
        return None
    figure = _figure(3.5)
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=[1.4, 1])
    log_scale(left, "y")
    every = [effect for effects, _ in shown for effect in effects]
    kinds = list(dict.fromkeys(effect.kind for effect in every))
    plain: list[list[tuple[int, float]]] = []
    for place, (effects, own) in enumerate(shown):
        inside = dict(sorted(_means(effects, "layer").items()))
        before = [(layer, mean) for layer, (mean, _) in inside.items()]
        if before and before not in plain:  # several methods start from the same errors
            label = None if plain else "rounded to nearest"
            left.plot(*zip(*before, strict=True), color=INKS["muted"], linestyle=(0, (1, 2)), label=label)
            plain.append(before)
        left.plot(list(inside), [mean for _, mean in inside.values()], **own.line(markersize=4))
        shift = (place - (len(shown) - 1) / 2) * min(0.22, 0.8 / len(shown))
        for kind, (first, last) in _means(effects, "kind").items():
            spot = kinds.index(kind) + shift
            right.plot([spot, spot], [first, last], color=INKS["muted"], linewidth=0.8, zorder=1)
            right.plot(spot, first, color=INKS["muted"], marker="_", markersize=7)
            right.plot(spot, last, **own.line(markersize=4))
    left.set_ylabel("squared output error, relative")
    right.set_xticks(range(len(kinds)), kinds, rotation=30, ha="right")
    right.set_xlim(-0.6, len(kinds) - 0.4)
    _finish_layers(figure, (left, right))
    means = "; ".join(f"{own.names} {' to '.join(map(_text, _mean(effects)))}" for effects, own in shown)
    outside = " The embedding, as head, is shown among the kinds only." if any(e.layer is None for e in every) else ""
    return Chart(
        "calibration",
        "Output error before and after calibration",
        "On the calibration text, for each matrix alone: mean over the matrices of a layer (left), and over the layers "
        "for each kind of matrix (right), from rounding to nearest on the same scales (bar) to the method (marker). "
        f"For distil: before its scales are trained.{outside}",
        to_svg(figure, "calibration", f"Output error by layer, mean before and after: {means}."),
    )


def _positions(files: Styled) -> Chart | None:
    shown = [(file.by_position, own) for file, own in files if file.by_position]
    if not any(_drawable(kld) for runs, _ in shown for kld in runs.kld):
        return None
    figure = _figure(3.1 + 0.17 * -(-len(shown) // 3))
    left, right = figure.subplots(1, 2)
    log_scale(left, "y")
    for runs, own in shown:
        curve = own.line(marker="")
        left.plot(runs.tokens_before, [kld if _drawable(kld) else math.nan for kld in runs.kld], **curve)
        right.plot(runs.tokens_before, [100 * share for share in runs.top1_agreement], **curve)
    left.set_title("mean KLD, nats per token")
    right.set_title("same top token, %")
    for axes in (left, right):
        axes.set_xlabel("tokens before")
        axes.grid(True, axis="y")
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=3, handlelength=3)
    ends = "; ".join(
        f"{own.name} {_text(runs.kld[0])} in the first, {_text(runs.kld[-1])} in the last run" for runs, own in shown
    )
    alt = f"Two line charts over the position in the window, mean KLD and same top token: {ends}."
    return Chart(
        "positions",
        "Agreement by position in the window",
        "Runs of neighbouring positions, over all windows. A curve that rises to the right is damage that grows with "
        "the context: rope, a key-value cache in few bits.",
        to_svg(figure, "positions", alt),
    )


def _speed(comparison: Comparison, files: Styled) -> Chart | None:
    models = [
        (comparison.reference, "reference", INKS["floor"]),
        *((file, own.name, own.colour) for file, own in files),
    ]
    shown = [(model.speed, model.bandwidth_share, name, colour) for model, name, colour in models if model.speed]
    if not shown:
        return None
    figure = _figure(1.0 + 0.32 * len(shown))
    prefill, decode = figure.subplots(1, 2, sharey=True)
    for row, (speed, share, _, colour) in enumerate(shown):
        _bar(prefill, row, speed.prefill_tok_s, colour)
        _bar(decode, row, speed.decode_tok_s, colour, "" if share is None else f" · {share:.0%}")
    prefill.set_title(f"Prefill, {shown[0][0].prefill_tokens} tokens")
    decode.set_title(f"Decode, {shown[0][0].decode_tokens} tokens")
    for axes in (prefill, decode):
        axes.set_xlabel("tokens per second")
        axes.grid(True, axis="x")
        axes.margins(x=0.24)
        axes.set_xlim(left=0)
        axes.locator_params(axis="x", nbins=5)
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.tick_params(axis="y", length=0)
    _rows(prefill, [name for _, _, name, _ in shown])
    shares = any(share is not None for _, share, _, _ in shown)
    rates = "; ".join(
        f"{name} {_text(speed.prefill_tok_s.value)} and {_text(speed.decode_tok_s.value)}"
        for speed, _, name, _ in shown
    )
    return Chart(
        "speed",
        "Speed",
        "Whiskers are one standard error over the repetitions."
        + (" Next to decode: its share of what memory bandwidth allows." if shares else ""),
        to_svg(figure, "speed", f"Bars of tokens per second, prefill and decode: {rates}."),
    )


def _bar(axes: Axes, row: int, rate: Estimate, colour: str, share: str = "") -> None:
    """A rate with its whisker and its figure."""
    whisker = {"elinewidth": 1, "capsize": 2.5, "color": INKS["ink"], "ecolor": INKS["ink"]}
    error = rate.error if rate.error and math.isfinite(rate.error) else None
    bar = axes.barh(row, rate.value, 0.62, color=colour, alpha=0.85, xerr=error, error_kw=whisker)
    axes.bar_label(bar, [rate_figure(rate).value + share], padding=5, fontsize=7.5)
