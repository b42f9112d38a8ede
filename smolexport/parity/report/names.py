"""Names of models in a report, and figures as text."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from smolexport.parity.results import Estimate, ModelInfo
from smolexport.text import printable

if TYPE_CHECKING:
    from smolexport.parity.inputs import Candidate

ABSENT = "-"


def model_infos(models: Sequence[Candidate]) -> list[ModelInfo]:
    """The facts about `models`, each under a name of its own."""
    names = short_names([(model.path, model.runtime.NAME) for model in models])
    return [model.info(name) for model, name in zip(models, names, strict=True)]


def short_names(models: Sequence[tuple[Path, str]]) -> list[str]:
    """A unique short name for each (path, runtime): the file name, extended only where necessary.

    Files of equal names get their folder, then the whole path; one file on several runtimes gets the runtime; the same
    file on the same runtime gets a number.
    """
    found = [path.name or str(path) for path, _ in models]
    longer = [f"{path.absolute().parent.name}/{path.name}" for path, _ in models], [str(path) for path, _ in models]
    for names in longer:
        paths: dict[str, set[Path]] = {}
        for name, (path, _) in zip(found, models, strict=True):
            paths.setdefault(name, set()).add(path)
        found = [more if len(paths[name]) > 1 else name for name, more in zip(found, names, strict=True)]
    on_runtimes = [f"{name} on {runtime}" for name, (_, runtime) in zip(found, models, strict=True)]
    numbered = [f"{name} #{place}" for place, name in enumerate(on_runtimes, 1)]
    for names in (on_runtimes, numbered):
        counts = Counter(found)
        found = [more if counts[name] > 1 else name for name, more in zip(found, names, strict=True)]
    return [printable(name) for name in found]


def reference_name(path: Path) -> str:
    """Name of the checkpoint in `path`: `demo`, the hub's `owner/name`, or the folder's name."""
    from smolexport.demo import demo_checkpoint

    path = path.absolute()
    if path == demo_checkpoint().absolute():
        return "demo"
    hub = re.fullmatch(r"models--(.+?)--(.+)", path.parents[1].name if len(path.parents) > 1 else "")
    if hub and path.parent.name == "snapshots":
        return printable(f"{hub[1]}/{hub[2]}")
    return printable(path.name or str(path))


def described(model: ModelInfo, kind: str = "") -> str:
    """What a model is: `gguf int4 gptq, llama.cpp`; `kind` replaces the format."""
    method = f" {model.method}" if model.method else ""
    return f"{kind or model.format} {model.scheme}{method}, {model.runtime}"


def two_lines(first: str, second: str, *, dim: bool = True) -> str:
    """Two lines of a cell of a rich table, the second one dim; markup in names is escaped."""
    from rich.markup import escape

    first, second = escape(printable(first)), escape(printable(second))
    return f"{first}\n[dim]{second}[/dim]" if dim else f"{first}\n{second}"


def number(value: float | None, form: str) -> str:
    """`value` in the format `form`, a dash for None."""
    return ABSENT if value is None else form.format(value)


def figure(estimate: Estimate | None, form: str) -> tuple[str, str]:
    """Text of a value and of its standard error, which is empty if unknown."""
    if estimate is None:
        return ABSENT, ""
    error = estimate.error
    # two significant digits, or all before the decimal point
    shown = f"{error:,.0f}" if error >= 10 or error == 0 else f"{error:.2g}"
    return form.format(estimate.value), shown if math.isfinite(error) else ""


def rate(estimate: Estimate | None) -> tuple[str, str]:
    """`figure` of a rate: three digits, or all before the decimal point."""
    return figure(estimate, "{:,.0f}" if estimate and estimate.value >= 100 else "{:.3g}")


def percent(share: Estimate) -> tuple[str, str]:
    """`figure` of a share, in percent."""
    return figure(Estimate(100 * share.value, 100 * share.error), "{:.2f}")


def short_power(text: str) -> str:
    """`2.9e-5` for Python's `2.9e-05`."""
    return re.sub(r"e([-+])0", r"e\1", text)
