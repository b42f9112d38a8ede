"""A comparison as one self-contained page: no network access, no scripts, charts as inline SVG."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING

from smolexport.errors import MissingDependencyError
from smolexport.parity.report.markdown import command_line
from smolexport.parity.report.svg import short_power
from smolexport.parity.report.tables import tables
from smolexport.parity.results import NEAR_TIE, CandidateResult, Comparison
from smolexport.text import printable

if TYPE_CHECKING:
    from jinja2 import Template

_LIMITS = {
    "max_kld": "mean KLD at most {:g}",
    "min_top1": "top-1 agreement at least {:g}",
    "max_ppl_ratio": "perplexity ratio at most {:g}",
    "max_exporter_kld": "mean KLD by exporter at most {:g}",
    "max_pair_kld": "mean KLD between files with the same weights at most {:g}",
}


def need_libraries() -> None:
    """Raise MissingDependencyError, with the command that installs them, if jinja2 or matplotlib is missing."""
    try:
        import jinja2  # noqa: F401
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise MissingDependencyError(
            f"an HTML report needs jinja2 and matplotlib ({error}): pip install 'smolexport[report]'"
        ) from error


def render_html(comparison: Comparison) -> str:
    """The page as text; raises MissingDependencyError without jinja2 or matplotlib."""
    need_libraries()
    from smolexport.parity.report.charts import charts

    page = _template().render(
        comparison=comparison,
        reference=comparison.reference,
        files=list(comparison.candidates),
        tables=tables(comparison),
        charts=charts(comparison),
        command=command_line(comparison),
        limits=_stated(comparison.candidates),
        near_tie=NEAR_TIE,
    )
    return re.sub(r"\n\s*\n+", "\n", page) + "\n"


@cache
def _template() -> Template:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("smolexport.parity", "report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"printable": printable, "visible": _visible, "short": short_power}
    return environment.get_template("page.html.j2")


def _stated(files: Sequence[CandidateResult]) -> list[str]:
    """The thresholds in words: once if they are the same for all files, else per file."""
    names: dict[tuple[str, ...], list[str]] = {}
    for file in files:
        limits = tuple(_LIMITS[name].format(limit) for name, limit in file.thresholds.values().items())
        names.setdefault(limits, []).append(file.model.name)
    if len(names) == 1:
        return list(next(iter(names)))
    return [f"{', '.join(files)}: {', '.join(words) or 'no thresholds'}" for words, files in names.items()]


def _visible(text: str) -> str:
    """A token's text with visible spaces and line ends."""
    shown = text.replace("\r", "␍").replace("\n", "↵").replace("\t", "⇥")
    if not shown.strip(" "):
        shown = "␣" * len(shown) or "∅"
    return printable(shown)
