"""An export that is stopped or raced: nothing under the final name but a whole file, no hidden remains."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from smolexport import plugins
from smolexport.conversion.pipeline import export
from smolexport.testing.checkpoints import write_checkpoint, write_tokenizer
from tests.cli.commands import START, TERMINAL, environment, tiny_checkpoint


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
        if any(p.stat().st_blocks * 512 > 100_000 for p in folder.glob(".*.partial")):
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


def test_ctrl_c_stays_ignored_where_it_was(middling: Path, tmp_path: Path) -> None:
    """As in a background job of a shell: whoever started it did not want Ctrl-C to reach it."""
    code = START[-1].replace("default_int_handler", "SIG_IGN")
    argv = [*START[:-1], code, "gguf", str(middling), "-q", "iq4_nl", "--threads", "1", "-o", str(tmp_path / "x.gguf")]
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment())
    wait_until_it_writes(process, tmp_path)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert [p.name for p in tmp_path.iterdir()] == ["x.gguf"]


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


def assert_interrupted(process: subprocess.Popen[str]) -> None:
    """Exit code 130 and one line on stderr that says so, nothing else."""
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, (out, err)
    assert (out, err) == ("", "smolexport: interrupted; nothing was left half-written\n")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopped_while_the_tokenizer_loads(number: signal.Signals, middling: Path, tmp_path: Path) -> None:
    """The signal comes while the library reads the file, which takes too short to be met from outside."""
    code = f"""
{TERMINAL}
import os, tokenizers
from smolexport.cli import main
class Slow:
    def from_file(path):
        os.kill(os.getpid(), {int(number)})
        return real(path)
real, tokenizers.Tokenizer = tokenizers.Tokenizer.from_file, Slow
main()
"""
    argv = [sys.executable, "-c", code, "gguf", str(middling), "-o", str(tmp_path / "x.gguf")]
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment())
    assert_interrupted(process)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc to see how far the process is")
@pytest.mark.skipif(
    any(plugins.missing(name) for name in ("torch", "llamacpp")), reason="torch or llama.cpp is not installed"
)
@pytest.mark.parametrize("sign", ["libtorch_cpu", "model.safetensors", "x.gguf"])
def test_stopped_while_comparing(sign: str, tmp_path: Path) -> None:
    """While torch is imported, while the reference loads or computes, and while the exported file does."""
    source = tiny_checkpoint(tmp_path)
    export("gguf", source, tmp_path / "x.gguf", quant="q8_0")
    (tmp_path / "text").write_text("the quick brown fox jumps over the lazy dog " * 2000, encoding="utf-8")
    options = ("--text", str(tmp_path / "text"), "--window", "64", "--threads", "1")
    argv = [*START, "compare", str(source), str(tmp_path / "x.gguf"), *options]
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment())
    wait_until_it_maps(process, sign)
    process.send_signal(signal.SIGINT)
    assert_interrupted(process)


def wait_until_it_maps(process: subprocess.Popen[str], name: str) -> None:
    """Until the file `name` is part of the process's memory."""
    end = time.monotonic() + 240  # on a busy machine the reference alone takes most of two minutes
    while time.monotonic() < end and process.poll() is None:
        if name in Path(f"/proc/{process.pid}/maps").read_text(encoding="utf-8"):
            return
        time.sleep(0.002)
    process.kill()
    pytest.fail(f"the comparison never mapped {name}: {process.communicate()}")
