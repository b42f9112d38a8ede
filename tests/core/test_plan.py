"""Plans as text, and their arithmetic.  The golden files are made by `tests/golden/make.py`."""

from __future__ import annotations

import math

import numpy as np
import pytest

from smolexport.conversion.plan import Entry, Plan
from smolexport.quant import FORMATS
from tests.golden.make import CASES, FOLDER, plan_of


@pytest.mark.parametrize("case", CASES)
def test_plan_is_the_golden_one(case: str) -> None:
    expected = (FOLDER / f"{case}.txt").read_text(encoding="utf-8")
    assert plan_of(case).render() + "\n" == expected, "python -m tests.golden.make, and read the difference"


def test_no_golden_file_is_forgotten() -> None:
    assert {p.stem for p in FOLDER.glob("*.txt")} == set(CASES)


@pytest.mark.parametrize("case", CASES)
def test_sums(case: str) -> None:
    plan = plan_of(case)
    assert plan.weights == sum(math.prod(e.shape) for e in plan.entries)
    assert plan.nbytes == sum(e.format.size(e.shape) for e in plan.entries)
    assert plan.bits_per_weight == pytest.approx(8 * plan.nbytes / plan.weights)
    shares = plan.shares()
    assert sum(n for n, _ in shares.values()) == len(plan.entries)
    assert sum(size for _, size in shares.values()) == plan.nbytes
    assert [size for _, size in shares.values()] == sorted((s for _, s in shares.values()), reverse=True)
    assert len({e.name for e in plan.entries}) == len(plan.entries)


def test_fallbacks_are_counted_by_kind() -> None:
    plan = plan_of("smollm2-135m-q4_k_m")
    lines = plan.fallback_lines()
    assert sum(int(line.split()[0]) for line in lines) == len(plan.fallbacks) > 0
    assert any("row length 576 is not a multiple of 256; using q5_0 instead of q4_k" in line for line in lines)
    assert all(e.requested is not e.format for e in plan.fallbacks)
    assert any("consider q4_0" in note for note in plan.notes)
    assert "note: " + lines[0] in plan.summary().splitlines()


def test_nothing_falls_back_where_all_fits() -> None:
    plan = plan_of("smollm3-3b-8-layers-q4_k_m")
    assert plan.fallbacks == ()
    assert "instead of" not in plan.render()


def test_long_values_are_shortened() -> None:
    entries = (Entry("a", FORMATS["f32"], (4,), values=(0.0,) * 4),)
    metadata = (
        ("text", "string", "x" * 500),
        ("quoted", "string", "line\nbreak"),
        ("list", "[u32]", list(range(1000))),
        ("array", "[f32]", np.zeros(7, np.float32)),
        ("real", "f32", 1e-5),
        ("flag", "bool", True),
    )
    lines = Plan("gguf", "llama", "f32", entries, metadata, ("a note",)).render().splitlines()
    assert max(map(len, lines)) < 130
    text = "\n".join(lines)
    for expected in ("xxx...", r"'line\nbreak'", "[1000 values]", "[7 values]", "1e-05", "True", "note: a note"):
        assert expected in text
