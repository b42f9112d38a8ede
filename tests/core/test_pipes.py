"""Pipes and devices in the place of models: refused in one line; reading one would wait for ever."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

import smolexport
from smolexport import plugins
from smolexport.errors import SmolexportError
from tests.cli.commands import ROOT, assert_refused, call, tiny_checkpoint
from tests.clocks import at_most

COMMANDS: dict[str, Callable[[Path], tuple[str | Path, ...]]] = {
    "inspect": lambda path: ("inspect", path),
    "inspect --json": lambda path: ("inspect", "--json", path),
    "generate": lambda path: ("generate", path, "Once"),
    "compare": lambda path: ("compare", "demo", path, "--no-cache"),
    "bench": lambda path: ("bench", path),
}
WEIGHTS = ("model.safetensors", "onnx/model_q4.onnx")
PIPES = {
    "gguf": [""],
    "mlx": ["model.safetensors", "config.json", "tokenizer.json"],
    "onnx": ["onnx/model_q4.onnx", "config.json", "genai_config.json", "tokenizer.json"],
}


def make_pipe(path: Path) -> Path:
    path.unlink(missing_ok=True)
    os.mkfifo(path)
    return path


@pytest.mark.parametrize("command", COMMANDS)
def test_a_pipe_instead_of_a_file(command: str, tmp_path: Path) -> None:
    pipe = make_pipe(tmp_path / "x.gguf")
    with at_most(60):
        assert_refused(call(*COMMANDS[command](pipe)), f"{pipe}: is a pipe or device")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(("target", "name"), [(t, n) for t, names in PIPES.items() for n in names if n])
def test_a_pipe_inside_a_folder(command: str, target: str, name: str, checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    assert call(target, checkpoint, "-q", "int4", "-o", folder).code == 0
    make_pipe(folder / name)
    with at_most(60):
        outcome = call(*COMMANDS[command](folder))
    if outcome.code or name in WEIGHTS:
        assert_refused(outcome)
    elif command.startswith("inspect"):  # tells of what is there, and notes what others will not read
        assert name == "tokenizer.json" or f"{name}: is not a regular file" in outcome.err
    else:
        assert (command, name) == ("bench", "tokenizer.json"), "ids are measured, no text is encoded"


@pytest.mark.parametrize(
    "name", sorted(p.name.removeprefix(plugins.ON) for p in (ROOT / "runtimes").glob("smolexport_on_*"))
)
def test_runtimes_that_are_handed_a_pipe(name: str, tmp_path: Path) -> None:
    if plugins.missing(name):
        pytest.skip("not installed")
    pipe = make_pipe(tmp_path / "x.gguf")
    with at_most(60), pytest.raises(SmolexportError):
        plugins.runtime(name).open(pipe)


def test_the_library_refuses_them_too(tmp_path: Path) -> None:
    pipe = make_pipe(tmp_path / "x")
    for use in (smolexport.inspect, smolexport.fingerprint, plugins.converter_for, plugins.runtime_for, plugins.locate):
        for path in (pipe, Path("/dev/zero")):
            with at_most(60), pytest.raises(SmolexportError, match="is a pipe or device"):
                use(path)
