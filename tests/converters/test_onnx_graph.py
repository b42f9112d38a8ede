"""Is the graph that we write the checkpoint's?  Plain onnxruntime against torch, in float32.

A wrong rotation, norm, bias, NoPE layer or scaling shows far above rounding (KLD 1e-8).
Axes: four architectures x tied and untied x rotary scalings x biases, in one block and token by token; schemes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import smolexport
from smolexport.conversion.pipeline import export
from smolexport.model.checkpoint import open_checkpoint
from smolexport.testing.checkpoints import write_checkpoint, write_tokenizer
from smolexport_to_onnx.reading import metadata_of, read_graph
from tests.onnx_for_tests import divergence, onnxruntime, play, relative, torch_logits

LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama llama3 factors": ("llama", {"rope_scaling": LLAMA3}),
    "llama linear": ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 3.0}}),
    "llama yarn, own betas and magnitude": (
        "llama",
        {"rope_scaling": YARN | {"beta_fast": 64, "beta_slow": 2, "attention_factor": 1.5}},
    ),
    "llama yarn, not truncated": ("llama", {"rope_scaling": YARN | {"truncate": False}}),
    "llama biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama untied, wide heads": ("llama", {"tie_word_embeddings": False, "head_dim": 32}),
    "llama, one key head": ("llama", {"num_key_value_heads": 1}),
    "llama, narrow heads": ("llama", {"head_dim": 8}),
    "llama, heads of 24 with biases": ("llama", {"head_dim": 24, "attention_bias": True}),
    "mistral untied": ("mistral", {"tie_word_embeddings": False}),
    "mistral, a window": ("mistral", {"sliding_window": 24}),
    "mistral, a window, narrow heads": ("mistral", {"sliding_window": 7, "head_dim": 8}),
    "smollm3": ("smollm3", {}),
    "smollm3 untied": ("smollm3", {"tie_word_embeddings": False}),
    "smollm3 own NoPE layers": ("smollm3", {"no_rope_layers": [1, 1, 0, 1, 1, 1, 1, 0]}),
    "smollm3 no rope at all": ("smollm3", {"no_rope_layers": [0] * 8}),
    "smollm3, narrow heads, yarn": ("smollm3", {"head_dim": 8, "rope_scaling": YARN}),
    "smollm3 yarn, mscale": ("smollm3", {"rope_scaling": YARN | {"mscale": 0.7, "mscale_all_dim": 1.1}}),
    "smollm3 biases": ("smollm3", {"attention_bias": True, "mlp_bias": True}),
    "qwen2": ("qwen2", {}),
    "qwen2 yarn": ("qwen2", {"rope_scaling": YARN}),
    "qwen2 untied": ("qwen2", {"tie_word_embeddings": False}),
    "qwen3": ("qwen3", {}),
    "qwen3 untied": ("qwen3", {"tie_word_embeddings": False}),
    "qwen3 yarn": ("qwen3", {"rope_scaling": YARN}),
    "qwen3, narrow heads": ("qwen3", {"head_dim": 8}),
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.mark.parametrize("case", CASES)
def test_onnxruntime_computes_what_torch_computes(case: str, tokenizer: Path, tmp_path: Path) -> None:
    """160 tokens, so that YaRN is run beyond its original context of 64."""
    onnxruntime()
    model_type, overrides = CASES[case]
    folder = write_checkpoint(tmp_path / "model", model_type, seed=11, tokenizer=tokenizer, **overrides)
    graph = export("onnx", folder, tmp_path / "out", quant="f32").path / "onnx" / "model.onnx"
    tokens = np.random.default_rng(3).integers(0, 320, 160)
    reference = torch_logits(folder, tokens)
    assert float(np.std(reference)) > 1
    assert abs(divergence(reference, play(graph, tokens))) < 1e-8
    assert abs(divergence(reference, play(graph, tokens, [1, 2, 3, 4, 40, 41, 150]))) < 1e-8


def test_token_by_token(tokenizer: Path, tmp_path: Path) -> None:
    onnxruntime()
    folder = write_checkpoint(tmp_path / "model", "smollm3", seed=11, tokenizer=tokenizer)
    graph = export("onnx", folder, tmp_path / "out", quant="f32").path / "onnx" / "model.onnx"
    tokens = np.random.default_rng(3).integers(0, 320, 48)
    whole, single = play(graph, tokens), play(graph, tokens, range(1, 48))
    np.testing.assert_allclose(single, whole, rtol=0, atol=1e-4)


TOLERANCES = {
    "f32": 1e-5, "f16": 1e-2, "int4": 1e-5, "int8": 1e-5, "q4f16": 1e-2, "int4-asym": 1e-5, "int4-g64": 1e-5,
    "int4-pure": 1e-5, "int4-g128": 1e-5, "int4-asym-g64": 1e-5, "int4-asym-g128": 1e-5, "int8-dynamic": 6e-2,
}  # fmt: skip


@pytest.mark.parametrize("scheme", TOLERANCES)
@pytest.mark.parametrize("tied", [True, False])
def test_every_scheme_plays_the_weights_that_are_read_back(
    scheme: str, tied: bool, tokenizer: Path, tmp_path: Path
) -> None:
    """With activations left as floats (accuracy_level 0), so that nothing but the weights was rounded.

    `int8-dynamic` rounds activations by definition; that its weights are exact is a test of its own.
    """
    onnxruntime()
    sizes: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32, "tie_word_embeddings": tied}
    folder = write_checkpoint(tmp_path / "model", "qwen3", seed=12, tokenizer=tokenizer, **sizes)
    out = export("onnx", folder, tmp_path / "out", quant=scheme, options={"accuracy_level": 0}).path
    [graph] = (out / "onnx").glob("*.onnx")
    tokens = np.random.default_rng(3).integers(0, 320, 96)
    back = ((t.stored_name, values) for t, values in smolexport.read_back(out, open_checkpoint(folder).spec))
    assert relative(play(graph, tokens), torch_logits(folder, tokens, back)) < TOLERANCES[scheme]


@pytest.mark.parametrize("quant", ["f32", "int4", "int8-dynamic"])
def test_a_tied_embedding_is_stored_once(quant: str, tokenizer: Path, tmp_path: Path) -> None:
    """Also when it is quantized: gathered from and multiplied by, it is the same bytes."""
    folder = write_checkpoint(tmp_path / "model", "llama", seed=1, tokenizer=tokenizer, hidden_size=128)
    out = export("onnx", folder, tmp_path / "out", quant=quant)
    [data] = (out.path / "onnx").glob("*.onnx_data")
    tables = 2 * 512 * 16 * 4
    assert data.stat().st_size - out.plan.nbytes - tables < 4096 * 64
    graph = read_graph(data.with_suffix(".onnx")).graph
    embeds = [i.name for i in graph.initializer if "embed" in i.name or "lm_head" in i.name]
    count, product = {"f32": (1, "Transpose"), "int4": (3, "MatMulNBits"), "int8-dynamic": (2, "MatMulInteger")}[quant]
    assert len(embeds) == count
    assert [n.op_type for n in graph.node if embeds[0] in n.input] == ["Gather", product]


def test_logits_of_the_last_position_alone(tokenizer: Path, tmp_path: Path) -> None:
    onnxruntime()
    folder = write_checkpoint(tmp_path / "model", "llama", seed=1, tokenizer=tokenizer)
    every, last = (
        export("onnx", folder, tmp_path / logits, quant="f32", options={"logits": logits}).path
        for logits in ("all", "last")
    )
    tokens = np.random.default_rng(3).integers(0, 320, 20)
    rows = play(every / "onnx" / "model.onnx", tokens)
    np.testing.assert_allclose(play(last / "onnx" / "model.onnx", tokens), rows[-1:], rtol=0, atol=1e-4)


def test_as_many_rows_of_logits_as_are_asked_for(tokenizer: Path, tmp_path: Path) -> None:
    """Whoever does not know the input leaves it out and has all of them."""
    ort = onnxruntime()
    folder = write_checkpoint(tmp_path / "model", "qwen3", seed=1, tokenizer=tokenizer)
    graph = export("onnx", folder, tmp_path / "out", quant="f32").path / "onnx" / "model.onnx"
    tokens = np.random.default_rng(3).integers(0, 320, 20)
    rows = play(graph, tokens)
    assert len(rows) == 20
    for keep, count in ((0, 20), (1, 1), (7, 7), (99, 20)):
        kept = play(graph, tokens, keep=keep)
        assert len(kept) == count
        np.testing.assert_allclose(kept, rows[-count:], rtol=0, atol=1e-4)
    session = ort.InferenceSession(str(graph), providers=["CPUExecutionProvider"])
    assert "num_logits_to_keep" not in {value.name for value in session.get_inputs()}


def test_the_tables_end_where_they_are_told_to(tokenizer: Path, tmp_path: Path) -> None:
    """A longer text is an error of the runtime, never a wrong rotation."""
    ort = onnxruntime()
    folder = write_checkpoint(tmp_path / "model", "llama", seed=1, tokenizer=tokenizer)
    done = export("onnx", folder, tmp_path / "out", quant="f32", options={"max_positions": 24})
    assert any("positions up to 24 of the 512" in note for note in done.plan.notes)
    graph = done.path / "onnx" / "model.onnx"
    assert metadata_of(read_graph(graph))["smolexport.max_positions"] == "24"
    assert json.loads((done.path / "genai_config.json").read_text())["search"]["max_length"] == 24
    play(graph, range(24))
    with pytest.raises(ort.capi.onnxruntime_pybind11_state.InvalidArgument, match="total_sequence_length"):
        play(graph, range(25))


def test_several_schemes_in_one_folder(tokenizer: Path, tmp_path: Path) -> None:
    """One pass, one graph each; the first is the one that is read."""
    folder = write_checkpoint(tmp_path / "model", "llama", seed=1, tokenizer=tokenizer, hidden_size=128)
    done = export("onnx", folder, tmp_path / "out", quant="q4f16+f32+int8")
    stems = ("model_q4f16", "model", "model_int8")
    assert {p.name for p in (done.path / "onnx").iterdir()} == {f"{s}.onnx{d}" for s in stems for d in ("", "_data")}
    found = smolexport.inspect(done.path)
    assert set(found.scheme.split("+")) == {"q4f16", "f32", "int8"}
    assert found.scheme.startswith("q4f16+")
    prints = {}
    for quant, stem in zip(("q4f16", "f32", "int8"), stems, strict=True):
        alone = export("onnx", folder, tmp_path / quant, quant=quant).path
        prints[quant] = smolexport.fingerprint(alone)
        for end in ("", "_data"):
            name = f"onnx/{stem}.onnx{end}"
            assert (alone / name).read_bytes() == (done.path / name).read_bytes(), name
        assert smolexport.fingerprint(done.path / "onnx" / f"{stem}.onnx") == prints[quant]
    assert smolexport.fingerprint(done.path) == prints["q4f16"]
    assert len(set(prints.values())) == 3
    config = json.loads((done.path / "config.json").read_text())["transformers.js_config"]
    assert config == {
        "dtype": "q4f16",
        "use_external_data_format": {f"{stem}.onnx": 1 for stem in stems},
        "kv_cache_dtype": {"q4f16": "float16"},
    }
