"""An export that is stopped or raced: nothing under the final name but a whole file, no hidden remains."""

from __future__ import annotations

import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from smolexport.testing.checkpoints import write_checkpoint, write_tokenizer
from tests.cli.commands import START, environment


@pytest.fixture(scope="module")
def middling(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 20 million weights: some seconds of work in the slowest scheme."""
    folder = tmp_path_factory.mktemp("middling")
    wide: dict[str, Any] = {
        "hidden_size": 512,
        "intermediate_size": 2048,
        "num_hidden_layers": 5,
        "num_attention_heads": 8,
    }
    return write_checkpoint(folder / "model", "llama", tokenizer=write_tokenizer(folder / "tokens"), **wide)


def start(source: Path, target: Path, *options: str) -> subprocess.Popen[str]:
    argv = [*START, "gguf", str(source), "-q", "iq4_nl", "--threads", "1", "-o", str(target), *options]
    return subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment())


def wait_until_it_writes(process: subprocess.Popen[str], folder: Path) -> None:
    """Until the hidden file holds some weights."""
    end = time.monotonic() + 60
    while time.monotonic() < end and process.poll() is None:
        if any(p.stat().st_size > 100_000 for p in folder.glob(".*.partial")):
            return
        time.sleep(0.01)
    pytest.fail(f"the export never began to write: {process.communicate()}")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopped_while_writing(number: signal.Signals, middling: Path, tmp_path: Path) -> None:
    process = start(middling, tmp_path / "x.gguf")
    wait_until_it_writes(process, tmp_path)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert out == ""
    assert err.splitlines()[-1] == "smolexport: interrupted; nothing was left half-written"
    assert "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


def test_killed_while_writing(middling: Path, tmp_path: Path) -> None:
    """Nothing can clean up after SIGKILL, but the final name stays free, and the next export succeeds."""
    process = start(middling, tmp_path / "x.gguf")
    wait_until_it_writes(process, tmp_path)
    process.kill()
    process.communicate(timeout=60)
    assert not (tmp_path / "x.gguf").exists()
    again = start(middling, tmp_path / "x.gguf")
    _, err = again.communicate(timeout=120)
    assert again.returncode == 0, err
    assert (tmp_path / "x.gguf").read_bytes()[:4] == b"GGUF"


def test_two_exports_to_one_name(middling: Path, tmp_path: Path) -> None:
    """Both see a free name, both write; the second to finish is refused and the first one's file stays."""
    processes = [start(middling, tmp_path / "x.gguf", "--name", name) for name in ("one", "two")]
    results = [process.communicate(timeout=120) for process in processes]
    codes = sorted(process.returncode for process in processes)
    assert codes == [0, 2], results
    loser = next(err for process, (_, err) in zip(processes, results, strict=True) if process.returncode == 2)
    assert "x.gguf: appeared while it was being written" in loser or "exists already" in loser
    winner = next(p for p in ("one", "two") if processes[("one", "two").index(p)].returncode == 0)
    assert list(tmp_path.iterdir()) == [tmp_path / "x.gguf"]
    from smolexport import inspect

    assert inspect(tmp_path / "x.gguf").name == winner
