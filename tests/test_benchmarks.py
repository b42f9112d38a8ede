"""The benchmarks run: each says what it does, and one measures a small shape for real."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent / "benchmarks"
COMMANDS = sorted(path.stem for path in FOLDER.glob("*.py") if "__main__" in path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", COMMANDS)
def test_help_says_how_it_is_called(name: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", f"tests.benchmarks.{name}", "--help"],
        cwd=FOLDER.parents[1], capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert f"python -m tests.benchmarks.{name}" in done.stdout


def test_gguf_equals_the_two_step_path_at_a_published_shape_for_less(demo: Path, tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")
    from tests.benchmarks import gguf_convert

    found = gguf_convert.measure("SmolLM2-135M", "q4_k_m", demo, tmp_path, repetitions=1)
    assert found["differing"] == []
    # the file in between, which only they have; time and memory shrink further with size, above a start of a second
    assert found["ratio"]["size"] < 0.4
    assert found["ratio"]["rss"] < 0.7
