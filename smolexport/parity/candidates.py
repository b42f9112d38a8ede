"""Candidates from paths: the runtime of each file, the facts about it, its name in reports, how it was calibrated.

The calibration record in a file's metadata and the report beside the file are untrusted input: anything malformed gives
a note of one line and counts as absent.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from smolexport import plugins
from smolexport.calibration.texts import TextSource
from smolexport.conversion.source_model import CALIBRATION_KEY
from smolexport.errors import UsageError
from smolexport.files import open_regular
from smolexport.model.checkpoint import open_checkpoint
from smolexport.model.source_files import refuse_changes
from smolexport.parity.inputs import Candidate, Origin, Record
from smolexport.parity.results import CalibrationEffect, ModelInfo
from smolexport.run.session import Runtime
from smolexport.text import failure, printable
from smolexport.tokenizer import open_tokenizer, read_tokenizer

DTYPES = ("bf16", "f32")
LARGEST_REPORT = 1 << 26  # bytes; a larger one is not read
LONGEST_METHOD = 40  # characters: it is a column heading
_MALFORMED = (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError, OverflowError)


def reference(folder: Path, dtype: str = "bf16", *, ignore_config: Collection[str] = ()) -> Candidate:
    """The checkpoint in `folder`, run by the runtime of checkpoints in `dtype`.

    Raises:
        UsageError: the dtype is not supported.
        CheckpointError: the checkpoint is damaged or not supported.
        MissingDependencyError: torch or transformers is not installed.
    """
    if dtype not in DTYPES:
        raise UsageError(f"--dtype {dtype}: not supported; use {' or '.join(DTYPES)}")
    checkpoint = open_checkpoint(folder, ignore_config=ignore_config)
    vocab_size = checkpoint.spec.vocab_size
    return Candidate(
        path=folder,
        format="checkpoint",
        scheme=dtype,
        runtime=plugins.checkpoint_runtime(),
        bytes=checkpoint.nbytes,
        bits_per_weight=8 * checkpoint.nbytes / sum(t.size for t in checkpoint.stored),
        options={"dtype": dtype},
        origin=Origin(checkpoint.spec, lambda: open_tokenizer(folder, read_tokenizer(folder, vocab_size))),
        weights=lambda: checkpoint.stored,
        notes=checkpoint.notes,
        unchanged=partial(refuse_changes, folder, checkpoint.stamps),
    )


def exported(
    paths: Sequence[Path], options: Mapping[str, Any] | None = None, runtimes: Sequence[str] = ()
) -> list[Candidate]:
    """Exported files or folders, each with the runtime of its format, or with all of `runtimes` that can run it.

    Args:
        paths: exported files or folders.
        options: further options of the runtimes' `open`; each goes to the runtimes that have it.
        runtimes: names of runtimes to use instead of the first installed one.

    Raises:
        FileFormatError: the file does not exist, is damaged, is a checkpoint, or has an unknown format.
        UsageError: no runtime has an option, or a value is not valid; a runtime does not exist or can run none of the
            files.
        MissingDependencyError: a runtime is not installed.
    """
    pairs = [(path, runtime) for path in paths for runtime in _runtimes_for(path, runtimes)]
    for name in runtimes:
        adapter = plugins.adapter(plugins.find_runtime(name))
        if adapter not in [runtime for _, runtime in pairs]:
            raise UsageError(f"--runtime {name}: no file has the format '{adapter.READS}' that it reads")
    known = {runtime.NAME: plugins.known_options(runtime.open) for _, runtime in pairs}
    for key in options or {}:
        if not any(key in names for names in known.values()):
            available = "; ".join(f"{owner} has {', '.join(names) or 'none'}" for owner, names in known.items())
            raise UsageError(f"--set {key}: no runtime has such an option; {available}")
    return [_exported(path, runtime, options or {}, known[runtime.NAME]) for path, runtime in pairs]


def _exported(path: Path, runtime: Runtime, options: Mapping[str, Any], known: Collection[str]) -> Candidate:
    own = {key: value for key, value in options.items() if key in known}
    converter = plugins.converter_for(path)
    about = converter.describe(path)
    record, unreadable = read_calibration_record(about.metadata)
    errors, damaged = read_calibration_errors(path, record) if record else ((), "")
    return Candidate(
        path=path,
        format=about.format,
        scheme=about.scheme,
        runtime=runtime,
        bytes=about.bytes,
        bits_per_weight=about.bits_per_weight,
        options=plugins.checked_options(runtime.open, own, runtime.NAME),
        # the weights read back are those of the folder's first model
        weights=None if "graph" in own else partial(converter.weights, path),
        calibration=record,
        calibration_errors=errors,
        notes=tuple(filter(None, (unreadable, damaged))),
    )


def _runtimes_for(path: Path, names: Sequence[str]) -> list[Runtime]:
    """The named runtimes that can run `path`, each once; without any, the default one."""
    kind = plugins.converter_for(path).FORMAT
    found = dict.fromkeys(plugins.find_runtime(name) for name in names)
    return [plugins.runtime(name) for name in found if kind == plugins.adapter(name).READS] or [
        plugins.runtime_for(path)
    ]


def model_infos(models: Sequence[Candidate]) -> list[ModelInfo]:
    """The facts about `models`, each under a name of its own."""
    names = short_names([(model.path, model.runtime.NAME) for model in models])
    return [model.info(name) for model, name in zip(models, names, strict=True)]


def short_names(models: Sequence[tuple[Path, str]]) -> list[str]:
    """A unique short name for each (path, runtime): the file name, extended only where necessary.

    Files of equal names get their folder, then the whole path; one file on several runtimes gets the runtime; the same
    file on the same runtime gets a number.
    """
    found = [path.name or str(path) for path, _ in models]
    for step in range(4):
        owners: dict[str, set[object]] = {}
        for place, (name, (path, _)) in enumerate(zip(found, models, strict=True)):
            owners.setdefault(name, set()).add(path if step < 2 else place)
        for place, (name, (path, runtime)) in enumerate(zip(found, models, strict=True)):
            in_folder = f"{path.absolute().parent.name}/{path.name}"
            longer = in_folder, str(path), f"{name} on {runtime}", f"{name} #{place + 1}"
            found[place] = longer[step] if len(owners[name]) > 1 else name
    return [printable(name) for name in found]


def reference_name(path: Path) -> str:
    """Name of the checkpoint in `path`: `demo`, the hub's `owner/name`, or the folder's name."""
    from smolexport.demo import demo_checkpoint

    path = path.absolute()
    if path == demo_checkpoint().absolute():
        return "demo"
    hub = re.fullmatch(r"models--(.+?)--(.+)", path.parents[1].name if len(path.parents) > 1 else "")
    if hub and path.parent.name == "snapshots":
        return printable(f"{hub[1]}/{hub[2]}")
    return printable(path.name or str(path))


def read_calibration_record(metadata: Mapping[str, Any]) -> tuple[Record | None, str]:
    """The record in a file's metadata, None if absent or unreadable, and a note, empty if all is well."""
    if CALIBRATION_KEY not in metadata:
        return None, ""
    try:
        found = json.loads(str(metadata[CALIBRATION_KEY]))
        method, texts = found["method"], found.get("texts", [])
        if not isinstance(method, str) or not 0 < len(method) <= LONGEST_METHOD:
            raise ValueError("method is not a name")
        sources = tuple(TextSource(str(one["name"]), str(one["sha256"]), int(one["tokens"])) for one in texts)
        return Record(method, sources, int(found.get("tokens", 0)), str(found.get("windows_sha256", ""))), ""
    except _MALFORMED as error:
        return None, f"metadata {CALIBRATION_KEY} cannot be read ({failure(error)}): treated as not calibrated"


def read_calibration_errors(path: Path, record: Record) -> tuple[tuple[CalibrationEffect, ...], str]:
    """The errors in the report beside `path`, none without a report, and a note, empty if all is well."""
    from smolexport.recipe import sidecar_of

    report = sidecar_of(path)
    try:
        if not report.exists():
            return (), ""
        with open_regular(report) as file:
            data = file.read(LARGEST_REPORT + 1)
        if len(data) > LARGEST_REPORT:
            raise ValueError("too large")
        found = json.loads(data)
        if (found["method"], found["windows_sha256"]) != (record.method, record.windows_sha256):
            raise ValueError("it belongs to another file")
        return tuple(_effect(str(source), one) for source, one in found["tensors"].items()), ""
    except _MALFORMED as error:
        return (
            (),
            f"{report.name}: cannot be read ({failure(error)}): errors before and after calibration are not shown",
        )


def _effect(source: str, one: Mapping[str, Any]) -> CalibrationEffect:
    before, after = float(one["before"]), float(one["after"])
    if not (math.isfinite(before) and math.isfinite(after) and before >= 0 and after >= 0):
        raise ValueError(f"{source}: {before} and {after} are not valid errors")
    stem = source.removesuffix(".weight")
    layer = re.match(r"model\.layers\.(\d{1,6})\.", stem)
    return CalibrationEffect(source, int(layer[1]) if layer else None, stem.rpartition(".")[2], before, after)
