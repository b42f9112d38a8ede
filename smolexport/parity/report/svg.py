"""Matplotlib figures as inline SVG: colours follow the colour scheme of the page, text stays text."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SERIES = 6
# Drawn with these placeholders, colours that matplotlib does not use by itself; `to_svg` replaces them by the page's
# CSS variables.
INKS = {
    name: f"#0a0b{place + 16:02x}"
    for place, name in enumerate(
        ["ink", "muted", "grid", "surface", "floor", "part-a", "part-b", *(f"series-{i}" for i in range(SERIES))]
    )
}
_VARIABLES = {colour: f"var(--{name})" for name, colour in INKS.items()}
_RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
_GAP = 7.0  # points between the centre of a marker and its label


def to_svg(figure: Figure, key: str, alt: str) -> str:
    """The element `svg` of `figure`, with the alternative text `alt` and ids that begin with `key`."""
    import matplotlib

    out = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": key}):
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    body = out.getvalue()
    body = re.sub(r"<(metadata|style)\b.*?</\1>", "", body[body.index("<svg") :], flags=re.DOTALL)
    # only within tags: a file name that looks like an attribute is text and must not change
    body = re.sub(r"<[^<>]*>", lambda tag: _own_tag(tag[0], key), body)
    return f'<svg role="img" aria-label="{escape(alt)}" {body.removeprefix("<svg ")}'.strip()


def _own_tag(tag: str, key: str) -> str:
    """A tag with ids that are unique on the page, and with the page's colours."""
    tag = re.sub(r'\bid="([^"]*)"', rf'id="{key}-\1"', tag)
    tag = re.sub(r'\b(xlink:href)="#', rf'\1="#{key}-', tag)
    tag = tag.replace("url(#", f"url(#{key}-")
    return re.sub(r"#0a0b[0-9a-f]{2}", lambda found: _VARIABLES.get(found[0], found[0]), tag)


def short_power(text: str) -> str:
    """`2.9e-5` for Python's `2.9e-05`."""
    return re.sub(r"e([-+])0", r"e\1", text)


def log_scale(axes: Axes, which: Literal["x", "y"]) -> None:
    """Give the axis a log scale with plain text labels: `0.01`, `1`, and powers of ten for long ones."""
    from matplotlib.ticker import FuncFormatter, NullFormatter

    def power(value: float, _: object) -> str:
        if 1e-3 <= value < 1e4:
            return f"{value:g}"
        return f"10{str(round(math.log10(value))).translate(_RAISED)}" if value > 0 else ""

    axes.set(**{f"{which}scale": "log"})
    axis = axes.xaxis if which == "x" else axes.yaxis
    axis.set_major_formatter(FuncFormatter(power))
    axis.set_minor_formatter(NullFormatter())


def place_labels(
    figure: Figure, axes: Axes, points: Sequence[tuple[float, float]], names: Sequence[str], colours: Sequence[str]
) -> None:
    """Write each name beside its point at the first free position; a thin line leads to a distant one.

    Call it last, because it finalizes the layout.  If no position is free, the name is written right of its point.
    """
    from matplotlib.transforms import Bbox

    figure.draw_without_rendering()
    reach, frame = 4 * figure.dpi / 72, axes.get_window_extent()
    centres = axes.transData.transform(points)
    taken = [Bbox([centre - reach, centre + reach]) for centre in centres]
    # beside the point, then above and below, farther and farther
    heights = [0.0, *(sign * step * 9.0 for step in range(1, 14) for sign in (1, -1))]
    spots: list[tuple[float, float, Any]] = [
        spot for dy in heights for spot in ((_GAP, dy, "left"), (-_GAP, dy, "right"))
    ]
    offset: Any = {"textcoords": "offset points"}
    for point, name, colour in zip(points, names, colours, strict=True):
        label = axes.annotate(name, point, va="center", fontsize=8, annotation_clip=False, xytext=(0, 0), **offset)
        for dx, dy, align in [*spots, spots[0]]:
            label.set(position=(dx, dy), horizontalalignment=align)
            box = label.get_window_extent()
            if frame.contains(*box.min) and frame.contains(*box.max) and not box.count_overlaps(taken):
                break
        taken.append(box)
        if abs(dy) > 2 * _GAP:
            line = {"arrowstyle": "-", "color": colour, "linewidth": 0.6, "shrinkA": 1, "shrinkB": 4}
            axes.annotate("", point, xytext=(dx, dy), arrowprops=line, **offset)
