"""ONNX folders that ONNX Runtime, ONNX Runtime GenAI and Transformers.js run; made without any of them.

The driver calls `check(spec)`, which says what the graph cannot express, then `plan(model, scheme)`, which decides
every tensor and every file, the graphs among them; `weights(path)` decodes a finished folder.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from smolexport.conversion import portable
from smolexport.conversion.folder_files import json_bytes
from smolexport.conversion.plan import Entry, OutputFile, Plan
from smolexport.conversion.source_model import SourceModel, provenance
from smolexport.errors import UsageError
from smolexport.model.spec import Tensor
from smolexport_to_onnx import architectures, folder, reading, schemes
from smolexport_to_onnx.container import Layout, Table, layout_of
from smolexport_to_onnx.lint import lint as lint
from smolexport_to_onnx.schemes import STEMS, Scheme

FORMAT = "onnx"
SUFFIX = "-onnx"
FOLDER = True
DEFAULT = "int4"
OPTIONS: Mapping[str, str] = {
    "accuracy_level": "activations of quantized products: 4 (8-bit integers, fastest on a CPU; default) … 0 (floats)",
    "logits": "all: of every position, as scoring needs; last: of the last one, a little faster on long prompts",
    "max_positions": "longest text, which sizes the rotary tables; default: the model's context, at most 8192",
}
LEVELS = (0, 1, 2, 3, 4)
POSITIONS = 8192
MAX_POSITIONS = 1 << 22  # 2 GB of tables for heads of 64
SCHEMES, find_scheme, check = schemes.SCHEMES, schemes.find_scheme, architectures.check
describe, recognises, replaceable, weights = (
    reading.describe, reading.recognises, reading.replaceable, reading.weights,
)  # fmt: skip


def plan(
    model: SourceModel,
    scheme: str,
    *,
    accuracy_level: int = 4,
    logits: str = "all",
    max_positions: int | None = None,
) -> Plan:
    """Decide every tensor and every file of the folder.

    Args:
        model: a model whose spec `check` has passed.
        scheme: a name of `SCHEMES` or an alias, or several with `+` between them: a graph for each.
        accuracy_level: of MatMulNBits, 0 to 4.
        logits: `all` or `last`.
        max_positions: rows of the rotary tables; None = the model's context, at most 8192.

    Raises:
        UsageError: an unknown scheme or option.
        CheckpointError: a small file of the checkpoint is damaged.
    """
    from smolexport_to_onnx.graph import Settings, build, serialize

    chosen, positions = find_scheme(scheme), _positions(model, max_positions)
    settings = _settings(accuracy_level, logits)
    copies, lines = folder.copied(model)
    entries, layouts = list[Entry](), list[Layout]()
    files, metadata = dict[str, bytes](), list[tuple[str, str, Any]]()
    for part in chosen.parts:
        own = _entries(model, part)
        layout = layout_of(STEMS[part.js], own, _tables(model, part, positions))
        strings = provenance(model, part.name, **{reading.POSITIONS_KEY: str(positions)})
        files[layout.graph] = serialize(build(model.spec, layout, Settings(part.dtype, **settings), strings))
        metadata += [(f"{layout.stem}.{key}", "string", value) for key, value in strings.items()]
        entries += own
        layouts.append(layout)
    config = folder.compose(model, chosen.parts, layouts)
    metadata += [(f"config.{key}", "json", value) for key, value in config.items()]
    notes = (*_portable(chosen.parts), *architectures.notes(model.spec, positions), *lines)
    made = Plan(FORMAT, model.spec.model_type, chosen.name, tuple(entries), tuple(metadata), notes)
    files |= {
        "config.json": json_bytes(config, 4),
        reading.GENAI: json_bytes(folder.genai(model, layouts[0], positions, copies), 4),
        "README.md": folder.card(
            model, chosen.name, chosen.parts[0].js, made.bits_per_weight, [*made.fallback_lines(), *notes]
        ),
    }
    small = (OutputFile(name, content) for name, content in files.items())
    return replace(made, files=(*(layout.file for layout in layouts), *small, *copies.values()))


def _positions(model: SourceModel, asked: int | None) -> int:
    if asked is None:
        return min(model.spec.context_length, POSITIONS)
    if not 1 <= asked <= MAX_POSITIONS:
        raise UsageError(f"--set max_positions={asked}: should be from 1 to {MAX_POSITIONS}")
    return asked


def _settings(accuracy_level: int, logits: str) -> dict[str, Any]:
    if accuracy_level not in LEVELS:
        raise UsageError(f"--set accuracy_level={accuracy_level}: should be one of {', '.join(map(str, LEVELS))}")
    if logits not in ("all", "last"):
        raise UsageError(f"--set logits={logits}: should be all or last")
    return {"accuracy_level": accuracy_level, "logits": logits}


def _entries(model: SourceModel, scheme: Scheme) -> list[Entry]:
    """The tensors of one graph, under names that no other graph of the folder has."""
    return [
        scheme.choose(tensor, model.spec, model.bits).entry(f"{STEMS[scheme.js]}/{tensor.name}", tensor)
        for tensor in model.spec.tensors()
    ]


def _tables(model: SourceModel, scheme: Scheme, positions: int) -> list[Table]:
    """Cosines and sines of every rotary embedding that some layer has."""
    ropes = dict.fromkeys(layer.mixer.rope for layer in model.spec.layers)
    return [
        Table(f"rope.{number}.{function}", rope, function, positions, scheme.dtype)
        for number, rope in enumerate(rope for rope in ropes if rope is not None)
        for function in ("cos", "sin")
    ]


def _portable(parts: tuple[Scheme, ...]) -> list[str]:
    return [portable.NOTE] if any(part.name in (*portable.SCHEMES, "q4f16") for part in parts) else []


def bit_choices(tensor: Tensor) -> tuple[int, ...]:
    """Bits that the scheme `auto-bits` can give `tensor`, most first: those that all formats share."""
    return portable.BIT_CHOICES if tensor.is_matrix and tensor.columns % portable.BLOCK == 0 else ()
