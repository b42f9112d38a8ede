"""Divergence against size, with a line through the sizes of each format and method."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from smolexport.parity.report.looks import DASHES, WIDE, Look, Sheet, drawable, floor_of, method_rank
from smolexport.parity.report.placing import place_labels
from smolexport.parity.report.svg import INKS, Chart, draw, log_scale

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["down", "floor_line", "size"]

FAR = 20


def size(sheet: Sheet, looks: Sequence[Look]) -> Chart | None:
    """A point for each file; points of one format and method are joined."""
    shown = [(f, look) for f, look in zip(sheet["candidates"], looks, strict=True) if drawable(f["kld"]["mean"])]
    if not shown:
        return None
    floor, least = floor_of(sheet), min(file["kld"]["mean"] for file, _ in shown)
    if floor and floor * FAR < least:  # what lies so far below would press the curves together
        floor = None
    lines = _lines(shown)
    told = len({method for _, _, method in lines}) > 1 or any(len(files) > 1 for files in lines.values())

    def paint(figure: Figure) -> None:
        axes = figure.add_subplot()
        log_scale(axes, "y")
        for (name, _, method), files in lines.items():
            dashes = DASHES[method_rank(method) % len(DASHES)]
            spots = sorted((file["bytes"] / 1e6, file["kld"]["mean"]) for file, _ in files)
            kind = f"{name} {method or 'rtn'}" if told else None
            axes.plot(*zip(*spots, strict=True), color=files[0][1].colour, linestyle=dashes, linewidth=1.2, label=kind)
        for file, look in shown:
            axes.errorbar(
                file["bytes"] / 1e6, file["kld"]["mean"], yerr=down(file["kld"]["mean"], file["kld"]["mean_error"]),
                color=look.colour, marker=look.mark, markersize=6, markeredgewidth=0, linewidth=1,
            )  # fmt: skip
        axes.margins(x=0.18, y=0.14)
        if floor:
            floor_line(axes, floor, across=True)
        axes.set_xlabel("size, MB")
        axes.set_ylabel("mean KLD, nats per token")
        axes.grid(True, axis="both")
        if told:
            figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper", handlelength=3)
        points = [(file["bytes"] / 1e6, file["kld"]["mean"]) for file, _ in shown]
        # where the legend has format and method, the scheme is what a point still needs
        names = [f"{file['scheme']} {file['method'] or ''}".rstrip() if told else look.name for file, look in shown]
        place_labels(figure, axes, points, names, [look.colour for _, look in shown])

    figures = "; ".join(f"{f['name']} {f['bytes'] / 1e6:.1f} MB, {f['kld']['mean']:.2g}" for f, _ in shown)
    joined = " A line joins the sizes of one format and method: at equal bytes the lower one is better."
    return draw(
        "size", "Divergence against size",
        f"Lower left is better: smaller, and nearer to the reference.{joined if told else ''}",
        f"{'Curves' if told else 'Scatter'} of mean KLD against size of all files: {figures}.", (WIDE, 4.4), paint,
    )  # fmt: skip


def _lines(
    shown: Sequence[tuple[Sheet, Look]],
) -> dict[tuple[str, str, str | None], list[tuple[Sheet, Look]]]:
    """Files by format, with the runtime where one plays a format's files beside another, and method."""
    several = len({(f["format"], f["runtime"]) for f, _ in shown}) > len({f["format"] for f, _ in shown})
    found: dict[tuple[str, str, str | None], list[tuple[Sheet, Look]]] = {}
    for file, look in shown:
        name = f"{file['format']} on {file['runtime']}" if several else file["format"]
        found.setdefault((name, file["runtime"], file["method"]), []).append((file, look))
    return dict(sorted(found.items(), key=lambda one: (one[0][:2], method_rank(one[0][2]))))


def down(mean: float, error: float | None) -> list[list[float]] | None:
    """An error bar that keeps above zero, for a log scale."""
    return None if error is None else [[min(error, 0.95 * mean)], [error]]


def floor_line(axes: Axes, floor: float, *, across: bool) -> None:
    """The noise floor's line, with its name."""
    line = axes.axhline if across else axes.axvline
    line(floor, color=INKS["floor"], linewidth=1.2, linestyle=(0, (5, 3)), zorder=1)
    spot: dict[str, object] = {
        "xy": (floor, 1),
        "xycoords": ("data", "axes fraction"),
        "xytext": (0, 3),
        "ha": "center",
    }
    if across:
        spot = {"xy": (0, floor), "xycoords": ("axes fraction", "data"), "xytext": (4, 3)}
    axes.annotate("noise floor", **spot, textcoords="offset points", color=INKS["muted"], fontsize=7.5)  # type: ignore[arg-type]
