"""A trained SmolLM3: what NoPE and rotary do to a model that uses them, through llama.cpp and back."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import smolexport
from smolexport.conversion.pipeline import export
from smolexport.parity.inputs import Settings
from smolexport.parity.results import Comparison

TWIN = Path(__file__).resolve().parents[1] / "fixtures" / "smollm3_twin"
QUICK = Settings(repetitions=0, memory=False, greedy_tokens=0, threads=1, max_windows=6)
EXACT = {"kv_type": "f32", "flash_attention": False}


@pytest.fixture
def twin(demo: Path, tmp_path: Path) -> Path:
    """The checkpoint with the demo model's tokenizer beside it."""
    folder = tmp_path / "twin"
    shutil.copytree(TWIN, folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(demo / name, folder)
    return folder


def sheet(folder: Path, scheme: str, source: Path, dtype: str = "bf16", **options: object) -> Comparison:
    pytest.importorskip("torch")
    pytest.importorskip("llama_cpp")
    file = export("gguf", source, folder.parent / f"{scheme}.gguf", quant=scheme).path
    return smolexport.compare(folder, [file], dtype=dtype, settings=QUICK, options=options)


def test_f32_computes_the_same(twin: Path) -> None:
    accuracy = sheet(twin, "f32", twin, "f32", **EXACT).candidates[0].accuracy
    assert accuracy.kld.mean.value < 1e-8
    assert accuracy.top1_agreement.value == 1.0


@pytest.mark.parametrize(("scheme", "kld", "top1"), [("q8_0", 0.0005, 0.98), ("q4_k", 0.01, 0.93)])
def test_quantized_files_stay_near_bf16(scheme: str, kld: float, top1: float, twin: Path) -> None:
    accuracy = sheet(twin, scheme, twin).candidates[0].accuracy
    assert accuracy.kld.mean.value <= kld
    assert accuracy.top1_agreement.value >= top1


def test_rotary_on_the_layer_without_it_shows(twin: Path) -> None:
    """The same weights read as a Llama, with rotary on every layer: far off, and worse at the text."""
    other = twin.parent / "as-llama"
    shutil.copytree(twin, other)
    config = json.loads((other / "config.json").read_text())
    for key in ("no_rope_layers", "no_rope_layer_interval", "use_sliding_window"):
        del config[key]
    (other / "config.json").write_text(json.dumps(config | {"model_type": "llama"}))
    accuracy = sheet(twin, "f32", other, "f32", **EXACT).candidates[0].accuracy
    assert accuracy.kld.mean.value > 0.001
    assert accuracy.perplexity.value > accuracy.reference_perplexity.value
