from __future__ import annotations

import dataclasses
import io
import json
import math
import re

import pytest
from rich.console import Console

from smolexport.parity.compare import compare
from smolexport.parity.inputs import Settings
from smolexport.parity.report import render, to_json
from smolexport.parity.results import Divergence, Estimate, Greedy, Spread
from smolexport.parity.thresholds import Thresholds
from tests.parity.rich_sheets import enriched, moved, named

QUICK = Settings(window=64, repetitions=2, prefill_tokens=32, decode_tokens=4, memory=False)


@pytest.fixture
def comparison(make_model, text):
    models = [make_model("q8_0.table", noise=0.01), make_model("q4_0.table", noise=0.4)]
    limits = Thresholds(max_kld=0.01, min_top1=0.9)
    return compare(make_model("bf16.table"), models, text=text, settings=QUICK, thresholds=limits)


def printed(comparison, width=100, **options):
    out = io.StringIO()
    render(comparison, Console(file=out, width=width, **options))
    return out.getvalue()


def test_json_has_the_promised_shape(comparison):
    sheet = json.loads(json.dumps(to_json(comparison), allow_nan=False))
    assert sheet["passed"] is False
    assert {"reference", "candidates", "passed"} <= set(sheet)
    assert isinstance(sheet["reference"]["perplexity"], float)
    for candidate, name in zip(sheet["candidates"], ("q8_0", "q4_0"), strict=True):
        assert candidate["path"].endswith(f"{name}.table")
        assert (candidate["format"], candidate["scheme"], candidate["runtime"]) == ("table", name, "table")
        assert isinstance(candidate["bytes"], int)
        assert candidate["bits_per_weight"] == 4.5
        for key in ("mean", "median", "p99", "max"):
            assert isinstance(candidate["kld"][key], float)
        for key in ("top1_agreement", "perplexity", "perplexity_ratio"):
            assert isinstance(candidate[key], float)
        assert candidate["greedy"]["tokens"] == 64
        assert {"ttft_ms", "prefill_tok_s", "decode_tok_s"} <= set(candidate["speed"])
        assert candidate["peak_rss_bytes"] is None
    assert sheet["candidates"][1]["greedy"]["first_divergence"] is not None
    assert [candidate["passed"] for candidate in sheet["candidates"]] == [True, False]


def test_json_figures_are_the_results(comparison):
    found = to_json(comparison)["candidates"][1]
    accuracy, greedy = comparison.candidates[1].accuracy, comparison.candidates[1].greedy
    assert found["kld"]["mean"] == accuracy.kld.mean.value
    assert found["kld"]["p99_9"] == accuracy.kld.p99_9
    assert found["perplexity_ratio_error"] == accuracy.perplexity_ratio.error
    assert found["greedy"]["first_divergence"] == greedy.first_divergence
    assert found["greedy"]["margin"] == greedy.margin
    assert len(found["greedy"]["prompts"]) == 4
    assert found["missed"] == list(comparison.candidates[1].missed)


def test_json_of_damaged_figures_has_null(make_model, text):
    result = compare(make_model("r.table"), [make_model("x.table", poison=4)], text=text, settings=QUICK)
    sheet = json.loads(json.dumps(to_json(result), allow_nan=False))
    assert sheet["candidates"][0]["kld"]["mean"] is None
    assert sheet["candidates"][0]["perplexity"] is None
    assert sheet["passed"] is False
    assert "damaged" in printed(result)


@pytest.mark.parametrize("width", [40, 80, 100, 120])
def test_no_figure_is_cut_off(comparison, width):
    lines = printed(comparison, width)
    assert "…" not in lines
    sheet = comparison.candidates[1]
    accuracy = sheet.accuracy
    for value in (accuracy.kld.mean.value, accuracy.kld.median, accuracy.kld.p99, accuracy.kld.max):
        assert f"{value:.3g}" in lines
    for value in (
        f"{100 * accuracy.top1_agreement.value:.2f}",
        f"{accuracy.perplexity.value:.4g}",
        f"{accuracy.perplexity_ratio.value:.4f}",
    ):
        assert value in lines
    assert f"{sheet.speed.prefill_tok_s.value:,.0f}" in lines
    assert f"{sheet.greedy.first_divergence}, mean {sheet.greedy.mean_agreed_tokens:.1f}" in lines
    assert f"{comparison.reference.perplexity.value:.4g}" in lines
    rows = [line for line in lines.splitlines() if re.search(r"\d\s{2,}\d", line)]
    assert max(map(len, rows)) <= max(width, 100)


def worst_case(comparison):
    """Figures as wide as they come."""
    candidate = comparison.candidates[1]
    wide = Estimate(1.23456e-05, 3.21e-07)
    accuracy = dataclasses.replace(
        candidate.accuracy,
        kld=Spread(wide, 1.23e-10, 2.34e-05, 3.45e-05, 4.56e-05, 7.89e-05, 1.11e-05),
        top1_agreement=Estimate(1.0, 0.00123),
        perplexity=Estimate(123456.7, 2345.6),
        reference_perplexity=Estimate(123456.7, 2345.6),
        perplexity_ratio=Estimate(99.98765, 0.000123),
    )
    fast = Estimate(123456.7, 4321.09)
    speed = dataclasses.replace(candidate.speed, ttft_ms=fast, prefill_tok_s=fast, decode_tok_s=fast)
    wide_figures = dataclasses.replace(
        candidate,
        greedy=Greedy(64, (Divergence(64, 63, 0.00012), Divergence(64))),
        accuracy=accuracy,
        speed=speed,
        load_seconds=123.45,
        peak_rss_bytes=98_765_432_109,
    )
    path = candidate.model.path.with_name("SmolLM3-3B-Instruct-with-a-very-long-name.q4_k_m.gguf")
    return named(comparison, moved(wide_figures, path=path, bytes=123_456_789_012, bits_per_weight=16.51))


def test_the_widest_figures_fit_into_100_columns(comparison):
    lines = printed(worst_case(comparison))
    assert "…" not in lines
    for figure in (
        "1.23e-05",
        "±3.2e-07",
        "1.23e-10",
        "100.00",
        "99.9877",
        "±0.00012",
        "123,457",
        "±4,321",
        "63, mean 63.5",
        "123,456.8",
    ):
        assert figure in lines
    assert "98,765" in lines
    assert max(len(line) for line in lines.splitlines() if "±" in line) <= 100
    # the long name is folded, not cut: its pieces stand below each other
    table = lines[: lines.index("Size and speed")].splitlines()
    start = next(index for index, line in enumerate(table) if line.startswith("SmolLM3"))
    pieces = "".join(line.split("  ")[0].strip() for line in table[start : start + 4])
    assert pieces.startswith("SmolLM3-3B-Instruct-with-a-very-long-name.q4_k_m.gguf")


def test_verdicts_notes_and_reference_row(comparison):
    lines = printed(comparison).splitlines()
    missed = [line for line in lines if line.startswith("MISSED")]
    assert len(missed) == 2
    assert all("q4_0.table" in line for line in missed)
    assert "above 0.01" in missed[0]
    names = [line.split()[0] for line in lines if re.match(r"\S+\.table", line)]
    assert names == ["bf16.table", "q8_0.table", "q4_0.table"] * 2
    assert any("reference bf16, table" in line for line in lines)
    assert not any("PASSED" in line for line in lines)
    better = dataclasses.replace(comparison, candidates=comparison.candidates[:1])
    assert "PASSED" in printed(better)


def test_a_name_with_markup_is_printed_as_it_is(comparison):
    candidate = comparison.candidates[0]
    odd = named(comparison, moved(candidate, path=candidate.model.path.with_name("[red]a[bold].table")))
    assert "[red]a[bold].table" in printed(odd)


def test_columns_without_a_figure_are_left_out(make_model, text):
    settings = Settings(window=64, repetitions=0, greedy_tokens=0, memory=False)
    result = compare(make_model("r.table"), [make_model("a.table")], text=text, settings=settings)
    sheet = to_json(result)["candidates"][0]
    assert (sheet["greedy"], sheet["speed"], sheet["peak_rss_bytes"]) == (None, None, None)
    row = next(line for line in printed(result).splitlines() if line.startswith("a.table"))
    assert row.split()[-1] == "1.0000"
    for head in ("first greedy", "prefill", "peak RSS"):
        assert head not in printed(result)
    assert not math.isnan(sheet["perplexity"])


def test_two_files_of_one_name_are_told_apart(comparison, tmp_path):
    first, second = (
        moved(result, path=tmp_path / folder / "model.table")
        for result, folder in zip(comparison.candidates, ("left", "right"), strict=True)
    )
    sheet = printed(named(comparison, first, second), width=140)
    assert "left/model.table" in sheet
    assert "right/model.table" in sheet
    assert "left/" not in printed(dataclasses.replace(comparison, candidates=(first,)), width=140)


@pytest.mark.parametrize("width", [40, 100, 140])
def test_the_whole_sheet_fits(comparison, width):
    text = printed(enriched(comparison), width)
    assert "…" not in text
    titles = ("Accuracy over", "Where the deviation comes from", "Same weights, two runtimes", "Size and speed")
    places = [text.index(title) for title in titles]
    assert places == sorted(places)
    assert max(len(line.rstrip()) for line in text[: text.index("tokens of text")].splitlines()[:-1]) <= max(width, 100)


def test_the_noise_floor_comes_first(comparison):
    rich = enriched(comparison)
    text = printed(rich)
    floor, first = f"{rich.reference.noise_floor.kld.mean.value:.3g}", rich.candidates[0].model.path.name
    for title in ("Accuracy over", "Where the deviation comes from", "Same weights, two runtimes"):
        part = text[text.index(title) :]
        assert part.index("noise floor") < part.index(first)
        assert floor in part[part.index("noise floor") : part.index(first)]
    assert "noise floor" not in printed(comparison)


def test_both_parts_and_the_pair_are_there(comparison):
    rich = enriched(comparison)
    text = printed(rich)
    parts = text[text.index("Where the deviation") : text.index("Same weights")]
    for result in rich.candidates:
        row = next(line for line in parts.splitlines() if line.startswith(result.model.path.name))
        both = result.attribution.quantization, result.attribution.exporter
        figures = [result.accuracy.kld.mean.value, *(part.kld.mean.value for part in both)]
        tops = [100 * part.top1_agreement.value for part in both]
        assert row.split()[1:] == [*(f"{value:.3g}" for value in figures), *(f"{value:.2f}" for value in tops)]
    pair = text[text.index("Same weights") : text.index("Size and speed")]
    kld, names = rich.pairs[0].accuracy.kld, [result.model.path.name for result in rich.candidates]
    rows = pair.splitlines()
    at = next(i for i, line in enumerate(rows) if line.startswith(names[0]))
    assert rows[at].split()[1:4] == [f"{kld.mean.value:.3g}", f"{kld.p99:.3g}", f"{kld.max:.3g}"]
    assert rows[at + 1].startswith(names[1])
    assert "Where the deviation" not in printed(comparison)
    assert "Same weights" not in printed(comparison)


def test_decode_as_share_of_the_bandwidth(comparison):
    rich = enriched(comparison)
    first = dataclasses.replace(rich.candidates[0], bandwidth_share=0.634)
    text = printed(dataclasses.replace(rich, candidates=(first, *rich.candidates[1:])))
    row = next(
        line for line in text[text.index("Size and speed") :].splitlines() if line.startswith(first.model.path.name)
    )
    assert row.split()[-1] == "63%"
    assert "23.4 GB/s, measured here" in text
    unknown = dataclasses.replace(comparison, bandwidth_bytes_per_s=None)
    assert "band-" not in printed(unknown)


def test_one_file_on_two_runtimes_is_told_apart(comparison):
    first = comparison.candidates[0]
    both = named(comparison, first, moved(first, runtime="other"))
    names = [candidate["name"] for candidate in to_json(both)["candidates"]]
    assert names == ["q8_0.table on table", "q8_0.table on other"]
    assert "q8_0.table on other" in printed(both, 140)
