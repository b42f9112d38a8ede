"""ONNX Runtime GenAI: conformance, equality with plain ONNX Runtime, hostile configurations, how to ask for it.

The graph's own damages are `test_onnxruntime_damage.py`'s: both adapters check it with the same function.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import psutil
import pytest

import smolexport
from smolexport import plugins
from smolexport.errors import CheckpointError, FileFormatError, SessionError, SmolexportError, UnsupportedError
from smolexport.parity.candidates import exported
from smolexport.run.session import Runtime
from smolexport.testing.checkpoints import write_checkpoint, write_tokenizer
from smolexport.testing.runtimes import RuntimeTests
from tests.children import python
from tests.cli.commands import assert_refused, call
from tests.runtimes.onnx_edits import change_config, on_tensor

pytest.importorskip("onnxruntime_genai", reason="the onnx-genai extra is not installed")

import smolexport_on_onnxruntime
import smolexport_on_onnxruntime_genai as adapter
from smolexport_on_onnxruntime_genai import _session

IDS = [int(i) for i in np.random.default_rng(7).integers(0, 320, 48)]


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokenizer = write_tokenizer(tmp_path_factory.mktemp("genai") / "tokenizer")
    return write_checkpoint(tokenizer.parent / "smollm3", "smollm3", tokenizer=tokenizer)


@pytest.fixture(scope="session")
def several(checkpoint: Path) -> Path:
    out, options = checkpoint.parent / "several-onnx", {"accuracy_level": 0}  # activations stay floats
    return smolexport.export("onnx", checkpoint, out, quant="int4+f32+f16", options=options).path


@pytest.fixture(scope="session")
def last(checkpoint: Path) -> Path:
    out = checkpoint.parent / "last-onnx"
    return smolexport.export("onnx", checkpoint, out, quant="f32", options={"logits": "last"}).path


@pytest.fixture
def folder(several: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(several, tmp_path / "broken"))


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_session, "BLOCK", 7)


class GenaiTests(RuntimeTests):
    runtime: ClassVar[Runtime] = adapter
    options: ClassVar = {"threads": 1}
    tolerance = 1e-4

    @pytest.fixture
    def model_path(self, several: Path) -> Path:
        return several


@pytest.mark.usefixtures("small_blocks")
class TestInteger(GenaiTests):
    """Weights of 4 bits, in blocks smaller than an append."""


class TestFloat(GenaiTests):
    options: ClassVar = {"threads": 1, "graph": "f32"}


class TestHalf(GenaiTests):
    options: ClassVar = {"threads": 1, "graph": "f16"}
    tolerance = 0.1


class TestLastRowsAlone(GenaiTests):
    """Such a graph is asked token by token."""

    @pytest.fixture
    def model_path(self, last: Path) -> Path:
        return last


@pytest.mark.parametrize("graph", ["int4", "f32", "f16"])
def test_it_computes_what_plain_onnxruntime_computes(several: Path, graph: str) -> None:
    """The same graph on the same library: to the bit, and without a graph's name the same one is taken."""
    options: dict[str, Any] = {"threads": 1, "context": 64, "graph": None if graph == "int4" else graph}
    with smolexport_on_onnxruntime.open(several, **options) as plain, adapter.open(several, **options) as ours:
        np.testing.assert_array_equal(ours.append(IDS), plain.append(IDS))
        plain.rewind(20)
        ours.rewind(20)
        for token in IDS[:8]:
            np.testing.assert_array_equal(ours.append([token]), plain.append([token]))


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("no\nmemory")])
def test_an_interrupted_append_leaves_the_session_whole(
    several: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    monkeypatch.setattr(_session, "BLOCK", 8)
    with adapter.open(several, threads=1, graph="f32") as session:
        expected = session.append(IDS)
        session.rewind(10)
        generator = session._generator

        class Failing:
            """The generator, whose second block is computed and then lost."""

            calls = 0

            def append_tokens(self, ids: Any) -> None:
                generator.append_tokens(ids)
                self.calls += 1
                if self.calls == 2:
                    raise error

            def __getattr__(self, name: str) -> Any:
                return getattr(generator, name)

        session._generator = Failing()
        wanted = KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else SessionError
        with pytest.raises(wanted, match=None if wanted is KeyboardInterrupt else "no memory$"):
            session.append(IDS[::-1][:30])
        session._generator = generator
        assert session.length == 10
        np.testing.assert_allclose(session.append(IDS[10:]), expected[10:], rtol=0, atol=1e-4)


@pytest.mark.parametrize("spinning", [True, False])
def test_threads_are_honoured(several: Path, spinning: bool) -> None:
    process, counts = psutil.Process(), {}

    def settled() -> int:
        """Threads of this process, once those of what was closed have ended."""
        found = process.num_threads()
        for _ in range(50):
            time.sleep(0.1)
            last, found = found, process.num_threads()
            if last == found:
                break
        return found

    with adapter.open(several, threads=1, spinning=spinning):
        pass  # the library starts its own threads once
    for threads in (1, 3):
        before = settled()
        with adapter.open(several, threads=threads, spinning=spinning) as session:
            session.append(IDS)
            counts[threads] = process.num_threads() - before
    assert counts[3] - counts[1] == 2


Damage = Callable[[Path], object]


def in_config(*path: str | int, value: object) -> Damage:
    """Set the value at `path` of genai_config.json."""

    def damage(folder: Path) -> None:
        file = folder / "genai_config.json"
        config = json.loads(file.read_text())
        part = config
        for key in path[:-1]:
            part = part[key]
        part[path[-1]] = value
        file.write_text(json.dumps(config))

    return damage


DECODER = ("model", "decoder")
OPTIONS = (*DECODER, "session_options")
DAMAGES: list[tuple[Damage, type[SmolexportError], str]] = [
    (lambda f: (f / "genai_config.json").write_text("{"), CheckpointError, "JSON"),
    (lambda f: (f / "genai_config.json").write_text("{}"), FileFormatError, "model is None, not an object"),
    (in_config("model", value=[]), FileFormatError, r"model is \[\]"),
    (in_config("engine", value={}), UnsupportedError, "engine is not known here"),
    (in_config("model", "type", value="whisper"), FileFormatError, "type is 'whisper'"),
    (in_config("model", "vision", value={"filename": "v.onnx"}), UnsupportedError, r"model\.vision is not known"),
    (in_config("model", "vocab_size", value=321), FileFormatError, "vocab_size is 321, expected 320"),
    (in_config("model", "vocab_size", value=320.0), FileFormatError, r"vocab_size is 320\.0"),
    (in_config("model", "eos_token_id", value=["2"]), FileFormatError, "eos_token_id"),
    (in_config("model", "eos_token_id", value=[2] * 1000), FileFormatError, "eos_token_id"),
    (in_config(*DECODER, "num_hidden_layers", value=9), FileFormatError, "num_hidden_layers is 9"),
    (in_config(*DECODER, "head_size", value=2**40), FileFormatError, "head_size is 1099511627776"),
    (in_config(*DECODER, "num_key_value_heads", value=-1), FileFormatError, "num_key_value_heads is -1"),
    (in_config(*DECODER, "hidden_size", value="x"), FileFormatError, "hidden_size is 'x'"),
    (in_config(*DECODER, "pipeline", value=[{"x": {"filename": "/x"}}]), UnsupportedError, "pipeline is not known"),
    (in_config(*DECODER, "filename", value="../x.onnx"), FileFormatError, r"none of onnx/\*\.onnx"),
    (in_config(*DECODER, "inputs", "past_key_names", value="%s%s%n"), FileFormatError, "past_key_names is '%s%s%n'"),
    (in_config(*DECODER, "outputs", "logits", value="present.0.key"), FileFormatError, "logits is 'present.0.key'"),
    (in_config(*DECODER, "inputs", "rnn_prev_states", value="x"), UnsupportedError, "rnn_prev_states is not known"),
    (in_config(*DECODER, "inputs", "position_ids", value="x"), FileFormatError, "position_ids is 'x'"),
    (in_config(*OPTIONS, "custom_ops_library", value="/tmp/x.so"), UnsupportedError, "custom_ops_library is not known"),
    (in_config(*OPTIONS, "enable_profiling", value="/tmp/x"), UnsupportedError, "enable_profiling is not known"),
    (in_config(*OPTIONS, "provider_options", value=[{"cuda": {}}]), UnsupportedError, "provider_options"),
    (in_config(*OPTIONS, "log_id", value=3), FileFormatError, "log_id is 3"),
    (in_config("search", "num_beams", value=4), UnsupportedError, "num_beams is not known"),
    (in_config("search", "top_k", value="many"), FileFormatError, "top_k is 'many'"),
    (in_config("search", "top_p", value=float("nan")), FileFormatError, "top_p is nan"),
    (lambda f: change_config(f, vocab_size=319), FileFormatError, "vocab_size is 320, expected 319"),
    (on_tensor(lambda _, entries: setattr(entries["location"], "value", "/etc/hostname")), FileFormatError, "beside"),
    (lambda f: (f / "onnx" / "model_q4.onnx_data").unlink(), FileFormatError, "is missing"),
]


@pytest.mark.parametrize(("damage", "error", "said"), DAMAGES, ids=[str(i) for i in range(len(DAMAGES))])
def test_a_damaged_folder_is_one_clear_line(
    folder: Path, damage: Damage, error: type[SmolexportError], said: str, capfd: pytest.CaptureFixture[str]
) -> None:
    damage(folder)
    options = {"graph": "f32"} if "beside" in said else {}
    with pytest.raises(error, match=said) as caught:
        adapter.open(folder, **options)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("key", "name", "value"),
    [
        ("vocab_size", "vocab_size", 319),
        ("num_key_value_heads", "num_key_value_heads", 4),
        ("head_dim", "head_size", 32),
    ],
)
def test_both_configs_against_the_graph(
    folder: Path, key: str, name: str, value: int, capfd: pytest.CaptureFixture[str]
) -> None:
    """Sizes that agree with each other and not with the graph are found when it is opened."""
    change_config(folder, **{key: value})
    in_config(*(("model",) if name == "vocab_size" else DECODER), name, value=value)(folder)
    with pytest.raises(FileFormatError, match=r"onnx: ONNX Runtime GenAI cannot run it: ") as caught:
        adapter.open(folder)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600
    assert capfd.readouterr() == ("", "")


def test_graphs_with_any_byte_changed(folder: Path) -> None:
    """In a process of their own, which a crash would end: each runs or is refused in one line."""
    said = python(f"""
import random
from pathlib import Path
import smolexport_on_onnxruntime_genai as adapter
from smolexport.errors import SmolexportError
folder, dice = Path({str(folder)!r}), random.Random(5)
path = folder / "onnx" / "model.onnx"
whole = path.read_bytes()
for _ in range(60):
    changed = bytearray(whole)
    changed[dice.randrange(len(changed))] = dice.randrange(256)
    path.write_bytes(changed)
    try:
        with adapter.open(folder, threads=1, context=8, graph="f32") as session:
            session.append([1, 2, 3])
            print("played")
    except SmolexportError as error:
        print("several lines" if len(str(error).split("\\n")) > 1 else "refused")
""")
    assert sorted(set(said.split())) == ["played", "refused"]
    assert len(said.split()) == 60


def test_a_folder_without_its_config(folder: Path) -> None:
    (folder / "genai_config.json").unlink()
    with pytest.raises(CheckpointError, match=r"genai_config\.json: not found; ONNX Runtime GenAI cannot run"):
        adapter.open(folder, graph="f32")


def test_what_was_damaged_was_sound(folder: Path) -> None:
    with adapter.open(folder) as session:
        assert session.append([1, 2, 3]).shape == (3, 320)


def test_plain_onnxruntime_stays_the_default(several: Path) -> None:
    assert plugins.runtime_for(several).NAME == "onnxruntime"
    for name in ("onnxruntime-genai", "onnxruntime_genai", "ONNXRuntime-GenAI"):
        assert plugins.runtime_for(several, name) is adapter


def test_asking_for_it_by_name(checkpoint: Path, several: Path) -> None:
    options = ("--runtime", "onnxruntime-genai", "--threads", "1", "-n", "8")
    asked, default = call("generate", several, "Once", *options), call("generate", several, "Once", *options[2:])
    assert asked.code == default.code == 0
    assert asked.err.startswith("onnxruntime-genai: ")
    assert default.err.startswith("onnxruntime: ")
    assert asked.out == default.out
    both = [c.runtime.NAME for c in exported([several], runtimes=["onnxruntime", "onnxruntime-genai", "onnxruntime"])]
    assert both == ["onnxruntime", "onnxruntime-genai"]
    nothing = call("compare", checkpoint, several, "--runtime", "mlx")
    assert_refused(nothing, "--runtime mlx: no file has the format 'mlx' that it reads")
    wrong = call("generate", several, "Once", "--runtime", "llama.cpp")
    assert_refused(wrong, several, "llama.cpp does not run the format 'onnx'; run by: onnxruntime, onnxruntime-genai")
    assert_refused(call("generate", several, "Once", "--runtime", "onnx"), "no runtime 'onnx'; installed: llama.cpp")


def test_both_on_one_sheet(checkpoint: Path, several: Path) -> None:
    pytest.importorskip("torch", reason="the torch extra is not installed")
    amounts = ("--window", "32", "--max-windows", "2", "--greedy-tokens", "4", "--repetitions", "1", "--threads", "1")
    runtimes = ("--runtime", "onnxruntime", "--runtime", "onnxruntime-genai")
    outcome = call("compare", checkpoint, several, *runtimes, *amounts, "--json")
    assert outcome.code == 0, outcome.err
    plain, genai = json.loads(outcome.out)["candidates"]
    assert (plain["runtime"], genai["runtime"]) == ("onnxruntime", "onnxruntime-genai")
    assert plain["kld"] == genai["kld"]
    assert min(plain["peak_rss_bytes"], genai["peak_rss_bytes"]) > 1e6
