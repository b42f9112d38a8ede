"""Changing exported graphs on purpose, with the onnx package."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

__all__ = ["change_config", "edited", "on_tensor", "only_last_rows_on_request"]


@contextmanager
def edited(path: Path) -> Iterator[Any]:
    """The model in the file `path`, its weights left outside, to be changed; then it is written back."""
    onnx = pytest.importorskip("onnx")
    model = onnx.load(path, load_external_data=False)
    yield model
    path.write_bytes(model.SerializeToString())


def on_tensor(change: Callable[[Any, dict[str, Any]], object]) -> Callable[[Path], None]:
    """A change of the first tensor of onnx/model.onnx that lies outside of it, and of its entries by key."""

    def damage(folder: Path) -> None:
        with edited(folder / "onnx" / "model.onnx") as model:
            tensor = next(t for t in model.graph.initializer if t.data_location == 1)
            change(tensor, {entry.key: entry for entry in tensor.external_data})

    return damage


def only_last_rows_on_request(path: Path) -> None:
    """Give the graph the input num_logits_to_keep, as older exporters' have it: 0 = all."""
    onnx = pytest.importorskip("onnx")
    helper, int64 = onnx.helper, onnx.TensorProto.INT64
    with edited(path) as model:
        graph = model.graph
        index, head = next((i, n) for i, n in enumerate(graph.node) if "logits" in n.output)
        for name, value in (("keep_shape", 1), ("keep_to", 2**31 - 1), ("keep_axis", 1)):
            graph.initializer.append(helper.make_tensor(name, int64, [1], [value]))
        graph.node.insert(index, helper.make_node("Neg", ["num_logits_to_keep"], ["keep_negative"]))
        graph.node.insert(index + 1, helper.make_node("Reshape", ["keep_negative", "keep_shape"], ["keep_from"]))
        sliced = [head.input[0], "keep_from", "keep_to", "keep_axis"]
        graph.node.insert(index + 2, helper.make_node("Slice", sliced, ["kept"]))
        head.input[0] = "kept"
        graph.input.append(helper.make_tensor_value_info("num_logits_to_keep", int64, []))
        logits = next(v for v in graph.output if v.name == "logits")
        logits.type.tensor_type.shape.dim[1].dim_param = "kept_length"


def change_config(folder: Path, name: str = "config.json", **changes: object) -> None:
    """Set keys of a JSON file; None removes one."""
    config = {**json.loads((folder / name).read_text()), **changes}
    (folder / name).write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
