"""What calibration took off each layer's error, and each kind of matrix's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from smolexport.parity.report.looks import WIDE, Look, Sheet, figure_text
from smolexport.parity.report.svg import INKS, Chart, draw, log_scale

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["steps"]

Means = dict[Any, tuple[float, float]]


def steps(sheet: Sheet, looks: Sequence[Look]) -> Chart | None:
    """One line for all files of the same errors: their weights are the same."""
    shown = _groups(sheet, looks)
    if not shown:
        return None
    outside = any(step["layer"] is None for _, found, _ in shown for step in found)

    def paint(figure: Figure) -> None:
        left, right = figure.subplots(1, 2, sharey=True, width_ratios=[1.4, 1])
        log_scale(left, "y")
        before: set[tuple[tuple[float, float], ...]] = set()
        kinds = list(dict.fromkeys(step["kind"] for _, found, _ in shown for step in found))
        for place, (names, found, look) in enumerate(shown):
            colour = look.colour if len(names) == 1 else INKS["floor"]
            style = {"color": colour, "marker": look.mark, "markersize": 4, "markeredgewidth": 0}
            inside = _means(found, "layer")
            plain = tuple((float(layer), means[0]) for layer, means in inside.items())
            if plain and plain not in before:  # several methods start from one
                before.add(plain)
                label = None if len(before) > 1 else "rounded to the nearest"
                left.plot(*zip(*plain, strict=True), color=INKS["muted"], linestyle=(0, (1, 2)), label=label)
            after = [means[1] for means in inside.values()]
            left.plot(list(inside), after, **style, linestyle=look.dashes, label="\n".join(names))
            aside = (place - (len(shown) - 1) / 2) * min(0.22, 0.8 / len(shown))
            _falls(right, {kinds.index(kind) + aside: both for kind, both in _means(found, "kind").items()}, style)
        left.set(xlabel="layer", ylabel="error of the outputs over the outputs, squared")
        left.xaxis.get_major_locator().set_params(integer=True)
        right.set_xticks(range(len(kinds)), kinds, rotation=30, ha="right")
        right.set_xlim(-0.6, len(kinds) - 0.4)
        for axes in (left, right):
            axes.grid(True, axis="y")
        figure.legend(*left.get_legend_handles_labels(), loc="outside right upper", handlelength=2.6, labelspacing=0.9)

    return draw(
        "steps", "Error of the outputs before and after calibration",
        "On the calibration text, of each matrix alone: mean over a layer's matrices, and over the layers for each "
        "kind of matrix, where a line falls from rounding to the nearest on the same scales (bar) to the method (mark)."
        " Of distil: before its scales are trained."
        + (" The embedding, as head, stands among the kinds alone." if outside else ""),
        "Error of the outputs by layer, mean before and after: " + "; ".join(
            f"{', '.join(names)} {figure_text(_mean(found, 'before'))} to {figure_text(_mean(found, 'after'))}"
            for names, found, _ in shown
        ) + ".",
        (WIDE, 3.5), paint,
    )  # fmt: skip


def _falls(axes: Axes, means: Means, style: dict[str, Any]) -> None:
    """At each place a line from the error before down to the one after."""
    for spot, (before, after) in means.items():
        axes.plot([spot, spot], [before, after], color=INKS["muted"], linewidth=0.8, zorder=1)
        axes.plot(spot, before, color=INKS["muted"], marker="_", markersize=7)
        axes.plot(spot, after, **style)


def _groups(sheet: Sheet, looks: Sequence[Look]) -> list[tuple[list[str], Sequence[Sheet], Look]]:
    """Names that share their errors, with those and the first one's look; zeros have no place on a log scale."""
    shown: dict[Any, tuple[list[str], Sequence[Sheet], Look]] = {}
    for file, look in zip(sheet["candidates"], looks, strict=True):
        found = [step for step in file["calibration_errors"] if step["before"] > 0 and step["after"] > 0]
        if found:
            mark = tuple((step["source"], step["before"], step["after"]) for step in found)
            shown.setdefault(mark, ([], found, look))[0].append(look.name)
    return list(shown.values())


def _means(found: Sequence[Sheet], key: str) -> Means:
    """Mean errors before and after of what has the same `key`; what lies outside of the layers has no layer."""
    groups: dict[Any, list[Sheet]] = {}
    for step in found:
        if step[key] is not None:
            groups.setdefault(step[key], []).append(step)
    places = sorted(groups) if key == "layer" else list(groups)
    return {place: (_mean(groups[place], "before"), _mean(groups[place], "after")) for place in places}


def _mean(found: Sequence[Sheet], key: str) -> float:
    return float(sum(step[key] for step in found)) / len(found)
