"""`generate`, `compare` and `demo` on real runtimes; the numbers themselves are tested in tests/parity."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from smolexport import plugins
from smolexport.api import generate
from smolexport.cli import demo as command
from smolexport.cli.options import parse_settings
from smolexport.errors import FileFormatError, UsageError
from tests.cli.commands import assert_refused, call, run

needs_runtimes = pytest.mark.skipif(
    any(plugins.missing(name) for name in ("torch", "llamacpp", "mlx", "onnxruntime")),
    reason="a runtime is not installed",
)
TEXT = "the quick brown fox jumps over the lazy dog and runs away from it " * 40
FEW = (
    "--window",
    "64",
    "--max-windows",
    "2",
    "--greedy-tokens",
    "8",
    "--repetitions",
    "1",
    "--threads",
    "1",
    "--no-chat",
)


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("words") / "words.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


@needs_runtimes
def test_generate_streams_text_on_stdout(exported: Path) -> None:
    outcome = run("generate", exported, "Once upon", "-n", "12", "--threads", "1")
    assert outcome.code == 0, outcome.err
    assert outcome.out.endswith("\n")
    assert outcome.err.startswith("llama.cpp: ")
    assert len(outcome.err.splitlines()) == 1
    assert "tokens/s" in outcome.err
    again = call("generate", exported, "-", "-n", "12", "--threads", "1", stdin="Once upon")
    assert again.out == outcome.out


@needs_runtimes
def test_generate_json_and_sampling(exported: Path, tiny: Path) -> None:
    for model in (exported, tiny):
        options = ("-n", "6", "-t", "0.8", "--top-k", "20", "--seed", "5", "--threads", "1", "--json")
        one, two = (json.loads(call("generate", model, "Once", *options).out) for _ in range(2))
        assert one["text"] == two["text"]
        assert one["tokens"] == two["tokens"]
        assert 1 <= len(one["tokens"]) <= 6
        assert one["stop_reason"] in ("max_tokens", "stop_token")
        assert set(one["speed"]) == {"ttft_ms", "prefill_tok_s", "decode_tok_s"}


@needs_runtimes
@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("-t", "-1"), "temperature"),
        (("--top-p", "2"), "top_p"),
        (("--repetition-penalty", "0"), "repetition_penalty"),
        (("-n", "-1"), "max_tokens"),
        (("--context", "100000"), "context = 100000"),
        (("--context", "4"), "exceed"),
    ],
)
def test_generate_refuses_nonsense(options: tuple[str, ...], said: str, exported: Path) -> None:
    assert_refused(call("generate", exported, "Once upon a time there was", *options, "--threads", "1"), said)


def test_generate_on_what_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"nonsense")
    assert_refused(call("generate", tmp_path / "x.gguf", "Once"), tmp_path / "x.gguf", "none of the known formats")


@pytest.mark.parametrize("name", ["nope.gguf", "models/nope.gguf", "a/b/nope.gguf", "nope.bin"])
def test_generate_on_a_missing_file(name: str) -> None:
    outcome = call("generate", name, "Once")
    assert_refused(outcome)
    assert outcome.err == f"smolexport: {name}: no such file\n"
    with pytest.raises(FileFormatError, match="no such file"):
        generate(name, "Once")


@pytest.mark.parametrize("name", ["nope", "x" * 300 + ".gguf"])
def test_generate_on_what_could_be_a_folder(name: str) -> None:
    assert_refused(call("generate", name, "Once"), name, "")
    assert "no such file\n" not in call("generate", name, "Once").err


@needs_runtimes
def test_the_prompt_on_stdin_is_utf8(exported: Path) -> None:
    options = ("-n", "4", "--threads", "1", "--json")
    outcome = call("generate", exported, "-", *options, stdin=b"caf\xe9")
    assert_refused(outcome, "stdin: is not UTF-8 text (unexpected end of data at byte 3)")
    outcome = call("generate", exported, "-", *options, stdin="café\r\nau lait\r".encode())
    assert json.loads(outcome.out)["prompt"] == "café\nau lait\n"


SETTINGS = [
    ("flash_attention=on", "--set flash_attention=on: this option of llama.cpp takes true or false"),
    ("flash_attention=1", "takes true or false"),
    ("batch=abc", "--set batch=abc: this option of llama.cpp takes a whole number"),
    ("batch=--5", "--set batch=--5: this option of llama.cpp takes a whole number"),
    ("batch=5.5", "takes a whole number"),
    ("batch=²", "takes a whole number"),
    ("batch=" + "9" * 5000, "takes a whole number"),
    ("batch=-5", "batch = -5 must be at least 1"),
    ("gpu_layers=x", "--set gpu_layers=x: this option of llama.cpp takes a whole number"),
    ("gpu_layers=TRUE", "--set gpu_layers=true: this option of llama.cpp takes a whole number"),
    ("gpu_layers=4294967296", "gpu_layers = 4294967296"),
    ("kv_type=8", "--set kv_type=8: this option of llama.cpp takes text"),
    ("path=x", "llama.cpp has no such option; it has kv_type, flash_attention, batch, gpu_layers"),
    ("batch", "must have the form KEY=VALUE"),
]


def test_a_setting_twice() -> None:
    assert parse_settings(["a=1", "b=x", "a=1"]) == {"a": 1, "b": "x"}
    with pytest.raises(UsageError, match=r"^--set a: is given twice, as 1 and as 2$"):
        parse_settings(["a=1", "b=x", "a=2"])


@needs_runtimes
@pytest.mark.parametrize(("setting", "said"), SETTINGS)
def test_settings_of_the_wrong_kind(setting: str, said: str, exported: Path) -> None:
    assert_refused(call("generate", exported, "Once", "--threads", "1", "--set", setting), said)


@needs_runtimes
def test_settings_that_only_python_can_give(tiny: Path) -> None:
    outcome = call("generate", tiny, "Once", "--set", "weights=x")
    assert_refused(outcome, "--set weights: torch has no such option; it has dtype")


@needs_runtimes
def test_a_setting_that_no_runtime_has(tiny: Path, exported: Path, folder: Path) -> None:
    two = call("compare", tiny, exported, folder, "--set", "nothere=1")
    each = "llama.cpp has kv_type, flash_attention, batch, gpu_layers; mlx has dtype"
    assert_refused(two, f"--set nothere: no runtime has such an option; {each}")
    one = call("compare", tiny, folder, folder, "--set", "nothere=1")
    assert_refused(one, "--set nothere: no runtime has such an option; mlx has dtype")


@needs_runtimes
def test_a_checkpoint_among_the_files(tiny: Path, exported: Path) -> None:
    assert_refused(call("compare", tiny, exported, tiny), f"{tiny}: is a checkpoint, not an exported file; export it")


@needs_runtimes
@pytest.mark.parametrize("setting", ["flash_attention=False", "batch=7", "gpu_layers=0", "kv_type=f32"])
def test_settings_that_pass(setting: str, exported: Path) -> None:
    outcome = call("generate", exported, "Once", "-n", "2", "--threads", "1", "--set", setting)
    assert outcome.code == 0, outcome.err


@needs_runtimes
def test_compare_json_has_the_published_shape(tiny: Path, exported: Path, words: Path) -> None:
    outcome = call("compare", tiny, exported, "--text", words, "--json", "--max-kld", "1", *FEW)
    assert outcome.code == 0, outcome.err
    result = json.loads(outcome.out)
    assert set(result) >= {"reference", "candidates", "passed"}
    assert result["passed"] is True
    [row] = result["candidates"]
    assert set(row) >= {
        "path", "format", "scheme", "runtime", "bytes", "bits_per_weight", "kld", "top1_agreement", "perplexity",
        "perplexity_ratio", "greedy", "speed", "peak_rss_bytes",
    }  # fmt: skip
    assert set(row["kld"]) >= {"mean", "median", "p99", "max"}
    assert set(row["greedy"]) >= {"tokens", "first_divergence"}
    assert set(row["speed"]) >= {"ttft_ms", "prefill_tok_s", "decode_tok_s"}
    assert (row["path"], row["format"], row["scheme"]) == (str(exported), "gguf", "q8_0")
    assert row["bytes"] == exported.stat().st_size
    assert 0 < row["kld"]["mean"] < 0.05


@needs_runtimes
def test_compare_exits_with_1_when_a_threshold_is_missed(tiny: Path, words: Path, tmp_path: Path) -> None:
    rough = tmp_path / "rough.gguf"
    call("gguf", tiny, "-q", "q4_0", "-o", rough)
    limits = ("--max-kld", "0.0000001", "--min-top1", "0", "--greedy-tokens", "0", "--repetitions", "0")
    outcome = call("compare", tiny, rough, "--text", words, *FEW, *limits)
    assert outcome.code == 1
    assert "Traceback" not in outcome.err
    assert "MISSED: rough.gguf: " in outcome.out


@needs_runtimes
def test_compare_refuses_text_that_is_none(tiny: Path, exported: Path, tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "short").write_text("the")
    assert_refused(call("compare", tiny, exported, "--text", tmp_path / "binary"), "is not UTF-8 text")
    assert_refused(call("compare", tiny, exported, "--text", tmp_path / "nothing"), "No such file")
    assert_refused(call("compare", tiny, exported, "--text", tmp_path / "short", *FEW), "token")


@pytest.mark.parametrize("equal", [True, False])
def test_demo_without_a_runtime(equal: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing can be run; that the formats hold the same weights is shown, and checked, all the same."""
    monkeypatch.setattr(plugins, "missing", lambda name: f"needs {name}: pip install {name}")
    if not equal:
        honest = command._fingerprints

        def odd(files: list[Path]) -> dict[str, str]:
            return {name: "0" * 32 if name == "demo-int4-mlx" else mark for name, mark in honest(files).items()}

        monkeypatch.setattr(command, "_fingerprints", odd)
    outcome = call("demo", "-o", tmp_path / "out")
    assert outcome.code == (0 if equal else 1), outcome.err
    assert ("int4: the formats hold different weights" in outcome.err) is not equal
    assert "int8: the formats" not in outcome.err
    assert "pip install torch" in outcome.err
    marks = dict(reversed(line.split()) for line in outcome.out.splitlines()[1:])
    assert set(marks) == {path.name for path in (tmp_path / "out").iterdir()}
    assert (marks["demo-int4.gguf"] == marks["demo-int4-mlx"]) is equal
    facts = json.loads(call("demo", "--json", "-o", tmp_path / "out", "--force").out)
    assert facts["fingerprints"] == marks
    assert (facts["candidates"], facts["passed"]) == ([], None if equal else False)
    assert len(facts["missing"]) == 4  # torch, llama.cpp, MLX, ONNX Runtime


def test_path_of_the_demo(demo: Path) -> None:
    assert call("demo", "--path").out == f"{demo}\n"


@needs_runtimes
def test_demo_keeps_its_files(demo: Path, tmp_path: Path) -> None:
    """The main job in one command: every format, all close enough to bf16 for exit code 0, equal where promised."""
    outcome = call("demo", "-o", tmp_path, "--json")
    assert outcome.code == 0, outcome.err
    result = json.loads(outcome.out)
    assert result["passed"] is True
    assert [c["scheme"] for c in result["candidates"]] == ["int8"] * 3 + ["int4"] * 3 + ["q4_k_m"]
    names = [f"demo-{scheme}{end}" for scheme in ("int4", "int8") for end in ("-mlx", "-onnx", ".gguf")]
    assert sorted(p.name for p in tmp_path.iterdir()) == [*names, "demo-q4_k_m.gguf"]
    marks = result["fingerprints"]
    assert marks["demo-int4-mlx"] == marks["demo-int4-onnx"] == marks["demo-int4.gguf"]
    assert marks["demo-int8-mlx"] == marks["demo-int8-onnx"] == marks["demo-int8.gguf"]
    assert len(set(marks.values())) == 3
    kld = {Path(c["path"]).name: c["kld"]["mean"] for c in result["candidates"]}
    assert abs(kld["demo-int4-mlx"] / kld["demo-int4.gguf"] - 1) < 0.02
    assert abs(kld["demo-int4-onnx"] / kld["demo-int4.gguf"] - 1) < 0.05
