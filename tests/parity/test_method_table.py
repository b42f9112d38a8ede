"""A file's method of calibration on every report, and what is read of it from the file and from beside it."""

from __future__ import annotations

import dataclasses
import io
import json
import os
from xml.etree import ElementTree

import pytest
from rich.console import Console

from smolexport.conversion.source_model import CALIBRATION_KEY
from smolexport.parity.candidates import read_calibration_errors, read_calibration_record
from smolexport.parity.compare import compare, side_by_side
from smolexport.parity.inputs import Record, Settings
from smolexport.parity.report import render, render_html, render_markdown, to_json
from smolexport.parity.report.junit import to_junit
from smolexport.parity.report.tables import described, method_rank
from smolexport.parity.results import CalibrationEffect
from smolexport.parity.thresholds import Rule, Thresholds
from smolexport.recipe import sidecar_of
from tests.browser.chromium_for_tests import needs_chromium_alone, opened
from tests.parity.rich_sheets import keeps_to_schema, moved

QUICK = Settings(window=64, repetitions=0, greedy_tokens=0, memory=False)
RECORD = {
    "method": "gptq", "damping": 0.01, "tokens": 64, "window": 32, "windows_sha256": "aa",
    "texts": [{"name": "words.txt", "sha256": "bb", "tokens": 64}],
}  # fmt: skip
ERRORS = {
    f"model.layers.{layer}.{name}.weight": {"before": 0.004 * (1 + layer), "after": 0.001 * (1 + layer)}
    for layer in range(3)
    for name in ("self_attn.q_proj", "mlp.down_proj")
} | {"model.embed_tokens.weight": {"before": 0.002, "after": 0.001}}


def effects_of(errors):
    return tuple(
        CalibrationEffect(
            source, None if "embed" in source else int(source.split(".")[2]), source.split(".")[-2], **one
        )
        for source, one in errors.items()
    )


@pytest.fixture
def comparison(make_model, text):
    """Two schemes in three methods, the second scheme in two of them alone."""
    models = []
    for scheme, noise, methods in (("q4", 0.4, (None, "gptq", "distil")), ("q5", 0.2, (None, "distil"))):
        for place, method in enumerate(methods):
            model = make_model(f"{scheme}.{method}.table", noise=noise / (1 + place))
            record = Record(method) if method else None
            effects = effects_of(ERRORS) if method == "gptq" else ()
            size = {"q4": 4_000_000, "q5": 5_000_000}[scheme]
            models.append(
                dataclasses.replace(model, calibration=record, calibration_errors=effects, bytes=size + place)
            )
    return compare(make_model("bf16.table"), models, text=text, settings=QUICK)


def printed(comparison):
    out = io.StringIO()
    render(comparison, Console(file=out, width=100))
    return out.getvalue()


def test_every_report_names_the_method(comparison):
    terminal, markdown, page = printed(comparison), render_markdown(comparison), render_html(comparison)
    for kind in ("q4 gptq, table", "q4 distil, table", "q5 distil, table", "q4, table"):
        assert f"table {kind}" in terminal
        assert f"table {kind}" in markdown
        assert f"table {kind}" in page
    sheet = to_json(comparison)
    keeps_to_schema(sheet)
    assert [one["method"] for one in sheet["candidates"]] == [None, "gptq", "distil", None, "distil"]
    assert sheet["reference"]["method"] is None
    cases = ElementTree.fromstring(to_junit(comparison)).iter("testcase")
    methods = [
        next((p.get("value") for p in case.iter("property") if p.get("name") == "method"), None) for case in cases
    ]
    assert methods == [None, "gptq", "distil", None, "distil"]


def test_methods_stand_side_by_side(comparison):
    rows = side_by_side(comparison.candidates)
    assert [(row.scheme, [file.method for file in row.files]) for row in rows] == [
        ("q4", ["rtn", "gptq", "distil"]),
        ("q5", ["rtn", "distil"]),
    ]
    plain, solved = (comparison.candidates[place].accuracy.kld.mean.value for place in (0, 1))
    assert comparison.methods == rows
    assert rows[0].files[1].ratio == solved / plain
    assert 0 < solved < plain
    terminal, markdown = printed(comparison), render_markdown(comparison)
    assert "Calibration methods at equal size" in terminal
    assert f"{solved / plain:.2f} x rtn" in terminal
    assert "| format | runtime | rtn | gptq | distil |" in markdown
    assert f"({solved / plain:.2f} x rtn) |" in markdown
    assert (
        next(line for line in markdown.splitlines() if line.startswith("| `table q5` | table")).split(" | ")[3] == "-"
    )
    page = render_html(comparison)
    assert "Calibration methods at equal size" in page
    assert f"{solved / plain:.2f} x rtn" in page


def test_other_sizes_and_single_methods_are_no_row(comparison):
    results = comparison.candidates
    assert side_by_side(results[1:2] + results[3:4]) == ()
    wider = moved(results[1], bits_per_weight=results[0].model.bits_per_weight + 1)
    assert side_by_side((results[0], wider)) == ()
    # a second file of one method is not dropped: it opens a row, which then has to find its like
    assert len(side_by_side((*results[:2], *results[:2]))) == 2


def test_columns_go_from_the_plainest_on():
    assert sorted(["of a stranger", "distil", "rtn"], key=method_rank) == ["rtn", "distil", "of a stranger"]
    assert method_rank(None) == method_rank("rtn")


def test_curves_join_the_sizes_of_a_method(comparison):
    page = render_html(comparison)
    size = page[page.index('id="size"') : page.index("</figure>", page.index('id="size"'))]
    for label in ("table rtn", "table gptq", "table distil", "q4 gptq", "q5 distil"):
        assert f">{label}<" in size
    assert "Curves of mean KLD against size" in size


def test_errors_before_and_after_are_drawn_where_a_report_has_them(comparison):
    page = render_html(comparison)
    assert 'id="calibration"' in page
    chart = page[page.index('id="calibration"') : page.index("</figure>", page.index('id="calibration"'))]
    for label in ("q_proj", "down_proj", "embed_tokens", "rounded to nearest"):
        assert f">{label}<" in chart
    bare = [dataclasses.replace(one, calibration_errors=()) for one in comparison.candidates]
    assert 'id="calibration"' not in render_html(dataclasses.replace(comparison, candidates=tuple(bare)))


def test_hostile_methods_are_text(make_model, text):
    model = dataclasses.replace(make_model("x.table"), calibration=Record("<script>x</script>|[red]\x1b"))
    result = compare(make_model("r.table"), [model, make_model("y.table")], text=text, settings=QUICK)
    assert "<script>" not in render_html(result)
    assert "<script>" not in render_markdown(result)
    assert "\x1b" not in printed(result)
    assert "[red]" in printed(result)
    keeps_to_schema(to_json(result))


def test_a_gate_matches_the_scheme_of_a_calibrated_file(make_model):
    model = dataclasses.replace(make_model("int4.table"), calibration=Record("gptq"))
    assert described(model.info("int4.table")) == "table int4 gptq, table"
    gate = Thresholds(rules=(Rule("table", "int4", Thresholds(max_kld=0.5)),))
    assert gate.thresholds_for(model.info("int4.table")).max_kld == 0.5


def test_a_record_is_read():
    record, note = read_calibration_record({CALIBRATION_KEY: json.dumps(RECORD)})
    assert note == ""
    assert record is not None
    assert (record.method, record.tokens, record.windows_sha256) == ("gptq", 64, "aa")
    assert [(one.name, one.sha256) for one in record.sources] == [("words.txt", "bb")]
    assert read_calibration_record({}) == (None, "")


@pytest.mark.parametrize(
    "value",
    [
        "", "{", "[]", "3", "null", "{}", '{"method": 3}', '{"method": ""}', '{"method": "x", "texts": [{}]}',
        '{"method": "x", "texts": 3}', '{"method": "x", "tokens": "many"}', '{"method": "x", "tokens": 1e999}',
        "[" * 100_000, 7, None, ["x"],
    ],
)  # fmt: skip
def test_a_damaged_record_is_a_note(value):
    record, note = read_calibration_record({CALIBRATION_KEY: value})
    assert record is None
    assert note.startswith(f"metadata {CALIBRATION_KEY} cannot be read (")
    assert "\n" not in note
    assert len(note) < 200


def test_the_report_beside_a_file_is_read(tmp_path):
    path, record = tmp_path / "x.gguf", read_calibration_record({CALIBRATION_KEY: json.dumps(RECORD)})[0]
    assert read_calibration_errors(path, record) == ((), "")
    sidecar_of(path).write_text(json.dumps(RECORD | {"tensors": ERRORS}))
    assert read_calibration_errors(path, record) == (effects_of(ERRORS), "")


@pytest.mark.parametrize(
    "content",
    [
        b"", b"\xff\xfe", b"{", b"[]", b"3", b"{}", json.dumps(RECORD).encode(),
        json.dumps(RECORD | {"method": "distil", "tensors": ERRORS}).encode(),
        json.dumps(RECORD | {"windows_sha256": "cc", "tensors": ERRORS}).encode(),
        json.dumps(RECORD | {"tensors": [1]}).encode(),
        json.dumps(RECORD | {"tensors": {"x": 3}}).encode(),
        json.dumps(RECORD | {"tensors": {"x": {"before": 1}}}).encode(),
        json.dumps(RECORD | {"tensors": {"x": {"before": -1, "after": 0}}}).encode(),
        json.dumps(RECORD | {"tensors": {"x": {"before": "nan", "after": 0}}}).encode(),
        b"[" * 100_000,
    ],
)  # fmt: skip
def test_a_damaged_report_beside_a_file_is_a_note(content, tmp_path):
    path, record = tmp_path / "x.gguf", read_calibration_record({CALIBRATION_KEY: json.dumps(RECORD)})[0]
    sidecar_of(path).write_bytes(content)
    effects, note = read_calibration_errors(path, record)
    assert effects == ()
    assert note.startswith("x.gguf.calibration.json: cannot be read (")
    assert "\n" not in note
    assert len(note) < 200


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo])
def test_a_folder_or_pipe_in_its_place_is_a_note(make, tmp_path):
    path = tmp_path / "x.gguf"
    make(sidecar_of(path))
    assert "cannot be read" in read_calibration_errors(path, Record("gptq"))[1]


def test_notes_of_a_candidate_stand_on_the_sheet(make_model, text):
    model = dataclasses.replace(make_model("x.table"), notes=("x.calibration.json: cannot be read (it is torn)",))
    result = compare(make_model("r.table"), [model], text=text, settings=QUICK)
    assert result.candidates[0].notes[0] == "x.calibration.json: cannot be read (it is torn)"


@needs_chromium_alone
@pytest.mark.parametrize("dark", [False, True])
def test_the_page_fits_in_a_browser(comparison, dark):
    seen = opened(render_html(comparison), dark=dark)
    assert len(seen["charts"]) == seen["captions"] == 4
    assert (seen["outside"], seen["beyond"], seen["scrolling"]) == ([], [], 0)
    assert seen["wanted"] <= 1200
