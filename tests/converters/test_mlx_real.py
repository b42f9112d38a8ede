"""Real trained models and true shapes: export, play on MLX beside llama.cpp, hold against bf16."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import smolexport
from smolexport.conversion.pipeline import export_all
from smolexport.demo import demo_text
from smolexport.parity.inputs import Settings
from smolexport.parity.results import CandidateResult
from tests.benchmarks import conversion, export_memory, mlx_convert
from tests.mlx_for_tests import mlx_lm

TWIN = Path(__file__).resolve().parents[1] / "fixtures" / "smollm3_twin"
STORY = "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. "
MB, MIB = 1e6, 1 << 20


@pytest.fixture(params=["demo", "twin", "stories260K"])
def trained(request: pytest.FixtureRequest, demo: Path, tmp_path: Path) -> tuple[Path, str]:
    """A trained checkpoint and a text that it knows something of."""
    if request.param == "demo":
        return demo, demo_text()
    if request.param == "twin":
        folder = Path(shutil.copytree(TWIN, tmp_path / "twin"))
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(demo / name, folder)
        return folder, demo_text()
    shared: Path = request.getfixturevalue("shared")
    return shared / "stories260K" / "hf_bf16", STORY * 12


def played(trained: tuple[Path, str], quant: str, out: Path) -> dict[str, CandidateResult]:
    """The results of all formats, by format."""
    for library in ("torch", "llama_cpp", "onnxruntime"):
        pytest.importorskip(library)
    mlx_lm()
    folder, text = trained
    paths = [done.path for done in export_all(folder, out, quant=quant)]
    settings = Settings(repetitions=0, memory=False, greedy_tokens=0, threads=1, max_windows=4)
    sheet = smolexport.compare(folder, paths, text=text, settings=settings)
    return {result.model.format: result for result in sheet.candidates}


def test_int8_is_the_model(trained: tuple[Path, str], tmp_path: Path) -> None:
    results = played(trained, "int8", tmp_path / "out")
    assert {"gguf", "mlx", "onnx"} <= set(results)
    for result in results.values():
        assert result.accuracy.kld.mean.value <= 0.002
        assert result.tokenizer_equal


def test_int4_is_the_same_in_all_runtimes(trained: tuple[Path, str], tmp_path: Path) -> None:
    """The same weights: what 8-bit activations add, in llama.cpp and ONNX Runtime, is small beside what 4 bits cost."""
    results = played(trained, "int4", tmp_path / "out")
    gguf, mlx, onnx = (results[name].accuracy.kld.mean.value for name in ("gguf", "mlx", "onnx"))
    assert mlx > 0.001
    assert abs(gguf / mlx - 1) < 0.02
    assert abs(onnx / gguf - 1) < 0.05


def test_search_is_nearer_to_the_model_than_mlx(demo: Path, tmp_path: Path) -> None:
    """In the same format, at the same bytes."""
    pytest.importorskip("torch")
    mlx_lm()
    encoders = ("mlx", "search")
    paths = [
        smolexport.export("mlx", demo, tmp_path / how, quant="q4_g32", options={"encoder": how}).path
        for how in encoders
    ]
    settings = Settings(repetitions=0, memory=False, greedy_tokens=0, threads=1, max_windows=4)
    sheet = smolexport.compare(demo, paths, settings=settings)
    kld = {how: r.accuracy.kld.mean.value for how, r in zip(encoders, sheet.candidates, strict=True)}
    assert kld["search"] < 0.9 * kld["mlx"]
    sizes = {how: (path / "model.safetensors").stat().st_size for how, path in zip(encoders, paths, strict=True)}
    assert sizes["search"] == sizes["mlx"]


@pytest.fixture
def warm(demo: Path, tmp_path: Path) -> None:
    """The kernels in numba's cache: compiling them takes more memory than any export."""
    smolexport.export("mlx", demo, tmp_path / "warm-mlx", quant="q4")
    export_all(demo, tmp_path / "warm", quant="int4")


@pytest.mark.usefixtures("warm")
def test_peak_memory_does_not_grow_with_the_model(shared: Path, tmp_path: Path) -> None:
    """The 1.7B shape, to MLX and to all formats at once; neither needs an intermediate file."""
    bare, tokenizer = conversion.child(conversion.BARE)["rss"], shared / "smollm2-tokenizer"
    for command, scheme, size, limit in (("mlx", "q4", 963 * MB, 150 * MIB), ("all", "int4", 3292 * MB, 180 * MIB)):
        (tmp_path / command).mkdir()
        figures = export_memory.measure("SmolLM2-1.7B", scheme, tokenizer, tmp_path / command, command=command)
        assert figures["peak_rss"] - bare < limit
        assert figures["output"] == pytest.approx(size, rel=0.02)
        shutil.rmtree(tmp_path / command)


@pytest.mark.usefixtures("warm")
def test_peak_memory_on_many_processors(shared: Path, tmp_path: Path) -> None:
    """Sixteen threads, the most that are taken by themselves, need little more than two."""
    bare = conversion.child(conversion.BARE)["rss"]
    figures = export_memory.measure("SmolLM2-135M", "q4", shared / "smollm2-tokenizer", tmp_path, 16, "mlx")
    assert figures["peak_rss"] - bare < 150 * MIB


def test_the_135m_shape_beside_mlx_lm(shared: Path, tmp_path: Path) -> None:
    """Every array equal at a published shape, for less than 0.6 of the CPU time and of the memory.

    Far more at the size of 1.7B, where less of it is starting up; the benchmark prints both.
    """
    mlx_lm()
    found = mlx_convert.measure("SmolLM2-135M", "q4", shared / "smollm2-tokenizer", tmp_path, repetitions=1)
    assert found["differing"] == []
    assert found["ratio"]["cpu"] < 0.6
    assert found["ratio"]["rss"] < 0.6
