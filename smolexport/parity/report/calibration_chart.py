"""Output error of each layer and each kind of matrix before and after calibration."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from smolexport.parity.calibration_record import CalibrationEffect
from smolexport.parity.report.styles import WIDE, Shown, Style, figure_text
from smolexport.parity.report.svg import INKS, Chart, draw, log_scale

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Means = dict[Any, tuple[float, float]]
"""Mean errors before and after, by layer or by kind of matrix."""


def calibration_chart(files: Shown) -> Chart | None:
    """One line for all files with the same errors: their weights are the same."""
    shown = _groups(files)
    if not shown:
        return None
    outside = any(effect.layer is None for _, found, _ in shown for effect in found)

    def paint(figure: Figure) -> None:
        left, right = figure.subplots(1, 2, sharey=True, width_ratios=[1.4, 1])
        log_scale(left, "y")
        drawn: set[tuple[tuple[float, float], ...]] = set()
        kinds = list(dict.fromkeys(effect.kind for _, found, _ in shown for effect in found))
        for place, (names, found, own) in enumerate(shown):
            colour = own.colour if len(names) == 1 else INKS["floor"]
            style = {"color": colour, "marker": own.marker, "markersize": 4, "markeredgewidth": 0}
            inside = _means(found, "layer")
            plain = tuple((float(layer), before) for layer, (before, _) in inside.items())
            if plain and plain not in drawn:  # several methods start from the same errors
                label = None if drawn else "rounded to nearest"
                drawn.add(plain)
                left.plot(*zip(*plain, strict=True), color=INKS["muted"], linestyle=(0, (1, 2)), label=label)
            after = [means[1] for means in inside.values()]
            left.plot(list(inside), after, **style, linestyle=own.dashes, label="\n".join(names))
            shift = (place - (len(shown) - 1) / 2) * min(0.22, 0.8 / len(shown))
            by_kind = _means(found, "kind")
            _drops(right, {kinds.index(kind) + shift: both for kind, both in by_kind.items()}, style)
        left.set(xlabel="layer", ylabel="squared output error, relative")
        left.xaxis.get_major_locator().set_params(integer=True)
        right.set_xticks(range(len(kinds)), kinds, rotation=30, ha="right")
        right.set_xlim(-0.6, len(kinds) - 0.4)
        for axes in (left, right):
            axes.grid(True, axis="y")
        figure.legend(*left.get_legend_handles_labels(), loc="outside right upper", handlelength=2.6, labelspacing=0.9)

    return draw(
        "calibration", "Output error before and after calibration",
        "On the calibration text, for each matrix alone: mean over the matrices of a layer (left), and over the layers "
        "for each kind of matrix (right), from rounding to nearest on the same scales (bar) to the method (marker)."
        " For distil: before its scales are trained."
        + (" The embedding, as head, is shown among the kinds only." if outside else ""),
        "Output error by layer, mean before and after: " + "; ".join(
            f"{', '.join(names)} " + " to ".join(map(figure_text, _mean(found))) for names, found, _ in shown
        ) + ".",
        (WIDE, 3.5), paint,
    )  # fmt: skip


def _drops(axes: Axes, means: Means, style: dict[str, Any]) -> None:
    """A vertical line at each place from the error before to the error after."""
    for spot, (before, after) in means.items():
        axes.plot([spot, spot], [before, after], color=INKS["muted"], linewidth=0.8, zorder=1)
        axes.plot(spot, before, color=INKS["muted"], marker="_", markersize=7)
        axes.plot(spot, after, **style)


def _groups(files: Shown) -> list[tuple[list[str], Sequence[CalibrationEffect], Style]]:
    """Names of the files that share their errors, with the errors and the first file's style."""
    shown: dict[Any, tuple[list[str], Sequence[CalibrationEffect], Style]] = {}
    for file, style in files:
        # a log scale cannot show zeros
        found = tuple(effect for effect in file.calibration_errors if effect.before > 0 and effect.after > 0)
        if found:
            shown.setdefault(found, ([], found, style))[0].append(style.name)
    return list(shown.values())


def _means(found: Sequence[CalibrationEffect], key: Literal["layer", "kind"]) -> Means:
    """Mean errors before and after, grouped by `key`; tensors outside the layers have no layer."""
    groups: dict[Any, list[CalibrationEffect]] = {}
    for effect in found:
        if getattr(effect, key) is not None:
            groups.setdefault(getattr(effect, key), []).append(effect)
    places = sorted(groups) if key == "layer" else list(groups)
    return {place: _mean(groups[place]) for place in places}


def _mean(found: Sequence[CalibrationEffect]) -> tuple[float, float]:
    return statistics.fmean(effect.before for effect in found), statistics.fmean(effect.after for effect in found)
