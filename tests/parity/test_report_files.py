"""Markdown, the page's text, and `--report FILE`."""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from smolexport.errors import MissingDependencyError, OutputError, UsageError
from smolexport.parity.inputs import Settings
from smolexport.parity.report import check_reports, render_html, render_markdown, to_json, write_reports
from smolexport.parity.report.charts import styles_of
from smolexport.parity.report.tables import tables
from smolexport.parity.results import Divergence, Greedy, ModelInfo
from smolexport.parity.thresholds import Rule, Thresholds
from tests.children import python
from tests.cli.commands import assert_refused, call
from tests.parity.rich_sheets import judged_by, keeps_to_schema, moved, named

HOSTILE = "<img src=x onerror=alert(1)>\"'&{{7*7}}$x^2$|`*_\x1b[2J\n\u202e\x9b.gguf"


class Page(HTMLParser):
    """Elements and attributes of a page, and its text."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.words, self.charts, self.stray = [], [], [], {}, []
        self.figure = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        known = dict(attrs)
        self.figure = known.get("id", "") if tag == "figure" else self.figure
        if tag == "svg":
            self.charts[self.figure] = known

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())


def hostile(comparison):
    """Everything that a stranger can name has markup in its name."""
    first = comparison.candidates[0]
    greedy = Greedy(8, (Divergence(8, 3, 0.5, 1, 2, "</td><script>alert(3)</script>", "<i>", "\n</svg>"),))
    odd = moved(
        dataclasses.replace(first, greedy=greedy, notes=("<script>alert(4)</script>",)),
        path=first.model.path.with_name(HOSTILE), scheme="</style><script>alert(2)</script>", format="<b>x",
    )  # fmt: skip
    environment = {"<script>": "</dd><script>alert(5)</script>"}
    return dataclasses.replace(
        named(comparison, odd, *comparison.candidates[1:]), environment=environment, notes=("<iframe src=//x>",)
    )


@pytest.fixture
def plain(make_model, text):
    """A comparison with as little as there can be, one file equal to the reference."""
    from smolexport.parity.compare import compare

    settings = Settings(window=64, repetitions=0, greedy_tokens=0, memory=False)
    return compare(make_model("r.table"), [make_model("a.table")], text=text, settings=settings)


def test_the_page_holds_everything(rich, rich_page):
    page, text = Page(rich_page), rich_page
    assert list(page.charts) == ["size", "attribution", "distribution", "layers", "positions", "speed"]
    for chart in page.charts.values():
        assert chart["role"] == "img"
        assert "demo-q8_0.gguf" in chart["aria-label"]
    sheet = to_json(rich)
    for candidate in sheet["candidates"]:
        assert candidate["name"] in page.text
        assert f"{candidate['top1_agreement'] * 100:.2f}" in page.text
        assert candidate["fingerprint"] in page.text
    for key, value in rich.environment.items():
        assert key in page.text
        assert value in page.text
    assert "the old man opened the door and looked at" in page.text
    assert "↵" in page.text
    assert "noise floor" in page.text
    assert "mean KLD at most 0.5" in page.text
    assert len(text.encode()) < 500_000


def test_every_cell_stands_below_a_head(rich, rich_page):
    drawn = re.findall(r"<table>.*?</table>", rich_page, re.DOTALL)
    assert len(drawn) == len(tables(rich)) == 4
    for table, drawing in zip(tables(rich), drawn, strict=True):
        heads = re.findall(r'<th scope="col">(.*?)</th>', drawing, re.DOTALL)
        assert heads == [table.heads[0], *table.heads[2:]]
        rows = [row.count("<td>") for row in drawing.split("<tr")[2:]]
        assert rows == [len(heads) - 1] * len(table.rows)


def test_the_page_needs_nothing_else(rich_page):
    page, text = Page(rich_page), rich_page
    assert not {"script", "img", "link", "iframe", "object", "embed", "base"} & set(page.tags)
    for name, value in page.attributes:
        assert not name.startswith("on")
        if name in ("src", "href", "xlink:href", "action", "data"):
            assert value.startswith("#"), (name, value)
    assert "default-src 'none'" in text
    assert not re.search(r"url\((?!#)|@import", text)
    namespaces = ("http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink")
    assert set(re.findall(r"\w+://[^\s\"'<>]*", text)) <= set(namespaces)


def test_ids_are_unique_and_every_reference_has_one(rich_page):
    attributes = Page(rich_page).attributes
    ids = [value for name, value in attributes if name == "id"]
    assert len(ids) == len(set(ids))
    used = {value[1:] for name, value in attributes if name == "xlink:href"}
    used |= {found for _, value in attributes if value for found in re.findall(r"url\(#([^)]+)\)", value)}
    assert used
    assert used <= set(ids)


def test_colours_are_the_pages_own(rich_page):
    drawn = rich_page[rich_page.index("<svg") :]
    assert "var(--series-0)" in drawn
    assert "var(--ink)" in drawn
    assert not re.search(r"(?:fill|stroke): #(?!none)", drawn)


def test_the_same_sheet_gives_the_same_page(rich, rich_page):
    assert render_html(rich) == rich_page


def test_names_are_text_wherever_they_stand(rich):
    page = Page(render_html(hostile(rich)))
    assert not {"script", "img", "iframe", "b"} & set(page.tags)
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    for words in (
        "<img src=x onerror=alert(1)>\"'&{{7*7}}$x^2$|`*_\\x1b[2J\\n\\u202e\\x9b.gguf",
        "</style><script>alert(2)</script>",
    ):
        assert words in page.text
    assert not set(page.text) & set("\x1b\x9b\u202e")


def test_names_are_text_in_markdown_too(rich):
    text = render_markdown(hostile(rich))
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert "<" not in re.sub(r"`[^`]*`", "", text)
    assert not set(text) & set("\x1b\x9b\u202e")
    cells = {len(re.findall(r"(?<!\\)\|", row)) for row in rows[: 2 + 1 + len(rich.candidates)]}
    assert len(cells) == 1


def test_markdown_is_the_sheet(rich):
    text = render_markdown(rich)
    tables = re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)
    assert [table.count("\n") for table in tables] == [6, 5, 4, 5]
    for table in tables:
        assert len({line.count("|") for line in table.splitlines()}) == 1
    first = rich.candidates[0]
    row = next(line for line in tables[0].splitlines() if "demo-q8_0.gguf" in line)
    assert row.startswith("| `demo-q8_0.gguf` | gguf q8\\_0, llama.cpp | ")
    assert f"{first.accuracy.kld.mean.value:.3g} ± " in row
    assert "| 9, mean 38.0 (margin 0.031, 1 near tie) |" in row
    parts = next(line for line in tables[1].splitlines() if "demo-q8_0.gguf" in line)
    assert f"{first.attribution.exporter.kld.mean.value:.3g} ± " in parts
    command = "smolexport compare demo demo-q8_0.gguf demo-int4-onnx --dtype bf16 --window 128 --max-windows 4 "
    assert f"`{command}--max-kld 0.5" in text
    assert "processor: AMD EPYC 7B13" in text
    assert "passed: every file meets its thresholds" in text


def test_a_gate_of_exceptions_alone_is_told(rich):
    """Nothing under [default]: what is asked stands in the rules, and no report may say that nothing was."""
    kind, scheme = rich.candidates[1].model.format, rich.candidates[1].model.scheme
    gate = Thresholds(rules=(Rule(kind, scheme, Thresholds(max_exporter_kld=0.5)),))
    judged = judged_by(rich, gate)
    sheet = to_json(judged)
    keeps_to_schema(sheet)
    assert [file["thresholds"]["max_exporter_kld"] for file in sheet["candidates"]][:2] == [None, 0.5]
    page = Page(render_html(judged))
    assert "Passed" in page.text
    assert "No thresholds" not in page.text
    assert f"{rich.candidates[1].model.path.name}: mean KLD by exporter at most 0.5" in page.text
    text = render_markdown(judged)
    assert "passed: every file meets its thresholds" in text
    assert "--gate parity.toml" in text
    assert "--max-kld" not in text


def test_two_schemes_of_a_format_look_different():
    """Also where they take the same bits per weight, and two methods of one; one file on two runtimes is one look."""
    models = [
        ModelInfo(scheme, Path(scheme), "onnx", scheme, method, "onnxruntime", {}, 0, bits)
        for scheme, bits, method in (
            ("int8", 9.3, None),
            ("int4", 6.2, None),
            ("int4-asym", 6.2, None),
            ("int4", 6.2, None),
            ("int4", 6.2, "gptq"),
            ("int4", 6.2, "distil"),
        )
    ]
    styles = [(style.dashes, style.marker) for style in styles_of(models)]
    assert len(set(styles)) == 5
    assert styles[1] == styles[3]


def test_as_little_as_there_can_be(plain):
    page = Page(render_html(plain))
    assert set(page.charts) <= {"positions", "distribution", "size"}
    assert "No thresholds" in page.text
    assert "Where greedy decoding diverges" not in page.text
    text = render_markdown(plain)
    assert "prefill" not in text
    assert "exporter" not in text


def test_damaged_figures_make_a_page(make_model, text):
    from smolexport.parity.compare import compare

    settings = Settings(window=64, repetitions=1, prefill_tokens=8, decode_tokens=2, greedy_tokens=4, memory=False)
    broken = compare(make_model("r.table"), [make_model("x.table", poison=4)], text=text, settings=settings)
    page = Page(render_html(broken))
    assert "Missed a file is damaged" in page.text
    assert "speed" in page.charts
    assert "missed: `x.table`: logits are not all finite" in render_markdown(broken)


def test_reports_are_written_by_their_names(rich, tmp_path):
    paths = [tmp_path / name for name in ("r.html", "r.MD", "r.json")]
    write_reports(paths, rich)
    page, table, sheet = (path.read_text(encoding="utf-8") for path in paths)
    assert page.startswith("<!DOCTYPE html>")
    assert table == render_markdown(rich)
    assert json.loads(sheet) == json.loads(json.dumps(to_json(rich)))
    assert {path.name for path in tmp_path.iterdir()} == {"r.html", "r.MD", "r.json"}


def test_nothing_is_replaced_unless_asked_to(rich, tmp_path):
    path = tmp_path / "r.md"
    path.write_text("mine")
    with pytest.raises(OutputError, match=r"r.md: exists already; pass --force .* or another name with --report"):
        write_reports([path], rich)
    assert path.read_text() == "mine"
    write_reports([path], rich, force=True)
    assert path.read_text(encoding="utf-8") == render_markdown(rich)


def test_what_cannot_be_is_refused(tmp_path):
    with pytest.raises(UsageError, match=r"must end in one of .html, .json, .md"):
        check_reports([tmp_path / "r.pdf"])
    with pytest.raises(UsageError, match="named twice"):
        check_reports([tmp_path / "r.md", tmp_path / "x" / ".." / "r.md"][:1] * 2)
    with pytest.raises(OutputError, match="no such folder"):
        check_reports([tmp_path / "no" / "r.md"])
    (tmp_path / "d.html").mkdir()
    with pytest.raises(OutputError, match=r"is a folder; give a file name with --report"):
        check_reports([tmp_path / "d.html"], force=True)


def test_a_surrogate_in_a_name_can_be_written(rich, tmp_path):
    first = rich.candidates[0]
    odd = named(rich, moved(first, path=first.model.path.with_name("a\udcff.gguf")), *rich.candidates[1:])
    paths = [tmp_path / name for name in ("r.html", "r.md", "r.json")]
    write_reports(paths, odd)
    assert json.loads(paths[2].read_text(encoding="utf-8"))["candidates"][0]["path"].endswith("a\udcff.gguf")
    assert r"a\udcff.gguf" in paths[0].read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["jinja2", "matplotlib.figure"])
def test_without_the_libraries_the_line_that_installs_them(name, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'smolexport\[report\]'"):
        check_reports([tmp_path / "r.html"])
    check_reports([tmp_path / "r.md", tmp_path / "r.json"])


def test_importing_the_reports_loads_no_library():
    code = "import smolexport.parity.report, sys; print(*sys.modules)"
    assert not {"matplotlib", "jinja2", "rich"} & set(python(code).split())


def test_the_command_writes_them(demo_files, tmp_path):
    """One run for all of it: JSON on stdout that keeps to its schema, the reports, the exit code of a miss."""
    few = ("--window", "64", "--max-windows", "1", "--greedy-tokens", "4", "--repetitions", "1", "--threads", "1")
    paths = tmp_path / "r.json", tmp_path / "r.html"
    asked = [word for path in paths for word in ("--report", path)]
    outcome = call("compare", "demo", demo_files[0], *few, "--max-kld", "1e-9", *asked, "--json")
    assert outcome.code == 1, outcome.err
    sheet = json.loads(outcome.out)
    keeps_to_schema(sheet)
    assert sheet["reference"]["name"] == "demo"
    assert sheet["candidates"][0]["name"] == "demo-q8_0.gguf"
    assert sheet["candidates"][0]["missed"]
    assert json.loads(paths[0].read_text(encoding="utf-8")) == sheet
    assert "Missed" in Page(paths[1].read_text(encoding="utf-8")).text
    assert_refused(call("compare", "demo", demo_files[0], *few, *asked), paths[0], "exists already", "--force")
    assert_refused(call("compare", "demo", demo_files[0], *few, "--report", tmp_path / "r.txt"), ".html, .json, .md")
    # with --force the report is no reason any more, so what is said is about the file
    assert_refused(call("compare", "demo", tmp_path / "no.gguf", *few, *asked, "--force"), "no.gguf", "no such file")
