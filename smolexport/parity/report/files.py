"""Reports as files, written completely or not at all: `--report` in the format of the file name, and `--junit`."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from smolexport.errors import UsageError
from smolexport.files import atomic_file, check_target
from smolexport.parity.report import html, junit, markdown, schema
from smolexport.parity.results import Comparison


def _json(comparison: Comparison) -> str:
    return json.dumps(schema.to_json(comparison), indent=2, allow_nan=False) + "\n"


KINDS: dict[str, Callable[[Comparison], str]] = {
    ".html": html.render_html,
    ".json": _json,
    ".md": markdown.render_markdown,
}
"""Function that makes the text of a report, by the suffix of its name."""


def check_reports(paths: Sequence[Path], verdicts: Path | None = None, *, force: bool = False) -> None:
    """Raise, before any work, if a report cannot be written.

    Args:
        paths: the files to write.
        verdicts: the JUnit XML, if it is to be written; an earlier one is replaced.
        force: existing files may be replaced.

    Raises:
        UsageError: a suffix that is not in `KINDS`, or one file twice.
        OutputError: the file exists, or its folder does not.
        MissingDependencyError: a library for the page is not installed.
    """
    for path in paths:
        if path.suffix.lower() not in KINDS:
            raise UsageError(f"--report {path}: the name must end in one of {', '.join(KINDS)}")
        check_target(path, 0, force=force, option="--report")
        if path.suffix.lower() == ".html":
            html.need_libraries()
    if len({path.resolve() for path in paths}) < len(paths):
        raise UsageError("--report: the same file is named twice")
    if verdicts:
        check_target(verdicts, 0, force=True, option="--junit")


def write_reports(
    paths: Sequence[Path], comparison: Comparison, verdicts: Path | None = None, *, force: bool = False
) -> None:
    """Write each report; raises what `check_reports` raises, and OutputError if the file cannot be written."""
    check_reports(paths, verdicts, force=force)
    texts = {path: KINDS[path.suffix.lower()](comparison) for path in paths}
    if verdicts:
        texts[verdicts] = junit.to_junit(comparison)
    for path, text in texts.items():
        with atomic_file(path, force=force or path == verdicts) as file:
            file.write(text.encode("utf-8"))
