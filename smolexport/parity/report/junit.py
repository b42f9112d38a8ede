"""A comparison as JUnit XML, which GitHub's report actions, GitLab and Jenkins show as tests.

One suite with one case per file and threshold, and one per file for finite logits.  The properties of a case hold the
figures.  Elements and attributes are those that the schemas of Jenkins and Ant share.
"""

from __future__ import annotations

import math
from xml.etree import ElementTree

from smolexport.parity.results import CandidateResult, Comparison
from smolexport.parity.thresholds import Check
from smolexport.text import printable

_SUITE = "smolexport parity"


def to_junit(comparison: Comparison) -> str:
    """The verdicts of `comparison` as an XML document."""
    root = ElementTree.Element("testsuites", name=_SUITE)
    suite = ElementTree.SubElement(root, "testsuite", name=_SUITE)
    _properties(suite, {**comparison.environment, "reference": comparison.reference.model.name})
    total = failed = 0
    for index, result in enumerate(comparison.candidates):
        for check in checks_of(comparison, index):
            total, failed = total + 1, failed + bool(check.miss)
            suite.append(_case(check, result))
    for element in (root, suite):
        element.attrib |= {"tests": str(total), "failures": str(failed), "errors": "0", "time": "0"}
    suite.set("skipped", "0")
    ElementTree.indent(root)
    return f'<?xml version="1.0" encoding="UTF-8"?>\n{ElementTree.tostring(root, encoding="unicode")}\n'


def checks_of(comparison: Comparison, index: int) -> tuple[Check, ...]:
    """The checks of the candidate at `index`; misses beyond its thresholds are of kind `other`."""
    result = comparison.candidates[index]
    pairs = [pair.accuracy for pair in comparison.pairs if index in (pair.first, pair.second)]
    found = result.thresholds.checks(result.accuracy, result.attribution, pairs)
    known = {check.miss for check in found}
    return (*found, *(Check("other", math.nan, None, miss) for miss in result.missed if miss not in known))


def _case(check: Check, result: CandidateResult) -> ElementTree.Element:
    model = result.model
    case = ElementTree.Element("testcase", classname=f"parity.{printable(model.name)}", name=check.kind, time="0")
    figures = {"figure": check.figure, "threshold": check.limit, "bits_per_weight": model.bits_per_weight}
    facts = {
        "path": str(model.path), "format": model.format, "scheme": model.scheme,
        **({"method": model.method} if model.method else {}), "runtime": model.runtime,
        "bytes": str(model.bytes), **{key: f"{value:.6g}" for key, value in figures.items() if value is not None},
    }  # fmt: skip
    _properties(case, facts)
    if check.miss:
        failure = ElementTree.SubElement(case, "failure", message=printable(check.miss), type=check.kind)
        failure.text = "\n".join(map(printable, (f"{model.name}: {check.miss}", *result.notes)))
    return case


def _properties(element: ElementTree.Element, facts: dict[str, str]) -> None:
    listed = ElementTree.SubElement(element, "properties")
    for name, value in facts.items():
        ElementTree.SubElement(listed, "property", name=printable(name), value=printable(value))
