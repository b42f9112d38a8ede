from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from smolexport import export, plugins
from smolexport.demo import demo_checkpoint, demo_text
from smolexport.parity.candidates import exported, reference
from smolexport.parity.compare import compare
from smolexport.parity.inputs import Candidate, Settings
from smolexport.parity.report import render_html
from smolexport.parity.thresholds import Thresholds
from tests.parity.rich_sheets import enriched

STANDINS = str(Path(__file__).parent / "standins")
if STANDINS not in sys.path:
    # found by its name, as a stranger's runtime is
    sys.path.append(STANDINS)

import smolexport_on_table as table  # noqa: E402


@pytest.fixture
def make_model(tmp_path):
    """Write a table file and describe it."""

    def make(name, *, options=None, **facts):
        path = tmp_path / name
        path.write_text(json.dumps({"vocab": 96, "seed": 7} | facts))
        return Candidate(
            path=path,
            format="table",
            scheme=name.partition(".")[0],
            runtime=table,
            bytes=path.stat().st_size,
            bits_per_weight=4.5,
            options=options or {},
        )

    return make


@pytest.fixture
def text():
    words = "the quick brown fox jumps over the lazy dog while seven wizards brew strange potions".split()
    return " ".join(words[(i * i + 3 * i) % len(words)] for i in range(500))


@pytest.fixture(scope="session")
def demo_files(tmp_path_factory):
    """Two exported files of the demo model; skips where something that runs them is not installed."""
    for name in ("torch", "llamacpp", "onnxruntime"):
        if plugins.missing(name):
            pytest.skip(f"the runtime {name} is not installed")
    folder = tmp_path_factory.mktemp("report")
    made = (("gguf", "q8_0", "demo-q8_0.gguf"), ("onnx", "int4", "demo-int4-onnx"))
    return [export(kind, "demo", folder / name, quant=quant).path for kind, quant, name in made]


@pytest.fixture(scope="session")
def played(demo_files):
    """What a real comparison of them gives."""
    settings = Settings(
        window=128, max_windows=4, greedy_tokens=16, prefill_tokens=64, decode_tokens=8, repetitions=2,
        threads=1, memory=False,
    )  # fmt: skip
    return compare(
        reference(demo_checkpoint()), exported(demo_files), text=demo_text(), settings=settings,
        thresholds=Thresholds(max_kld=0.2),
    )  # fmt: skip


@pytest.fixture(scope="session")
def rich(played):
    """The same with everything on it."""
    return enriched(played)


@pytest.fixture(scope="session")
def rich_page(rich):
    """The page of it."""
    return render_html(rich)
