"""MLX folders from strangers, targets that are taken, exports that are stopped: one clear line, and nothing lost."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import struct
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import smolexport
import smolexport_to_mlx
from smolexport.errors import FileFormatError, OutputError, SmolexportError, TensorError, UsageError
from smolexport.testing.checkpoints import write_checkpoint, write_tokenizer
from tests.cli.commands import LIMITED, START, assert_refused, call, environment, tiny_checkpoint
from tests.damage import poke

UP = "model.layers.0.mlp.up_proj"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def exported(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return smolexport.export("mlx", tiny, tmp_path_factory.mktemp("out") / "x", quant="q4_g32").path


@pytest.fixture
def folder(exported: Path, tmp_path: Path) -> Path:
    """A copy that may be damaged."""
    return Path(shutil.copytree(exported, tmp_path / "folder"))


def header_of(path: Path) -> tuple[dict[str, Any], bytes]:
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def rewrite(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    header, data = header_of(path)
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def configure(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "none of the known formats"),
    "no config": (lambda f: (f / "config.json").unlink(), "none of the known formats"),
    "config is no JSON": (lambda f: (f / "config.json").write_text("{"), "config.json: is not valid JSON"),
    "config is a list": (lambda f: (f / "config.json").write_text("[]"), "expected a JSON object"),
    "empty weights": (lambda f: (f / "model.safetensors").write_bytes(b""), "is a checkpoint, not an exported file"),
    "no quantization": (lambda f: configure(f, quantization=None), "mode 'affine' with None bits"),
    "bits that are text": (
        lambda f: configure(f, quantization={"bits": "4", "group_size": 32}), "mode 'affine' with '4' bits"),
    "seven bits": (lambda f: configure(f, quantization={"bits": 7, "group_size": 32}), "bits is 7"),
    "another group": (lambda f: configure(f, quantization={"bits": 4, "group_size": 64}), "affine4-g64 needs"),
    "an unknown mode": (
        lambda f: configure(f, quantization={"bits": 4, "group_size": 32, "mode": "magic"}), "mode 'magic'"),
    "nvfp4 over affine scales": (
        lambda f: configure(f, quantization={"bits": 4, "group_size": 16, "mode": "nvfp4"}), "nvfp4 needs"),
    "weights as float8": (
        lambda f: rewrite(f / "model.safetensors", lambda h: h[f"{UP}.weight"].update(dtype="I32")), "needs U32"),
    "the same array in two files": (
        lambda f: shutil.copy(f / "model.safetensors", f / "model-2.safetensors"), "safetensors too"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_folders(damage: str, folder: Path) -> None:
    change, said = DAMAGES[damage]
    change(folder)
    outcome = call("inspect", folder)
    assert_refused(outcome, said)


STRANGERS: dict[str, Callable[[dict[str, Any]], object]] = {
    "a stranger's array": lambda h: h.update({"what.weight": h.pop("model.norm.weight")}),
    "scales without weight": lambda h: h.update({"a.scales": h.pop(f"{UP}.weight")}),
    "biases without scales": lambda h: h.update({f"{UP}.factors": h.pop(f"{UP}.scales")}),
    "a layer of many digits": lambda h: h.update(
        {f"model.layers.{'9' * 5000}.input_layernorm.weight": h.pop("model.norm.weight")}),
    "codes where numbers belong": lambda h: h["model.norm.weight"].update(dtype="I16"),
    "a third axis": lambda h: h["model.norm.weight"].update(shape=[8, 8, 1]),
}  # fmt: skip


@pytest.mark.parametrize("stranger", STRANGERS)
def test_strange_modules_are_shown_and_not_decoded(stranger: str, folder: Path) -> None:
    """`inspect` lists what is there; only what needs the model's own tensors refuses."""
    before = smolexport.inspect(folder)
    rewrite(folder / "model.safetensors", STRANGERS[stranger])
    found = smolexport.inspect(folder)
    assert sum(row.nbytes for row in found.tensors) == sum(row.nbytes for row in before.tensors)
    outcome = call("inspect", folder)
    assert outcome.code == 0
    assert "note: no weights fingerprint" in outcome.err
    with pytest.raises(FileFormatError, match=r"not part of a known module|belongs to no known module"):
        smolexport.fingerprint(folder)


def test_folders_cut_anywhere_or_with_any_byte_changed(folder: Path) -> None:
    """Read or refused in our own words; never another exception."""
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    dice, messages = random.Random(5), list[str]()
    for turn in range(150):
        at = dice.randrange(header)
        changed = whole[: dice.randrange(len(whole))] if turn % 3 == 0 else (
            whole[:at] + bytes([dice.randrange(256)]) + whole[at + 1 :]
        )  # fmt: skip
        path.write_bytes(changed)
        try:
            smolexport.fingerprint(folder)
            smolexport.inspect(folder)
        except SmolexportError as error:
            messages.append(str(error))
    assert messages
    assert not [m for m in messages if "\n" in m]


def test_weights_that_are_cut_off_after_the_header_was_read(folder: Path) -> None:
    stored = smolexport_to_mlx.weights(folder)
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:4000])
    with pytest.raises(FileFormatError, match="ends inside the array"):
        [tensor.read_rows() for tensor in stored.values()]
    path.unlink()
    with pytest.raises(FileFormatError, match="No such file"):
        next(iter(stored.values())).read_rows()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite(value: float, tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path)
    poke(source / "model.safetensors", f"{UP}.weight", (3, 5), value)
    outcome = call("mlx", source, "-o", tmp_path / "x")
    assert_refused(outcome, f"tensor {UP}.weight has {value} at [3, 5]; weights must be finite", planned=True)
    assert not [p for p in tmp_path.iterdir() if p.name.startswith((".", "x"))]


@pytest.mark.parametrize(("scheme", "options"), [("f16", {}), ("int4", {}), ("int8", {}), ("q4", {"dtype": "f16"})])
def test_weights_that_float16_cannot_hold(scheme: str, options: dict[str, str], tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path)
    poke(source / "model.safetensors", "model.norm.weight", (7,), 1e6)
    with pytest.raises(
        TensorError, match=r"model\.norm\.weight has (999424\.0|1e\+06) at \[7\], which f16 cannot hold"
    ):
        smolexport.export("mlx", source, tmp_path / "x", quant=scheme, options=options)
    assert not (tmp_path / "x").exists()


def test_a_scale_that_fits_with_a_bias_that_does_not(tmp_path: Path) -> None:
    """8 bits: the bias is 128 scales, a little more than the largest weight."""
    source = tiny_checkpoint(tmp_path)
    poke(source / "model.safetensors", f"{UP}.weight", (0, 0), 65280.0)
    with pytest.raises(TensorError, match="cannot hold"):
        smolexport.export("mlx", source, tmp_path / "x", quant="int8")
    smolexport.export("gguf", source, tmp_path / "x.gguf", quant="q8_0")


def test_options_are_checked(tiny: Path, tmp_path: Path) -> None:
    for options, said in (
        (("--set", "dtype=f8"), "--set dtype=f8: should be one of f32, f16, bf16"),
        (("--set", "dtype=8"), "--set dtype=8: this option of mlx takes text"),
        (("--set", "encoder=best"), "--set encoder=best: should be one of mlx, recode, search"),
        (("--set", "colour=red"), "--set colour: mlx has no such option; it has dtype, encoder"),
        (("-q", "int4", "--set", "dtype=bf16"), "the scheme int4 is f16 by definition"),
        (("-q", "mxfp4", "--set", "encoder=search"), "is for the affine schemes"),
        (("-q", "q4_g46"), "--quant q4_g46: MLX has no such scheme; did you mean"),
    ):
        assert_refused(call("mlx", tiny, "-o", tmp_path / "x", *options), said)
    with pytest.raises(UsageError, match="gguf has no such option; it has imatrix"):
        smolexport.export("gguf", tiny, tmp_path / "x", options={"dtype": "f16"})
    assert list(tmp_path.iterdir()) == []


def test_a_group_that_does_not_divide_falls_back_aloud_or_is_refused(tmp_path: Path) -> None:
    """Rows of 64 do not fit 128, rows of 172 fit nothing: smaller groups, then floats, named in config.json."""
    tokenizer = write_tokenizer(tmp_path / "tokenizer")
    source = write_checkpoint(tmp_path / "model", "llama", tokenizer=tokenizer, intermediate_size=172)
    outcome = call("mlx", source, "-q", "q4_g128", "-o", tmp_path / "x")
    assert "row length 64 is not a multiple of 128; using affine4-g64 instead of affine4-g128" in outcome.err
    assert "row length 172 is not a multiple of 32; using bf16 instead of affine4-g128" in outcome.err
    table = json.loads((tmp_path / "x" / "config.json").read_text())["quantization"]
    assert table["group_size"] == 128
    assert table[UP] == {"group_size": 64, "bits": 4, "mode": "affine"}
    assert table["model.layers.0.mlp.down_proj"] is False
    from smolexport_to_mlx.lint import lint

    assert lint(tmp_path / "x") == []
    refused = call("mlx", source, "-q", "q4_g128", "-o", tmp_path / "y", "--strict")
    assert_refused(refused, "--strict: q4_g128 does not fit", "row length 172")


def test_too_little_space(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Usage:
        free = 10_000

    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage)
    assert_refused(call("mlx", tiny, "-o", tmp_path / "x"), "MB are needed, 0 MB are free")
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_while_writing(tiny: Path, tmp_path: Path) -> None:
    for command in (("mlx", "-q", "bf16", "-o", tmp_path / "x"), ("all", "-o", tmp_path / "x")):
        done = subprocess.run(
            [START[0], "-c", LIMITED, command[0], str(tiny), *map(str, command[1:])],
            check=False, capture_output=True, text=True, env=environment({"NUMBA_CACHE_DIR": ""}), timeout=120,
        )  # fmt: skip
        assert done.returncode == 2, done.stderr
        assert done.stderr.splitlines()[-1].endswith("File too large; nothing was written")
        assert "Traceback" not in done.stderr
        assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def middling(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 20 million weights: some seconds of work for the slowest encoder."""
    folder = tmp_path_factory.mktemp("middling")
    wide: dict[str, Any] = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 5}
    return write_checkpoint(folder / "model", "llama", tokenizer=write_tokenizer(folder / "tokens"), **wide)


def begun(middling: Path, target: Path) -> subprocess.Popen[str]:
    """An export that has begun to write weights."""
    slow = ["-q", "q3", "--set", "encoder=search", "--threads", "1"]
    process = subprocess.Popen(
        [*START, "mlx", str(middling), *slow, "-o", str(target), "--force"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(),
    )  # fmt: skip
    end = time.monotonic() + 60
    while time.monotonic() < end and process.poll() is None:
        if any(p.stat().st_blocks * 512 > 100_000 for p in target.parent.glob(".*.partial/*.safetensors")):
            return process
        time.sleep(0.01)
    pytest.fail(f"the export never began to write: {process.communicate()}")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopped_while_writing(number: signal.Signals, middling: Path, exported: Path, tmp_path: Path) -> None:
    """The earlier export stays as it was, nothing else remains."""
    shutil.copytree(exported, tmp_path / "x")
    before = smolexport.fingerprint(tmp_path / "x")
    process = begun(middling, tmp_path / "x")
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert err.splitlines()[-1] == "smolexport: interrupted; nothing was left half-written"
    assert [p.name for p in tmp_path.iterdir()] == ["x"]
    assert smolexport.fingerprint(tmp_path / "x") == before


def test_killed_while_writing(middling: Path, tiny: Path, tmp_path: Path) -> None:
    """Nothing under the final name; the next export mentions what was left hidden, once nobody writes to it."""
    process = begun(middling, tmp_path / "x")
    process.kill()
    process.communicate(timeout=60)
    [left] = tmp_path.iterdir()
    assert left.name.startswith(".x.")
    old = time.time() - 3600
    for path in (*left.iterdir(), left):
        os.utime(path, (old, old))
    outcome = call("mlx", tiny, "-o", tmp_path / "x")
    assert outcome.code == 0
    assert f"note: {left} is left from an export that was killed; it can be deleted" in outcome.err


def test_two_exports_to_one_name(tiny: Path, tmp_path: Path) -> None:
    """One of them wins whole, the other says so."""
    import threading

    results: list[object] = []

    def one(scheme: str) -> None:
        try:
            results.append(smolexport.export("mlx", tiny, tmp_path / "x", quant=scheme).plan.scheme)
        except OutputError as error:
            results.append(error)

    threads = [threading.Thread(target=one, args=(scheme,)) for scheme in ("q4_g32", "q8_g32")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    [winner] = [r for r in results if isinstance(r, str)]
    assert smolexport.inspect(tmp_path / "x").scheme == winner
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


def test_a_broken_small_file_of_the_checkpoint(tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path)
    (source / "tokenizer_config.json").write_text("{")
    assert_refused(call("mlx", source, "-o", tmp_path / "x"), "tokenizer_config.json: is not valid JSON")
    assert not (tmp_path / "x").exists()
