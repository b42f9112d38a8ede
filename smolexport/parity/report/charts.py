"""The page's charts, from the sheet alone.  One that has nothing to show is left out."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from smolexport.parity.report.layers import layers
from smolexport.parity.report.looks import WIDE, Look, Sheet, drawable, figure_text, floor_of, looks_of
from smolexport.parity.report.names import short_power
from smolexport.parity.report.size import floor_line, size
from smolexport.parity.report.steps import steps
from smolexport.parity.report.svg import INKS, Chart, draw, log_scale

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["charts"]

_LEFT = 1e-9  # where a log scale has no place for a figure, it stands at the edge of what is drawn


def charts(sheet: Sheet) -> list[Chart]:
    """All charts that `sheet` has figures for; raises MissingDependencyError without matplotlib."""
    looks = looks_of(sheet)
    makers: tuple[Callable[[Sheet, Sequence[Look]], Chart | None], ...] = (
        size, _distribution, _attribution, layers, steps, _positions, _speed,
    )  # fmt: skip
    return [chart for make in makers if (chart := make(sheet, looks)) is not None]


def _distribution(sheet: Sheet, looks: Sequence[Look]) -> Chart | None:
    edges = sheet["kld_edges"]
    floor = sheet["reference"]["noise_floor"]
    rows = [(floor, "noise floor", INKS["floor"])] if floor else []
    rows += [(f, look.name, look.colour) for f, look in zip(sheet["candidates"], looks, strict=True)]
    held = [place for file, _, _ in rows for place, count in enumerate(file["kld_histogram"]["counts"]) if count]
    if not held:
        return None
    low, high = edges[min(held)], edges[max(held) + 1]

    def paint(figure: Figure) -> None:
        axes = figure.add_subplot()
        log_scale(axes, "x")
        axes.grid(True, axis="x")
        for row, (file, _, colour) in enumerate(rows):
            base, shares = -float(row), file["kld_histogram"]["counts"]
            tops = [base + 0.85 * count / (max(shares) or 1) for count in shares]
            axes.stairs(tops, edges, baseline=base, fill=True, color=colour, alpha=0.28, linewidth=0)
            axes.stairs(tops, edges, baseline=base, color=colour, linewidth=1.1)
            for key, dashes in (("median", ":"), ("mean", "-"), ("p99", (0, (3, 1.5)))):
                if drawable(file["kld"][key]):
                    axes.plot([file["kld"][key]] * 2, [base, base + 0.42], color=INKS["ink"], lw=1.4, ls=dashes)
        axes.set_yticks([0.3 - row for row in range(len(rows))], [name for _, name, _ in rows])
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        axes.set(xlim=(low, high), ylim=(-len(rows) + 0.9, 1.0), xlabel="KLD of a position, nats per token")

    return draw(
        "distribution", "Distribution of the divergence",
        "Each row is one file's scored positions. Upright lines: median (dotted), mean (solid), 99 % (dashed).",
        "Histograms of KLD per position on a log scale: " + "; ".join(
            f"{name} from median {figure_text(file['kld']['median'])} to 99 % {figure_text(file['kld']['p99'])}"
            for file, name, _ in rows
        ) + ".",
        (WIDE, 0.8 + 0.44 * len(rows)), paint,
    )  # fmt: skip


def _attribution(sheet: Sheet, looks: Sequence[Look]) -> Chart | None:
    shown = [(f["attribution"], look) for f, look in zip(sheet["candidates"], looks, strict=True) if f["attribution"]]
    parts = ("quantization", "part-a"), ("exporter", "part-b")
    means = [a[part]["kld"]["mean"] for a, _ in shown for part, _ in parts]
    positive = [mean for mean in means if drawable(mean)]
    if not positive:
        return None
    floor = floor_of(sheet)
    left = max(_LEFT, min([*positive, *([floor] if floor else [])]) / 4)

    def paint(figure: Figure) -> None:
        axes = figure.add_subplot()
        log_scale(axes, "x")
        axes.grid(True, axis="x")
        for row, (attribution, _) in enumerate(shown):
            for (part, ink), place in zip(parts, (row - 0.19, row + 0.19), strict=True):
                kld = attribution[part]["kld"]
                mean = kld["mean"] if kld["mean"] is not None else math.nan
                axes.barh(place, max(mean, left) - left, 0.34, left=left, color=INKS[ink], label=None if row else part)
                text = short_power(f"{mean:.2g}") if math.isfinite(mean) else "not finite"
                spot: Any = {"xytext": (4, 0), "textcoords": "offset points", "va": "center", "fontsize": 7.5}
                spot["bbox"] = {"facecolor": INKS["surface"], "edgecolor": "none", "pad": 0.6}  # over the floor's line
                axes.annotate(text, (max(mean, left) if math.isfinite(mean) else left, place), **spot)
        axes.set_yticks(range(len(shown)), [look.name for _, look in shown])
        axes.tick_params(axis="y", length=0)
        axes.set(ylim=(len(shown) - 0.4, -0.6), xlabel="mean KLD, nats per token")
        axes.set_xlim(left, max(positive) * 2.5)
        if floor:
            floor_line(axes, floor, across=False)
        figure.legend(*axes.get_legend_handles_labels(), loc="outside upper right", ncols=2)

    figures = "; ".join(
        f"{look.name} {figure_text(a['quantization']['kld']['mean'])} and {figure_text(a['exporter']['kld']['mean'])}"
        for a, look in shown
    )
    return draw(
        "attribution", "Where the deviation comes from",
        "Quantization: what rounding the weights did. Exporter: what graph, metadata and runtime do beyond that, also "
        "activations rounded to 8 bits; far above the noise floor it is a fault.",
        f"Bars on a log scale, mean KLD by quantization and by exporter: {figures}.",
        (WIDE, 1.1 + 0.42 * len(shown)), paint,
    )  # fmt: skip


def _positions(sheet: Sheet, looks: Sequence[Look]) -> Chart | None:
    shown = [(f["by_position"], look) for f, look in zip(sheet["candidates"], looks, strict=True) if f["by_position"]]
    if not any(drawable(kld) for runs, _ in shown for kld in runs["kld"]):
        return None

    def paint(figure: Figure) -> None:
        left, right = figure.subplots(1, 2)
        log_scale(left, "y")
        for runs, look in shown:
            style: dict[str, Any] = {"color": look.colour, "linestyle": look.dashes, "label": look.name}
            left.plot(runs["tokens_before"], [kld if drawable(kld) else math.nan for kld in runs["kld"]], **style)
            shares = [math.nan if share is None else 100 * share for share in runs["top1"]]
            right.plot(runs["tokens_before"], shares, **style)
        left.set_title("mean KLD, nats per token")
        right.set_title("same top token, %")
        for axes in (left, right):
            axes.set_xlabel("tokens before")
            axes.grid(True, axis="y")
        figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=3, handlelength=3)

    return draw(
        "positions", "Agreement by position in the window",
        "Runs of neighbouring positions, all windows together. A line that climbs to the right is damage that grows "
        "with the context: rope, a cache in few bits.",
        "Two line charts over the position in the window, mean KLD and same top token: " + "; ".join(
            f"{look.name} {figure_text(runs['kld'][0])} at the first, {figure_text(runs['kld'][-1])} at the last run"
            for runs, look in shown
        ) + ".",
        (WIDE, 3.1 + 0.17 * -(-len(shown) // 3)), paint,
    )  # fmt: skip


def _speed(sheet: Sheet, looks: Sequence[Look]) -> Chart | None:
    models = [(sheet["reference"], "reference", INKS["floor"])]
    models += [(f, look.name, look.colour) for f, look in zip(sheet["candidates"], looks, strict=True)]
    shown = [model for model in models if model[0]["speed"]]
    if not shown:
        return None

    def paint(figure: Figure) -> None:
        plots = figure.subplots(1, 2, sharey=True)
        for axes, name, title in zip(plots, ("prefill", "decode"), ("Prefill", "Decode"), strict=True):
            for row, (model, _, colour) in enumerate(shown):
                rate, error = (model["speed"][f"{name}_tok_s{end}"] for end in ("", "_error"))
                _bar(axes, row, rate, error, colour, model["bandwidth_share"] if name == "decode" else None)
            axes.set_title(f"{title}, {shown[0][0]['speed'][f'{name}_tokens']} tokens")
            axes.set_xlabel("tokens per second")
            axes.grid(True, axis="x")
            axes.margins(x=0.24)
            axes.set_xlim(left=0)
            axes.locator_params(axis="x", nbins=5)
            axes.xaxis.set_major_formatter("{x:,.0f}")
            axes.tick_params(axis="y", length=0)
        plots[0].set_yticks(range(len(shown)), [name for _, name, _ in shown])
        plots[0].set_ylim(len(shown) - 0.4, -0.6)

    shares = any(model["bandwidth_share"] is not None for model, _, _ in shown)
    return draw(
        "speed", "Speed",
        "Whiskers are one standard error over the repetitions."
        + (" Beside decode: its share of what the memory's bandwidth allows." if shares else ""),
        "Bars of tokens per second, prefill and decode: " + "; ".join(
            f"{name} {figure_text(m['speed']['prefill_tok_s'])} and {figure_text(m['speed']['decode_tok_s'])}"
            for m, name, _ in shown
        ) + ".",
        (WIDE, 1.0 + 0.32 * len(shown)), paint,
    )  # fmt: skip


def _bar(axes: Axes, row: int, rate: float | None, error: float | None, colour: str, share: float | None) -> None:
    """A rate with its whisker, and the figure behind them."""
    if rate is None:
        return
    axes.barh(row, rate, 0.62, color=colour, alpha=0.85)
    if error is not None:
        axes.errorbar(rate, row, xerr=error, color=INKS["ink"], linewidth=1, capsize=2.5)
    text = f"{rate:,.0f}" if rate >= 100 else f"{rate:.3g}"
    spot: Any = {"xytext": (5, 0), "textcoords": "offset points", "va": "center", "fontsize": 7.5}
    axes.annotate(text if share is None else f"{text} · {share:.0%}", (rate + (error or 0), row), **spot)
