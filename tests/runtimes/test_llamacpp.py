"""The llama.cpp runtime: conformance, equality with torch in f32, its tokenizer, its errors."""

from __future__ import annotations

import gc
import json
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import psutil
import pytest

from smolexport.conversion.pipeline import export
from smolexport.errors import FileFormatError, SessionClosedError, SessionError, UsageError
from smolexport.model.arch import architectures
from smolexport.run.generate import generate
from smolexport.run.sampling import Sampling
from smolexport.run.session import Runtime
from smolexport.testing.checkpoints import write_checkpoint, write_tokenizer
from smolexport.testing.runtimes import RuntimeTests

pytest.importorskip("llama_cpp", reason="the llamacpp extra is not installed")

import smolexport_on_llamacpp

FAMILIES = architectures()
STRICT: Mapping[str, Any] = {"threads": 1, "kv_type": "f32", "flash_attention": False}
IDS = [int(i) for i in np.random.default_rng(7).integers(0, 320, 96)]


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a checkpoint and an f32 GGUF of every family."""
    folder = tmp_path_factory.mktemp("llamacpp")
    write_tokenizer(folder / "tokenizer")
    for family in FAMILIES:
        write_checkpoint(folder / family, family, tokenizer=folder / "tokenizer")
        export("gguf", folder / family, folder / f"{family}.gguf", quant="f32")
    return folder


class TestStrict(RuntimeTests):
    """Exact enough to tell structure from rounding."""

    runtime: ClassVar[Runtime] = smolexport_on_llamacpp
    options: ClassVar = STRICT
    tolerance = 1e-3

    @pytest.fixture
    def model_path(self, models: Path) -> Path:
        return models / "smollm3.gguf"


class TestDefaults(RuntimeTests):
    """f16 cache, flash attention as llama.cpp likes, and batches smaller than an append."""

    runtime: ClassVar[Runtime] = smolexport_on_llamacpp
    options: ClassVar = {"threads": 1, "batch": 7}
    tolerance = 0.15

    @pytest.fixture
    def model_path(self, models: Path) -> Path:
        return models / "qwen2.gguf"


LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    *((family, {}) for family in FAMILIES),
    *((family, {"rope_scaling": YARN}) for family in FAMILIES),
    ("smollm3", {"rope_scaling": YARN, "old_style": False}),
    ("llama", {"rope_scaling": LLAMA3}),
    ("llama", {"rope_scaling": {"type": "linear", "factor": 2.0}, "tie_word_embeddings": False}),
    ("llama", {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 1}),
]


@pytest.mark.parametrize(("family", "changes"), VARIANTS)
def test_equals_torch_in_f32(models: Path, tmp_path: Path, family: str, changes: dict[str, Any]) -> None:
    torch_runtime = pytest.importorskip("smolexport_on_torch")
    pytest.importorskip("transformers", reason="the torch extra is not installed")
    folder = write_checkpoint(tmp_path / family, family, tokenizer=models / "tokenizer", **changes)
    export("gguf", folder, tmp_path / "f32.gguf", quant="f32")
    with (
        torch_runtime.open(folder, threads=1, dtype="f32") as reference,
        smolexport_on_llamacpp.open(tmp_path / "f32.gguf", **STRICT) as session,
    ):
        expected, got = log_softmax(reference.append(IDS)), log_softmax(session.append(IDS))
    divergence = (np.exp(expected) * (expected - got)).sum(-1)
    assert divergence.mean() < 1e-8
    assert divergence.max() < 1e-7


def log_softmax(logits: Any) -> Any:
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


@pytest.mark.parametrize("batch", [1, 5, 32, 512])
@pytest.mark.parametrize("last_only", [False, True])
def test_batches_do_not_show(models: Path, batch: int, last_only: bool) -> None:
    with (
        smolexport_on_llamacpp.open(models / "llama.gguf", **STRICT) as whole,
        smolexport_on_llamacpp.open(models / "llama.gguf", **STRICT, batch=batch) as cut,
    ):
        expected = whole.append(IDS)
        got = cut.append(IDS, last_only=last_only)
        np.testing.assert_allclose(got, expected[-1:] if last_only else expected, rtol=0, atol=1e-3)


def test_tokenizer_equals_the_checkpoints(models: Path) -> None:
    from tokenizers import Tokenizer

    theirs = Tokenizer.from_file(str(models / "llama" / "tokenizer.json"))
    texts = [
        "",
        " ",
        "The cat sat on the mat, and that was it.",
        "a  4 1234567 3.14",
        "<|im_start|>user\nHi<|im_end|>\n",
        "naïve Ünïcode 中文 العربية 🙂👩‍👩‍👧\t\n\n  x",
        "nul\0inside",
        "word " * 500,
    ]
    with smolexport_on_llamacpp.open(models / "llama.gguf", threads=1) as session:
        for text in texts:
            assert session.codec.encode(text) == theirs.encode(text, add_special_tokens=False).ids, text
        assert {0, 2} <= session.codec.stop_tokens
        decoder = session.codec.decoder()
        assert decoder.push(1) == ""  # a control token has no text
        with pytest.raises(SessionError, match="outside the vocabulary"):
            decoder.push(320)
        with pytest.raises(UsageError, match="UTF-8"):
            session.codec.encode("\ud800")


def test_codec_after_close(models: Path) -> None:
    session = smolexport_on_llamacpp.open(models / "llama.gguf", threads=1)
    codec, decoder = session.codec, session.codec.decoder()
    session.close()
    with pytest.raises(SessionClosedError):
        codec.encode("x")
    with pytest.raises(SessionClosedError):
        decoder.push(5)


def test_codec_outlives_a_forgotten_session(models: Path) -> None:
    codec = smolexport_on_llamacpp.open(models / "llama.gguf", threads=1).codec
    gc.collect()
    assert codec.encode("the")


@pytest.mark.parametrize("how", ["close", "forget"])
def test_memory_is_given_back(models: Path, how: str) -> None:
    def once() -> None:
        session = smolexport_on_llamacpp.open(models / "smollm3.gguf", threads=1, context=512)
        session.append(IDS, last_only=True)
        if how == "close":
            session.close()

    for _ in range(3):
        once()
    before = psutil.Process().memory_info().rss
    for _ in range(20):
        once()
    # One session holds some 5 MB here: twenty leaks would be 100.
    assert psutil.Process().memory_info().rss - before < 20e6


def test_nothing_is_printed(models: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with smolexport_on_llamacpp.open(models / "llama.gguf", threads=1) as session:
        session.append(IDS)
        session.codec.encode("hello")
    with pytest.raises(FileFormatError):
        smolexport_on_llamacpp.open(models / "llama" / "model.safetensors")
    captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("", "")


def damaged(models: Path, folder: Path, how: str) -> Path:
    content = (models / "llama.gguf").read_bytes()
    path = folder / "damaged.gguf"
    match how:
        case "empty":
            path.write_bytes(b"")
        case "text":
            path.write_text("This is not a model.")
        case "header only":
            path.write_bytes(content[:24])
        case "cut in the metadata":
            path.write_bytes(content[:2000])
        case "cut in the weights":
            path.write_bytes(content[: len(content) // 2])
        case "unknown architecture":
            at = content.index(b"general.architecture") + len("general.architecture") + 4 + 8
            path.write_bytes(content[:at] + b"xlama" + content[at + 5 :])
        case "version":
            path.write_bytes(content[:4] + b"\xff\0\0\0" + content[8:])
        case "missing tensor":
            path.write_bytes(content.replace(b"output_norm.weight", b"output_nerm.weight"))
    return path


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("empty", "not a GGUF file"),
        ("text", "not a GGUF file.*This"),
        ("header only", "llama.cpp cannot load this file: (?!no reason)"),
        ("cut in the metadata", "llama.cpp cannot load this file: (?!no reason)"),
        ("cut in the weights", "not within the file bounds"),
        ("unknown architecture", "unknown model architecture: 'xlama'"),
        ("version", "version"),
        ("missing tensor", "output_norm.weight"),
    ],
)
def test_a_damaged_file_is_one_clear_line(models: Path, tmp_path: Path, how: str, said: str) -> None:
    path = damaged(models, tmp_path, how)
    with pytest.raises(FileFormatError, match=said) as caught:
        smolexport_on_llamacpp.open(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_assertion_of_llama_cpp_is_one_line(models: Path, tmp_path: Path) -> None:
    # Two tokens of one text: llama.cpp ends the process, so another one has to try it.
    tokens = json.loads((models / "llama" / "tokenizer.json").read_text())["model"]["vocab"]
    one, other = (t.encode() for t in sorted(tokens, key=tokens.__getitem__) if t in ("Ġthe", "Ġand"))
    content = (models / "llama.gguf").read_bytes()
    path = tmp_path / "double.gguf"
    path.write_bytes(content.replace(len(one).to_bytes(8, "little") + one, len(other).to_bytes(8, "little") + other, 1))
    code = f"import smolexport_on_llamacpp as r; from pathlib import Path; r.open(Path({str(path)!r}))"
    here = Path(__file__).parents[2]
    result = subprocess.run(
        [sys.executable, "-c", code],
        check=False,
        env={"PYTHONPATH": f"{here}:{here / 'runtimes'}"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 2
    assert result.stdout == ""
    assert len(result.stderr.splitlines()) == 1
    assert str(path) in result.stderr


@pytest.mark.parametrize("options", [{"kv_type": "q4_0"}, {"batch": 0}, {"threads": 0}, {"context": 513}])
def test_options_out_of_range(models: Path, options: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(options))):
        smolexport_on_llamacpp.open(models / "llama.gguf", **options)


def test_greedy_equals_torch(models: Path) -> None:
    torch_runtime = pytest.importorskip("smolexport_on_torch")
    pytest.importorskip("transformers", reason="the torch extra is not installed")
    with (
        torch_runtime.open(models / "llama", threads=1, dtype="f32") as reference,
        smolexport_on_llamacpp.open(models / "llama.gguf", **STRICT) as session,
    ):
        expected = generate(reference, "The cat", max_tokens=32, stop_tokens=[])
        got = generate(session, "The cat", max_tokens=32, stop_tokens=[])
        assert len(set(expected.tokens)) > 4
        assert (got.tokens, got.text) == (expected.tokens, expected.text)
        sampling = Sampling(temperature=0.9, top_k=40, top_p=0.95, min_p=0.01, repetition_penalty=1.1, seed=3)
        for s in (reference, session):
            s.rewind(0)
        drawn = [
            generate(s, "The cat", sampling=sampling, max_tokens=32, stop_tokens=[]).tokens
            for s in (reference, session)
        ]
        assert drawn[0] == drawn[1]
        assert drawn[0] != expected.tokens


def test_a_trained_model_tells_a_story(shared: Path, tmp_path: Path) -> None:
    # Characters with byte fallback instead of byte-level BPE, and a BOS that the file asks for.
    path = tmp_path / "stories.gguf"
    export("gguf", shared / "stories260K" / "hf_bf16", path, quant="f32")
    with smolexport_on_llamacpp.open(path, threads=1) as session:
        assert session.codec.encode("Once upon a time")[0] == 1
        story = generate(session, "Once upon a time", max_tokens=40)
        assert story.text.startswith(", there was a little girl named")


class Stopped(BaseException):
    """What the command line's signal handler raises."""


def stop(*_: object) -> None:
    raise Stopped


class InterruptedLevel:
    """Stands for the level of errors: the n-th line that llama.cpp logs meets a signal on its way."""

    def __init__(self, after: int) -> None:
        self.lines, self.after = 0, after

    def __eq__(self, other: object) -> bool:
        self.lines += 1
        if self.lines == self.after:
            signal.raise_signal(signal.SIGINT)
        return False

    __hash__ = None  # type: ignore[assignment]


@pytest.mark.parametrize("where", ["first", "last"])
def test_an_interruption_while_loading_is_not_lost(
    where: str, models: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The handler runs inside a callback from C, through which its exception cannot pass."""
    from smolexport_on_llamacpp import _library

    counting = InterruptedLevel(0)
    monkeypatch.setattr(_library, "ERROR", counting)
    session = smolexport_on_llamacpp.open(models / "llama.gguf", threads=1)
    after = 1 if where == "first" else counting.lines  # the last one comes from making the context
    session.close()
    monkeypatch.setattr(_library, "ERROR", InterruptedLevel(after))
    before, hook = signal.signal(signal.SIGINT, stop), sys.unraisablehook
    try:
        with pytest.raises(Stopped):
            smolexport_on_llamacpp.open(models / "llama.gguf", threads=1)
    finally:
        signal.signal(signal.SIGINT, before)
    assert sys.unraisablehook is hook
    assert capfd.readouterr().err == ""
    smolexport_on_llamacpp.open(models / "llama.gguf", threads=1).close()  # nothing is kept for the next one
