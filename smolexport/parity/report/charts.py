"""The charts of the page, drawn from a comparison.  A chart without figures to show is left out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from smolexport.parity.report.calibration_chart import calibration_chart
from smolexport.parity.report.label_layout import place_labels
from smolexport.parity.report.names import short_power
from smolexport.parity.report.styles import (
    DASHES,
    WIDE,
    Shown,
    Style,
    drawable,
    figure_text,
    floor_of,
    method_rank,
    shorter,
    styled,
)
from smolexport.parity.report.svg import INKS, Chart, draw, log_scale
from smolexport.parity.results import Accuracy, CandidateResult, Comparison, Estimate, WeightError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_LEFT = 1e-9  # a value that a log scale cannot show stands at the edge of the chart
_FAR = 20  # a noise floor so many times below all files is not drawn: it would compress the curves


def charts(comparison: Comparison) -> list[Chart]:
    """All charts that `comparison` has figures for; raises MissingDependencyError without matplotlib."""
    shown = styled(comparison)
    found = (
        _size(comparison, shown),
        _distribution(comparison, shown),
        _attribution(comparison, shown),
        _layers(shown),
        calibration_chart(shown),
        _positions(shown),
        _speed(comparison, shown),
    )
    return [chart for chart in found if chart is not None]


def _size(comparison: Comparison, files: Shown) -> Chart | None:
    """Divergence against size: a point per file, with a line through the sizes of each format and method."""
    shown = [(file, style) for file, style in files if drawable(file.accuracy.kld.mean.value)]
    if not shown:
        return None
    points = [(file.model.bytes / 1e6, file.accuracy.kld.mean.value) for file, _ in shown]
    floor, least = floor_of(comparison), min(kld for _, kld in points)
    if floor and floor * _FAR < least:
        floor = None
    lines = _size_lines(shown)
    named = len({method for _, _, method in lines}) > 1 or any(len(group) > 1 for group in lines.values())

    def paint(figure: Figure) -> None:
        axes = figure.add_subplot()
        log_scale(axes, "y")
        for (name, _, method), group in lines.items():
            dashes = DASHES[method_rank(method) % len(DASHES)]
            spots = sorted((file.model.bytes / 1e6, file.accuracy.kld.mean.value) for file, _ in group)
            kind = f"{name} {method or 'rtn'}" if named else None
            axes.plot(*zip(*spots, strict=True), color=group[0][1].colour, linestyle=dashes, linewidth=1.2, label=kind)
        for (file, style), point in zip(shown, points, strict=True):
            axes.errorbar(
                *point, yerr=_error_bar(file.accuracy.kld.mean),
                color=style.colour, marker=style.marker, markersize=6, markeredgewidth=0, linewidth=1,
            )  # fmt: skip
        axes.margins(x=0.18, y=0.14)
        if floor:
            _floor_line(axes, floor, across=True)
        axes.set_xlabel("size, MB")
        axes.set_ylabel("mean KLD, nats per token")
        axes.grid(True, axis="both")
        if named:
            figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper", handlelength=3)
        # with format and method in the legend, a point needs only its scheme
        models = [file.model for file, _ in shown]
        kinds = [f"{model.scheme} {model.method or ''}".rstrip() for model in models]
        names = kinds if named else [style.name for _, style in shown]
        place_labels(figure, axes, points, names, [style.colour for _, style in shown])

    figures = "; ".join(
        f"{file.model.name} {size:.1f} MB, {kld:.2g}" for (file, _), (size, kld) in zip(shown, points, strict=True)
    )
    joined = " A line joins the sizes of one format and method: at equal size, lower is better."
    return draw(
        "size", "Divergence against size",
        f"Lower left is better: smaller, and closer to the reference.{joined if named else ''}",
        f"{'Curves' if named else 'Scatter'} of mean KLD against size of all files: {figures}.", (WIDE, 4.4), paint,
    )  # fmt: skip


def _size_lines(shown: Shown) -> dict[tuple[str, str, str | None], list[tuple[CandidateResult, Style]]]:
    """Files by format (with the runtime if a format runs on several) and method."""
    models = [file.model for file, _ in shown]
    several = len({(model.format, model.runtime) for model in models}) > len({model.format for model in models})
    found: dict[tuple[str, str, str | None], list[tuple[CandidateResult, Style]]] = {}
    for file, style in shown:
        model = file.model
        name = f"{model.format} on {model.runtime}" if several else model.format
        found.setdefault((name, model.runtime, model.method), []).append((file, style))
    return dict(sorted(found.items(), key=lambda one: (one[0][:2], method_rank(one[0][2]))))


def _error_bar(mean: Estimate) -> list[list[float]] | None:
    """An error bar that stays above zero, for a log scale."""
    return [[min(mean.error, 0.95 * mean.value)], [mean.error]] if math.isfinite(mean.error) else None


def _floor_line(axes: Axes, floor: float, *, across: bool) -> None:
    """A labelled line at the noise floor."""
    line = axes.axhline if across else axes.axvline
    line(floor, color=INKS["floor"], linewidth=1.2, linestyle=(0, (5, 3)), zorder=1)
    spot: Any = {"xy": (floor, 1), "xycoords": ("data", "axes fraction"), "xytext": (0, 3), "ha": "center"}
    if across:
        spot = {"xy": (0, floor), "xycoords": ("axes fraction", "data"), "xytext": (4, 3)}
    axes.annotate("noise floor", **spot, textcoords="offset points", color=INKS["muted"], fontsize=7.5)


def _distribution(comparison: Comparison, shown: Shown) -> Chart | None:
    edges, floor = comparison.kld_edges, comparison.reference.noise_floor
    rows: list[tuple[Accuracy, str, str]] = [(floor, "noise floor", INKS["floor"])] if floor else []
    rows += [(file.accuracy, style.name, style.colour) for file, style in shown]
    filled = [bin_ for one, _, _ in rows for bin_, count in enumerate(one.kld_histogram.counts) if count]
    if not filled:
        return None

    def paint(figure: Figure) -> None:
        axes = figure.add_subplot()
        log_scale(axes, "x")
        axes.grid(True, axis="x")
        for row, (accuracy, _, colour) in enumerate(rows):
            base, counts = -float(row), accuracy.kld_histogram.counts
            tops = [base + 0.85 * count / (max(counts) or 1) for count in counts]
            axes.stairs(tops, edges, baseline=base, fill=True, color=colour, alpha=0.28, linewidth=0)
            axes.stairs(tops, edges, baseline=base, color=colour, linewidth=1.1)
            kld = accuracy.kld
            for value, dashes in ((kld.median, ":"), (kld.mean.value, "-"), (kld.p99, (0, (3, 1.5)))):
                if drawable(value):
                    axes.plot([value] * 2, [base, base + 0.42], color=INKS["ink"], lw=1.4, ls=dashes)
        axes.set_yticks([0.3 - row for row in range(len(rows))], [name for _, name, _ in rows])
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        limits = edges[min(filled)], edges[max(filled) + 1]
        axes.set(xlim=limits, ylim=(-len(rows) + 0.9, 1.0), xlabel="KLD of a position, nats per token")

    return draw(
        "distribution", "Distribution of the divergence",
        "Each row shows one file's scored positions. Vertical lines: median (dotted), mean (solid), 99 % (dashed).",
        "Histograms of KLD per position on a log scale: " + "; ".join(
            f"{name} from median {figure_text(accuracy.kld.median)} to 99 % {figure_text(accuracy.kld.p99)}"
            for accuracy, name, _ in rows
        ) + ".",
        (WIDE, 0.8 + 0.44 * len(rows)), paint,
    )  # fmt: skip


def _attribution(comparison: Comparison, files: Shown) -> Chart | None:
    shown = [
        (style.name, file.attribution.quantization.kld.mean.value, file.attribution.exporter.kld.mean.value)
        for file, style in files
        if file.attribution
    ]
    positive = [mean for _, *means in shown for mean in means if drawable(mean)]
    if not positive:
        return None
    floor = floor_of(comparison)
    left = max(_LEFT, min([*positive, *([floor] if floor else [])]) / 4)

    def paint(figure: Figure) -> None:
        axes = figure.add_subplot()
        log_scale(axes, "x")
        axes.grid(True, axis="x")
        for row, (_, *means) in enumerate(shown):
            bars = (("quantization", "part-a", row - 0.19), ("exporter", "part-b", row + 0.19))
            for mean, (part, ink, place) in zip(means, bars, strict=True):
                right = max(mean, left) if math.isfinite(mean) else left
                axes.barh(place, right - left, 0.34, left=left, color=INKS[ink], label=None if row else part)
                text = short_power(f"{mean:.2g}") if math.isfinite(mean) else "not finite"
                spot: Any = {"xytext": (4, 0), "textcoords": "offset points", "va": "center", "fontsize": 7.5}
                spot["bbox"] = {"facecolor": INKS["surface"], "edgecolor": "none", "pad": 0.6}  # over the floor's line
                axes.annotate(text, (right, place), **spot)
        axes.set_yticks(range(len(shown)), [name for name, *_ in shown])
        axes.tick_params(axis="y", length=0)
        axes.set(ylim=(len(shown) - 0.4, -0.6), xlabel="mean KLD, nats per token")
        axes.set_xlim(left, max(positive) * 2.5)
        if floor:
            _floor_line(axes, floor, across=False)
        figure.legend(*axes.get_legend_handles_labels(), loc="outside upper right", ncols=2)

    figures = "; ".join(f"{name} {figure_text(first)} and {figure_text(second)}" for name, first, second in shown)
    return draw(
        "attribution", "Where the deviation comes from",
        "Quantization: the effect of rounding the weights. Exporter: the effect of graph, metadata and runtime beyond "
        "that, including activations rounded to 8 bits; far above the noise floor it is a fault.",
        f"Bars on a log scale, mean KLD by quantization and by exporter: {figures}.",
        (WIDE, 1.1 + 0.42 * len(shown)), paint,
    )  # fmt: skip


def _layers(files: Shown) -> Chart | None:
    """Error of the weights by layer, and of the tensors outside the layers; one line per fingerprint."""
    shown = _by_fingerprint(files)
    if not shown:
        return None
    # norms and biases stay floats: tensors that no file changed are left out
    every = [error for _, errors, _ in shown for error in errors]
    outside = list(dict.fromkeys(e.source for e in every if e.layer is None and drawable(e.relative)))

    def paint(figure: Figure) -> None:
        wide = [3.4, max(0.55 * len(outside), 0.7)] if outside else [1]
        plots = figure.subplots(1, len(wide), sharey=True, width_ratios=wide, squeeze=False)[0]
        for names, errors, own in shown:
            means = _by_layer(errors)
            # a line of several formats has no format's colour
            style = {"color": own.colour if len(names) == 1 else INKS["floor"], "marker": own.marker}
            plots[0].plot(
                list(means), [100 * mean for mean in means.values()],
                **style, linestyle=own.dashes, markersize=3.2, markeredgewidth=0, label="\n".join(names),
            )  # fmt: skip
            for error in errors if outside else ():
                if error.source in outside and math.isfinite(error.relative):
                    spot = outside.index(error.source)
                    plots[1].plot(spot, 100 * error.relative, **style, markersize=6, markeredgewidth=0)
        plots[0].set(xlabel="layer", ylabel="relative error of the weights, %", ylim=(0, None))
        plots[0].xaxis.get_major_locator().set_params(integer=True)
        if outside:
            stems = [source.removesuffix(".weight").rpartition(".")[2] for source in outside]
            plots[1].set_xticks(range(len(outside)), [shorter(stem, 16) for stem in stems], rotation=20)
            plots[1].set_xlim(-0.6, len(outside) - 0.4)
        for axes in plots:
            axes.grid(True, axis="y")
        figure.legend(
            *plots[0].get_legend_handles_labels(), loc="outside right upper", handlelength=2.6, labelspacing=0.9
        )

    return draw(
        "layers", "Quantization error by layer",
        "Root of the summed squared differences between decoded and original weights, relative to the weights; "
        "files with the same weights share a line.",
        "Relative error of the weights by layer: " + "; ".join(
            f"{', '.join(names)} {100 * min(m):.2g} to {100 * max(m):.2g} %"
            for names, errors, _ in shown if (m := list(_by_layer(errors).values()))
        ) + ".",
        (WIDE, 3.3), paint,
    )  # fmt: skip


def _by_fingerprint(files: Shown) -> list[tuple[list[str], Sequence[WeightError], Style]]:
    """Names of the files of each fingerprint, with their errors and the first file's style."""
    shown: dict[str, tuple[list[str], Sequence[WeightError], Style]] = {}
    for place, (file, style) in enumerate(files):
        if any(drawable(error.relative) for error in file.tensor_errors):
            key = file.fingerprint or f"file {place}"
            shown.setdefault(key, ([], file.tensor_errors, style))[0].append(style.name)
    return list(shown.values())


def _by_layer(errors: Sequence[WeightError]) -> dict[int, float]:
    """Root mean square of the relative errors in each layer, weighted by the tensors' sizes."""
    sums: dict[int, tuple[float, int]] = {}
    for error in errors:
        if error.layer is not None and math.isfinite(error.relative):
            total, weights = sums.get(error.layer, (0.0, 0))
            sums[error.layer] = total + error.weights * error.relative**2, weights + error.weights
    return {layer: math.sqrt(total / weights) for layer, (total, weights) in sorted(sums.items()) if weights}


def _positions(files: Shown) -> Chart | None:
    shown = [(file.by_position, style) for file, style in files if file.by_position]
    if not any(drawable(kld) for runs, _ in shown for kld in runs.kld):
        return None

    def paint(figure: Figure) -> None:
        left, right = figure.subplots(1, 2)
        log_scale(left, "y")
        for runs, look in shown:
            style: dict[str, Any] = {"color": look.colour, "linestyle": look.dashes, "label": look.name}
            left.plot(runs.tokens_before, [kld if drawable(kld) else math.nan for kld in runs.kld], **style)
            right.plot(runs.tokens_before, [100 * share for share in runs.top1_agreement], **style)
        left.set_title("mean KLD, nats per token")
        right.set_title("same top token, %")
        for axes in (left, right):
            axes.set_xlabel("tokens before")
            axes.grid(True, axis="y")
        figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=3, handlelength=3)

    return draw(
        "positions", "Agreement by position in the window",
        "Runs of neighbouring positions, over all windows. A curve that rises to the right is damage that grows with "
        "the context: rope, a key-value cache in few bits.",
        "Two line charts over the position in the window, mean KLD and same top token: " + "; ".join(
            f"{style.name} {figure_text(runs.kld[0])} in the first, {figure_text(runs.kld[-1])} in the last run"
            for runs, style in shown
        ) + ".",
        (WIDE, 3.1 + 0.17 * -(-len(shown) // 3)), paint,
    )  # fmt: skip


def _speed(comparison: Comparison, files: Shown) -> Chart | None:
    reference = comparison.reference
    models = [(reference.speed, reference.bandwidth_share, "reference", INKS["floor"])]
    models += [(file.speed, file.bandwidth_share, style.name, style.colour) for file, style in files]
    shown = [(speed, share, name, colour) for speed, share, name, colour in models if speed]
    if not shown:
        return None

    def paint(figure: Figure) -> None:
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
        prefill.set_yticks(range(len(shown)), [name for _, _, name, _ in shown])
        prefill.set_ylim(len(shown) - 0.4, -0.6)

    shares = any(share is not None for _, share, _, _ in shown)
    return draw(
        "speed", "Speed",
        "Whiskers are one standard error over the repetitions."
        + (" Next to decode: its share of what memory bandwidth allows." if shares else ""),
        "Bars of tokens per second, prefill and decode: " + "; ".join(
            f"{name} {figure_text(speed.prefill_tok_s.value)} and {figure_text(speed.decode_tok_s.value)}"
            for speed, _, name, _ in shown
        ) + ".",
        (WIDE, 1.0 + 0.32 * len(shown)), paint,
    )  # fmt: skip


def _bar(axes: Axes, row: int, rate: Estimate, colour: str, share: str = "") -> None:
    """A rate with its whisker and its figure."""
    error = rate.error if math.isfinite(rate.error) else 0.0
    axes.barh(row, rate.value, 0.62, color=colour, alpha=0.85)
    if error:
        axes.errorbar(rate.value, row, xerr=error, color=INKS["ink"], linewidth=1, capsize=2.5)
    text = f"{rate.value:,.0f}" if rate.value >= 100 else f"{rate.value:.3g}"
    spot: Any = {"xytext": (5, 0), "textcoords": "offset points", "va": "center", "fontsize": 7.5}
    axes.annotate(text + share, (rate.value + error, row), **spot)
