"""Real tokenizers, a real trained checkpoint, true shapes: export, load, run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import smolexport
from smolexport.conversion.pipeline import export
from smolexport.conversion.prepare import prepare
from smolexport.demo import demo_text
from smolexport.parity.inputs import Settings
from smolexport.parity.thresholds import Thresholds
from smolexport.testing.checkpoints import write_checkpoint
from tests.benchmarks import export_memory
from tests.core.published_configs import PUBLISHED

MEMORY_LIMIT = 400e6
STORY = "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. "


@pytest.mark.parametrize("dtype", ["bf16", "f32"])
@pytest.mark.parametrize("scheme", ["q8_0", "f16"])
def test_stories260k_stays_itself(scheme: str, dtype: str, shared: Path, tmp_path: Path) -> None:
    """On a story in bf16; and, without the reference's own rounding, on books that it knows nothing of."""
    pytest.importorskip("torch")
    pytest.importorskip("llama_cpp")
    folder = shared / "stories260K" / "hf_bf16"
    done = export("gguf", folder, tmp_path / "stories.gguf", quant=scheme)
    settings = Settings(repetitions=0, memory=False, greedy_tokens=16, threads=1)
    limits = Thresholds(max_kld=0.002)
    text = STORY * 12 if dtype == "bf16" else demo_text()
    sheet = smolexport.compare(folder, [done.path], text=text, dtype=dtype, settings=settings, thresholds=limits)
    assert sheet.passed
    assert sheet.candidates[0].tokenizer_equal


def test_stories260k_plan_says_what_does_not_fit(shared: Path, tmp_path: Path) -> None:
    plan = prepare("gguf", shared / "stories260K" / "hf_bf16", tmp_path / "x.gguf", quant="q8_0").plan
    wide = [e for e in plan.entries if e.shape[-1] == 172]
    assert len(wide) == 5
    assert {(e.format.name, e.requested.name if e.requested else "") for e in wide} == {("f16", "q8_0")}
    assert "5 tensors: row length 172 is not a multiple of 32; using f16 instead of q8_0" in plan.summary()


def test_135m_shape_with_the_real_tokenizer_runs(shared: Path, tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")
    figures = export_memory.measure("SmolLM2-135M", "q4_k", shared / "smollm2-tokenizer", tmp_path)
    assert figures["peak_rss"] < MEMORY_LIMIT
    (file,) = (tmp_path / "out").iterdir()
    found = smolexport.inspect(file)
    # 105.5 MB and 6.17 bits per weight is what llama.cpp's own tools make of this shape.
    assert found.bits_per_weight == pytest.approx(6.17, abs=0.01)
    assert found.bytes == pytest.approx(105.5e6, rel=0.002)
    run_it(file, "a  4", [81, 256, 36])


def test_reduced_smollm3_with_the_real_tokenizer_runs(shared: Path, tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")
    folder = write_checkpoint(
        tmp_path / "model", "smollm3", tokenizer=shared / "smollm3-tokenizer", hidden_size=256, intermediate_size=512,
        num_hidden_layers=4, vocab_size=128256,
    )  # fmt: skip
    done = export("gguf", folder, tmp_path / "model.gguf", quant="q4_k")
    run_it(done.path, "1234 Hello", None)


def run_it(file: Path, text: str, expected: list[int] | None) -> None:
    import smolexport_on_llamacpp as llamacpp

    with llamacpp.open(file, threads=1, context=64) as session:
        ids = session.codec.encode(text)
        assert expected is None or ids == expected
        logits = session.append(ids)
    assert logits.shape == (len(ids), session.vocab_size)
    assert np.isfinite(logits).all()
    assert logits.std() > 0


def test_plan_of_135m_recommends_what_fits() -> None:
    """The K mixes hardly contain a K-quant there; the plan says so first, with the better choices."""
    import smolexport_to_gguf as gguf
    from smolexport.conversion.source_model import SourceModel
    from smolexport.demo import demo_checkpoint
    from smolexport.model.arch import load_spec
    from smolexport.tokenizer import read_tokenizer

    tokenizer = read_tokenizer(demo_checkpoint(), 49152)
    model = SourceModel(load_spec(PUBLISHED["SmolLM2-135M"]), tokenizer, "x", demo_checkpoint(), {})
    plan = gguf.plan(model, "q4_k")
    advice = next(line for line in plan.notes if "consider" in line)
    assert "falls back for 181 of 211 matrices and has 6.17 bits per weight" in advice
    assert "q4_0 (5.35 bits)" in advice
    assert "q8_0 (8.51 bits)" in advice


def test_peak_memory_of_the_1_7b_shape(shared: Path, tmp_path: Path) -> None:
    figures = export_memory.measure("SmolLM2-1.7B", "q4_k", shared / "smollm2-tokenizer", tmp_path)
    assert figures["peak_rss"] < MEMORY_LIMIT
    assert figures["output"] == pytest.approx(1055.7e6, rel=0.002)
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["SmolLM2-1.7B-q4_k_m.gguf"]
