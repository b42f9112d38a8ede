"""`smolexport bench`, and `compare` without files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from smolexport import plugins
from smolexport.conversion.pipeline import export
from tests.cli.commands import run

SHORT = ("--prefill", "32", "--decode", "4", "--repetitions", "2", "--threads", "1")


@pytest.fixture(scope="module")
def files(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    pytest.importorskip("llama_cpp")
    pytest.importorskip("onnxruntime")
    folder = tmp_path_factory.mktemp("bench")
    return [export(kind, demo, folder / f"demo.{kind}", quant="int4").path for kind in ("gguf", "onnx")]


def test_files_and_a_checkpoint_are_measured_in_one_run(files: list[Path]) -> None:
    pytest.importorskip("torch")
    outcome = run("bench", *map(str, files), "demo", *SHORT, "--json")
    assert outcome.code == 0, outcome.err
    sheet = json.loads(outcome.out)
    assert [row["runtime"] for row in sheet["models"]] == ["torch", "llama.cpp", "onnxruntime"]
    for row in sheet["models"]:
        speed = row["speed"]
        assert (speed["prefill_tokens"], speed["decode_tokens"], speed["repetitions"]) == (32, 4, 2)
        assert min(speed[key] for key in ("ttft_ms", "prefill_tok_s", "decode_tok_s")) > 0
        assert 0 < row["bandwidth_share"] < 2
        assert row["peak_rss_bytes"] > row["bytes"]
    assert 1e8 < sheet["bandwidth_bytes_per_s"] < 1e13
    assert sheet["environment"]["threads"] == "1"


def test_the_table_names_every_file(files: list[Path]) -> None:
    outcome = run("bench", str(files[0]), *SHORT)
    assert outcome.code == 0, outcome.err
    assert "±" in outcome.out
    once = run("bench", str(files[0]), *SHORT[:-4], "--repetitions", "1")
    assert (once.code, "±" in once.out) == (0, False)  # one observation has no error
    assert "demo.gguf" in outcome.out
    assert "GB/s of memory" in outcome.out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("nowhere.gguf",), "nowhere.gguf"),
        (("demo", "--repetitions", "0"), "at least one repetition"),
        (("demo", "--decode", "0"), "decode tokens: 0 is too few"),
        (("demo", "--set", "dtype=f32"), "apply to exported files"),
        (("demo", "--runtime", "mlx"), "apply to exported files"),
    ],
)
def test_bad_requests_are_one_line(arguments: tuple[str, ...], said: str) -> None:
    outcome = run("bench", *arguments)
    assert outcome.code == 2
    assert said in outcome.err
    assert outcome.err.count("\n") == 1


def test_compare_without_files_makes_them(demo: Path) -> None:
    for library in ("torch", "llama_cpp", "mlx_lm", "onnxruntime"):
        pytest.importorskip(library)
    quick = ("--max-windows", "1", "--greedy-tokens", "0", "--repetitions", "0", "--no-chat", "--no-cache")
    outcome = run("compare", "demo", "-q", "int8,q4_k", *quick, "--json")
    assert outcome.code == 0, outcome.err
    rows = json.loads(outcome.out)["candidates"]
    players = {"gguf": ["llama.cpp"], "mlx": ["mlx"], "onnx": ["onnxruntime"]}
    if plugins.missing("onnxruntime_genai") is None:
        players["onnx"].append("onnxruntime-genai")
    expected = [(kind, "int8", player) for kind, names in players.items() for player in names]
    assert [(r["format"], r["scheme"], r["runtime"]) for r in rows] == [*expected, ("gguf", "q4_k_m", "llama.cpp")]
    assert len({row["fingerprint"] for row in rows}) == 2
    assert all(Path(row["path"]).name.startswith("demo-") for row in rows)


def test_each_formats_best_and_no_file_twice() -> None:
    """One command for the sheet: the portable schemes, and what each format does best; q4 is ONNX's int4 again."""
    for library in ("torch", "llama_cpp", "mlx_lm", "onnxruntime"):
        pytest.importorskip(library)
    quick = ("--max-windows", "1", "--greedy-tokens", "0", "--repetitions", "0", "--no-chat", "--no-cache")
    players = ("--runtime", "llama.cpp", "--runtime", "mlx", "--runtime", "onnxruntime")
    outcome = run("compare", "demo", "-q", "int4,best4,q4,q4_k_m", *players, *quick, "--no-attribution", "--json")
    assert outcome.code == 0, outcome.err
    rows = json.loads(outcome.out)["candidates"]
    made = sorted(f"{row['format']} {row['scheme']}" for row in rows)
    assert made == ["gguf int4", "gguf q4_k_m", "mlx int4", "mlx q4", "mlx q4_g32", "onnx int4", "onnx int4-asym"]
    kld = {(r["format"], r["scheme"]): r["kld"]["mean"] for r in rows}
    assert kld["gguf", "q4_k_m"] < kld["gguf", "int4"]
    assert kld["onnx", "int4-asym"] < kld["onnx", "int4"]
    assert kld["mlx", "q4_g32"] < kld["mlx", "q4"]
    assert "best4" in run("list", "mlx").out


def test_a_scheme_is_for_files_that_are_made(files: list[Path]) -> None:
    outcome = run("compare", "demo", str(files[0]), "-q", "int8")
    assert outcome.code == 2
    assert "without files" in outcome.err
    for quant, said in (("int5", "int5"), ("int4,", "a scheme is missing next to a comma")):
        outcome = run("compare", "demo", "-q", quant)
        assert outcome.code == 2
        assert said in outcome.err
        assert outcome.err.count("\n") == 1


def test_a_cache_that_cannot_be_made_is_told_and_costs_nothing_else(files: list[Path], tmp_path: Path) -> None:
    pytest.importorskip("torch")
    (tmp_path / "file").touch()
    quick = ("--max-windows", "1", "--greedy-tokens", "0", "--repetitions", "0", "--no-chat", "--no-attribution")
    outcome = run("compare", "demo", str(files[0]), *quick, env={"HF_ASSETS_CACHE": str(tmp_path / "file" / "x")})
    assert outcome.code == 0, outcome.err
    assert "note: the reference's logits are not kept for the next comparison: " in outcome.err
