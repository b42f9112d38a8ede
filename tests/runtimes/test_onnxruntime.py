"""The ONNX runtime: conformance, equality with torch, caches in place, blocks, its errors."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import psutil
import pytest
from numpy.typing import NDArray

import smolexport
from smolexport.errors import SessionError, UsageError
from smolexport.model.arch import architectures, load_spec
from smolexport.model.checkpoint import read_config
from smolexport.plugins import runtime_for
from smolexport.run.generate import generate
from smolexport.run.session import Runtime
from smolexport.testing.checkpoints import write_checkpoint, write_tokenizer
from smolexport.testing.runtimes import RuntimeTests
from tests.children import python
from tests.runtimes.onnx_edits import edited, rows_cannot_be_chosen, rows_must_be_chosen

pytest.importorskip("onnxruntime", reason="the onnxruntime extra is not installed")

import smolexport_on_onnxruntime as adapter
from smolexport_on_onnxruntime import _session

FAMILIES = architectures()
IDS = [int(i) for i in np.random.default_rng(7).integers(0, 320, 48)]
PRECISE = {"accuracy_level": 0}  # activations stay floats


def exported(source: Path, out: Path, quant: str = "f32", **options: Any) -> Path:
    return smolexport.export("onnx", source, out, quant=quant, options=options).path


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("onnx") / "tokenizer")


@pytest.fixture(scope="session")
def checkpoint(tokenizer: Path) -> Path:
    return write_checkpoint(tokenizer.parent / "llama", "llama", tokenizer=tokenizer)


@pytest.fixture(scope="session")
def folder(checkpoint: Path) -> Path:
    return exported(checkpoint, checkpoint.parent / "f32-onnx")


@pytest.fixture(scope="session")
def several(checkpoint: Path) -> Path:
    return exported(checkpoint, checkpoint.parent / "several-onnx", "int4+f32", **PRECISE)


@pytest.fixture(scope="session")
def keep(checkpoint: Path) -> Path:
    folder = exported(checkpoint, checkpoint.parent / "keep-onnx")
    rows_must_be_chosen(folder / "onnx" / "model.onnx")
    return folder


@pytest.fixture(scope="session")
def every(checkpoint: Path) -> Path:
    folder = exported(checkpoint, checkpoint.parent / "every-onnx")
    rows_cannot_be_chosen(folder / "onnx" / "model.onnx")
    return folder


@pytest.fixture(scope="session")
def last(checkpoint: Path) -> Path:
    return exported(checkpoint, checkpoint.parent / "last-onnx", logits="last")


@pytest.fixture(scope="session")
def half(checkpoint: Path) -> Path:
    return exported(checkpoint, checkpoint.parent / "half-onnx", "f16")


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_session, "BLOCK", 7)


class OnnxTests(RuntimeTests):
    runtime: ClassVar[Runtime] = adapter
    options: ClassVar = {"threads": 1}
    tolerance = 1e-4


class TestFloat(OnnxTests):
    @pytest.fixture
    def model_path(self, folder: Path) -> Path:
        return folder


@pytest.mark.usefixtures("small_blocks")
class TestBlocks(OnnxTests):
    """Weights of 4 bits, in blocks smaller than an append."""

    @pytest.fixture
    def model_path(self, several: Path) -> Path:
        return several


@pytest.mark.usefixtures("small_blocks")
class TestLastRowsOnRequest(OnnxTests):
    @pytest.fixture
    def model_path(self, keep: Path) -> Path:
        return keep


@pytest.mark.usefixtures("small_blocks")
class TestLastRowsAlone(OnnxTests):
    """Such a graph is asked token by token."""

    @pytest.fixture
    def model_path(self, last: Path) -> Path:
        return last


class TestHalf(OnnxTests):
    """A cache of float16; logits near 8 have steps of 1/128."""

    tolerance = 0.1

    @pytest.fixture
    def model_path(self, half: Path) -> Path:
        return half

    def test_the_cache_is_half(self, half: Path) -> None:
        with adapter.open(half, context=8) as session:
            assert {buffer.dtype for buffer in session._buffers} == {np.dtype(np.float16)}


def relative(got: NDArray[np.float32], expected: NDArray[np.float32]) -> float:
    return float(np.linalg.norm(got - expected) / np.linalg.norm(expected))


def play(folder: Path, ids: list[int] = IDS, **options: Any) -> NDArray[np.float32]:
    with adapter.open(folder, threads=1, **options) as session:
        return session.append(ids)


def play_on_torch(folder: Path, ids: list[int] = IDS, **options: Any) -> NDArray[np.float32]:
    pytest.importorskip("torch", reason="the torch extra is not installed")
    import smolexport_on_torch

    with smolexport_on_torch.open(folder, threads=1, dtype="f32", **options) as session:
        return session.append(ids)


LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}


@pytest.mark.parametrize(
    ("family", "overrides"),
    [
        *((family, {"tie_word_embeddings": tied}) for family in FAMILIES for tied in (True, False)),
        ("llama", {"rope_scaling": LLAMA3, "attention_bias": True, "mlp_bias": True}),
        ("smollm3", {"rope_scaling": YARN}),
        ("qwen2", {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}),
    ],
    ids=str,
)
def test_equals_torch(tokenizer: Path, tmp_path: Path, family: str, overrides: dict[str, Any]) -> None:
    source = write_checkpoint(tmp_path / family, family, tokenizer=tokenizer, **overrides)
    long = [int(i) for i in np.random.default_rng(8).integers(0, 320, 200)]  # beyond both original contexts
    expected = play_on_torch(source, long)
    assert 2 < expected.std() < 5
    folder = exported(source, tmp_path / "out")
    assert relative(play(folder, long), expected) < 1e-5
    with adapter.open(folder, threads=1) as session:
        single = np.concatenate([session.append([i]) for i in long])
    assert relative(single, expected) < 1e-5


@pytest.mark.parametrize("quant", ["int4", "int8"])
@pytest.mark.parametrize("family", FAMILIES)
def test_quantized_equals_torch_on_the_decoded_weights(
    tokenizer: Path, tmp_path: Path, family: str, quant: str
) -> None:
    source = write_checkpoint(tmp_path / family, family, tokenizer=tokenizer)
    folder = exported(source, tmp_path / "out", quant, **PRECISE)
    spec = load_spec(read_config(source)[0])
    decoded = [(tensor.stored_name, array) for tensor, array in smolexport.read_back(folder, spec)]
    assert relative(play(folder), play_on_torch(source, weights=decoded)) < 1e-5


def test_greedy_equals_torch(checkpoint: Path, folder: Path) -> None:
    pytest.importorskip("torch", reason="the torch extra is not installed")
    import smolexport_on_torch

    options = {"max_tokens": 24, "stop_tokens": [], "with_text": False}
    with adapter.open(folder) as ours, smolexport_on_torch.open(checkpoint, dtype="f32") as theirs:
        assert generate(ours, IDS, **options).tokens == generate(theirs, IDS, **options).tokens


def test_it_is_the_runtime_of_the_format(folder: Path) -> None:
    assert runtime_for(folder).NAME == "onnxruntime"


def test_caches_are_written_in_place(folder: Path) -> None:
    with adapter.open(folder, context=64) as session:
        session.append(IDS[:20])
        bound = {value.data_ptr() for value in session._binding.get_outputs()[:-1]}
        assert bound == {buffer.ctypes.data for buffer in session._buffers}
        for buffer in session._buffers:
            assert buffer.shape == (1, 2, 64, 16)
            assert buffer[:, :, :20].any(axis=-1).all()
            assert not buffer[:, :, 20:].any()
        before = [buffer.copy() for buffer in session._buffers]
        session.append(IDS[20:21])
        for buffer, old in zip(session._buffers, before, strict=True):
            assert buffer[:, :, 20].any()
            buffer[:, :, 20] = 0
            np.testing.assert_array_equal(buffer, old)


@pytest.mark.parametrize("last_only", [False, True])
def test_blocks_bound_the_memory(every: Path, monkeypatch: pytest.MonkeyPatch, last_only: bool) -> None:
    monkeypatch.setattr(_session, "BLOCK", 7)
    with adapter.open(every, context=64) as session:
        assert made(session, monkeypatch, IDS[:20], last_only) == [7, 7, 6]


@pytest.mark.parametrize("graph", ["folder", "keep"])
def test_rows_that_are_not_wanted_are_not_made(
    graph: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_session, "BLOCK", 7)
    with adapter.open(request.getfixturevalue(graph), context=64) as session:
        assert made(session, monkeypatch, IDS[:20], True) == [1, 1, 1]
        assert made(session, monkeypatch, IDS[20:40], False) == [7, 7, 6]


def made(session: Any, monkeypatch: pytest.MonkeyPatch, ids: list[int], last_only: bool) -> list[int]:
    """How many rows of logits each pass makes."""
    shapes: list[int] = []
    run = type(session)._run

    def noted(self: Any, part: Any, held: int, logits: NDArray[Any]) -> None:
        shapes.append(len(logits))
        run(self, part, held, logits)

    with monkeypatch.context() as patch:
        patch.setattr(type(session), "_run", noted)
        session.append(ids, last_only=last_only)
    return shapes


def test_positions_are_told_where_they_are_asked_for(folder: Path, checkpoint: Path, tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    other = exported(checkpoint, tmp_path / "out")
    with edited(other / "onnx" / "model.onnx") as model:
        ids = ["batch_size", "sequence_length"]
        model.graph.input.append(onnx.helper.make_tensor_value_info("position_ids", onnx.TensorProto.INT64, ids))
        for node in model.graph.node:
            if node.op_type == "GroupQueryAttention" and len(node.input) == 9:
                node.input.append("position_ids")
    with adapter.open(other, threads=1) as session:
        got = np.concatenate([session.append(part) for part in (IDS[:30], *([i] for i in IDS[30:]))])
    np.testing.assert_allclose(got, play(folder), rtol=0, atol=1e-4)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("no\nmemory")])
def test_an_interrupted_append_leaves_the_session_whole(
    folder: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    monkeypatch.setattr(_session, "BLOCK", 8)
    with adapter.open(folder, threads=1) as session:
        expected = session.append(IDS)
        session.rewind(10)
        run = type(session)._run

        def fail(self: Any, ids: Any, held: int, logits: Any) -> None:
            run(self, ids, held, logits)  # written, then lost
            if held > 20:
                raise error

        with monkeypatch.context() as patch:
            patch.setattr(type(session), "_run", fail)
            expected_error = KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else SessionError
            with pytest.raises(expected_error, match=None if expected_error is KeyboardInterrupt else "no memory$"):
                session.append(IDS[::-1][:30])
        assert session.length == 10
        np.testing.assert_allclose(session.append(IDS[10:]), expected[10:], rtol=0, atol=1e-4)


def test_graphs_are_chosen_by_name_or_scheme(several: Path) -> None:
    by_default, f32 = play(several), play(several, graph="model")
    assert relative(by_default, f32) > 0.01
    for name in ("int4", "q4", "model_q4"):
        np.testing.assert_array_equal(play(several, graph=name), by_default)
    for name in ("f32", "fp32"):
        np.testing.assert_array_equal(play(several, graph=name), f32)
    with pytest.raises(UsageError, match=r"no graph 'int5'; it has model, model_q4$"):
        adapter.open(several, graph="int5")


def test_without_genai_config_one_graph_is_enough(several: Path, checkpoint: Path, tmp_path: Path) -> None:
    folder = exported(checkpoint, tmp_path / "out")
    expected = play(folder)
    (folder / "genai_config.json").unlink()
    np.testing.assert_array_equal(play(folder), expected)
    (folder / "onnx" / "model_other.onnx").write_bytes((folder / "onnx" / "model.onnx").read_bytes())
    with pytest.raises(UsageError, match="choose one by the option graph: model, model_other"):
        adapter.open(folder)


@pytest.mark.parametrize("spinning", [True, False])
@pytest.mark.parametrize("threads", [1, 3])
def test_threads_are_honoured(folder: Path, threads: int, spinning: bool) -> None:
    process = psutil.Process()
    before = process.num_threads()
    with adapter.open(folder, threads=threads, spinning=spinning) as session:
        assert process.num_threads() - before == threads - 1  # the caller's own thread computes too
        session.append(IDS)


@pytest.mark.parametrize(
    ("busy", "threads", "expected"), [(5.0, 4, "1"), (40.0, 4, "0"), (40.0, 2, "1"), (100.0, 1, "0"), (0.0, 1, "0")]
)
def test_threads_spin_where_cores_are_idle(
    folder: Path, monkeypatch: pytest.MonkeyPatch, busy: float, threads: int, expected: str
) -> None:
    monkeypatch.setattr(psutil, "cpu_count", lambda: 4)
    monkeypatch.setattr(psutil, "cpu_percent", lambda _seconds: busy)
    with adapter.open(folder, threads=threads) as session:
        options = session._session.get_session_options()
        assert options.get_session_config_entry("session.intra_op.allow_spinning") == expected


def test_torch_is_not_needed(folder: Path) -> None:
    said = python(f"""
import sys
for name in ("onnx_ir", "torch", "transformers"):
    sys.modules[name] = None
from pathlib import Path
import smolexport_on_onnxruntime
with smolexport_on_onnxruntime.open(Path({str(folder)!r})) as session:
    print(session.append([1, 2, 3]).shape)
""")
    assert said == "(3, 320)\n"


def test_options_out_of_range(folder: Path) -> None:
    with pytest.raises(UsageError, match="threads"):
        adapter.open(folder, threads=0)
