"""The benchmarks run: each says what it does, and one measures a small shape for real."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
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


BUSY = "import time\nwhile time.process_time() < 1: pass"
PARENT = (
    f"import subprocess, sys; subprocess.run([sys.executable, '-c', {BUSY!r}], check=True); import time; time.sleep(1)"
)


def test_what_a_child_starts_is_in_its_figures() -> None:
    from tests.benchmarks.auto_round import measured

    found = measured([sys.executable, "-c", PARENT])
    assert 1 <= found["cpu"] < 2.5  # once, though it is seen alive and then in its parent's times
    assert found["wall"] >= 2
    with pytest.raises(SystemExit, match="no such thing"):
        measured([sys.executable, "-c", "raise SystemExit('no such thing')"])


def test_auto_rounds_file_has_as_many_bits_and_is_judged_like_ours(demo: Path, tmp_path: Path) -> None:
    python = os.environ.get("SMOLEXPORT_AUTO_ROUND_PYTHON")
    if not python:
        pytest.skip(
            "SMOLEXPORT_AUTO_ROUND_PYTHON names no Python that has auto-round; see tests/benchmarks/auto_round.py"
        )
    pytest.importorskip("torch")
    import smolexport
    from smolexport.demo import demo_text
    from tests.benchmarks import auto_round

    windows = auto_round.windows_of(demo, demo_text(), 128)
    tokens = tmp_path / "tokens.npy"
    np.save(tokens, np.array([w.tokens for w in windows[8:24]], np.int32))
    path, figures = auto_round.theirs(Path(python), demo, tmp_path / "out", tokens, "gguf:q4_0", {"iters": 0}, 1)
    ours = smolexport.export("gguf", demo, tmp_path / "ours.gguf", quant="int4").path
    assert auto_round.bits(path) == auto_round.bits(ours) == 4.5
    assert figures["cpu"] > 1
    klds = [auto_round.accuracy(demo, one, windows[:4], 1).kld.mean.value for one in (path, ours)]
    assert 0.001 < klds[0] < klds[1]
