"""Matplotlib figures as inline SVG: colours follow the colour scheme of the page, text stays text.

Drawings use the colours of `INKS`, placeholders that are replaced by the page's CSS variables at the end.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any, Literal

from smolexport.errors import MissingDependencyError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SERIES = 6
# colours that matplotlib does not use by itself
INKS = {
    name: f"#0a0b{place + 16:02x}"
    for place, name in enumerate(
        ["ink", "muted", "grid", "surface", "floor", "part-a", "part-b", *(f"series-{i}" for i in range(SERIES))]
    )
}
_SETTINGS = {
    "svg.fonttype": "none",
    "font.family": ["sans-serif"],
    "font.sans-serif": ["DejaVu Sans"],  # comes with matplotlib; wider than the page's own font
    "font.size": 8.5,
    "text.parse_math": False,  # a dollar sign in a file name is not mathematics
    "text.usetex": False,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 8,
    "axes.labelsize": 8.5,
    "axes.edgecolor": INKS["muted"],
    "axes.labelcolor": INKS["ink"],
    "axes.titlecolor": INKS["ink"],
    "axes.facecolor": "none",
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.unicode_minus": True,
    "figure.facecolor": "none",
    "savefig.facecolor": "none",
    "text.color": INKS["ink"],
    "xtick.color": INKS["muted"],
    "ytick.color": INKS["muted"],
    "xtick.labelcolor": INKS["ink"],
    "ytick.labelcolor": INKS["ink"],
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "xtick.major.width": 0.7,
    "ytick.major.width": 0.7,
    "grid.color": INKS["grid"],
    "grid.linewidth": 0.7,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "lines.linewidth": 1.5,
}


@dataclass(frozen=True)
class Chart:
    """A chart ready for the page.

    Attributes:
        key: its name among the page's charts.
        title: heading.
        caption: how to read the chart.
        svg: the element `svg`, with an alternative text.
    """

    key: str
    title: str
    caption: str
    svg: str


def need_matplotlib() -> None:
    """Raise MissingDependencyError if matplotlib cannot be imported."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise MissingDependencyError(
            f"an HTML report needs matplotlib ({error}): pip install 'smolexport[report]'"
        ) from error


def draw(
    key: str, title: str, caption: str, alt: str, size: tuple[float, float], paint: Callable[[Figure], None]
) -> Chart:
    """Draw a figure of `size` inches with `paint` and return it as SVG.

    Args:
        key: the chart's name, unique on the page; the prefix of all ids in the SVG.
        title: heading.
        caption: how to read the chart.
        alt: alternative text.
        size: width and height; the page is 9.6 wide.
        paint: draws into the figure.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    need_matplotlib()
    from matplotlib.figure import Figure

    with _settings(key):
        figure = Figure(figsize=size, layout="constrained")
        paint(figure)
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return Chart(key, title, caption, _inline(out.getvalue(), key, alt))


def log_scale(axes: Axes, which: Literal["x", "y"]) -> None:
    """Give the axis a log scale with plain text labels: `0.01`, `1`, and powers of ten for long ones."""
    from matplotlib.ticker import FuncFormatter, NullFormatter

    (axes.set_xscale if which == "x" else axes.set_yscale)("log")
    axis = axes.xaxis if which == "x" else axes.yaxis
    axis.set_major_formatter(FuncFormatter(lambda value, _: _power(value)))
    axis.set_minor_formatter(NullFormatter())


def _power(value: float) -> str:
    if 1e-3 <= value < 1e4:
        return f"{value:g}"
    return f"10{str(round(math.log10(value))).translate(_RAISED)}" if value > 0 else ""


_RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


@contextmanager
def _settings(key: str) -> Iterator[None]:
    import matplotlib

    settings: Any = {**_SETTINGS, "svg.hashsalt": key}
    with matplotlib.rc_context(settings):
        yield


def _inline(document: str, key: str, alt: str) -> str:
    """The element `svg` alone, with unique ids and the page's colours."""
    body = document[document.index("<svg") :]
    body = re.sub(r"<(metadata|style)\b.*?</\1>", "", body, flags=re.DOTALL)
    # only within tags: a file name that looks like an attribute is text and must not change
    body = re.sub(r"<[^<>]*>", lambda tag: _own_tag(tag[0], key), body)
    opening = f'<svg role="img" aria-label="{escape(alt)}" '
    return re.sub(r"^<svg ", lambda _: opening, body).strip()


def _own_tag(tag: str, key: str) -> str:
    tag = re.sub(r'\bid="([^"]*)"', rf'id="{key}-\1"', tag)
    tag = re.sub(r'\b(xlink:href)="#', rf'\1="#{key}-', tag)
    tag = tag.replace("url(#", f"url(#{key}-")
    tag = re.sub(r"\bfont: [^;\"]*?([0-9.]+)px[^;\"]*", _font, tag)
    return re.sub(r"#0a0b[0-9a-f]{2}", lambda found: _VARIABLES.get(found[0], found[0]), tag)


def _font(found: re.Match[str]) -> str:
    """Size and weight as drawn; the font family comes from the page."""
    weight = re.search(r"\b(bold|[1-9]00)\b", found[0].partition(f"{found[1]}px")[0])
    return f"font-size: {found[1]}px" + (f"; font-weight: {weight[1]}" if weight else "")


_VARIABLES = {colour: f"var(--{name})" for name, colour in INKS.items()}
