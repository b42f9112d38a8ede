"""Thresholds by format and scheme, and JUnit XML."""

from __future__ import annotations

import dataclasses
import math
from xml.etree import ElementTree

import pytest

from smolexport.errors import UsageError
from smolexport.parity.compare import compare
from smolexport.parity.inputs import Settings
from smolexport.parity.report.junit import checks_of, to_junit
from smolexport.parity.results import Attribution, Pair
from smolexport.parity.thresholds import Rule, Thresholds, gate_from, read_gate
from tests.parity.rich_sheets import judged_by, moved, named

QUICK = Settings(window=64, repetitions=0, greedy_tokens=0, memory=False)
FULL = """
[default]
max_kld = 0.05
min_top1 = 0.9
[int4]
max_kld = 0.04
max_exporter_kld = 0.001
[gguf]
max_kld = 0.03
max_ppl_ratio = 2
[gguf.q4-K]
max_kld = 0.02
"""


@pytest.fixture
def write(tmp_path):
    def write(text):
        path = tmp_path / "parity.toml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


@pytest.fixture
def model(make_model):
    base = make_model("x.table")
    return lambda kind, scheme: dataclasses.replace(base, format=kind, scheme=scheme)


@pytest.mark.parametrize(
    ("kind", "scheme", "expected"),
    [
        ("mlx", "q4", Thresholds(0.05, 0.9)),
        ("mlx", "int4", Thresholds(0.04, 0.9, max_exporter_kld=0.001)),
        ("onnx", "int4+f32", Thresholds(0.04, 0.9, max_exporter_kld=0.001)),
        ("onnx", "f32+int4", Thresholds(0.05, 0.9)),
        ("gguf", "q8_0", Thresholds(0.03, 0.9, 2)),
        ("gguf", "int4", Thresholds(0.04, 0.9, 2, 0.001)),
        ("gguf", "q4_k_m", Thresholds(0.02, 0.9, 2)),
        ("stranger", "q4_k_m", Thresholds(0.05, 0.9)),
    ],
)
def test_the_most_specific_table_wins_key_by_key(write, model, kind, scheme, expected):
    gate = read_gate(write(FULL))
    assert gate.thresholds_for(model(kind, scheme)) == expected
    assert gate.needs_attribution()


def test_flags_override_every_table(write, model):
    gate = gate_from(write(FULL), Thresholds(max_kld=0.5))
    for kind, scheme in (("gguf", "q4_k_m"), ("onnx", "int4"), ("mlx", "q4")):
        assert gate.thresholds_for(model(kind, scheme)).max_kld == 0.5
    assert gate.thresholds_for(model("gguf", "int4")).max_exporter_kld == 0.001
    assert gate_from(None, Thresholds(0.5)) == Thresholds(0.5)


def test_one_name_of_two_schemes(write, model):
    """`q4` is a scheme of MLX and another name of ONNX's int4; the table is MLX's, and int4 may have its own."""
    gate = read_gate(write("[q4]\nmax_kld = 1\n[int4]\nmax_kld = 2\n"))
    limits = [gate.thresholds_for(model(*kind)).max_kld for kind in (("mlx", "q4"), ("onnx", "int4"), ("mlx", "bf16"))]
    assert limits == [1, 2, None]
    assert not gate.needs_attribution()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("max_kld = 1", "max_kld: is outside of any table"),
        ("[in4]\nmax_kld = 1", "[in4]: unknown table"),
        ("[gguf.q99]\nmax_kld = 1", "[gguf.q99]: format gguf has no such scheme"),
        ("[int4]\nmax_kdl = 1", "[int4] max_kdl: is not a threshold, did you mean max_kld?"),
        ("[gguf.q4_k]\nmin_top2 = 1", "[gguf.q4_k] min_top2: is not a threshold"),
        ("[default.x]\nmax_kld = 1", "[default] x: is not a threshold"),
        ('[int4]\nmax_kld = "0.1"', "[int4] max_kld = '0.1': must be a number"),
        ("[int4]\nmax_kld = true", "[int4] max_kld = true: must be a number"),
        ("[int4]\nmax_kld = nan", "must be a number"),
        ("[int4]\nmax_kld = inf", "must be a number"),
        ("[int4]\nmax_kld = -1", "must be a number, at least 0"),
        ("[int4]\nmin_top1 = 90", "[int4] min_top1 = 90: must be a share"),
        ("[gguf.q4_k]\nmax_kld = 1\n[gguf.q4_k_m]\nmax_kld = 1", "gguf q4_k_m has two tables"),
        ("[int4", "is not TOML"),
        (b"\xff\xfe", "is not TOML"),
        ("", "sets no threshold"),
        ("[default]\n[int4]\n", "sets no threshold"),
    ],
)
def test_a_gate_that_is_wrong_is_one_line(write, text, words):
    path = write(text)
    with pytest.raises(UsageError) as caught:
        read_gate(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_no_gate_file_is_an_error(tmp_path):
    with pytest.raises(UsageError, match=r"none\.toml: No such file"):
        read_gate(tmp_path / "none.toml")


@pytest.fixture
def judged(make_model, text):
    """Two like files, of which the gate asks more of the first."""
    models = [make_model("strict.table", noise=0.1), make_model("easy.table", noise=0.1, seed=7)]
    gate = Thresholds(max_kld=9.0, rules=(Rule("table", "strict", Thresholds(max_kld=1e-9, min_top1=0.0)),))
    return compare(make_model("bf16.table"), models, text=text, settings=QUICK, thresholds=gate)


def test_a_comparison_asks_each_candidate_for_its_own(judged):
    assert [candidate.passed for candidate in judged.candidates] == [False, True]
    [miss] = judged.candidates[0].missed
    assert miss.endswith("is above 1e-09")


def figures(comparison, mean):
    accuracy = comparison.candidates[0].accuracy
    spread = dataclasses.replace(accuracy.kld, mean=dataclasses.replace(accuracy.kld.mean, value=mean))
    return dataclasses.replace(accuracy, kld=spread)


@pytest.mark.parametrize(("mean", "missed"), [(0.001, False), (0.002, True), (math.nan, True)])
def test_exporter_and_pairs(judged, mean, missed):
    accuracy, other = judged.candidates[0].accuracy, figures(judged, mean)
    parts = Attribution(quantization=accuracy, exporter=other)
    assert bool(Thresholds(max_exporter_kld=0.001).misses(accuracy, parts)) is missed
    assert bool(Thresholds(max_pair_kld=0.001).misses(accuracy, None, [accuracy, other])) is True
    assert bool(Thresholds(max_pair_kld=0.001).misses(accuracy, None, [other])) is missed


def test_a_figure_that_nobody_took_is_a_miss_and_a_missing_twin_is_none(judged):
    accuracy = judged.candidates[0].accuracy
    assert Thresholds(max_exporter_kld=1.0).misses(accuracy) == ("max_exporter_kld = 1 was not measured",)
    assert Thresholds(max_pair_kld=0.0).misses(accuracy) == ()


def read(comparison):
    suites = ElementTree.fromstring(to_junit(comparison).encode())
    assert suites.tag == "testsuites"
    [suite] = suites
    cases = suite.findall("testcase")
    assert suite.get("tests") == suites.get("tests") == str(len(cases))
    assert suite.get("failures") == str(sum(case.find("failure") is not None for case in cases))
    return suite, cases


def test_junit_has_a_case_for_each_file_and_threshold(judged):
    _, cases = read(judged)
    assert [(case.get("classname"), case.get("name")) for case in cases] == [
        ("parity.strict.table", "finite"),
        ("parity.strict.table", "max_kld"),
        ("parity.strict.table", "min_top1"),
        ("parity.easy.table", "finite"),
        ("parity.easy.table", "max_kld"),
    ]
    assert [case.find("failure") is not None for case in cases] == [False, True, False, False, False]
    failure = cases[1].find("failure")
    assert failure.get("message") == judged.candidates[0].missed[0]
    facts = {p.get("name"): p.get("value") for p in cases[1].find("properties")}
    assert float(facts["figure"]) == pytest.approx(judged.candidates[0].accuracy.kld.mean.value, rel=1e-5)
    assert (facts["threshold"], facts["scheme"], facts["runtime"]) == ("1e-09", "strict", "table")


def test_junit_says_what_else_failed_and_what_the_pairs_did(judged):
    results = [dataclasses.replace(judged.candidates[0], missed=("something new",)), judged.candidates[1]]
    gate = Thresholds(max_pair_kld=0.5)
    pairs = (Pair(0, 1, figures(judged, 0.7)),)
    found = judged_by(dataclasses.replace(judged, candidates=results, pairs=pairs), gate)
    kinds = [[(check.kind, bool(check.miss)) for check in checks_of(found, index)] for index in (0, 1)]
    assert kinds == [
        [("finite", False), ("max_pair_kld", True), ("other", True)],
        [*kinds[1][:1], ("max_pair_kld", True)],
    ]
    assert "something new" in to_junit(found)


def test_junit_of_logits_that_are_not_finite(make_model, text):
    limits = Thresholds(max_kld=1)
    found = compare(
        make_model("r.table"), [make_model("x.table", poison=4)], text=text, settings=QUICK, thresholds=limits
    )
    _, cases = read(found)
    assert [case.find("failure") is not None for case in cases] == [True, True]
    assert len(found.candidates[0].missed) == 1


def test_names_that_xml_cannot_hold(judged):
    name = 'a<b>&"\x00\x1b[31m\n\ud800\ufffe]]>é😀.table'
    results = [
        moved(dataclasses.replace(result, notes=(name,)), path=result.model.path.with_name(name))
        for result in judged.candidates
    ]
    found = dataclasses.replace(named(judged, *results), environment={"odd\x07": name})
    suite, cases = read(found)
    names = {case.get("classname") for case in cases}
    assert len(names) == 2
    for shown in names:
        assert r'a<b>&"\x00\x1b[31m\n\ud800\ufffe]]>é😀.table' in shown
    assert "]]>é😀" in cases[1].find("failure").text
    assert suite.find("properties")[0].get("name") == r"odd\x07"


def test_cases_tell_files_apart(judged, tmp_path):
    def classes(*paths):
        _, cases = read(named(judged, *(moved(judged.candidates[0], path=path) for path in paths)))
        return list(dict.fromkeys(case.get("classname").removeprefix("parity.") for case in cases))

    a, b = tmp_path / "a" / "x.gguf", tmp_path / "b" / "x.gguf"
    assert classes(a, tmp_path / "y.gguf") == ["x.gguf", "y.gguf"]
    assert classes(a, b) == ["a/x.gguf", "b/x.gguf"]
    assert classes(a, a) == ["x.gguf on table #1", "x.gguf on table #2"]
