"""Changing exported graphs on purpose, with the onnx package."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

__all__ = ["change_config", "edited", "field", "on_tensor", "rows_cannot_be_chosen", "rows_must_be_chosen"]


def field(number: int, content: bytes) -> bytes:
    """A field of protocol buffers that holds a message, a text or a packed list."""

    def varint(value: int) -> bytes:
        return bytes([value]) if value < 0x80 else bytes([value & 0x7F | 0x80]) + varint(value >> 7)

    return varint(number << 3 | 2) + varint(len(content)) + content


KEEP = "num_logits_to_keep"


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


def rows_must_be_chosen(path: Path) -> None:
    """Make num_logits_to_keep an input that has to be fed, as other exporters have it."""
    with edited(path) as model:
        kept = [tensor for tensor in model.graph.initializer if tensor.name != KEEP]
        assert len(kept) < len(model.graph.initializer)
        model.graph.ClearField("initializer")
        model.graph.initializer.extend(kept)


def rows_cannot_be_chosen(path: Path) -> None:
    """Leave num_logits_to_keep out of the inputs, so that all rows are always made."""
    with edited(path) as model:
        kept = [value for value in model.graph.input if value.name != KEEP]
        assert len(kept) < len(model.graph.input)
        model.graph.ClearField("input")
        model.graph.input.extend(kept)


def change_config(folder: Path, name: str = "config.json", **changes: object) -> None:
    """Set keys of a JSON file; None removes one."""
    config = {**json.loads((folder / name).read_text()), **changes}
    (folder / name).write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
