"""The JSON: its schema holds for real output, and the distributions in it are those of the positions."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from smolexport.parity.candidates import reference_name, short_names
from smolexport.parity.compare import compare
from smolexport.parity.inputs import Settings
from smolexport.parity.metrics import RUNS, by_position, histogram
from smolexport.parity.report import json_schema, to_json
from smolexport.parity.results import KLD_EDGES, TextInfo
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
    assert sheet["candidates"][0]["kld_histogram"]["not_finite"] > 0
    assert sheet["candidates"][0]["by_position"]["kld"].count(None) > 0


@pytest.mark.parametrize(
    "damage",
    [
        lambda sheet: sheet.pop("kld_edges"),
        lambda sheet: sheet.update(schema=1),
        lambda sheet: sheet.update(stray=1),
        lambda sheet: sheet["candidates"][0].update(stray=1),
        lambda sheet: sheet["candidates"][0]["kld"].pop("p99_9"),
        lambda sheet: sheet["candidates"][0]["attribution"]["exporter"].pop("top1_agreement"),
        lambda sheet: sheet["candidates"][0]["tensor_errors"][1].update(relative="0.1"),
        lambda sheet: sheet["pairs"][0].pop("second"),
        lambda sheet: sheet["reference"]["noise_floor"].pop("kld_histogram"),
        lambda sheet: sheet["candidates"][0]["kld_histogram"].pop("not_finite"),
        lambda sheet: sheet["candidates"][0]["thresholds"].pop("max_pair_kld"),
        lambda sheet: sheet["candidates"][0].update(notes="a note"),
        lambda sheet: sheet.update(candidates=[]),
        lambda sheet: sheet["text"].update(windows=-1),
        lambda sheet: sheet["candidates"][0]["greedy"]["prompts"][0].update(position=0.5),
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
    assert sheet["reference"]["noise_floor"]["kld"]["mean"] == rich.reference.noise_floor.kld.mean.value
    assert first["attribution"]["exporter"]["kld"]["mean"] == result.attribution.exporter.kld.mean.value
    assert (
        first["attribution"]["quantization"]["top1_agreement"] == result.attribution.quantization.top1_agreement.value
    )
    assert first["fingerprint"] == result.fingerprint
    assert first["bandwidth_share"] == result.bandwidth_share
    assert [error["relative"] for error in first["tensor_errors"]] == [e.relative for e in result.tensor_errors]
    assert (sheet["pairs"][0]["first"], sheet["pairs"][0]["second"]) == (0, 1)
    assert sheet["pairs"][0]["kld"]["mean"] == rich.pairs[0].accuracy.kld.mean.value
    assert first["greedy"]["median_agreed_tokens"] == 41
    assert first["greedy"]["prompts"][2]["candidate_text"] == "\n"
    assert sheet["environment"] == dict(rich.environment)
    assert sheet["bandwidth_bytes_per_s"] == rich.bandwidth_bytes_per_s


def distributions(played, values, same, text):
    values = np.array(values)
    accuracy = dataclasses.replace(
        played.candidates[0].accuracy, divergences=values, same_top=np.array(same), positions=len(values),
        kld_histogram=histogram(values),
    )  # fmt: skip
    runs = by_position(accuracy, text)
    result = dataclasses.replace(played.candidates[0], accuracy=accuracy, by_position=runs)
    found = to_json(dataclasses.replace(played, text=text, candidates=(result,)))
    return found["candidates"][0]["kld_histogram"], found["candidates"][0]["by_position"]


def test_a_comparison_brings_both_distributions(played):
    for result in played.candidates:
        assert result.accuracy.kld_histogram == histogram(result.accuracy.divergences)
        assert result.by_position == by_position(result.accuracy, played.text)
        assert result.by_position is not None


def test_the_histogram_counts_every_position_once(played):
    values = [
        0.0,
        -1e-12,
        KLD_EDGES[0],
        KLD_EDGES[7],
        np.nextafter(KLD_EDGES[7], 0),
        5.0,
        KLD_EDGES[-1],
        1e9,
        np.inf,
        np.nan,
    ]
    counted, runs = distributions(played, values, [True] * 10, TextInfo(20, 10, 2, 5))
    held = {place: count for place, count in enumerate(counted["counts"]) if count}
    five = next(place for place, edge in enumerate(KLD_EDGES) if edge > 5) - 1
    assert held == {0: 1, 7: 1, 6: 1, five: 1}
    assert (counted["below"], counted["above"], counted["not_finite"]) == (2, 2, 2)
    assert len(counted["counts"]) == len(KLD_EDGES) - 1
    assert runs["tokens_before"] == [5, 6, 7, 8, 9]


def test_edges_ascend_by_four_a_decade():
    assert list(KLD_EDGES) == sorted(set(KLD_EDGES))
    assert [edge for edge in KLD_EDGES if np.isclose(np.log10(edge) % 1, 0)][:2] == [1e-9, 1e-8]
    assert KLD_EDGES[4] / KLD_EDGES[0] == pytest.approx(10)


def test_positions_of_all_windows_are_taken_together(played):
    values, same = [1.0, 2.0, 3.0, 5.0, 6.0, 7.0], [True, True, False, True, False, False]
    _, runs = distributions(played, values, same, TextInfo(14, 7, 2, 3))
    assert runs == {"tokens_before": [4, 5, 6], "kld": [3.0, 4.0, 5.0], "top1_agreement": [1.0, 0.5, 0.0]}
    _, runs = distributions(played, values[:5], same[:5], TextInfo(14, 7, 2, 3))
    assert runs is None


def test_many_positions_become_runs(played):
    scored = 255
    values = np.arange(2 * scored) % scored * 0.01
    _, runs = distributions(played, values, np.ones(2 * scored, bool), TextInfo(1024, 512, 2, scored))
    assert len(runs["kld"]) == RUNS
    starts = [*runs["tokens_before"], 512]
    assert starts[0] == 512 - scored
    for start, end, mean in zip(starts, starts[1:], runs["kld"], strict=False):
        assert mean == pytest.approx(0.01 * ((start + end - 1) / 2 - 257))


def test_names(tmp_path):
    a, b = tmp_path / "a" / "m.gguf", tmp_path / "b" / "m.gguf"
    assert short_names([(a, "x"), (b, "x")]) == ["a/m.gguf", "b/m.gguf"]
    assert short_names([(a, "x"), (a, "y")]) == ["m.gguf on x", "m.gguf on y"]
    assert short_names([(a, "x"), (a, "x")]) == ["m.gguf on x #1", "m.gguf on x #2"]
    assert short_names([(a, "x"), (b, "x"), (a, "y")]) == ["a/m.gguf on x", "b/m.gguf", "a/m.gguf on y"]
    deep = [Path("p/a/m.gguf"), Path("q/a/m.gguf")]
    assert short_names([(path, "x") for path in deep]) == [str(path) for path in deep]
    assert short_names([(Path("a\x1b[2J\n.gguf"), "x")]) == [r"a\x1b[2J\n.gguf"]
    hub = tmp_path / "models--HuggingFaceTB--SmolLM2-135M" / "snapshots" / ("0" * 40)
    assert reference_name(hub) == "HuggingFaceTB/SmolLM2-135M"
    assert reference_name(tmp_path / "my-model") == "my-model"


def test_enriching_keeps_what_was_played(played):
    assert enriched(played).candidates[1].accuracy is played.candidates[1].accuracy
