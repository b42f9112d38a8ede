"""What a file is called on a sheet with others, and figures as text."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from smolexport.text import printable

__all__ = ["ABSENT", "error_text", "estimate", "number", "reference_name", "short_names", "short_power", "two_lines"]

ABSENT = "-"


def short_names(models: Sequence[tuple[Path, str]]) -> list[str]:
    """A short name for each (path, runtime), no two alike: the file's own, with more around it only where it must.

    Two files of one name get their folder, or where that does not tell them apart the whole path; one file on two
    runtimes gets the runtime.
    """
    found = [path.name or str(path) for path, _ in models]
    longer = [f"{path.absolute().parent.name}/{path.name}" for path, _ in models], [str(path) for path, _ in models]
    for names in longer:
        places: dict[str, set[Path]] = {}
        for name, (path, _) in zip(found, models, strict=True):
            places.setdefault(name, set()).add(path)
        found = [more if len(places[name]) > 1 else name for name, more in zip(found, names, strict=True)]
    counts = Counter(found)
    return [
        printable(f"{name} on {runtime}" if counts[name] > 1 else name)
        for name, (_, runtime) in zip(found, models, strict=True)
    ]


def reference_name(path: Path) -> str:
    """What the checkpoint in `path` is called: `demo`, the hub's `owner/name`, else the folder's own name."""
    from smolexport.demo import demo_checkpoint

    path = path.absolute()
    if path == demo_checkpoint().absolute():
        return "demo"
    hub = re.fullmatch(r"models--(.+?)--(.+)", path.parents[1].name if len(path.parents) > 1 else "")
    if hub and path.parent.name == "snapshots":
        return printable(f"{hub[1]}/{hub[2]}")
    return printable(path.name or str(path))


def two_lines(first: str, second: str, *, dim: bool = True) -> str:
    """Two lines of a cell of a rich table, the second one dim; strangers' names mean nothing in them."""
    from rich.markup import escape

    first, second = escape(printable(first)), escape(printable(second))
    return f"{first}\n[dim]{second}[/dim]" if dim else f"{first}\n{second}"


def number(value: float | None, form: str) -> str:
    """`value` in the format `form`, a dash for None."""
    return ABSENT if value is None else form.format(value)


def error_text(error: float) -> str:
    """A standard error: two significant digits, or all before the point."""
    return f"{error:,.0f}" if error >= 10 or error == 0 else f"{error:.2g}"


def estimate(value: float | None, error: float | None, form: str) -> str:
    """`value ± error` on one line; the error alone may be absent."""
    if value is None or error is None or not math.isfinite(error):
        return number(value, form)
    return f"{form.format(value)} ± {error_text(error)}"


def short_power(text: str) -> str:
    """`2.9e-5` for Python's `2.9e-05`."""
    return re.sub(r"e([-+])0", r"e\1", text)
