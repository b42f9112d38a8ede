"""A comparison as one page that needs nothing but itself: no network, no scripts, charts as SVG within it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from typing import TYPE_CHECKING, Any

from smolexport.errors import MissingDependencyError
from smolexport.parity.methods import PLAIN, columns
from smolexport.parity.report.markdown import command_line
from smolexport.parity.report.names import ABSENT, estimate, number, short_power
from smolexport.parity.report.sheet import to_json
from smolexport.parity.report.svg import need_matplotlib
from smolexport.parity.results import NEAR_TIE, Comparison
from smolexport.text import printable

if TYPE_CHECKING:
    from jinja2 import Environment

__all__ = ["need_libraries", "render_html"]

Sheet = Mapping[str, Any]
_PROMPTS = 3  # diverging prompts shown of each file; the JSON has all


def need_libraries() -> None:
    """Raise MissingDependencyError, with the line that installs them, where jinja2 or matplotlib is missing."""
    try:
        import jinja2  # noqa: F401
    except ImportError as error:
        raise MissingDependencyError(
            f"an HTML report needs jinja2 ({error}): pip install 'smolexport[report]'"
        ) from error
    need_matplotlib()


def render_html(comparison: Comparison) -> str:
    """The page as text; raises MissingDependencyError without jinja2 and matplotlib."""
    need_libraries()
    from smolexport.parity.report.charts import charts

    sheet = to_json(comparison)
    page = _environment().get_template("page.html.j2").render(
        sheet=sheet,
        reference=sheet["reference"],
        files=sheet["candidates"],
        charts={chart.key: chart for chart in charts(sheet)},
        command=command_line(sheet),
        limits=_asked(sheet),
        near_tie=NEAR_TIE,
        methods=columns(file["method"] for row in sheet["methods"] for file in row["files"]),
        plain=PLAIN,
        missed=[(file["name"], miss) for file in sheet["candidates"] for miss in file["missed"]],
        attributed=any(file["attribution"] for file in sheet["candidates"]),
        shares=sheet["bandwidth_bytes_per_s"] is not None,
        diverging=[(file["name"], *_diverging(file["greedy"])) for file in sheet["candidates"] if file["greedy"]],
    )  # fmt: skip
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
    environment.globals |= {"pm": _with_error, "percent": _percent, "absent": ABSENT}
    return environment


def _asked(sheet: Sheet) -> list[str]:
    """What was asked for, in words: once where it is the same for all files, else with their names."""
    names: dict[tuple[str, ...], list[str]] = {}
    for file in sheet["candidates"]:
        names.setdefault(tuple(filter(None, _limits(file["thresholds"]))), []).append(file["name"])
    if len(names) == 1:
        return list(next(iter(names)))
    return [f"{', '.join(files)}: {', '.join(words) or 'nothing asked'}" for words, files in names.items()]


def _limits(limits: Sheet) -> list[str]:
    """Thresholds in words; empty where there is none."""
    kld, top1, ratio = limits["max_kld"], limits["min_top1"], limits["max_ppl_ratio"]
    exporter, pair = limits["max_exporter_kld"], limits["max_pair_kld"]
    return [
        "" if kld is None else f"mean KLD at most {kld:g}",
        "" if top1 is None else f"top-1 agreement at least {100 * top1:g} %",
        "" if ratio is None else f"perplexity ratio at most {ratio:g}",
        "" if exporter is None else f"mean KLD by exporter at most {exporter:g}",
        "" if pair is None else f"mean KLD between files of the same weights at most {pair:g}",
    ]


def _diverging(greedy: Sheet) -> tuple[Sheet, list[Sheet], int]:
    """A file's continuations, its earliest divergences, and how many there are."""
    apart = [prompt for prompt in greedy["prompts"] if prompt["first_divergence"] is not None]
    apart.sort(key=lambda prompt: prompt["first_divergence"])
    return greedy, apart[:_PROMPTS], len(apart)


def _with_error(part: Sheet, key: str, form: str = "{:.3g}", scale: float = 1.0) -> dict[str, str]:
    """Value and error of `key` as two texts."""
    value, error = part[key], part[f"{key}_error"]
    value, error = (None if figure is None else scale * figure for figure in (value, error))
    if value is not None and form == "rate":
        form = "{:,.0f}" if value >= 100 else "{:.3g}"
    text, _, tail = short_power(estimate(value, error, form)).partition(" ± ")
    return {"value": text, "error": tail}


def _percent(part: Sheet, key: str) -> dict[str, str]:
    return _with_error(part, key, "{:.2f}", 100.0)


def _visible(text: str) -> str:
    """A token's text with its spaces and line ends to be seen."""
    shown = text.replace("\r", "␍").replace("\n", "↵").replace("\t", "⇥")
    if not shown.strip(" "):
        shown = "␣" * len(shown) or "∅"
    return printable(shown)


def _small(value: float | None) -> str:
    """A divergence in three significant digits."""
    return short_power(number(value, "{:.3g}"))
