"""A deviation in two parts: what rounding the weights did, and what graph, metadata and runtime do.

checkpoint in torch --quantization--> decoded weights in torch, float32 --exporter--> the file on its runtime
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from smolexport.conversion.pipeline import export
from smolexport.demo import demo_text
from smolexport.parity.candidates import exported, reference
from smolexport.parity.compare import compare
from smolexport.parity.inputs import Settings
from smolexport.parity.results import CandidateResult, Comparison
from smolexport.parity.scoring import MATRIX, tensor_errors
from smolexport.testing.checkpoints import write_checkpoint, write_tokenizer
from tests.onnx_for_tests import onnxruntime
from tests.runtimes.onnx_edits import edited

FLOATS = {"kv_type": "f32", "flash_attention": False}
QUICK = Settings(max_windows=2, greedy_tokens=0, repetitions=0, threads=1, memory=False)


@pytest.fixture(autouse=True)
def _libraries() -> None:
    pytest.importorskip("torch")
    pytest.importorskip("llama_cpp")
    onnxruntime()


def held(folder: Path, *files: Path, dtype: str = "f32", text: str | None = None) -> Comparison:
    options = FLOATS if any(file.suffix == ".gguf" for file in files) else {}
    words = demo_text() if text is None else text
    return compare(reference(folder, dtype), exported(files, options), text=words, settings=QUICK)


def parts(result: CandidateResult) -> tuple[float, float]:
    """Mean KLD of the weights' and of the runtime's part."""
    assert result.attribution is not None
    return result.attribution.quantization.kld.mean.value, result.attribution.exporter.kld.mean.value


def test_one_weights_three_runtimes(demo: Path, tmp_path: Path) -> None:
    pytest.importorskip("mlx_lm")
    files = [export(kind, demo, tmp_path / f"demo.{kind}", quant="int4").path for kind in ("gguf", "mlx", "onnx")]
    result = held(demo, *files, dtype="bf16")
    assert len({candidate.fingerprint for candidate in result.candidates}) == 1
    floor = result.reference.noise_floor
    assert floor is not None
    assert 1e-6 < floor.kld.mean.value < 1e-3
    quantization = {parts(candidate)[0] for candidate in result.candidates}
    assert len(quantization) == 1  # decoded and run once
    for candidate in result.candidates:
        weights, runtime = parts(candidate)
        assert 0.005 < weights < 0.03
        assert runtime < weights / 10
        assert candidate.accuracy.kld.mean.value == pytest.approx(weights, rel=0.1)
    assert [(pair.first, pair.second) for pair in result.pairs] == [(0, 1), (0, 2), (1, 2)]
    assert all(0 < pair.accuracy.kld.mean.value < 0.001 for pair in result.pairs)


def test_errors_of_tensors_are_those_of_the_codec(demo: Path, tmp_path: Path) -> None:
    files = [export("gguf", demo, tmp_path / f"{q}.gguf", quant=q).path for q in ("f32", "int8", "int4")]
    plain, eight, four = (
        {error.source: error for error in candidate.tensor_errors} for candidate in held(demo, *files).candidates
    )
    assert all(error.relative == 0 for error in plain.values())
    matrix = "model.layers.1.mlp.down_proj.weight"
    assert 0.002 < eight[matrix].relative < 0.01
    assert 0.05 < four[matrix].relative < 0.15
    assert four["model.embed_tokens.weight"].relative == eight["model.embed_tokens.weight"].relative
    assert four[matrix].layer == 1


def wrong_rope_in_gguf(folder: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    from smolexport_to_gguf import metadata

    true = metadata._rope_metadata
    monkeypatch.setattr(
        metadata, "_rope_metadata", lambda a, r: [(k, t, v / 10 if "base" in k else v) for k, t, v in true(a, r)]
    )
    return export("gguf", folder, out / "wrong.gguf", quant="int4").path


def wrong_rope_in_mlx(folder: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    pytest.importorskip("mlx_lm")
    path = export("mlx", folder, out / "wrong-mlx", quant="int4").path
    config = json.loads((path / "config.json").read_text())
    config["rope_theta"] /= 10
    if isinstance(config.get("rope_parameters"), dict):
        config["rope_parameters"]["rope_theta"] /= 10
    (path / "config.json").write_text(json.dumps(config))
    return path


def wrong_norm_in_onnx(folder: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = export("onnx", folder, out / "wrong-onnx", quant="int4").path
    with edited(path / "onnx" / "model_q4.onnx") as model:
        for node in model.graph.node:
            for attribute in node.attribute:
                if attribute.name == "epsilon":
                    attribute.f = 0.5
    return path


def lost_bias_in_onnx(folder: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The bias is in the file, and nothing adds it."""
    path = export("onnx", folder, out / "wrong-onnx", quant="int4").path
    with edited(path / "onnx" / "model_q4.onnx") as model:
        adds = [node for node in model.graph.node if node.op_type == "Add"]
        assert adds
        for add in adds:
            add.op_type = "Identity"
            del add.input[1:]
    return path


@pytest.mark.parametrize("plant", [wrong_rope_in_gguf, wrong_rope_in_mlx, wrong_norm_in_onnx])
def test_the_blame_lands_on_the_exporter(
    plant: Callable[[Path, Path, pytest.MonkeyPatch], Path],
    demo: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Even at 4 bits: the weights decode as before, and only the second part grows."""
    [found] = held(demo, plant(demo, tmp_path, monkeypatch)).candidates
    weights, runtime = parts(found)
    assert weights < 0.03
    assert runtime > 0.1


@pytest.mark.parametrize(
    ("tensors", "told"),
    [
        (("model.norm.weight",), "model.norm.weight: not a rounded copy of the checkpoint's tensor"),
        (("model.layers.1.mlp.gate_proj.weight", "model.layers.1.mlp.up_proj.weight"), "mlp.gate_proj.weight, model"),
    ],
)
def test_tensors_that_are_not_the_checkpoints_are_the_exporters(
    tensors: tuple[str, ...], told: str, demo: Path, tmp_path: Path
) -> None:
    """A norm written wrongly, and two matrices in each other's place: the file decodes to them, rounding did not."""
    from safetensors.torch import load_file, save_file

    other = tmp_path / "other"
    shutil.copytree(demo, other)
    [path] = other.glob("*.safetensors")
    held_there = load_file(path)
    one, *rest = tensors
    if rest:
        held_there[one], held_there[rest[0]] = held_there[rest[0]], held_there[one]
    else:
        held_there[one] = held_there[one] / 2
    save_file(held_there, path, {"format": "pt"})
    [found] = held(demo, export("gguf", other, tmp_path / "wrong.gguf", quant="int4").path).candidates
    weights, runtime = parts(found)
    assert weights < 0.03
    assert runtime > 2 * weights
    assert any(told in note for note in found.notes)


def test_what_rounding_does_is_told_from_another_tensor(demo: Path, tmp_path: Path) -> None:
    """The coarsest schemes there are stay far below what a tensor in another's place comes to."""
    for kind, scheme in (("gguf", "q2_k"), ("mlx", "q2_g128")):
        file = export(kind, demo, tmp_path / f"{scheme}.{kind}", quant=scheme).path
        [candidate] = exported([file])
        assert candidate.weights is not None
        own = reference(demo).weights
        assert own is not None
        errors = tensor_errors(own(), candidate.weights(), file)
        assert max(error.relative for error in errors) < 0.75 * MATRIX
        assert all(error.rounded for error in errors)


def test_a_lost_bias_is_the_exporters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = write_tokenizer(tmp_path / "tokenizer")
    folder = write_checkpoint(tmp_path / "model", "qwen2", seed=4, tokenizer=tokenizer, hidden_size=128)
    sound = export("onnx", folder, tmp_path / "sound-onnx", quant="int4", options={"accuracy_level": 0}).path
    faulty = lost_bias_in_onnx(folder, tmp_path, monkeypatch)
    text = "".join(map(chr, np.random.default_rng(1).integers(97, 123, 3000)))
    good, bad = held(folder, sound, faulty, text=text).candidates
    assert parts(good)[0] == parts(bad)[0] > 0
    assert parts(good)[1] < 1e-7
    assert parts(bad)[1] > 100 * parts(good)[1]
    assert parts(bad)[1] > parts(bad)[0]


def test_a_fault_of_the_weights_is_not_the_exporters(demo: Path, tmp_path: Path) -> None:
    """Two bits: the weights are far away, and the runtime runs just them."""
    [found] = held(demo, export("gguf", demo, tmp_path / "demo.gguf", quant="q2_k").path).candidates
    weights, runtime = parts(found)
    assert weights > 0.05
    assert runtime < weights / 20


def test_another_graph_of_a_folder_is_not_judged_by_the_first_ones_weights(demo: Path, tmp_path: Path) -> None:
    folder = export("onnx", demo, tmp_path / "demo-onnx", quant="int4+int8").path
    several = exported([folder], {"graph": "int8"})
    result = compare(reference(demo, "f32"), several, text=demo_text(), settings=QUICK)
    [found] = result.candidates
    assert found.accuracy.kld.mean.value < 0.002
    assert (found.attribution, found.fingerprint, found.tensor_errors) == (None, None, ())
