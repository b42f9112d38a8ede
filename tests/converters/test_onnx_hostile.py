"""ONNX folders from strangers, targets that are taken, options that cannot be: one clear line, and nothing lost."""

from __future__ import annotations

import json
import math
import random
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import smolexport
import smolexport_to_onnx
from smolexport.conversion.pipeline import write
from smolexport.conversion.prepare import prepare
from smolexport.errors import FileFormatError, OutputError, SmolexportError, TensorError, UnsupportedError
from smolexport.files import check_target
from smolexport.model.arch import load_spec
from smolexport.testing.checkpoints import write_checkpoint, write_tokenizer
from tests.cli.commands import LIMITED, START, assert_refused, call, environment, tiny_checkpoint
from tests.damage import poke
from tests.runtimes.onnx_edits import edited, field

UP = "model.layers.0.mlp.up_proj"
GRAPH = "onnx/model_q4.onnx"
DATA = f"{GRAPH}_data"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def exported(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return smolexport.export("onnx", tiny, tmp_path_factory.mktemp("out") / "x", quant="int4").path


@pytest.fixture
def folder(exported: Path, tmp_path: Path) -> Path:
    """A copy that may be damaged."""
    return Path(shutil.copytree(exported, tmp_path / "folder"))


def place(folder: Path, name: str = "model.norm.weight", **changes: object) -> None:
    """Another place for the bytes of an array."""
    with edited(folder / GRAPH) as model:
        for entry in named(model, name).external_data:
            entry.value = str(changes.get(entry.key, entry.value))


def named(model: Any, name: str) -> Any:
    return next(tensor for tensor in model.graph.initializer if tensor.name == name)


def shape(folder: Path, name: str, *sizes: int, length: int | None = None, graph: str = GRAPH) -> None:
    with edited(folder / graph) as model:
        tensor = named(model, name)
        tensor.dims[:] = sizes
        for entry in tensor.external_data:
            if entry.key == "length" and length is not None:
                entry.value = str(length)


def attribute(folder: Path, op: str, **changes: int) -> None:
    with edited(folder / GRAPH) as model:
        for node in model.graph.node:
            for told in node.attribute if node.op_type == op else ():
                told.i = changes.get(told.name, told.i)


def twice(folder: Path) -> None:
    with edited(folder / GRAPH) as model:
        model.graph.initializer.append(model.graph.initializer[0])


def nodes(folder: Path, count: int, node: bytes) -> None:
    """A graph of so many equal nodes."""
    (folder / GRAPH).write_bytes(field(7, field(1, node) * count))


def shared(folder: Path) -> None:
    """The largest array under a hundred names more."""
    with edited(folder / GRAPH) as model:
        most = max(model.graph.initializer, key=lambda tensor: math.prod(tensor.dims))
        for number in range(100):
            model.graph.initializer.append(most)
            model.graph.initializer[-1].name = f"x{number}"


def hollow(path: Path, size: int) -> None:
    with path.open("wb") as file:
        file.truncate(size)


FIELDS = "more than 1,048,576 fields"
DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no graph": (lambda f: (f / GRAPH).unlink(), "none of the known formats"),
    "no weights": (lambda f: (f / DATA).unlink(), "model_q4.onnx_data: not found, but model_q4.onnx names it"),
    "weights are a folder": (lambda f: [(f / DATA).unlink(), (f / DATA).mkdir()], "not found, but model_q4.onnx"),
    "weights cut off": (lambda f: (f / DATA).write_bytes((f / DATA).read_bytes()[:-5]), "ends inside the array"),
    "graph is empty": (lambda f: (f / GRAPH).write_bytes(b""), "there is no graph in it"),
    "graph is text": (lambda f: (f / GRAPH).write_text("no graph at all"), "is damaged or not an ONNX file"),
    "graph of a gigabyte": (lambda f: hollow(f / GRAPH, 1 << 30), "1024 MiB; a graph with its weights beside it"),
    "config is no JSON": (lambda f: (f / "config.json").write_text("{"), "config.json: is not valid JSON"),
    "genai_config is no JSON": (lambda f: (f / "genai_config.json").write_text("{"), "genai_config.json: is not valid"),
    "genai_config is a list": (lambda f: (f / "genai_config.json").write_text("[]"), "expected a JSON object"),
    "weights above": (lambda f: place(f, location="../config.json"), "'../config.json', which is not a file beside"),
    "weights at the root": (lambda f: place(f, location="/etc/passwd"), "'/etc/passwd', which is not a file beside"),
    "weights below": (lambda f: place(f, location="a/b"), "'a/b', which is not a file beside the graph"),
    "weights on a drive": (lambda f: place(f, location="C:weights"), "'C:weights', which is not a file beside"),
    "weights behind a backslash": (lambda f: place(f, location="..\\x"), "which is not a file beside the graph"),
    "weights here": (lambda f: place(f, location="."), "'.', which is not a file beside the graph"),
    "weights nowhere": (lambda f: place(f, location=""), "'', which is not a file beside the graph"),
    "an endless path": (lambda f: place(f, location="x" * 5000), "File name too long"),
    "behind the end": (lambda f: place(f, offset=1 << 40), "ends inside the array model.norm.weight"),
    "another length": (lambda f: place(f, length=12), "should have 256 bytes, has 12"),
    "a huge shape": (lambda f: shape(f, "model.norm.weight", 1 << 62, 1 << 62, length=0), "ends inside the array"),
    "a negative shape": (lambda f: shape(f, "model.norm.weight", -64), "has the shape [-64]"),
    "too many axes": (lambda f: shape(f, "model.norm.weight", *[1] * 400, 64), "shape [1, 1, 1, 1, 1, 1, 1, 1, 1]"),
    "many small fields": (lambda f: (f / GRAPH).write_bytes(b"\x72\x00" * (2 << 20)), FIELDS),
    "many fields in all": (lambda f: nodes(f, 12, b"\x32\x00" * 100_000), FIELDS),
    "many numbers": (lambda f: nodes(f, 25, field(5, field(8, bytes(100_000)))), FIELDS),
    "arrays that share their bytes": (shared, "its arrays share their bytes"),
    "an array twice": (twice, "is in it twice"),
    "seven bits": (lambda f: attribute(f, "MatMulNBits", bits=7), "bits is 7, must be one of 4, 8"),
    "another block": (lambda f: attribute(f, "MatMulNBits", block_size=64), "which do not form"),
    "blocks of nothing": (lambda f: attribute(f, "MatMulNBits", block_size=0), "in blocks of 0"),
    "rows of nothing": (lambda f: attribute(f, "MatMulNBits", K=0), "in blocks of 32"),
    "longer rows": (lambda f: attribute(f, "MatMulNBits", K=96), "which do not form"),
    "codes without axes": (lambda f: shape(f, "model.embed_tokens.B", 320 * 64), "which do not form"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_folders(damage: str, folder: Path) -> None:
    change, said = DAMAGES[damage]
    change(folder)
    assert_refused(call("inspect", folder), said)
    if damage != "config is no JSON":  # which is not needed to read weights
        with pytest.raises(SmolexportError):
            smolexport_to_onnx.weights(folder)
    with pytest.raises(SmolexportError):
        smolexport_to_onnx.lint(folder)


STRANGERS: dict[str, Callable[[Path], object]] = {
    "a stranger's array": lambda f: rename(f, "model.norm.weight", "what.weight"),
    "a layer of many digits": lambda f: rename(f, "model.norm.weight", f"model.layers.{'9' * 300}.mlp.weight"),
    "no heads": lambda f: attribute(f, "GroupQueryAttention", num_heads=0, kv_num_heads=0),
    "heads that do not divide": lambda f: attribute(f, "GroupQueryAttention", num_heads=5, kv_num_heads=1),
    "fewer than no heads": lambda f: attribute(f, "GroupQueryAttention", num_heads=-4, kv_num_heads=-2),
    "heads below nothing": lambda f: attribute(f, "GroupQueryAttention", num_heads=8, kv_num_heads=-2),
}  # fmt: skip


def rename(folder: Path, old: str, new: str) -> None:
    with edited(folder / GRAPH) as model:
        named(model, old).name = new


@pytest.mark.parametrize("stranger", STRANGERS)
def test_strange_modules_are_shown_and_not_decoded(stranger: str, folder: Path) -> None:
    """`inspect` lists what is there; only what needs the model's own tensors refuses."""
    before = smolexport.inspect(folder)
    STRANGERS[stranger](folder)
    found = smolexport.inspect(folder)
    assert sum(row.nbytes for row in found.tensors) == sum(row.nbytes for row in before.tensors)
    outcome = call("inspect", folder)
    assert outcome.code == 0
    assert "note: no weights fingerprint" in outcome.err
    with pytest.raises(FileFormatError, match="not part of a known module"):
        smolexport.fingerprint(folder)
    assert smolexport_to_onnx.lint(folder)


def test_folders_cut_anywhere_or_with_any_byte_changed(folder: Path) -> None:
    """Read or refused in our own words; never another exception."""
    path = folder / GRAPH
    whole = path.read_bytes()
    dice, messages = random.Random(5), list[str]()
    for turn in range(200):
        at = dice.randrange(len(whole))
        changed = whole[:at] if turn % 4 == 0 else whole[:at] + bytes([dice.randrange(256)]) + whole[at + 1 :]
        path.write_bytes(changed)
        for look in (smolexport.inspect, smolexport_to_onnx.weights, smolexport_to_onnx.lint):
            try:
                look(folder)
            except SmolexportError as error:
                messages.append(str(error))
        smolexport_to_onnx.replaceable(folder)
    assert messages
    assert not [m for m in messages if "\n" in m]


NO_MESSAGES = (b"\x0a", b"\x0a\xff", b"\x0b", b"\x80" * 11, b"\x09abc", b"\x0a" + b"\xff" * 8 + b"\x7fx", b"\x38\x01")


@pytest.mark.parametrize("data", NO_MESSAGES)
@pytest.mark.parametrize("behind", [0, 3 << 20])
def test_messages_that_no_one_sends(data: bytes, behind: int, folder: Path) -> None:
    """Alone, and behind so much that fields are counted first."""
    (folder / GRAPH).write_bytes((field(1000, bytes(behind)) if behind else b"") + data)
    with pytest.raises(FileFormatError, match="is damaged or not an ONNX file"):
        smolexport_to_onnx.weights(folder)


@pytest.mark.parametrize("depth", [90, 3000])
def test_messages_in_messages(depth: int, folder: Path) -> None:
    """Graphs in attributes of nodes, with something long in the innermost one."""
    data = field(10, bytes(3 << 20))
    for _ in range(depth):
        data = field(1, field(5, field(6, data)))
    (folder / GRAPH).write_bytes(field(7, data))
    with pytest.raises(FileFormatError, match="is damaged or not an ONNX file"):
        smolexport_to_onnx.weights(folder)


def test_texts_that_are_not_utf_8(folder: Path) -> None:
    """Of names, places and strings in the graph, one after the other."""
    whole, found = (folder / GRAPH).read_bytes(), 0
    for text in (b"model.norm.weight", b"model_q4.onnx_data", b"smolexport.scheme", b"logits", b"MatMulNBits"):
        (folder / GRAPH).write_bytes(whole.replace(text, b"\xff" * len(text)))
        for look in (smolexport.inspect, smolexport_to_onnx.weights, smolexport_to_onnx.lint):
            try:
                look(folder)
            except FileFormatError:
                found += 1
        assert not smolexport_to_onnx.replaceable(folder) or text != b"smolexport.scheme"
    assert found > 5


def test_weights_that_are_cut_off_after_the_graph_was_read(folder: Path) -> None:
    stored = smolexport_to_onnx.weights(folder)
    path = folder / DATA
    path.write_bytes(path.read_bytes()[:4000])
    with pytest.raises(FileFormatError, match="ends inside the array"):
        [tensor.read_rows() for tensor in stored.values()]
    path.unlink()
    with pytest.raises(FileFormatError, match="No such file"):
        next(iter(stored.values())).read_rows()


def test_lint_sees_what_readers_would_trip_over(folder: Path) -> None:
    assert smolexport_to_onnx.lint(folder) == []
    config, generation = (json.loads((folder / n).read_text()) for n in ("config.json", "genai_config.json"))
    decoder = generation["model"]["decoder"]
    for name, content, said in (
        ("config.json", {k: v for k, v in config.items() if k != "transformers.js_config"}, "finds no external data"),
        ("config.json", config | {"transformers.js_config": {"dtype": "q4"}}, "should hold model_q4.onnx: 1"),
        ("config.json", config | {"transformers.js_config": {"dtype": "fp16"}}, "dtype is 'fp16', and there is no"),
        ("config.json", config | {"num_hidden_layers": 1}, "which no reader feeds"),
        ("config.json", config | {"num_hidden_layers": 3}, "has no input or output past_key_values.2.key"),
        ("config.json", config | {"vocab_size": 300}, "vocab_size is 320"),
        ("config.json", config | {"intermediate_size": 96}, "config.json asks for [96, 64]"),
        ("genai_config.json", {"model": 4}, "should hold an object model"),
        (
            "genai_config.json",
            {"model": generation["model"] | {"context_length": 10**6}},
            "the rotary tables end at 512",
        ),
        (
            "genai_config.json",
            {"model": generation["model"] | {"decoder": decoder | {"head_size": 8}}},
            "head_size is 8",
        ),
        (
            "genai_config.json",
            {"model": generation["model"] | {"decoder": decoder | {"filename": "x"}}},
            "no such graph",
        ),
    ):
        (folder / name).write_text(json.dumps(content))
        assert any(said in finding for finding in smolexport_to_onnx.lint(folder)), said
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "genai_config.json").write_text(json.dumps(generation))
    whole = (folder / GRAPH).read_bytes()
    for damage, said in (
        (lambda graph: graph.node[5].input.__setitem__(0, "nowhere"), "nowhere"),
        (lambda graph: graph.node.append(graph.node[0]), "SSA"),
        (lambda graph: graph.node[0].attribute.add(name="what", i=1, type=2), "what"),
        (lambda graph: graph.node.insert(0, graph.node.pop()), "topologically sorted"),
    ):
        with edited(folder / GRAPH) as model:
            damage(model.graph)
        [finding] = smolexport_to_onnx.lint(folder)
        assert finding.startswith("model_q4.onnx: is not a valid graph (")
        assert said in finding
        (folder / GRAPH).write_bytes(whole)
    place(folder, offset=0)
    assert any("share bytes" in finding for finding in smolexport_to_onnx.lint(folder))
    (folder / "tokenizer.json").unlink()
    assert any("tokenizer.json is missing" in finding for finding in smolexport_to_onnx.lint(folder))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite(value: float, tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path)
    poke(source / "model.safetensors", f"{UP}.weight", (3, 5), value)
    outcome = call("onnx", source, "-o", tmp_path / "x")
    assert_refused(outcome, f"tensor {UP}.weight has {value} at [3, 5]; weights must be finite", planned=True)
    assert not [p for p in tmp_path.iterdir() if p.name.startswith((".", "x"))]


@pytest.mark.parametrize("scheme", ["f16", "int4", "int8", "q4f16"])
def test_weights_that_float16_cannot_hold(scheme: str, tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path)
    poke(source / "model.safetensors", "model.norm.weight", (7,), 1e6)
    with pytest.raises(TensorError, match=r"model\.norm\.weight has .* at \[7\], which f16 cannot hold"):
        smolexport.export("onnx", source, tmp_path / "x", quant=scheme)
    assert not (tmp_path / "x").exists()


def test_options_are_checked(tiny: Path, tmp_path: Path) -> None:
    for options, said in (
        (("--set", "accuracy_level=9"), "--set accuracy_level=9: should be one of 0, 1, 2, 3, 4"),
        (("--set", "accuracy_level=high"), "this option of onnx takes"),
        (("--set", "logits=some"), "--set logits=some: should be all or last"),
        (("--set", "max_positions=0"), "--set max_positions=0: should be from 1 to"),
        (("--set", "max_positions=99999999999"), "should be from 1 to"),
        (
            ("--set", "colour=red"),
            "--set colour: onnx has no such option; it has accuracy_level, logits, max_positions",
        ),
        (("-q", "int44"), "--quant int44: ONNX has no such scheme; did you mean"),
        (("-q", "int4+"), "each + must be between two schemes"),
        (("-q", "int4+q4"), "int4 and int4 have the same file name"),
        (("-q", "f32+int4+int4-asym"), "int4 and int4-asym have the same file name; use one of them"),
    ):
        assert_refused(call("onnx", tiny, "-o", tmp_path / "x", *options), said)
    assert list(tmp_path.iterdir()) == []


def test_models_that_the_graph_cannot_express(tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path, head_dim=12)
    with pytest.raises(UnsupportedError, match="heads of a multiple of 8 dimensions, the checkpoint of 12"):
        smolexport.export("onnx", source, tmp_path / "x")
    spec = load_spec(json.loads((tiny_checkpoint(tmp_path / "other") / "config.json").read_text()))
    first = spec.layers[0]
    mixer = {"num_attention_heads": 3}, {"head_dim": 32}
    wrong, wide = (replace(first, mixer=replace(first.mixer, **changes)) for changes in mixer)
    gelu = replace(first, mlp=replace(first.mlp, activation="gelu"))
    for changed, said in (
        (replace(spec, layers=(*spec.layers, wide)), f"head_dim 16, the checkpoint has 32 on layer {len(spec.layers)}"),
        (replace(spec, layers=(wrong,)), "3 query heads and 2 key heads"),
        (replace(spec, layers=(first, gelu)), "activation silu, the checkpoint has gelu on layer 1"),
        (replace(spec, layers=(wide,)), "rotates all 32 dimensions of a head, the checkpoint 16"),
        (replace(spec, layers=()), "has at least one layer"),
    ):
        assert any(said in reason for reason in smolexport_to_onnx.check(changed)), said
    assert smolexport_to_onnx.check(spec) == []


def test_blocks_that_do_not_divide_fall_back_aloud_or_are_refused(tmp_path: Path) -> None:
    tokenizer = write_tokenizer(tmp_path / "tokenizer")
    source = write_checkpoint(tmp_path / "model", "llama", tokenizer=tokenizer, intermediate_size=172)
    outcome = call("onnx", source, "-q", "int4-g128", "-o", tmp_path / "x")
    assert "row length 64 is not a multiple of 128; using int4-g64 instead of int4-g128" in outcome.err
    assert "row length 172 is not a multiple of 32; using f32 instead of int4-g128" in outcome.err
    assert smolexport_to_onnx.lint(tmp_path / "x") == []
    refused = call("onnx", source, "-q", "int4-g128", "-o", tmp_path / "y", "--strict")
    assert_refused(refused, "--strict: int4-g128 does not fit", "row length 172")


def anonymous(folder: Path) -> None:
    with edited(folder / GRAPH) as model:
        model.ClearField("metadata_props")


FOREIGN: dict[str, Callable[[Path], object]] = {
    "a note": lambda f: (f / "notes.txt").write_text("precious"),
    "a note beside the graph": lambda f: (f / "onnx" / "notes.txt").write_text("precious"),
    "another graph": lambda f: shutil.copy(f / GRAPH, f / "onnx" / "mine.onnx"),
    "a hidden file": lambda f: (f / ".env").write_text("precious"),
    "a repository": lambda f: (f / ".git").mkdir(),
    "a file that is a link": lambda f: [
        shutil.move(f / "README.md", f.parent / "card"), (f / "README.md").symlink_to(f.parent / "card")],
    "weights that are a link": lambda f: [shutil.move(f / DATA, f.parent / "w"), (f / DATA).symlink_to(f.parent / "w")],
    "made by another tool": anonymous,
    "damaged": lambda f: (f / GRAPH).write_bytes(b"no"),
    "no graph": lambda f: (f / GRAPH).unlink(),
}  # fmt: skip


@pytest.mark.parametrize("foreign", FOREIGN)
def test_a_folder_that_somebody_changed_is_not_replaced(foreign: str, folder: Path) -> None:
    (folder / "LICENSE.md").write_text("ours, as companions go")
    assert smolexport_to_onnx.replaceable(folder)
    FOREIGN[foreign](folder)
    assert not smolexport_to_onnx.replaceable(folder)
    before = {p: p.lstat().st_mtime_ns for p in folder.rglob("*")}
    with pytest.raises(OutputError, match="never replaced"):
        check_target(folder, 1, force=True, replaceable=smolexport_to_onnx.replaceable)
    assert {p: p.lstat().st_mtime_ns for p in folder.rglob("*")} == before


def test_an_earlier_export_is_replaced_with_force_alone(tiny: Path, folder: Path) -> None:
    assert_refused(call("onnx", tiny, "-o", folder), "folder: exists already; pass --force")
    done = call("onnx", tiny, "-q", "f32+int8", "-o", folder, "--force")
    assert done.out == f"{folder}\n"
    assert not (folder / GRAPH).exists()
    assert smolexport.inspect(folder).scheme == "f32+int8"


def test_a_checkpoint_with_a_graph_beside_its_weights_stays_a_checkpoint(exported: Path, tmp_path: Path) -> None:
    """As many on the hub are."""
    source = tiny_checkpoint(tmp_path)
    shutil.copytree(exported / "onnx", source / "onnx")
    assert not smolexport_to_onnx.recognises(source)
    assert not smolexport_to_onnx.replaceable(source)


def test_a_name_that_is_no_text_makes_a_folder_that_is_read(tiny: Path, tmp_path: Path) -> None:
    """As `--name $'\\xffx'` arrives."""
    made = smolexport.export("onnx", tiny, tmp_path / "x", name="\udcffx").path
    assert smolexport.inspect(made).name == "?x"
    for path in (*made.rglob("*.json"), made / "README.md"):
        path.read_bytes().decode("utf-8")


def test_a_plan_for_another_place_is_no_danger_to_the_checkpoint(tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path)
    before = {p.name: p.read_bytes() for p in source.iterdir()}
    job = prepare("onnx", source, tmp_path / "elsewhere")
    with pytest.raises(OutputError, match="is or contains the checkpoint"):
        write(replace(job, path=source), force=True)
    assert {p.name: p.read_bytes() for p in source.iterdir()} == before


def test_a_disk_that_fills_while_writing(tiny: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [START[0], "-c", LIMITED, "onnx", str(tiny), "-q", "f32", "-o", str(tmp_path / "x")],
        check=False, capture_output=True, text=True, env=environment({"NUMBA_CACHE_DIR": ""}), timeout=120,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert "File too large" in done.stderr.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []
