"""A comparison as JUnit XML: what GitHub's report actions, GitLab and Jenkins show as tests.

One suite, one case for each file and threshold, and one for each file that says that its logits are finite.  The
figures stand in a case's properties.  Elements and attributes are those that the schemas of Jenkins and Ant share.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

from smolexport.files import atomic_file, check_target
from smolexport.parity.gate import Check
from smolexport.parity.report.names import reference_name
from smolexport.parity.results import Accuracy, CandidateResult, Comparison
from smolexport.text import printable

__all__ = ["check_junit", "checks_of", "labels", "to_junit", "write_junit"]

_SUITE = "smolexport parity"


def to_junit(comparison: Comparison) -> str:
    """The verdicts of `comparison`, an XML document."""
    root = ElementTree.Element("testsuites", name=_SUITE)
    suite = ElementTree.SubElement(root, "testsuite", name=_SUITE)
    _properties(suite, {**comparison.environment, "reference": reference_name(comparison.reference.model.path)})
    total = failed = 0
    for index, name in enumerate(labels(comparison)):
        for check in checks_of(comparison, index):
            total, failed = total + 1, failed + bool(check.miss)
            suite.append(_case(name, check, comparison.candidates[index]))
    for element in (root, suite):
        element.attrib |= {"tests": str(total), "failures": str(failed), "errors": "0", "time": "0"}
    suite.set("skipped", "0")
    ElementTree.indent(root)
    return f'<?xml version="1.0" encoding="UTF-8"?>\n{ElementTree.tostring(root, encoding="unicode")}\n'


def check_junit(path: Path | None) -> None:
    """Refuse, before any work, a `path` that could not be written; None is no report.

    Raises:
        OutputError: a folder, a place that does not exist or cannot be written to.
    """
    if path is not None:
        check_target(path, 0, force=True, option="--junit")


def write_junit(comparison: Comparison, path: Path | None) -> None:
    """Write `to_junit` to `path`, whole or not at all, over an earlier report; None writes nothing.

    Raises:
        OutputError: the disk is full or the folder cannot be written to.
    """
    if path is not None:
        with atomic_file(path, force=True) as file:
            file.write(to_junit(comparison).encode("utf-8"))


def labels(comparison: Comparison) -> list[str]:
    """A name for each candidate: its file's, with runtime or folder where that is not enough, then with a number."""
    models = [result.model for result in comparison.candidates]
    names = [model.path.name or str(model.path) for model in models]
    for fuller in (
        [f"{name} on {model.runtime.NAME}" for name, model in zip(names, models, strict=True)],
        [f"{model.path} on {model.runtime.NAME}" for model in models],
        [f"{model.path} on {model.runtime.NAME} #{place}" for place, model in enumerate(models, 1)],
    ):
        names = [more if names.count(name) > 1 else name for name, more in zip(names, fuller, strict=True)]
    return names


def checks_of(comparison: Comparison, index: int) -> tuple[Check, ...]:
    """What the candidate at `index` was asked for; what it misses beyond its thresholds stands under `other`."""
    result = comparison.candidates[index]
    limits = comparison.thresholds.thresholds_for(result.model)
    found = limits.checks(result.accuracy, result.attribution, _pairs(comparison, index))
    told = {check.miss for check in found}
    return (*found, *(Check("other", math.nan, None, miss) for miss in result.misses if miss not in told))


def _pairs(comparison: Comparison, index: int) -> Sequence[Accuracy]:
    return [pair.accuracy for pair in comparison.pairs if index in (pair.first, pair.second)]


def _case(name: str, check: Check, result: CandidateResult) -> ElementTree.Element:
    model = result.model
    case = ElementTree.Element("testcase", classname=f"parity.{printable(name)}", name=check.kind, time="0")
    figures = {"figure": check.figure, "threshold": check.limit, "bits_per_weight": model.bits_per_weight}
    facts = {
        "path": str(model.path), "format": model.format, "scheme": model.scheme,
        **({"method": model.method} if model.method else {}), "runtime": model.runtime.NAME,
        "bytes": str(model.bytes), **{key: f"{value:.6g}" for key, value in figures.items() if value is not None},
    }  # fmt: skip
    _properties(case, facts)
    if check.miss:
        failure = ElementTree.SubElement(case, "failure", message=printable(check.miss), type=check.kind)
        failure.text = "\n".join(map(printable, (f"{name}: {check.miss}", *result.notes)))
    return case


def _properties(element: ElementTree.Element, facts: dict[str, str]) -> None:
    listed = ElementTree.SubElement(element, "properties")
    for name, value in facts.items():
        ElementTree.SubElement(listed, "property", name=printable(name), value=printable(value))
