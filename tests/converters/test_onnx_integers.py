"""`int8-dynamic`: products of integers, in which nothing is rounded but what is meant to be.

The operators of each product are taken out of the graph and held against numpy: equal to the bit, since sums of
integers are exact and every step in floats is a single operation.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import smolexport
from smolexport.errors import FileFormatError
from smolexport.testing.checkpoints import write_checkpoint, write_tokenizer
from smolexport_to_onnx import lint, weights
from smolexport_to_onnx.reading import read_graph, read_model
from tests.cli.commands import assert_refused, call
from tests.converters.test_onnx_hostile import shape
from tests.onnx_for_tests import onnxruntime, play, relative

GRAPH = Path("onnx", "model_quantized.onnx")
# Widths that are not a multiple of a vector register's.
ODD: dict[str, Any] = {"hidden_size": 60, "head_dim": 16, "intermediate_size": 90, "vocab_size": 323}
Floats = NDArray[np.float32]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model whose embedding is its head."""
    place = tmp_path_factory.mktemp("integers")
    tokenizer = write_tokenizer(place / "tokenizer")
    source = write_checkpoint(place / "model", "llama", seed=5, tokenizer=tokenizer, num_hidden_layers=1, **ODD)
    return smolexport.export("onnx", source, place / "out", quant="int8-dynamic").path


@pytest.fixture(scope="module")
def products(folder: Path) -> dict[str, tuple[NDArray[np.int64], Floats, Callable[[Floats], Floats]]]:
    """Module -> codes [columns, rows], scales [rows], and its operators as a function of activations [n, columns]."""
    onnx, ort = pytest.importorskip("onnx"), onnxruntime()
    model = onnx.load(str(folder / GRAPH))
    arrays = {i.name: i for i in model.graph.initializer}
    found = {}
    for at, product in enumerate(model.graph.node):
        if product.op_type != "MatMulInteger":
            continue
        nodes = list(model.graph.node)[at - 6 : at + 4]
        assert (nodes[0].op_type, nodes[-1].op_type) == ("Abs", "Div")
        ends = [onnx.helper.make_tensor_value_info(n, 1, None) for n in (nodes[0].input[0], nodes[-1].output[0])]
        names = {name for node in nodes for name in node.input if name in arrays}
        graph = onnx.helper.make_graph(nodes, "x", ends[:1], ends[1:], [arrays[name] for name in sorted(names)])
        alone = onnx.helper.make_model(graph, opset_imports=model.opset_import, ir_version=model.ir_version)
        opened = ort.InferenceSession(alone.SerializeToString(), providers=["CPUExecutionProvider"])
        module = product.input[1].removesuffix(".B")
        codes, scales = (onnx.numpy_helper.to_array(arrays[f"{module}.{part}"]) for part in ("B", "scales"))
        found[module] = codes.astype(np.int64) - 128, scales, running(opened, ends[0].name)
    return found


def running(opened: Any, name: str) -> Callable[[Floats], Floats]:
    return lambda activations: opened.run(None, {name: activations[None]})[0][0]


def by_numpy(activations: Floats, codes: NDArray[np.int64], scales: Floats) -> Floats:
    """The product as it is meant: 127 steps of each row of activations either way, ties to even."""
    largest = np.abs(activations).max(axis=1, keepdims=True)
    steps = np.float32(127) / np.maximum(largest, np.float32(1e-30))
    sums = np.rint(activations * steps).astype(np.int64) @ codes
    return np.asarray(sums.astype(np.float32) * scales / steps)


def test_every_matrix_is_multiplied_so(folder: Path, products: Any) -> None:
    """And read back, it is what the operator has: columns of the array are rows of the matrix."""
    stored = read_model(folder / GRAPH).stored
    assert {name.removesuffix(".weight") for name, rows in stored.items() if len(rows.shape) == 2} == set(products)
    assert len(products) == 5
    for module, (codes, scales, _) in products.items():
        np.testing.assert_array_equal(stored[f"{module}.weight"].read_rows(), (codes * scales).T.astype(np.float32))


def test_products_equal_those_of_numpy(products: Any) -> None:
    """With signs that make sums as large as can be, where processors without VNNI may saturate signed weights."""
    rng = np.random.default_rng(1)
    for codes, scales, run in products.values():
        plain = rng.standard_normal((40, len(codes))).astype(np.float32)
        steps = np.rint(plain * 40)
        steps[:, 0] = 127  # a row that is whole steps
        signs = np.sign(codes.T[:40]).astype(np.float32) * 3
        for activations in (plain, plain * 1e20, plain * 1e-20, steps.astype(np.float32), steps / 2, signs, 0 * plain):
            for rows in (activations, activations[:1]):
                np.testing.assert_array_equal(run(rows), by_numpy(rows, codes, scales))


def test_no_position_spoils_another(products: Any) -> None:
    for codes, _, run in products.values():
        activations = np.random.default_rng(2).standard_normal((9, len(codes))).astype(np.float32)
        alone = run(activations)
        activations[4] *= 1e6
        np.testing.assert_array_equal(np.delete(run(activations), 4, 0), np.delete(alone, 4, 0))


def test_the_embedding_is_looked_up_in_the_array_of_the_head(folder: Path) -> None:
    graph = read_graph(folder / GRAPH).graph
    [lookup] = [n for n in graph.node if n.op_type == "Gather" and n.input[0] == "model.embed_tokens.B"]
    assert [a.i for a in lookup.attribute if a.name == "axis"] == [1]
    [shape] = [tuple(i.dims) for i in graph.initializer if i.name == "model.embed_tokens.B"]
    assert shape == (60, 323)


def test_a_text_in_any_pieces(folder: Path) -> None:
    """Nearly equal: attention adds up in another order, and what lay between two steps may fall to the other one."""
    tokens = np.random.default_rng(3).integers(0, 320, 48)
    whole = play(folder / GRAPH, tokens)
    assert relative(play(folder / GRAPH, tokens, range(1, 48)), whole) < 0.01
    assert relative(play(folder / GRAPH, tokens, keep=3), whole[-3:]) < 0.01


def test_a_file_that_ends_early(folder: Path) -> None:
    stored = weights(folder)
    data = folder / f"{GRAPH}_data"
    whole = data.read_bytes()
    try:
        data.write_bytes(whole[:5000])
        with pytest.raises(FileFormatError, match="ends inside the array"):
            [tensor.read_rows() for tensor in stored.values()]
        data.unlink()
        with pytest.raises(FileFormatError, match="No such file"):
            next(iter(stored.values())).read_rows()
    finally:
        data.write_bytes(whole)


DAMAGES: dict[str, tuple[str, tuple[int, ...], int | None, str]] = {
    "codes of no rows": ("B", (60, 0), 0, "are not rows with a scale each"),
    "fewer codes than scales": ("B", (60, 60), 3600, "are not rows with a scale each"),
    "rows lying down": ("B", (323, 60), None, "are not rows with a scale each"),
    "codes without axes": ("B", (323 * 60,), None, "in blocks of 0"),
    "scales with two axes": ("scales", (1, 323), None, "are not rows with a scale each"),
    "more codes than the file has": ("B", (1 << 40, 323), 0, "ends inside the array model.embed_tokens.B"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_arrays(damage: str, folder: Path, tmp_path: Path) -> None:
    part, sizes, length, said = DAMAGES[damage]
    copied = Path(shutil.copytree(folder, tmp_path / "x"))
    shape(copied, f"model.embed_tokens.{part}", *sizes, length=length, graph=str(GRAPH))
    assert_refused(call("inspect", copied), said)
    for look in (weights, lint):
        with pytest.raises(FileFormatError, match=said):
            look(copied)
