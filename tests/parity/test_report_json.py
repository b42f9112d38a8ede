"""The JSON: its schema holds for real output, and the distributions in it are those of the positions."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from smolexport.parity.compare import compare
from smolexport.parity.inputs import Settings
from smolexport.parity.report import json_schema, to_json
from smolexport.parity.report.distribution import EDGES, RUNS
from smolexport.parity.report.names import reference_name, short_names
from smolexport.parity.results import TextFacts, Thresholds
from tests.parity.rich_sheets import enriched, keeps_to_schema

jsonschema = pytest.importorskip("jsonschema")


def test_the_whole_sheet_keeps_to_it(played, rich):
    for comparison in (played, rich):
        sheet = json.loads(json.dumps(to_json(comparison), allow_nan=False))
        keeps_to_schema(sheet)
        assert sheet["schema"] == json_schema()["properties"]["schema"]["const"]


def test_a_damaged_sheet_keeps_to_it(make_model, text):
    settings = Settings(window=64, repetitions=0, greedy_tokens=0, memory=False)
    broken = compare(make_model("r.table"), [make_model("x.table", poison=4)], text=text, settings=settings)
    sheet = json.loads(json.dumps(to_json(broken), allow_nan=False))
    keeps_to_schema(sheet)
    histogram = sheet["candidates"][0]["kld_histogram"]
    assert histogram["not_finite"] > 0
    assert sheet["candidates"][0]["by_position"]["kld"].count(None) > 0


@pytest.mark.parametrize(
    "damage",
    [
        lambda sheet: sheet.pop("kld_edges"),
        lambda sheet: sheet.update(schema=2),
        lambda sheet: sheet.update(stray=1),
        lambda sheet: sheet["candidates"][0].update(stray=1),
        lambda sheet: sheet["candidates"][0]["kld"].pop("p99_9"),
        lambda sheet: sheet["candidates"][0]["attribution"]["exporter"].pop("top1_agreement"),
        lambda sheet: sheet["candidates"][0]["tensor_errors"][1].update(relative="0.1"),
        lambda sheet: sheet["pairs"][0].pop("second"),
        lambda sheet: sheet["reference"]["noise_floor"].pop("kld_histogram"),
        lambda sheet: sheet["candidates"][0].update(top1_agreement=1.5),
    ],
)
def test_the_schema_refuses_what_is_not_so(rich, damage):
    sheet = copy.deepcopy(to_json(rich))
    keeps_to_schema(sheet)
    damage(sheet)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.Draft202012Validator(json_schema()).validate(sheet)


def test_every_new_figure_is_the_results(rich):
    sheet = to_json(rich)
    first, result = sheet["candidates"][0], rich.candidates[0]
    assert sheet["reference"]["noise_floor"]["kld"]["mean"] == rich.reference.floor.kld.mean.value
    assert first["attribution"]["exporter"]["kld"]["mean"] == result.attribution.exporter.kld.mean.value
    assert first["attribution"]["quantization"]["top1_agreement"] == result.attribution.quantization.top1.value
    assert first["fingerprint"] == result.fingerprint
    assert first["bandwidth_share"] == result.bandwidth_share
    assert [error["relative"] for error in first["tensor_errors"]] == [e.relative for e in result.tensor_errors]
    assert (sheet["pairs"][0]["first"], sheet["pairs"][0]["second"]) == (0, 1)
    assert sheet["pairs"][0]["kld"]["mean"] == rich.pairs[0].accuracy.kld.mean.value
    assert first["greedy"]["median_agreed_tokens"] == 41
    assert first["greedy"]["prompts"][2]["candidate_text"] == "\n"
    assert sheet["environment"] == dict(rich.environment)
    assert sheet["bandwidth_bytes_per_s"] == rich.bandwidth


def distributions(played, values, same, text):
    accuracy = dataclasses.replace(
        played.candidates[0].accuracy, divergences=np.array(values), same_top=np.array(same), positions=len(values)
    )
    result = dataclasses.replace(played.candidates[0], accuracy=accuracy)
    found = to_json(dataclasses.replace(played, text=text, candidates=(result,), thresholds=Thresholds()))
    return found["candidates"][0]["kld_histogram"], found["candidates"][0]["by_position"]


def test_the_histogram_counts_every_position_once(played):
    values = [0.0, -1e-12, EDGES[0], EDGES[7], np.nextafter(EDGES[7], 0), 5.0, EDGES[-1], 1e9, np.inf, np.nan]
    histogram, by_position = distributions(played, values, [True] * 10, TextFacts(20, 10, 2, 5))
    held = {place: count for place, count in enumerate(histogram["counts"]) if count}
    five = next(place for place, edge in enumerate(EDGES) if edge > 5) - 1
    assert held == {0: 1, 7: 1, 6: 1, five: 1}
    assert (histogram["below"], histogram["above"], histogram["not_finite"]) == (2, 2, 2)
    assert len(histogram["counts"]) == len(EDGES) - 1
    assert by_position["tokens_before"] == [5, 6, 7, 8, 9]


def test_edges_ascend_by_four_a_decade():
    assert list(EDGES) == sorted(set(EDGES))
    assert [edge for edge in EDGES if np.isclose(np.log10(edge) % 1, 0)][:2] == [1e-9, 1e-8]
    assert EDGES[4] / EDGES[0] == pytest.approx(10)


def test_positions_of_all_windows_are_taken_together(played):
    values, same = [1.0, 2.0, 3.0, 5.0, 6.0, 7.0], [True, True, False, True, False, False]
    _, runs = distributions(played, values, same, TextFacts(14, 7, 2, 3))
    assert runs == {"tokens_before": [4, 5, 6], "kld": [3.0, 4.0, 5.0], "top1": [1.0, 0.5, 0.0]}
    _, runs = distributions(played, values[:5], same[:5], TextFacts(14, 7, 2, 3))
    assert runs is None


def test_many_positions_become_runs(played):
    scored = 255
    values = np.arange(2 * scored) % scored * 0.01
    _, runs = distributions(played, values, np.ones(2 * scored, bool), TextFacts(1024, 512, 2, scored))
    assert len(runs["kld"]) == RUNS
    starts = [*runs["tokens_before"], 512]
    assert starts[0] == 512 - scored
    for start, end, mean in zip(starts, starts[1:], runs["kld"], strict=False):
        assert mean == pytest.approx(0.01 * ((start + end - 1) / 2 - 257))


def test_names(tmp_path):
    a, b = tmp_path / "a" / "m.gguf", tmp_path / "b" / "m.gguf"
    assert short_names([(a, "x"), (b, "x")]) == ["a/m.gguf", "b/m.gguf"]
    assert short_names([(a, "x"), (a, "y")]) == ["m.gguf on x", "m.gguf on y"]
    assert short_names([(a, "x"), (b, "x"), (a, "y")]) == ["a/m.gguf on x", "b/m.gguf", "a/m.gguf on y"]
    deep = [Path("p/a/m.gguf"), Path("q/a/m.gguf")]
    assert short_names([(path, "x") for path in deep]) == [str(path) for path in deep]
    assert short_names([(Path("a\x1b[2J\n.gguf"), "x")]) == [r"a\x1b[2J\n.gguf"]
    hub = tmp_path / "models--HuggingFaceTB--SmolLM2-135M" / "snapshots" / ("0" * 40)
    assert reference_name(hub) == "HuggingFaceTB/SmolLM2-135M"
    assert reference_name(tmp_path / "my-model") == "my-model"


def test_enriching_keeps_what_was_played(played):
    assert enriched(played).candidates[1].accuracy is played.candidates[1].accuracy
