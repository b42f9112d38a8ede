"""`compare --method --stats`: files made in several ways, and text that calibration has seen."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from smolexport.calibration.calibrator import Calibration
from smolexport.conversion.pipeline import export
from smolexport.recipe import sidecar_of
from tests.cli.commands import assert_refused, call
from tests.cli.test_cli_play import needs_runtimes
from tests.parity.rich_sheets import keeps_to_schema

FAST = (
    "--max-windows", "1", "--greedy-tokens", "0", "--repetitions", "0", "--no-chat", "--no-attribution",
    "--threads", "1",
)  # fmt: skip


@pytest.fixture(scope="module")
def solved(demo: Path, demo_statistics: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    calibration = Calibration("gptq", demo_statistics)
    return export("gguf", demo, tmp_path_factory.mktemp("solved"), quant="int4", calibration=calibration).path


@needs_runtimes
def test_every_scheme_is_made_in_every_way(demo_statistics: Path) -> None:
    ask = ("compare", "demo", "-q", "int4,int8", "--method", "rtn,gptq,gptq", "--stats", demo_statistics)
    outcome = call(*ask, *FAST, "--json")
    assert outcome.code == 0, outcome.err
    sheet = json.loads(outcome.out)
    keeps_to_schema(sheet)
    made = {(one["format"], one["scheme"], one["method"] or "") for one in sheet["candidates"]}
    formats = ("gguf", "mlx", "onnx")
    ways = (("int4", ""), ("int4", "gptq"), ("int8", ""))
    assert made == {(name, *way) for name in formats for way in ways}
    assert "gptq cannot affect it; using rtn" in outcome.err
    for row in sheet["methods"]:
        assert row["scheme"] == "int4"
        ratios = {file["method"]: file["ratio"] for file in row["files"]}
        assert ratios["rtn"] == 1
        assert ratios["gptq"] < 0.6
    assert {row["format"] for row in sheet["methods"]} == set(formats)
    assert all(bool(one["calibration_errors"]) == (one["method"] == "gptq") for one in sheet["candidates"])
    assert any(note.startswith("0 of the ") for note in sheet["notes"])


@needs_runtimes
def test_a_scheme_that_no_method_reaches_is_made_all_the_same(demo_statistics: Path) -> None:
    ask = ("compare", "demo", "-q", "int8", "--method", "gptq", "--stats", demo_statistics, *FAST, "--json")
    outcome = call(*ask)
    assert outcome.code == 0, outcome.err
    assert {(one["format"], one["method"]) for one in json.loads(outcome.out)["candidates"]} == {
        ("gguf", None), ("mlx", None), ("onnx", None),
    }  # fmt: skip
    assert "gptq cannot affect it; using rtn" in outcome.err


def test_refusals_come_before_any_work(tiny: Path, exported: Path, demo_statistics: Path) -> None:
    assert_refused(call("compare", tiny, "--method", "rtn,gptq"), "--method gptq: needs statistics", "--stats STATS")
    assert_refused(call("compare", tiny, "--method", "magic"), "--method magic: must be one of rtn")
    assert_refused(call("compare", tiny, "--method", "rtn,"), "--method rtn,: a method is missing next to a comma")
    assert_refused(call("compare", tiny, "--stats", demo_statistics), "rtn uses no statistics")
    assert_refused(call("compare", tiny, exported, "--method", "gptq"), "applies only without files")
    ask = ("compare", tiny, "--method", "gptq", "--stats", demo_statistics)
    assert_refused(call(*ask), "holds statistics of another checkpoint", tiny)


@needs_runtimes
def test_a_damaged_report_beside_a_file_is_a_note(solved: Path) -> None:
    place = sidecar_of(solved)
    content = place.read_bytes()
    try:
        place.write_bytes(content[: len(content) // 2])
        outcome = call("compare", "demo", solved, *FAST)
    finally:
        place.write_bytes(content)
    assert outcome.code == 0, outcome.err
    assert f"note: {solved.name}: {place.name}: cannot be read (" in outcome.out
    assert "gguf int4 gptq, llama.cpp" in outcome.out


@needs_runtimes
def test_text_that_calibration_has_seen_is_refused(demo: Path, tmp_path: Path) -> None:
    """The very file by its hash, also with other line ends; its text in another file by its runs of tokens."""
    from smolexport.demo import demo_text

    text, rest = tmp_path / "seen.txt", tmp_path / "rest.txt"
    text.write_bytes(demo_text()[:9000].replace("\n", "\r\n").encode())
    rest.write_text("Another beginning. " + demo_text()[:9000], encoding="utf-8")
    stats = tmp_path / "stats"
    asked = call("calibrate", "demo", "--text", text, "--tokens", "2048", "--window", "128", "-o", stats)
    assert asked.code == 0, asked.err
    made = ("--method", "gptq", "--stats", stats)
    said = "was calibrated on the text to be scored (seen.txt)"
    assert_refused(call("compare", "demo", *made, "--text", text), stats, said)
    done = export("gguf", demo, tmp_path, quant="int4", calibration=Calibration("gptq", stats))
    outcome = call("compare", "demo", done.path, "--text", text, *FAST)
    assert_refused(outcome, done.path, said)
    outcome = call("compare", "demo", done.path, "--text", rest, "--stats", stats, *FAST)
    assert_refused(outcome, stats, "scored tokens also occur in the calibration text, more than 1%", "--text")
    # without the statistics nobody can know
    outcome = call("compare", "demo", done.path, "--text", rest, *FAST)
    assert outcome.code == 0, outcome.err
