"""The ONNX runtime on damaged and hostile folders: one clear line, nothing read outside of them, no memory taken."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import smolexport
from smolexport.errors import (
    CheckpointError,
    FileFormatError,
    SessionError,
    SmolexportError,
    UnsupportedError,
    UsageError,
)
from smolexport.testing.checkpoints import write_checkpoint, write_tokenizer
from tests.runtimes.onnx_edits import change_config, edited, on_tensor

pytest.importorskip("onnxruntime", reason="the onnxruntime extra is not installed")
onnx = pytest.importorskip("onnx", reason="the onnx package is not installed")

import smolexport_on_onnxruntime as adapter  # noqa: E402
from smolexport_on_onnxruntime.checks import read_graph  # noqa: E402

Damage = Callable[[Path], object]


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("onnx")
    tokenizer = write_tokenizer(folder / "tokenizer")
    source = write_checkpoint(folder / "llama", "llama", num_hidden_layers=2, tokenizer=tokenizer)
    return smolexport.export("onnx", source, folder / "out-onnx", quant="f32").path


@pytest.fixture
def folder(sound: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "broken"))


def graph_file(folder: Path) -> Path:
    return folder / "onnx" / "model.onnx"


def cut_short(name: str) -> Damage:
    def damage(folder: Path) -> None:
        path = folder / "onnx" / name
        os.truncate(path, path.stat().st_size - 1)

    return damage


def location(value: str) -> Damage:
    return on_tensor(lambda _, entries: setattr(entries["location"], "value", value))


def entry(key: str, value: str) -> Damage:
    return on_tensor(lambda _, entries: setattr(entries[key], "value", value))


def another_entry(key: str, value: str) -> Damage:
    return on_tensor(lambda tensor, _: tensor.external_data.add(key=key, value=value))


def in_genai(filename: object) -> Damage:
    return lambda folder: change_config(folder, "genai_config.json", model={"decoder": {"filename": filename}})


def in_graph(change: Callable[[Any], object]) -> Damage:
    def damage(folder: Path) -> None:
        with edited(graph_file(folder)) as model:
            change(model)

    return damage


def foreign_operator(model: Any) -> None:
    model.opset_import.append(onnx.helper.make_opsetid("evil", 1))
    model.graph.node.append(onnx.helper.make_node("Run", ["input_ids"], ["sprung"], domain="evil"))


def foreign_operator_inside(model: Any) -> None:
    inner = onnx.helper.make_graph([onnx.helper.make_node("Run", [], ["x"], domain="evil")], "inner", [], [])
    model.graph.node.append(onnx.helper.make_node("If", ["x"], ["y"], then_branch=inner, else_branch=inner))


def place_inside_an_attribute(model: Any) -> None:
    tensor = onnx.TensorProto(name="hidden", data_type=1, dims=[4], data_location=1)
    tensor.external_data.add(key="location", value="../../secret")
    model.graph.node.append(onnx.helper.make_node("Constant", [], ["c"], value=tensor))


def nested_graphs(model: Any) -> None:
    inner = onnx.helper.make_graph([], "inner", [], [])
    for _ in range(12):
        inner = onnx.helper.make_graph([onnx.helper.make_node("If", [], [], then_branch=inner)], "g", [], [])
    model.graph.node.extend(inner.node)


def cache_by_concatenation(model: Any) -> None:
    node = next(n for n in model.graph.node if n.op_type == "GroupQueryAttention")
    node.output[1] = "fresh"
    pasts = ["past_key_values.0.key", "fresh"]
    model.graph.node.append(onnx.helper.make_node("Concat", pasts, ["present.0.key"], axis=2))


def cache_read_twice(model: Any) -> None:
    model.graph.node.append(onnx.helper.make_node("Identity", ["past_key_values.1.value"], ["kept"]))


def cache_of_the_other_layer(model: Any) -> None:
    one, two = (n for n in model.graph.node if n.op_type == "GroupQueryAttention")
    one.input[3], two.input[3] = two.input[3], one.input[3]


def unknown_input(model: Any) -> None:
    model.graph.input.append(onnx.helper.make_tensor_value_info("beam_idx", 6, [1]))


def function(model: Any) -> None:
    model.functions.append(onnx.FunctionProto(name="f", domain="com.microsoft"))


def sparse(model: Any) -> None:
    model.graph.sparse_initializer.append(onnx.SparseTensorProto(dims=[1]))


DAMAGES: list[tuple[Damage, type[SmolexportError], str]] = [
    (lambda f: (f / "config.json").unlink(), CheckpointError, "config.json"),
    (lambda f: (f / "config.json").write_text("{"), CheckpointError, "JSON"),
    (lambda f: (f / "config.json").write_text("[]"), CheckpointError, "object"),
    (lambda f: change_config(f, num_hidden_layers=3), FileFormatError, "has 2 layers, but config.json 3"),
    (lambda f: change_config(f, num_hidden_layers=1), FileFormatError, "has 2 layers, but config.json 1"),
    (lambda f: change_config(f, num_key_value_heads=4), FileFormatError, r"past_key_values\.0\.key .* 4 along axis 1"),
    (lambda f: change_config(f, num_key_value_heads=None), FileFormatError, "4 along axis 1"),
    (lambda f: change_config(f, head_dim=32), FileFormatError, "32 along axis 3"),
    (lambda f: change_config(f, vocab_size=321), FileFormatError, "logits .* 321 along axis 2"),
    (lambda f: change_config(f, vocab_size=True), FileFormatError, "vocab_size is True"),
    (lambda f: change_config(f, num_attention_heads="four"), FileFormatError, "num_attention_heads is 'four'"),
    (lambda f: change_config(f, "genai_config.json", model=[]), FileFormatError, r"model is \[\]"),
    (lambda f: change_config(f, "genai_config.json", model={"context_length": 0}), FileFormatError, "context_length"),
    (in_genai("../model.onnx"), FileFormatError, r"none of onnx/\*\.onnx"),
    (in_genai("/onnx/model.onnx"), FileFormatError, r"none of onnx/\*\.onnx"),
    (in_genai("onnx/../onnx/model.onnx"), FileFormatError, r"none of onnx/\*\.onnx"),
    (in_genai("onnx/model_q4.onnx"), FileFormatError, r"none of onnx/\*\.onnx"),
    (in_genai(["onnx/model.onnx"]), FileFormatError, r"none of onnx/\*\.onnx"),
    (lambda f: graph_file(f).unlink(), FileFormatError, r"no graph onnx/\*\.onnx"),
    (lambda f: graph_file(f).write_bytes(b""), FileFormatError, "no graph in it"),
    (lambda f: graph_file(f).write_bytes(b"\xff" * 64), FileFormatError, "damaged or not an ONNX"),
    (lambda f: graph_file(f).write_bytes(b"ORTM" * 64), FileFormatError, "model.onnx: "),
    (cut_short("model.onnx"), FileFormatError, "damaged or not an ONNX"),
    (cut_short("model.onnx_data"), FileFormatError, "end at byte"),
    (lambda f: (f / "onnx" / "model.onnx_data").unlink(), FileFormatError, "is missing"),
    (location("../config.json"), FileFormatError, "beside the graph, not in '../config.json'"),
    (location("/etc/hostname"), FileFormatError, "beside the graph"),
    (location("onnx/model.onnx_data"), FileFormatError, "beside the graph"),
    (location("*/_ORT_MEM_ADDR_/*"), FileFormatError, "beside the graph"),
    (location(".."), FileFormatError, "beside the graph"),
    (location(""), FileFormatError, "beside the graph"),
    (location("x" * 5000), FileFormatError, "beside the graph, not in 'xxx"),
    (entry("offset", "-4096"), FileFormatError, "offset '-4096'"),
    (entry("offset", str(2**62)), FileFormatError, "offset '46116"),
    (entry("offset", "99999999"), FileFormatError, "end at byte"),
    (entry("length", "4"), FileFormatError, "not what their shape"),
    (another_entry("location", "model.onnx_data"), FileFormatError, "not understood"),
    (another_entry("prepacked_0", "x|0;1"), FileFormatError, "not understood"),
    (on_tensor(lambda tensor, _: setattr(tensor, "data_location", 0)), FileFormatError, "not understood"),
    (on_tensor(lambda tensor, _: setattr(tensor, "data_type", 8)), FileFormatError, "not what their shape"),
    (on_tensor(lambda tensor, _: tensor.dims.append(2)), FileFormatError, "not what their shape"),
    (on_tensor(lambda tensor, _: tensor.dims.extend([1] * 1000)), FileFormatError, "not what their shape"),
    (on_tensor(lambda tensor, _: tensor.dims.extend([-1, -1])), FileFormatError, "not what their shape"),
    (in_graph(foreign_operator), FileFormatError, "'Run' of 'evil'"),
    (in_graph(foreign_operator_inside), FileFormatError, "'Run' of 'evil'"),
    (in_graph(place_inside_an_attribute), FileFormatError, "'hidden' must be in a file beside"),
    (in_graph(nested_graphs), FileFormatError, "deep"),
    (in_graph(function), FileFormatError, "functions"),
    (in_graph(sparse), FileFormatError, "sparse"),
    (in_graph(unknown_input), FileFormatError, "beam_idx"),
    (in_graph(lambda model: model.graph.output.pop()), FileFormatError, r"present\.1\.value is nothing"),
    (in_graph(lambda model: model.graph.node.pop()), FileFormatError, "cannot load"),
    (in_graph(cache_by_concatenation), UnsupportedError, "not made in place"),
    (in_graph(cache_read_twice), UnsupportedError, "not made in place"),
    (in_graph(cache_of_the_other_layer), UnsupportedError, "not made in place"),
]


@pytest.mark.parametrize(("damage", "error", "said"), DAMAGES, ids=[str(i) for i in range(len(DAMAGES))])
def test_a_damaged_folder_is_one_clear_line(
    folder: Path, damage: Damage, error: type[SmolexportError], said: str, capfd: pytest.CaptureFixture[str]
) -> None:
    damage(folder)
    with pytest.raises(error, match=said) as caught:
        adapter.open(folder)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)
    assert len(str(caught.value)) < 600
    assert capfd.readouterr() == ("", "")  # what ONNX Runtime has to say is in the error


def test_what_was_damaged_was_sound(folder: Path) -> None:
    with adapter.open(folder) as session:
        assert session.append([1, 2, 3]).shape == (3, 320)


def test_the_rotary_tables_bound_the_context(folder: Path) -> None:
    change_config(folder, max_position_embeddings=10**9)
    change_config(folder, "genai_config.json", model={"decoder": {"filename": "onnx/model.onnx"}})
    with adapter.open(folder) as session:
        assert session.context == 512
    with pytest.raises(UsageError, match="between 1 and the model's own 512"):
        adapter.open(folder, context=513)


def test_a_failing_run_is_a_session_error(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with adapter.open(folder) as session:
        expected = session.append([1, 2])
        session.rewind(0)
        session.vocab_size += 1  # ONNX Runtime refuses the buffer for the logits
        with pytest.raises(SessionError, match="ONNX Runtime failed: ") as caught:
            session.append([1, 2])
        session.vocab_size -= 1
        assert session.length == 0
        assert (session.append([1, 2]) == expected).all()
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


def test_caches_that_no_memory_holds(folder: Path) -> None:
    change_config(folder, num_key_value_heads=1 << 62)
    with edited(graph_file(folder)) as model:
        for port in (*model.graph.input, *model.graph.output):
            if len(port.type.tensor_type.shape.dim) == 4:
                port.type.tensor_type.shape.dim[1].dim_value = 1 << 62
    with pytest.raises(UsageError, match="no memory for the caches of 64 tokens"):
        adapter.open(folder, threads=1, context=64)


def test_graphs_with_any_byte_changed(folder: Path) -> None:
    """The reader in front of ONNX Runtime says yes or no, and nothing else; it needs little memory for it."""
    path = graph_file(folder)
    whole = path.read_bytes()
    dice = random.Random(5)
    tracemalloc.start()
    for _ in range(400):
        changed = bytearray(whole)
        for _ in range(dice.choice((1, 1, 8))):
            changed[dice.randrange(len(changed))] = dice.randrange(256)
        path.write_bytes(changed[: dice.choice((len(changed), dice.randrange(1, len(changed))))])
        with contextlib.suppress(FileFormatError, UnsupportedError):
            read_graph(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 32 << 20


@pytest.mark.parametrize("bomb", [b"\x08\x01" * (3 << 20), b"\x3a\x00" * (3 << 20)], ids=["numbers", "graphs"])
def test_many_small_fields_are_refused(folder: Path, bomb: bytes) -> None:
    graph_file(folder).write_bytes(bomb)
    with pytest.raises(FileFormatError, match="more than 1,048,576 fields"):
        adapter.open(folder)


def test_weights_inside_the_graph(folder: Path) -> None:
    """Many foreign folders hold them so; and the file beside is not needed then."""
    with adapter.open(folder) as session:
        expected = session.append([1, 2, 3])
    onnx.save(onnx.load(graph_file(folder)), graph_file(folder))
    (folder / "onnx" / "model.onnx_data").unlink()
    with adapter.open(folder) as session:
        assert (session.append([1, 2, 3]) == expected).all()


def test_a_folder_of_links(folder: Path, tmp_path: Path) -> None:
    """As the hub's cache has them: each file is a link to one with another name."""
    linked, blobs = tmp_path / "linked", tmp_path / "blobs"
    blobs.mkdir()
    for number, file in enumerate(sorted(path for path in folder.rglob("*") if path.is_file())):
        link = linked / file.relative_to(folder)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(Path(file).rename(blobs / str(number)))
    with adapter.open(linked) as session:
        assert session.append([1, 2, 3]).shape == (3, 320)
