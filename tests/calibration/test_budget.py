"""Bits chosen under a budget: the arithmetic by itself, and what comes of it on real runtimes."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import smolexport
from smolexport.calibration.bit_allocation import sample
from smolexport.calibration.calibrator import Calibration
from smolexport.calibration.knapsack import Budget, Option, Unit, cost_of, finest, least, reach, size_of, spend
from smolexport.conversion.pipeline import Export, export, export_all
from smolexport.conversion.prepare import prepare
from smolexport.conversion.source_model import CALIBRATION_KEY
from smolexport.demo import demo_text
from smolexport.errors import UsageError
from smolexport.parity.inputs import Settings
from smolexport.recipe import sidecar_of
from tests.cli.commands import assert_refused, call

SETTINGS = Settings(repetitions=0, memory=False, greedy_tokens=0, threads=1, max_windows=4)
options = st.builds(Option, st.just(4), st.integers(1, 50), st.floats(0, 1, allow_nan=False))
units = st.lists(st.builds(Unit, st.just(("x",)), st.lists(options, min_size=1, max_size=4).map(tuple)), max_size=4)


def best(found: list[Unit], size: int) -> float:
    """The least cost of all choices that fit."""
    choices = itertools.product(*(unit.options for unit in found))
    return min(cost_of(choice) for choice in choices if size_of(choice) <= size)


@given(units, st.integers(0, 220), st.integers(0, 20))
def test_a_size_is_kept_and_near_the_optimum(found: list[Unit], size: int, other: int) -> None:
    fewest = size_of(least(found)) + other
    if size < fewest:
        with pytest.raises(UsageError, match=f"{fewest:,} bytes are the least"):
            spend(found, size, other)
        return
    choice = spend(found, size, other)
    assert size_of(choice) + other <= size
    assert all(option in unit.options for unit, option in zip(found, choice, strict=True))
    hulls = [unit.hull() for unit in found]
    step = max((a.cost - b.cost for hull in hulls for a, b in itertools.pairwise(hull)), default=0)
    exact = best(found, size - other)
    assert exact - 1e-12 <= cost_of(choice) <= exact + step + 1e-12


@given(units, st.integers(0, 220), st.integers(0, 100))
def test_more_bytes_never_cost_more(found: list[Unit], size: int, more: int) -> None:
    if size >= size_of(least(found)):
        assert cost_of(spend(found, size + more)) <= cost_of(spend(found, size)) + 1e-12


@given(units, st.floats(0.001, 3), st.floats(0, 1))
def test_a_divergence_is_kept_with_few_bytes(found: list[Unit], kld: float, more: float) -> None:
    if cost_of(finest(found)) > kld:
        with pytest.raises(UsageError, match="is the least that can be had"):
            reach(found, kld)
        return
    choice = reach(found, kld)
    assert cost_of(choice) <= kld
    assert size_of(reach(found, kld + more)) <= size_of(choice)
    # Where a step ends nothing else does better with so many bytes.
    assert cost_of(choice) <= best(found, size_of(choice)) + 1e-12


def test_the_sample_of_rows_stands_for_all() -> None:
    weights = np.random.default_rng(0).pareto(1.2, 4000)
    rows, scale = sample(weights)
    assert len(set(rows)) == len(rows) == 256
    assert scale.sum() == pytest.approx(4000)
    assert set(np.argsort(-weights)[:128]) <= set(rows)
    assert scale @ weights[rows] == pytest.approx(weights.sum(), rel=0.1)
    assert [list(part) for part in sample(weights[:3])] == [[0, 1, 2], [1, 1, 1]]


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (
            ["-q", "auto-bits"],
            "-q auto-bits: chooses bits tensor by tensor; give --size or --target-kld",
        ),
        (["--size", "3MB"], "a budget needs statistics"),
        (["--size", "3MB", "--target-kld", "1", "--stats", "x"], "give one of them"),
        (["--size", "3MB", "-q", "q4_0", "--stats", "x"], "--quant q4_0: a budget chooses the bits"),
        (["--size", "3 stones", "--stats", "x"], "is not a size"),
        (["--size", "0", "--stats", "x"], "is not a size"),
        (["--max-kld", "0.02", "--stats", "x"], "use --target-kld"),
        (["--target-kld", "0", "--stats", "x"], "'--target-kld'"),
        (["--target-kld", "nan", "--stats", "x"], "'--target-kld'"),
    ],
)
def test_bad_budgets(argv: list[str], said: str, demo: Path) -> None:
    assert_refused(call("gguf", demo, *argv), said)


def budgeted(statistics: Path, method: str = "gptq", **budget: float) -> Calibration:
    return Calibration(method, statistics, budget=Budget(**budget))  # type: ignore[arg-type]


def bytes_of(path: Path) -> int:
    return sum(p.stat().st_size for p in ([path] if path.is_file() else path.rglob("*")) if p.is_file())


def kld_of(demo: Path, done: list[Export]) -> list[float]:
    results = smolexport.compare(demo, [d.path for d in done], text=demo_text(), settings=SETTINGS).candidates
    return [result.accuracy.kld.mean.value for result in results]


def test_a_size_between_int4_and_int8(demo: Path, demo_statistics: Path, tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")
    plain = export("gguf", demo, tmp_path / "int4.gguf", quant="int4", calibration=Calibration("gptq", demo_statistics))
    size = round(1.15 * plain.bytes)
    mixed = export("gguf", demo, tmp_path / "bits.gguf", calibration=budgeted(demo_statistics, size=size))
    assert 0.97 * size <= bytes_of(mixed.path) <= size
    before, after = kld_of(demo, [plain, mixed])
    assert after < 0.8 * before
    assert {e.format.name for e in mixed.plan.entries} > {"q4_0", "f32"}
    found = json.loads(str(smolexport.inspect(mixed.path).metadata[CALIBRATION_KEY]))["budget"]
    assert found["size"] == size
    assert found["measured_kld"] == pytest.approx(found["predicted_kld"], rel=0.5)
    assert json.loads(sidecar_of(mixed.path).read_bytes())["budget"] == found
    assert any("measured" in note and "held-out windows" in note for note in mixed.plan.notes)


def test_all_formats_get_the_same_decision_and_weights(demo: Path, demo_statistics: Path, tmp_path: Path) -> None:
    """With ONNX among them all have 4 and 8 bits; each is run by its own runtime, ONNX Runtime among them."""
    from tests.mlx_for_tests import mlx_lm

    for library in ("llama_cpp", "onnxruntime"):
        pytest.importorskip(library)
    mlx_lm()
    size = 3_700_000
    done = export_all(demo, tmp_path, calibration=budgeted(demo_statistics, size=size))
    assert len({smolexport.fingerprint(one.path) for one in done}) == 1
    assert 0.97 * size <= max(bytes_of(one.path) for one in done) <= size
    decisions = [
        {e.tensor: round(8 * e.format.row_bytes(256) / 256) for e in one.plan.entries if len(e.shape) == 2}
        for one in done
    ]
    layer = {(t.layer, t.role.name): bits for t, bits in decisions[0].items() if t is not None}
    assert len(set(decisions[0].values())) == 2
    assert all(layer[i, "Q"] == layer[i, "K"] == layer[i, "V"] for i in range(4))
    assert all(smolexport.inspect(one.path).scheme == "auto-bits" for one in done)
    kld = kld_of(demo, done)
    assert max(kld) < 0.012
    for path in (one.path for one in done if one.path.is_dir()):
        assert smolexport.plugins.converter_for(path).lint(path) == []


def test_a_divergence_is_met_on_the_runtime(demo: Path, demo_statistics: Path, tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")
    calibration = budgeted(demo_statistics, target_kld=0.004)
    done = export("gguf", demo, tmp_path / "x.gguf", calibration=calibration)
    found = json.loads(sidecar_of(done.path).read_bytes())["budget"]
    assert 0.5 * 0.004 < found["measured_kld"] <= 0.004
    [kld] = kld_of(demo, [done])
    assert kld <= 1.15 * 0.004


def test_plain_rounding_under_a_budget_and_what_cannot_be(demo: Path, demo_statistics: Path, tmp_path: Path) -> None:
    small = budgeted(demo_statistics, "rtn", size=2_000_000)
    with pytest.raises(UsageError, match=r"--size 2,000,000: ([0-9,]+) bytes are the least") as caught:
        prepare("mlx", demo, tmp_path, calibration=small)
    lowest = int(str(caught.value).split(": ")[1].split()[0].replace(",", ""))
    done = export("mlx", demo, tmp_path / "least", calibration=budgeted(demo_statistics, "rtn", size=lowest))
    assert lowest - 100 <= bytes_of(done.path) <= lowest
    with pytest.raises(UsageError, match=r"--target-kld 1e-09: .* is the least that can be had, measured"):
        prepare("gguf", demo, tmp_path, calibration=budgeted(demo_statistics, "rtn", target_kld=1e-9))
    look = prepare("gguf", demo, tmp_path, calibration=Calibration(
        "rtn", demo_statistics, budget=Budget(size=3_000_000, measure=False)))  # fmt: skip
    assert any("the export measures it" in note for note in look.plan.notes)
    assert look.plan.size <= 3_000_000


@pytest.mark.parametrize("target", ["gguf", "mlx", "onnx"])
def test_sizes_are_those_of_the_finished_output(target: str, demo: Path, tmp_path: Path) -> None:
    done = export(target, demo, tmp_path / "x", quant="int8")
    assert done.plan.size == bytes_of(done.path)
