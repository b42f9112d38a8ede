"""`int4` and `int8` in an ONNX folder are the very weights of the GGUF file and the MLX folder, and the folder is
what each of its readers takes: ONNX Runtime GenAI runs it like plain ONNX Runtime."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import smolexport
from smolexport.conversion.pipeline import export_all
from smolexport.model.arch import architectures
from smolexport.testing.checkpoints import write_checkpoint, write_tokenizer
from smolexport_to_onnx import lint, replaceable
from smolexport_to_onnx.graph import serialize
from smolexport_to_onnx.reading import read_graph, read_model
from tests.onnx_for_tests import onnxruntime, play, session

ARCHITECTURES = architectures()


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.mark.parametrize("scheme", ["int4", "int8"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_one_model_in_every_format(model_type: str, tied: bool, scheme: str, tokenizer: Path, tmp_path: Path) -> None:
    """One pass, one fingerprint; also where rows are not a multiple of 32 and stay float16 values."""
    folder = write_checkpoint(
        tmp_path / "model", model_type, seed=3, tokenizer=tokenizer, tie_word_embeddings=tied, intermediate_size=176
    )
    done = export_all(folder, tmp_path / "out", quant=scheme)
    assert {"gguf", "mlx", "onnx"} <= {export.plan.target for export in done}
    assert len({smolexport.fingerprint(export.path) for export in done}) == 1
    [ours] = [export for export in done if export.plan.target == "onnx"]
    assert {entry.format.name for entry in ours.plan.fallbacks} == {"f32"}
    assert any("row length 176 is not a multiple of 32" in line for line in ours.plan.fallback_lines())


def test_half_precision_holds_the_same_weights(tokenizer: Path, tmp_path: Path) -> None:
    """Scales of the lattice are float16 by definition; float32 or float16 is only what the graph computes in."""
    folder = write_checkpoint(tmp_path / "model", "qwen2", seed=3, tokenizer=tokenizer, intermediate_size=176)
    prints = {
        quant: smolexport.fingerprint(smolexport.export("onnx", folder, tmp_path / quant, quant=quant).path)
        for quant in ("int4", "q4f16", "int8")
    }
    assert prints["int4"] == prints["q4f16"] != prints["int8"]


def test_the_operator_takes_the_lattice_for_what_it_is(tokenizer: Path, tmp_path: Path) -> None:
    """Unit vectors through the graph's own MatMulNBits nodes bring back the decoded weights, exactly."""
    import onnx

    ort = onnxruntime()
    folder = write_checkpoint(tmp_path / "model", "llama", seed=3, tokenizer=tokenizer)
    out = smolexport.export("onnx", folder, tmp_path / "x", quant="int4", options={"accuracy_level": 0}).path
    path = out / "onnx" / "model_q4.onnx"
    model, stored = onnx.load(str(path)), read_model(path).stored
    arrays = {i.name: i for i in model.graph.initializer}
    for node in (n for n in model.graph.node if n.op_type == "MatMulNBits"):
        columns = next(a.i for a in node.attribute if a.name == "K")
        one = onnx.helper.make_graph(
            [node], "x", [onnx.helper.make_tensor_value_info(node.input[0], 1, ["n", columns])],
            [onnx.helper.make_tensor_value_info(node.output[0], 1, None)], [arrays[n] for n in node.input[1:]],
        )  # fmt: skip
        alone = onnx.helper.make_model(one, opset_imports=model.opset_import, ir_version=model.ir_version)
        opened = ort.InferenceSession(alone.SerializeToString(), providers=["CPUExecutionProvider"])
        [product] = opened.run(None, {node.input[0]: np.eye(columns, dtype=np.float32)})
        np.testing.assert_array_equal(product.T, stored[f"{node.input[1].removesuffix('.B')}.weight"].read_rows())


@pytest.mark.parametrize(
    "quant", ["f32", "f16", "int4", "int8", "q4f16", "int4-asym-g64", "int8-dynamic", "int4+q4f16+f32"]
)
@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_the_folder_keeps_every_rule_of_its_readers(
    model_type: str, quant: str, tokenizer: Path, tmp_path: Path
) -> None:
    folder = write_checkpoint(tmp_path / "model", model_type, seed=3, tokenizer=tokenizer, hidden_size=128)
    out = smolexport.export("onnx", folder, tmp_path / "x", quant=quant).path
    assert lint(out) == []
    assert replaceable(out)
    for graph in (out / "onnx").glob("*.onnx"):
        assert graph.stat().st_size < (100_000 if quant == "int8-dynamic" else 64_000)


@pytest.mark.parametrize("quant", ["int4", "int8-dynamic"])
def test_the_graph_is_what_the_library_would_write(quant: str, tokenizer: Path, tmp_path: Path) -> None:
    """But for lists of integers, which are packed: read, written and read again it is the same model."""
    folder = write_checkpoint(tmp_path / "model", "qwen3", seed=3, tokenizer=tokenizer)
    [path] = (smolexport.export("onnx", folder, tmp_path / "x", quant=quant).path / "onnx").glob("*.onnx")
    import onnx

    model, data = read_graph(path), path.read_bytes()
    assert serialize(model) == data
    theirs = model.SerializeToString()
    assert len(theirs) < len(data)
    assert type(model).FromString(theirs) == model
    assert model.ir_version == 10
    assert {o.domain: o.version for o in model.opset_import} == {"": 21, "com.microsoft": 1}
    names = [node.name for node in model.graph.node]
    assert len(set(names)) == len(names)
    shaped = onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True)
    assert list(shaped.graph.output) == list(model.graph.output)


def genai() -> Any:
    return pytest.importorskip("onnxruntime_genai", reason="onnxruntime-genai is not installed")


def greedy(graph: Path, prompt: list[int], count: int) -> list[int]:
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(play(graph, ids)[-1].argmax()))
    return ids


def near_tie(graph: Path, quant: str, found: list[int], due: list[int], start: int) -> bool:
    """Whether activations of 16 bits explain where two texts part.

    With and without shared buffers ONNX Runtime adds up attention in another order; on some processors that shows.
    """
    at = next(i for i, (one, other) in enumerate(zip(found, due, strict=False)) if one != other)
    logits = play(graph, due[:at])[-1]
    return quant == "q4f16" and at > start + 8 and logits[due[at]] - logits[found[at]] < 0.01 * np.abs(logits).max()


@pytest.mark.parametrize(
    ("model_type", "quant", "sizes"),
    [
        ("llama", "f32", {}),
        ("smollm3", "int4", {"tie_word_embeddings": False}),
        ("qwen2", "int8", {}),
        ("qwen3", "int4", {}),
        ("qwen3", "q4f16", {}),
        ("smollm3", "int8-dynamic", {}),
        ("llama", "int4", {"head_dim": 8}),
        (
            "llama",
            "int4",
            {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}},
        ),
    ],
)
def test_genai_generates_what_onnxruntime_computes(
    model_type: str, quant: str, sizes: dict[str, Any], tokenizer: Path, tmp_path: Path
) -> None:
    """The same greedy ids through genai_config.json, its generator and shared buffers; its tokenizer is ours."""
    og = genai()
    folder = write_checkpoint(tmp_path / "model", model_type, seed=3, tokenizer=tokenizer, **sizes)
    out = smolexport.export("onnx", folder, tmp_path / "x", quant=quant).path
    model = og.Model(str(out))
    prompt = [int(i) for i in og.Tokenizer(model).encode("the cat and the hat")]
    from tokenizers import Tokenizer

    assert prompt == Tokenizer.from_file(str(folder / "tokenizer.json")).encode("the cat and the hat").ids
    parameters = og.GeneratorParams(model)
    parameters.set_search_options(max_length=len(prompt) + 40, min_length=len(prompt) + 40)
    generator = og.Generator(model, parameters)
    generator.append_tokens(prompt)
    while not generator.is_done():
        generator.generate_next_token()
    found = [int(i) for i in generator.get_sequence(0)]
    [graph] = (out / "onnx").glob("*.onnx")
    due = greedy(graph, prompt, 40)
    stop = json.loads((out / "config.json").read_text())["eos_token_id"]
    if stop in due[len(prompt) :]:  # min_length keeps the generator from it
        due = due[: due.index(stop, len(prompt))]
    assert found[: len(due)] == due or near_tie(graph, quant, found, due, len(prompt))
    assert len(due) > len(prompt) + 3


def test_shared_buffers_give_the_same_logits(tokenizer: Path, tmp_path: Path) -> None:
    """Past and present in one preallocated buffer, as a fast loop binds them."""
    ort = onnxruntime()
    folder = write_checkpoint(tmp_path / "model", "smollm3", seed=3, tokenizer=tokenizer)
    graph = smolexport.export("onnx", folder, tmp_path / "x", quant="f32").path / "onnx" / "model.onnx"
    tokens = np.random.default_rng(1).integers(0, 320, 30)
    opened = session(graph)
    past = [i for i in opened.get_inputs() if i.name.startswith("past")]
    buffers = {
        i.name: ort.OrtValue.ortvalue_from_numpy(np.full((1, i.shape[1], 40, i.shape[3]), 9, np.float32)) for i in past
    }
    rows, total = [], 0
    for part in np.split(tokens.astype(np.int64), [7, 8, 20]):
        total += len(part)
        binding = opened.io_binding()
        binding.bind_cpu_input("input_ids", part[None])
        binding.bind_cpu_input("attention_mask", np.ones((1, total), np.int64))
        for name, value in buffers.items():
            binding.bind_ortvalue_input(name, value)
            binding.bind_ortvalue_output(name.replace("past_key_values", "present"), value)
        binding.bind_output("logits")
        opened.run_with_iobinding(binding)
        rows.append(binding.copy_outputs_to_cpu()[-1][0])
    np.testing.assert_allclose(np.concatenate(rows), play(graph, tokens), rtol=0, atol=1e-4)
