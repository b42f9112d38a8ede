"""The torch runtime: conformance, and equality with a direct forward of transformers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, ClassVar

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors import safe_open

from smolexport.errors import CheckpointError, SessionError, TensorError, UsageError
from smolexport.model.arch import architectures, load_spec
from smolexport.run.generate import generate
from smolexport.run.session import Runtime
from smolexport.testing.checkpoints import random_tensors, write_checkpoint, write_safetensors, write_tokenizer
from smolexport.testing.runtimes import RuntimeTests
from tests.damage import join, split

torch = pytest.importorskip("torch", reason="the torch extra is not installed")
transformers = pytest.importorskip("transformers", reason="the torch extra is not installed")

import smolexport_on_torch  # noqa: E402

FAMILIES = architectures()
TORCH = {"bf16": torch.bfloat16, "f32": torch.float32}


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("torch")
    write_tokenizer(folder / "tokenizer")
    return write_checkpoint(folder / "llama", "llama", tokenizer=folder / "tokenizer")


class TestTorchF32(RuntimeTests):
    runtime: ClassVar[Runtime] = smolexport_on_torch
    options: ClassVar = {"threads": 1, "dtype": "f32"}
    tolerance = 1e-4

    @pytest.fixture
    def model_path(self, checkpoint: Path) -> Path:
        return checkpoint


class TestTorchBf16(RuntimeTests):
    """In bf16 a logit near 8 has steps of 1/16, and blocks of another size round elsewhere."""

    runtime: ClassVar[Runtime] = smolexport_on_torch
    options: ClassVar = {"threads": 1}
    tolerance = 0.25

    @pytest.fixture
    def model_path(self, checkpoint: Path) -> Path:
        return checkpoint


def ids(count: int = 24, vocab: int = 320) -> list[int]:
    return [int(i) for i in np.random.default_rng(7).integers(0, vocab, count)]


def direct(folder: Path, dtype: str) -> NDArray[np.float32]:
    """Logits of one forward without a cache, as anybody would write it."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=TORCH[dtype])
    with torch.no_grad():
        logits: NDArray[np.float32] = model(torch.tensor([ids()]), use_cache=False).logits[0].float().numpy()
    return logits


@pytest.mark.parametrize("dtype", ["bf16", "f32"])
@pytest.mark.parametrize("family", FAMILIES)
def test_equals_a_direct_forward(tmp_path: Path, family: str, dtype: str) -> None:
    folder = write_checkpoint(tmp_path / family, family)
    expected = direct(folder, dtype)
    with smolexport_on_torch.open(folder, threads=1, dtype=dtype) as session:
        got = session.append(ids())
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-4 if dtype == "f32" else 0.25)
    assert 2 < expected.std() < 5
    assert np.abs(got - expected).mean() < (1e-5 if dtype == "f32" else 0.02)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_tiny_checkpoints_are_worth_testing_with(tmp_path: Path, family: str) -> None:
    # Every tensor matters: without any one of them the logits are far away.
    folder = write_checkpoint(tmp_path / family, family, dtype="f32")
    spec = load_spec(json.loads((folder / "config.json").read_text()))
    tensors = dict(random_tensors(spec))
    with smolexport_on_torch.open(folder, threads=1, dtype="f32") as session:
        whole = session.append(ids())
    chances = np.exp(whole - whole.max(-1, keepdims=True))
    chances /= chances.sum(-1, keepdims=True)
    entropy = -(chances * np.log(chances + 1e-30)).sum(-1).mean()
    assert 0.5 < entropy < 0.7 * np.log(spec.vocab_size)
    for role in {t.role: t.stored_name for t in spec.tensors()}.values():
        changed = {**tensors, role: tensors[role][::-1].copy()}
        with smolexport_on_torch.open(folder, threads=1, dtype="f32", weights=changed.items()) as session:
            assert np.abs(session.append(ids()) - whole).max() > 0.1, role


def test_bf16_keeps_the_rotary_frequencies_in_f32(checkpoint: Path) -> None:
    with smolexport_on_torch.open(checkpoint, threads=1) as session:
        model = session._model
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
        assert model.model.rotary_emb.inv_freq.dtype == torch.float32
        exact = 10000.0 ** (-np.arange(0, 16, 2) / 16)
        np.testing.assert_allclose(model.model.rotary_emb.inv_freq.numpy(), exact, rtol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", ["bf16", "f32"])
def test_the_same_weights_given_are_the_same_model(tmp_path: Path, family: str, dtype: str) -> None:
    folder = write_checkpoint(tmp_path / "full", family, shards=3)
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(folder / "config.json", bare)
    weights: list[tuple[str, NDArray[Any]]] = []
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="numpy") as tensors:
            weights += [(name, tensors.get_tensor(name)) for name in tensors.keys()]  # noqa: SIM118
    assert weights[0][1].dtype == ml_dtypes.bfloat16
    with (
        smolexport_on_torch.open(folder, threads=1, dtype=dtype) as read,
        smolexport_on_torch.open(bare, threads=1, dtype=dtype, weights=iter(weights)) as given,
        smolexport_on_torch.open(
            bare, threads=1, dtype=dtype, weights=((n, a.astype(np.float32)) for n, a in weights)
        ) as widened,
    ):
        expected = read.append(ids())
        np.testing.assert_array_equal(given.append(ids()), expected)
        np.testing.assert_array_equal(widened.append(ids()), expected)


def test_given_weights_are_used_and_copied(checkpoint: Path) -> None:
    spec = load_spec(json.loads((checkpoint / "config.json").read_text()))
    other = dict(random_tensors(spec, seed=99))
    with smolexport_on_torch.open(checkpoint, threads=1, dtype="f32") as session:
        own = session.append(ids())
    with smolexport_on_torch.open(checkpoint, threads=1, dtype="f32", weights=other.items()) as session:
        first = session.append(ids())
        for array in other.values():
            array[:] = 0
        session.rewind(0)
        np.testing.assert_array_equal(session.append(ids()), first)
    assert np.abs(first - own).max() > 1


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model.norm.weight": None}, "model.norm.weight.*missing"),
        ({"model.layers.0.self_attn.q_proj.bias": np.zeros(64, np.float32)}, "q_proj.bias.*not part"),
        ({"model.norm.weight": np.zeros(63, np.float32)}, "model.norm.weight.*shape"),
    ],
)
@pytest.mark.parametrize("where", ["file", "given"])
def test_wrong_tensors_are_named(
    checkpoint: Path, tmp_path: Path, change: dict[str, NDArray[Any] | None], said: str, where: str
) -> None:
    spec = load_spec(json.loads((checkpoint / "config.json").read_text()))
    tensors = {n: a for n, a in {**dict(random_tensors(spec)), **change}.items() if a is not None}
    shutil.copy(checkpoint / "config.json", tmp_path)
    if where == "file":
        write_safetensors(tmp_path / "model.safetensors", tensors)
    weights = None if where == "file" else tensors.items()
    with pytest.raises(TensorError, match=said):
        smolexport_on_torch.open(tmp_path, weights=weights)


def test_given_integers_are_refused(checkpoint: Path) -> None:
    with pytest.raises(TensorError, match=r"model.norm.weight.*int32"):
        smolexport_on_torch.open(checkpoint, weights=[("model.norm.weight", np.zeros(64, np.int32))])


def test_loading_is_silent(checkpoint: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with smolexport_on_torch.open(checkpoint, threads=1) as session:
        session.append(ids())
    captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("", "")


def break_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def quantized(folder: Path) -> None:
    break_config(folder, quantization_config={"quant_method": "bitsandbytes"})
    header, data = split(folder / "model.safetensors")
    header["model.layers.0.mlp.up_proj.weight"]["dtype"] = "U8"
    header["model.layers.0.mlp.up_proj.weight"]["shape"] = [2, *header["model.layers.0.mlp.up_proj.weight"]["shape"]]
    join(folder / "model.safetensors", header, data)


@pytest.mark.parametrize(
    ("damage", "error", "said"),
    [
        (lambda f: (f / "config.json").unlink(), CheckpointError, "config.json"),
        (lambda f: (f / "config.json").write_text("{"), CheckpointError, "not valid JSON"),
        (lambda f: (f / "config.json").write_text("[]"), CheckpointError, "object"),
        (lambda f: (f / "model.safetensors").unlink(), CheckpointError, "safetensors"),
        (lambda f: (f / "model.safetensors").write_bytes(b"\xff" * 64), CheckpointError, "is damaged"),
        (lambda f: break_config(f, model_type="gpt9"), CheckpointError, "gpt9"),
        (quantized, TensorError, r"quantized already \(quantization_config: 'bitsandbytes'\)"),
    ],
)
def test_a_damaged_folder_is_one_clear_line(
    checkpoint: Path, tmp_path: Path, damage: Any, error: type[Exception], said: str
) -> None:
    folder = Path(shutil.copytree(checkpoint, tmp_path / "broken"))
    damage(folder)
    with pytest.raises(error, match=said) as caught:
        smolexport_on_torch.open(folder)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)


def test_pickled_weights_are_never_opened(checkpoint: Path, tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Any, tuple[str]]:
            return Path.touch, (tmp_path / "sprung",)  # type: ignore[return-value]

    folder = tmp_path / "pickled"
    folder.mkdir()
    shutil.copy(checkpoint / "config.json", folder)
    torch.save({"model.norm.weight": Trap()}, folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="safetensors"):
        smolexport_on_torch.open(folder)
    assert not (tmp_path / "sprung").exists()


def test_code_from_the_checkpoint_is_never_run(checkpoint: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(checkpoint, tmp_path / "remote"))
    (folder / "modeling_evil.py").write_text(f"open({str(tmp_path / 'sprung')!r}, 'w')\nclass Evil: ...\n")
    break_config(folder, model_type="evil", auto_map={"AutoModelForCausalLM": "modeling_evil.Evil"})
    with pytest.raises(CheckpointError):
        smolexport_on_torch.open(folder)
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("options", [{"dtype": "f16"}, {"threads": 0}])
def test_options_out_of_range(checkpoint: Path, options: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(options))):
        smolexport_on_torch.open(checkpoint, **options)


def test_an_interrupted_append_leaves_the_session_whole(checkpoint: Path) -> None:
    with smolexport_on_torch.open(checkpoint, threads=1, dtype="f32") as session:
        expected = session.append(ids())
        session.rewind(10)

        def fail(*_: object) -> None:
            raise raised.pop(0)

        raised: list[BaseException] = [KeyboardInterrupt(), RuntimeError("no\nmemory")]
        hook = session._model.model.layers[2].register_forward_pre_hook(fail)
        with pytest.raises(KeyboardInterrupt):
            session.append(ids()[10:])
        with pytest.raises(SessionError, match=r"transformers failed: RuntimeError: no memory$"):
            session.append(ids()[10:])
        hook.remove()
        assert session.length == 10
        np.testing.assert_allclose(session.append(ids()[10:]), expected[10:], rtol=0, atol=1e-4)


def test_threads_are_set_for_the_session_that_computes(checkpoint: Path) -> None:
    with (
        smolexport_on_torch.open(checkpoint, threads=1) as one,
        smolexport_on_torch.open(checkpoint, threads=2) as two,
    ):
        two.append([1])
        assert torch.get_num_threads() == 2
        one.append([1])
        assert torch.get_num_threads() == 1


def test_greedy_equals_transformers_generate(checkpoint: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    prompt = ids(8)
    with torch.no_grad():
        theirs = model.generate(torch.tensor([prompt]), max_new_tokens=16, do_sample=False, eos_token_id=None)
    with smolexport_on_torch.open(checkpoint, threads=1, dtype="f32") as session:
        ours = generate(session, prompt, max_tokens=16, stop_tokens=[], with_text=False)
    assert list(ours.tokens) == theirs[0, 8:].tolist()


def test_a_trained_model_tells_a_story(shared: Path) -> None:
    folder = shared / "stories260K" / "hf_bf16"
    with smolexport_on_torch.open(folder, threads=1, dtype="f32") as session:
        story = generate(session, "Once upon a time", max_tokens=40)
        assert story.text.startswith(", there was a little girl named")
        session.rewind(0)
        # The text itself again: the model finds its own words likely, so the codec brought back the same tokens.
        tokens = session.codec.encode("Once upon a time" + story.text)
        logits = session.append(tokens)
        assert np.mean(logits[:-1].argmax(-1) == np.asarray(tokens[1:])) > 0.8
