"""ONNX folders that ONNX Runtime, ONNX Runtime GenAI and Transformers.js run; made without any of them.

A few functions and a table; the driver calls them in this order: `check(spec)` says what the graph cannot express,
`plan(model, scheme)` decides every tensor and every small file, the graphs among them, `output(plan, path)` takes the
encoded rows, `weights(path)` decodes them again.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from smolexport.conversion import portable
from smolexport.conversion.model_card import installed_version
from smolexport.conversion.plan import Companion, Entry, Plan
from smolexport.conversion.source_model import CALIBRATION_KEY, SourceModel
from smolexport.conversion.writer import Sink
from smolexport.errors import UsageError
from smolexport.files import atomic_folder, check_target
from smolexport.model.spec import Tensor
from smolexport_to_onnx import architectures, companions
from smolexport_to_onnx.card import card
from smolexport_to_onnx.config import compose, genai
from smolexport_to_onnx.container import Layout, Table, layout_of
from smolexport_to_onnx.description import NAME_KEY, POSITIONS_KEY, describe, recognises, replaceable
from smolexport_to_onnx.lint import lint
from smolexport_to_onnx.packed import serialize
from smolexport_to_onnx.reading import GENAI, SCHEME_KEY, weights
from smolexport_to_onnx.schemes import SCHEMES, STEMS, Portable, Scheme, find_scheme

__all__ = [
    "DEFAULT",
    "FOLDER",
    "FORMAT",
    "OPTIONS",
    "SCHEMES",
    "SUFFIX",
    "bit_choices",
    "check",
    "describe",
    "find_scheme",
    "lint",
    "output",
    "plan",
    "recognises",
    "replaceable",
    "size",
    "weights",
]

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

check = architectures.check


@dataclass(frozen=True)
class FolderPlan(Plan):
    """A plan with the places of everything in the files of external data."""

    layouts: tuple[Layout, ...] = field(repr=False, default=())


def plan(
    model: SourceModel,
    scheme: str,
    *,
    accuracy_level: int = 4,
    logits: str = "all",
    max_positions: int | None = None,
) -> FolderPlan:
    """Decide every tensor and every small file of the folder.

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
    from smolexport_to_onnx.graph import Settings, build

    chosen, positions, gathered = find_scheme(scheme), _positions(model, max_positions), companions.gather(model)
    schemes = tuple(_decided(part, model) for part in chosen.parts)
    entries, layouts = list[Entry](), list[Layout]()
    files, metadata = dict[str, bytes](), list[tuple[str, str, Any]]()
    for number, part in enumerate(schemes):
        own = _entries(model, part)
        layout = layout_of(STEMS[part.js], own, _tables(model, part, positions), number)
        strings = _strings(model, part, positions)
        settings = Settings(part.dtype, *_checked(accuracy_level, logits))
        files[layout.graph] = serialize(build(model.spec, layout, settings, strings))
        metadata += [(f"{layout.stem}.{key}", "string", value) for key, value in strings.items()]
        entries += own
        layouts.append(layout)
    bare = FolderPlan(FORMAT, model.spec.model_type, chosen.name, tuple(entries), layouts=tuple(layouts))
    config = compose(model, schemes, layouts)
    generation = genai(model, layouts[0], positions, gathered.files)
    notes = (*_portable(schemes), *architectures.notes(model.spec, positions), *gathered.notes)
    lines = [*bare.fallback_lines(), *notes]
    files |= {
        "config.json": _json(config),
        GENAI: _json(generation),
        "README.md": card(model, chosen.name, schemes[0].js, bare.bits_per_weight, lines),
    }
    metadata += [(f"config.{key}", "json", value) for key, value in config.items()]
    made = (Companion(name, content) for name, content in files.items())
    return replace(bare, metadata=tuple(metadata), notes=notes, companions=(*made, *gathered.files.values()))


def _decided(scheme: Scheme, model: SourceModel) -> Scheme:
    if isinstance(scheme, Portable) and scheme.name == portable.AUTO_BITS:
        return replace(scheme, bits=portable.decided(model.bits))
    return scheme


def _positions(model: SourceModel, asked: int | None) -> int:
    if asked is None:
        return min(model.spec.context_length, POSITIONS)
    if not 1 <= asked <= MAX_POSITIONS:
        raise UsageError(f"--set max_positions={asked}: should be from 1 to {MAX_POSITIONS}")
    return asked


def _checked(accuracy_level: int, logits: str) -> tuple[int, Literal["all", "last"]]:
    if accuracy_level not in LEVELS:
        raise UsageError(f"--set accuracy_level={accuracy_level}: should be one of {', '.join(map(str, LEVELS))}")
    if logits not in ("all", "last"):
        raise UsageError(f"--set logits={logits}: should be all or last")
    return accuracy_level, "last" if logits == "last" else "all"


def _entries(model: SourceModel, scheme: Scheme) -> list[Entry]:
    """The tensors of one graph, under names that no other graph of the folder has."""
    entries = []
    for tensor in model.spec.tensors():
        choice = scheme.choose(tensor)
        name = f"{STEMS[scheme.js]}/{tensor.name}"
        entries.append(Entry(name, choice.format, tensor.shape, tensor, choice.wanted, via=choice.via))
    return entries


def _tables(model: SourceModel, scheme: Scheme, positions: int) -> list[Table]:
    """Cosines and sines of every rotary embedding that some layer has."""
    ropes = dict.fromkeys(layer.mixer.rope for layer in model.spec.layers)
    return [
        Table(f"rope.{number}.{function}", rope, function, positions, scheme.dtype)
        for number, rope in enumerate(rope for rope in ropes if rope is not None)
        for function in ("cos", "sin")
    ]


def _portable(schemes: tuple[Scheme, ...]) -> list[str]:
    return [portable.NOTE] if any(scheme.name in (*portable.SCHEMES, "q4f16") for scheme in schemes) else []


def _strings(model: SourceModel, scheme: Scheme, positions: int) -> dict[str, str]:
    """What a graph says about itself."""
    strings = {
        SCHEME_KEY: scheme.name,
        NAME_KEY: model.name.encode("utf-8", "replace").decode(),
        POSITIONS_KEY: str(positions),
        "smolexport.version": installed_version(),
    }
    return {**strings, CALIBRATION_KEY: model.calibration} if model.calibration else strings


def _json(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=4, ensure_ascii=False) + "\n").encode()


def bit_choices(tensor: Tensor) -> tuple[int, ...]:
    """Bits that the scheme `auto-bits` can give `tensor`, most first: those that all formats share."""
    return portable.BIT_CHOICES if tensor.is_matrix and tensor.columns % portable.BLOCK == 0 else ()


def size(plan: Plan) -> int:
    """Bytes of all files of the folder."""
    layouts = plan.layouts if isinstance(plan, FolderPlan) else ()
    return sum(layout.nbytes for layout in layouts) + sum(c.nbytes for c in plan.companions)


@contextmanager
def output(plan: Plan, path: Path, *, force: bool = False) -> Iterator[Sink]:
    """Open the folder `path` for the plan's tensors; it appears whole, when the block ends, or not at all.

    Args:
        plan: what `plan` made.
        path: the target folder.
        force: replace an earlier output that stands there.

    Raises:
        OutputError: the target exists or cannot be written.
        UsageError: a plan of another converter.
    """
    if not isinstance(plan, FolderPlan):
        raise UsageError(f"{path}: a plan for {plan.target} cannot be written as {FORMAT}")
    check_target(path, size(plan), force=force, replaceable=replaceable)
    names = [*(layout.data for layout in plan.layouts), *(companion.name for companion in plan.companions)]
    with atomic_folder(path, replaceable=replaceable if force else None) as folder, ExitStack() as stack:
        for companion in plan.companions:
            target = folder / companion.name
            target.parent.mkdir(exist_ok=True)
            target.write_bytes(companion.read())
        files = []
        for layout in plan.layouts:
            file = stack.enter_context((folder / layout.data).open("wb"))
            file.truncate(layout.nbytes)
            for table in layout.tables:
                file.seek(layout.arrays[table.name].offset)
                for chunk in table.chunks():
                    file.write(chunk.data)
            files.append(file)
        places = {name: found for layout in plan.layouts for name, found in layout.places.items()}
        yield Sink([path / name for name in names], files, places)
