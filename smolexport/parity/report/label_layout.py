"""Labels beside points, without overlaps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.transforms import Bbox

_GAP = 7.0  # points between the centre of a marker and its label


def place_labels(
    figure: Figure, axes: Axes, points: Sequence[tuple[float, float]], names: Sequence[str], colours: Sequence[str]
) -> None:
    """Write each name beside its point at the first free position; a thin line leads to a distant one.

    Call it last, because it finalizes the layout.  If no position is free, the name is written right of its point.
    """
    figure.draw_without_rendering()
    scale = figure.dpi / 72
    frame = axes.get_window_extent()
    marks = [_around(axes.transData.transform(point), 4 * scale) for point in points]
    taken: list[Bbox] = []
    for point, name, colour in zip(points, names, colours, strict=True):
        label = axes.annotate(
            name, point, xytext=(_GAP, 0), textcoords="offset points", va="center", fontsize=8, annotation_clip=False
        )
        for dx, dy, align in _spots():
            label.set_horizontalalignment(align)
            label.set_position((dx, dy))
            box = label.get_window_extent()
            inside = box.x0 >= frame.x0 and box.x1 <= frame.x1 and box.y0 >= frame.y0 and box.y1 <= frame.y1
            if inside and not any(box.overlaps(other) for other in (*marks, *taken)):
                break
        else:
            dx, dy = _GAP, 0.0
            label.set_horizontalalignment("left")
            label.set_position((dx, dy))
        taken.append(label.get_window_extent())
        if abs(dy) > 2 * _GAP:
            axes.annotate(
                "", point, xytext=(dx, dy), textcoords="offset points",
                arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.6, "shrinkA": 1, "shrinkB": 4},
            )  # fmt: skip


def _spots() -> Iterator[tuple[float, float, Literal["left", "right"]]]:
    """Offsets in points and text alignment: beside the point, then above and below, farther and farther."""
    yield _GAP, 0.0, "left"
    yield -_GAP, 0.0, "right"
    for step in range(1, 14):
        for dy in (step * 9.0, -step * 9.0):
            yield _GAP, dy, "left"
            yield -_GAP, dy, "right"


def _around(spot: Any, reach: float) -> Bbox:
    from matplotlib.transforms import Bbox

    return Bbox.from_extents(spot[0] - reach, spot[1] - reach, spot[0] + reach, spot[1] + reach)
