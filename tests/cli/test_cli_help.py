"""The command line explains itself, and bad usage is one line with exit code 2."""

from __future__ import annotations

import re
from importlib.metadata import version
from typing import Any

import pytest

from smolexport.cli.app import build
from tests.cli.commands import assert_refused, call, run

COMMANDS = ("gguf", "mlx", "all", "calibrate", "compare", "sweep", "generate", "inspect", "list", "demo")


def parameters(command: str) -> list[Any]:
    return [p for p in build().commands[command].params if p.name != "help"]


def test_without_arguments_it_teaches() -> None:
    outcome = call()
    assert outcome.code == 0
    assert outcome.out.startswith("Usage: smolexport")
    for command in COMMANDS:
        assert re.search(rf"^  {command} +\w", outcome.out, re.MULTILINE), command
    assert outcome.err == ""
    assert call("--help").out == outcome.out


def test_version() -> None:
    assert call("--version").out == f"smolexport {version('smolexport')}\n"


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command(command: str) -> None:
    outcome = call(command, "--help")
    assert outcome.code == 0
    assert outcome.out.startswith(f"Usage: smolexport {command}")
    about = re.split(r"^(?:Positional arguments|Options):$", outcome.out, maxsplit=1, flags=re.MULTILINE)[0]
    assert len(about.splitlines()) >= 4, "says what it does, in more than a name"
    for parameter in (p for p in parameters(command) if not getattr(p, "hidden", False)):
        names = [n for n in parameter.opts if n.startswith("--")] or [parameter.name.upper()]
        assert re.search(rf"^  .*{names[0]}\b", outcome.out, re.MULTILINE), names[0]
        assert parameter.help, f"{command} {names[0]} has no help"
        assert parameter.help.rstrip().endswith("."), f"{command} {names[0]}: {parameter.help}"


@pytest.mark.parametrize("command", COMMANDS)
def test_json_everywhere(command: str) -> None:
    assert any("--json" in p.opts for p in parameters(command))


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["ggguf"], "No such command 'ggguf'"),
        (["gguf"], "Missing argument"),
        (["gguf", "x", "--bogus"], "No such option '--bogus'"),
        (["gguf", "x", "y"], "unexpected extra argument"),
        (["gguf", "x", "--threads", "0"], "'--threads'"),
        (["gguf", "x", "--threads", "many"], "'--threads'"),
        (["gguf", "x", "--quant"], "requires an argument"),
        (["gguf", "x", "--quant", ""], "'--quant' / '-q': is empty"),
        (["gguf", "x", "-o", ""], "'--out' / '-o': is empty"),
        (["mlx", "x", "-o", ""], "'--out' / '-o': is empty"),
        (["demo", "-o", ""], "'--out' / '-o': is empty"),
        (["gguf", ""], "the name of the checkpoint is empty"),
        (["mlx", ""], "the name of the checkpoint is empty"),
        (["all", ""], "the name of the checkpoint is empty"),
        (["generate", "", "Once"], "the name of the checkpoint is empty"),
        (["compare", "", "x.gguf"], "the name of the checkpoint is empty"),
        (["compare", "demo", ""], "is empty"),
        (["compare", "demo", "x.gguf", "--text", ""], "'--text': is empty"),
        (["inspect", ""], "is empty"),
        (["mlx", "x", "--set", "dtype=f16", "--set", "dtype=f32"], "--set dtype: is given twice, as f16 and as f32"),
        (["gguf", "x", "--quant", "q4"], "--quant q4: GGUF has no such scheme; did you mean 'q4_"),
        (["list", "onxx"], "no converter for the format 'onxx'; installed: gguf"),
        (["calibrate"], "Missing argument"),
        (["calibrate", "demo"], "Missing option '--out' / '-o'"),
        (["calibrate", "demo", "-o", ""], "'--out' / '-o': is empty"),
        (["calibrate", "demo", "-o", "x", "--text", ""], "'--text': is empty"),
        (["calibrate", "demo", "-o", "x", "--tokens", "3"], "'--tokens'"),
        (["calibrate", "demo", "-o", "x", "--seed", "-1"], "'--seed'"),
        (["calibrate", "", "-o", "x"], "the name of the checkpoint is empty"),
        (["calibrate", "demo", "-o", "no/such/x"], "no/such: no such folder; create it"),
        (["compare"], "Missing argument"),
        (["compare", "nothing"], "nothing: no such folder"),
        (["bench"], "Missing argument"),
        (["sweep", "x"], "Missing option '--out' / '-o'"),
        (["sweep", "-o", "out"], "Missing argument"),
        (["sweep", "", "-o", "out"], "is empty"),
        (["sweep", "x", "-o", "out", "--engine", "slurm"], "'slurm' is not one of 'local', 'ray'"),
        (["sweep", "x", "-o", "out", "--jobs", "0"], "'--jobs'"),
        (["sweep", "x", "-o", "out", "--window", "3"], "'--window'"),
        (["sweep", "demo", "-o", "out", "--formats", "onxx"], "no converter for the format 'onxx'; installed: gguf"),
        (["sweep", "demo", "-o", "out", "-q", "q4_k", "--formats", "mlx"], "--quant q4_k: MLX has no such scheme"),
        (["sweep", "demo", "-o", "out", "--text", "nothing.txt"], "nothing.txt: No such file"),
        (["sweep", "demo", "-o", "no/such/out", "--no-compare"], "no/such: no such folder; create it"),
        (["inspect"], "Missing argument"),
        (["inspect", "nothing.gguf"], "nothing.gguf: no such file"),
        (["generate", "nothing.gguf", "Once"], "nothing.gguf: no such file"),
        (["inspect", "nothing-mlx"], "nothing-mlx: no such folder"),
        (["generate", "nothing-mlx", "Once"], "nothing-mlx: no such folder"),
        (["generate", "x"], "Missing argument"),
        (["compare", "nothing", "nothing.gguf"], "nothing: no such folder"),
        (["compare", "x", "y", "--min-top1", "2"], "'--min-top1'"),
        (["compare", "x", "y", "--max-kld", "-1"], "'--max-kld'"),
        (["compare", "x", "y", "--max-kld", "nan"], "'--max-kld'"),
        (["compare", "x", "y", "--min-top1", "nan"], "'--min-top1'"),
        (["compare", "x", "y", "--max-ppl-ratio", "nan"], "'--max-ppl-ratio'"),
    ],
)
def test_bad_usage(argv: list[str], said: str) -> None:
    assert_refused(call(*argv), said)


def test_the_installed_entry_point() -> None:
    outcome = run("--version")
    assert (outcome.code, outcome.out, outcome.err) == (0, f"smolexport {version('smolexport')}\n", "")
    assert_refused(run("nonsense"), "No such command 'nonsense'")
