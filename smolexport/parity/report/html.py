"""A comparison as one self-contained page: no network access, no scripts, charts as inline SVG."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING

from smolexport.errors import MissingDependencyError
from smolexport.parity.method_table import PLAIN, columns
from smolexport.parity.report.markdown import command_line
from smolexport.parity.report.names import ABSENT, described, figure, number, percent, rate, short_power
from smolexport.parity.report.svg import need_matplotlib
from smolexport.parity.results import NEAR_TIE, CandidateResult, Comparison, Divergence, Estimate, Greedy
from smolexport.parity.thresholds import Thresholds
from smolexport.text import printable

if TYPE_CHECKING:
    from jinja2 import Environment

_PROMPTS = 3  # diverging prompts shown per file; the JSON has all


def need_libraries() -> None:
    """Raise MissingDependencyError, with the command that installs them, if jinja2 or matplotlib is missing."""
    try:
        import jinja2  # noqa: F401
    except ImportError as error:
        raise MissingDependencyError(
            f"an HTML report needs jinja2 ({error}): pip install 'smolexport[report]'"
        ) from error
    need_matplotlib()


def render_html(comparison: Comparison) -> str:
    """The page as text; raises MissingDependencyError without jinja2 or matplotlib."""
    need_libraries()
    from smolexport.parity.report.charts import charts

    files = comparison.candidates
    page = (
        _environment()
        .get_template("page.html.j2")
        .render(
            comparison=comparison,
            reference=comparison.reference,
            files=list(files),
            charts={chart.key: chart for chart in charts(comparison)},
            command=command_line(comparison),
            limits=_stated(files),
            near_tie=NEAR_TIE,
            methods=columns(file.method for row in comparison.methods for file in row.files),
            plain=PLAIN,
            missed=[(file.model.name, miss) for file in files for miss in file.missed],
            attributed=any(file.attribution for file in files),
            shares=comparison.bandwidth_bytes_per_s is not None,
            diverging=[(file.model.name, file.greedy, *_diverging(file.greedy)) for file in files if file.greedy],
        )
    )
    return re.sub(r"\n\s*\n+", "\n", page) + "\n"


@cache
def _environment() -> Environment:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("smolexport.parity", "report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"fig": number, "printable": printable, "visible": _visible, "small": _small}
    environment.globals |= {
        "figure": _figure,
        "percent": percent,
        "rate": rate,
        "described": described,
        "absent": ABSENT,
    }
    return environment


def _stated(files: Sequence[CandidateResult]) -> list[str]:
    """The thresholds in words: once if they are the same for all files, else per file."""
    names: dict[tuple[str, ...], list[str]] = {}
    for file in files:
        names.setdefault(tuple(_limits(file.thresholds)), []).append(file.model.name)
    if len(names) == 1:
        return list(next(iter(names)))
    return [f"{', '.join(files)}: {', '.join(words) or 'no thresholds'}" for words, files in names.items()]


def _limits(thresholds: Thresholds) -> list[str]:
    words = {
        "max_kld": "mean KLD at most {:g}",
        "min_top1": "top-1 agreement at least {:g}",
        "max_ppl_ratio": "perplexity ratio at most {:g}",
        "max_exporter_kld": "mean KLD by exporter at most {:g}",
        "max_pair_kld": "mean KLD between files with the same weights at most {:g}",
    }
    return [words[name].format(limit) for name, limit in thresholds.values().items()]


def _diverging(greedy: Greedy) -> tuple[list[Divergence], int]:
    """The earliest divergences, and the number of all."""
    found = sorted((one for one in greedy.prompts if one.position is not None), key=lambda one: one.agreed_tokens)
    return found[:_PROMPTS], len(found)


def _figure(estimate: Estimate, form: str = "{:.3g}") -> tuple[str, str]:
    value, error = figure(estimate, form)
    return short_power(value), short_power(error)


def _visible(text: str) -> str:
    """A token's text with visible spaces and line ends."""
    shown = text.replace("\r", "␍").replace("\n", "↵").replace("\t", "⇥")
    if not shown.strip(" "):
        shown = "␣" * len(shown) or "∅"
    return printable(shown)


def _small(value: float) -> str:
    """A divergence in three significant digits."""
    return short_power(f"{value:.3g}")
