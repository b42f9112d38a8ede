"""The MLX runtime: conformance, equality with torch in f32, quantized folders, its errors."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from numpy.typing import NDArray

from smolexport.errors import SessionError, UsageError
from smolexport.model.arch import architectures
from smolexport.run.generate import generate
from smolexport.run.session import Runtime
from smolexport.testing.checkpoints import write_checkpoint, write_tokenizer
from smolexport.testing.runtimes import RuntimeTests
from tests import mlx_for_tests
from tests.children import python

mx = pytest.importorskip("mlx.core", reason="the mlx extra is not installed")

import smolexport_on_mlx  # noqa: E402

mlx_lm = mlx_for_tests.mlx_lm()
FAMILIES = architectures()
IDS = [int(i) for i in np.random.default_rng(7).integers(0, 320, 48)]
ON_CPU = pytest.mark.skipif(mx.default_device().type != mx.cpu, reason="about MLX's CPU backend")
MODES: Mapping[str, Mapping[str, Any]] = {
    "q4": {"group_size": 64, "bits": 4, "mode": "affine"},
    "q8": {"group_size": 32, "bits": 8, "mode": "affine"},
    "mxfp4": {"group_size": 32, "bits": 4, "mode": "mxfp4"},
}


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mlx")
    write_tokenizer(folder / "tokenizer")
    return write_checkpoint(folder / "llama", "llama", tokenizer=folder / "tokenizer")


def quantized(source: Path, folder: Path, mode: str) -> Path:
    """`source` as mlx-lm itself quantizes and saves it."""
    model, config = mlx_lm.utils.load_model(source, lazy=True)
    model, config = mlx_lm.utils.quantize_model(model, config, **MODES[mode])
    folder.mkdir()
    mlx_lm.utils.save_model(folder, model)
    mlx_lm.utils.save_config(config, folder / "config.json")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if (source / name).exists():
            shutil.copy(source / name, folder)
    return folder


@pytest.fixture(scope="session")
def q4(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quantized(checkpoint, tmp_path_factory.mktemp("q4") / "q4", "q4")


class TestFloat(RuntimeTests):
    runtime: ClassVar[Runtime] = smolexport_on_mlx
    options: ClassVar = {"dtype": "f32"}
    tolerance = 1e-4

    @pytest.fixture
    def model_path(self, checkpoint: Path) -> Path:
        return checkpoint


class TestQuantized(RuntimeTests):
    """As people open it, in blocks smaller than an append."""

    runtime: ClassVar[Runtime] = smolexport_on_mlx
    options: ClassVar = {"dtype": "f32"}
    tolerance = 1e-4

    @pytest.fixture(autouse=True)
    def small_blocks(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from smolexport_on_mlx import _session

        monkeypatch.setattr(_session, "BLOCK", 7)

    @pytest.fixture
    def model_path(self, q4: Path) -> Path:
        return q4


def relative(got: NDArray[np.float32], expected: NDArray[np.float32]) -> float:
    return float(np.linalg.norm(got - expected) / np.linalg.norm(expected))


def play(folder: Path, **options: Any) -> NDArray[np.float32]:
    with smolexport_on_mlx.open(folder, **options) as session:
        return session.append(IDS)


def play_on_torch(folder: Path, **options: Any) -> NDArray[np.float32]:
    pytest.importorskip("torch", reason="the torch extra is not installed")
    import smolexport_on_torch

    with smolexport_on_torch.open(folder, threads=1, dtype="f32", **options) as session:
        return session.append(IDS)


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
def test_equals_torch(tmp_path: Path, family: str, overrides: dict[str, Any]) -> None:
    folder = write_checkpoint(tmp_path / family, family, **overrides)
    expected = play_on_torch(folder)
    assert 2 < expected.std() < 5
    assert relative(play(folder, dtype="f32"), expected) < 1e-5


@pytest.mark.parametrize("family", ["smollm3", "qwen2"])
@pytest.mark.parametrize("mode", MODES)
def test_quantized_equals_torch_on_the_decoded_weights(tmp_path: Path, family: str, mode: str) -> None:
    source = write_checkpoint(tmp_path / family, family)
    folder = quantized(source, tmp_path / mode, mode)
    model, _ = mlx_lm.utils.load_model(folder, lazy=True)
    model.set_dtype(mx.float32)  # decoded from scales in f32, as the session does
    flat = mlx_lm.utils.tree_flatten(mlx_lm.utils.dequantize_model(model).parameters())
    decoded = [(name, np.array(array.astype(mx.float32))) for name, array in flat]
    assert relative(play(folder, dtype="f32"), play_on_torch(source, weights=decoded)) < 1e-5


@ON_CPU
def test_dtypes(q4: Path) -> None:
    by_default, f32, f16, bf16 = (play(q4, dtype=dtype) for dtype in (None, "f32", "f16", "bf16"))
    np.testing.assert_array_equal(by_default, f32)
    assert 1e-5 < relative(f16, f32) < 0.02
    assert relative(f16, f32) < relative(bf16, f32) < 0.2


@pytest.mark.parametrize("dtype", ["f16", "bf16"])
def test_narrow_dtypes_keep_the_rotary_frequencies(tmp_path: Path, dtype: str) -> None:
    folder = write_checkpoint(tmp_path, "llama", rope_scaling=LLAMA3)
    with smolexport_on_mlx.open(folder, dtype=dtype) as session:
        assert session._model.layers[0].self_attn.rope._freqs.dtype == mx.float32
        session.append(IDS)
        assert session._cache is not None
        assert session._cache[0].keys.dtype == {"f16": mx.float16, "bf16": mx.bfloat16}[dtype]


@ON_CPU
def test_last_only_computes_one_row_of_the_head(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, "llama", vocab_size=20000, num_hidden_layers=1)
    rows, peaks = [], []
    with smolexport_on_mlx.open(folder) as session:
        for last_only in (False, True):
            session.rewind(0)
            mx.reset_peak_memory()
            before = mx.get_active_memory()
            rows.append(session.append(IDS, last_only=last_only))
            peaks.append(mx.get_peak_memory() - before)
    np.testing.assert_allclose(rows[1], rows[0][-1:], rtol=0, atol=1e-4)
    assert peaks[1] < rows[0].nbytes / 2 < peaks[0]


def test_sliding_windows_rewind_beyond_the_window(tmp_path: Path) -> None:
    # No architecture that is exported has windows, but a folder of somebody else's may.
    kinds = ["full_attention", "sliding_attention"] * 2
    folder = write_checkpoint(tmp_path, "llama")
    config = folder / "config.json"
    plain = config.read_text()
    config.write_text(json.dumps({**json.loads(plain), "layer_types": kinds, "sliding_window": 8}))
    model, _ = mlx_lm.utils.load_model(folder)
    model.set_dtype(mx.float32)
    whole = np.array(model(mx.array([IDS]))[0])  # without any cache
    rotating = model.make_cache()
    assert [type(c).__name__ for c in rotating] == ["KVCache", "RotatingKVCache"] * 2
    single = np.concatenate([np.array(model(mx.array([[i]]), cache=rotating)[0]) for i in IDS])
    np.testing.assert_allclose(single, whole, rtol=0, atol=1e-4)
    with smolexport_on_mlx.open(folder, dtype="f32") as session:
        np.testing.assert_allclose(session.append(IDS), whole, rtol=0, atol=1e-4)
        session.rewind(20)
        rows = np.concatenate([session.append([i]) for i in IDS[20:]])
        np.testing.assert_allclose(rows, whole[20:], rtol=0, atol=1e-4)
    config.write_text(plain)
    assert np.abs(play(folder, dtype="f32")[20:] - whole[20:]).max() > 0.1


def test_an_interrupted_append_leaves_the_session_whole(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with smolexport_on_mlx.open(checkpoint, dtype="f32") as session:
        expected = session.append(IDS)
        session.rewind(10)
        layer, raised = type(session._model.layers[0]), [KeyboardInterrupt(), RuntimeError("no\nmemory")]
        original = layer.__call__

        def fail(self: Any, *args: Any, **options: Any) -> Any:
            if self is session._model.layers[2]:
                raise raised.pop(0)
            return original(self, *args, **options)

        monkeypatch.setattr(layer, "__call__", fail)
        with pytest.raises(KeyboardInterrupt):
            session.append(IDS[10:])
        with pytest.raises(SessionError, match=r"MLX failed: RuntimeError: no memory$"):
            session.append(IDS[10:])
        monkeypatch.undo()
        assert session.length == 10
        np.testing.assert_allclose(session.append(IDS[10:]), expected[10:], rtol=0, atol=1e-4)


def test_sessions_move_between_threads(checkpoint: Path) -> None:
    expected, got = play(checkpoint, dtype="f32"), []
    with smolexport_on_mlx.open(checkpoint, dtype="f32") as session:
        for part in (IDS[:20], IDS[20:]):
            thread = threading.Thread(target=lambda part=part: got.append(session.append(part)))
            thread.start()
            thread.join()
        session.rewind(24)
        got.append(session.append(IDS[24:]))
    np.testing.assert_allclose(np.concatenate(got[:2]), expected, rtol=0, atol=1e-4)
    np.testing.assert_allclose(got[2], expected[24:], rtol=0, atol=1e-4)


def test_greedy_equals_mlx_lm(checkpoint: Path) -> None:
    generate_step = mlx_for_tests.mlx_lm("generate").generate_step
    model, _ = mlx_lm.utils.load_model(checkpoint)
    model.set_dtype(mx.float32)
    theirs = [int(token) for token, _ in generate_step(mx.array(IDS), model, max_tokens=16)]
    with smolexport_on_mlx.open(checkpoint, dtype="f32") as session:
        ours = generate(session, IDS, max_tokens=16, stop_tokens=[], with_text=False)
    assert list(ours.tokens) == theirs


@ON_CPU
def test_needs_neither_compiler_nor_temporary_files_nor_file_limits(checkpoint: Path) -> None:
    # A g++ that is there is not called either: nothing is written, and nothing loaded from where others may write.
    said = python(f"""
import os, resource
from pathlib import Path
os.environ["TMPDIR"] = "/nonexistent"
resource.setrlimit(resource.RLIMIT_NOFILE, (512, 1024))
import smolexport_on_mlx
with smolexport_on_mlx.open(Path({str(checkpoint)!r})) as session:
    print(session.append([1, 2, 3]).shape, resource.getrlimit(resource.RLIMIT_NOFILE))
""")
    assert said == "(3, 320) (512, 1024)\n"


@pytest.mark.parametrize("options", [{"dtype": "int8"}, {"threads": 0}])
def test_options_out_of_range(checkpoint: Path, options: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(options))):
        smolexport_on_mlx.open(checkpoint, **options)
