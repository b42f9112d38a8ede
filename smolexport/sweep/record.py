"""What is known of a task from earlier: a small JSON file that is written when something is done, never before."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path, PurePath
from typing import Any

from smolexport.files import atomic_file
from smolexport.sweep.plan import STATE, Task

Facts = Mapping[str, Any]
Check = Callable[[Any], bool]


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) <= sys.float_info.max  # which NaN is not


def _is_plain(value: Any) -> bool:
    """A number, truth value, text or nothing; or a list of texts."""
    if isinstance(value, list):
        return all(isinstance(item, str) for item in value)
    return value is None or isinstance(value, (str, bool)) or _is_number(value)


def _is_path(value: Any) -> bool:
    """Whether `value` is the name of a file below a folder, as this system may have it."""
    if not isinstance(value, str) or "\0" in value:
        return False
    try:
        os.fsencode(value)
    except UnicodeError:
        return False
    return not PurePath(value).is_absolute() and ".." not in PurePath(value).parts


def _table_of(check: Check) -> Check:
    return lambda value: isinstance(value, dict) and all(map(check, value.values()))


def _is_file(facts: Any) -> bool:
    return _table_of(_is_plain)(facts) and _is_number(facts.get("bytes"))


def _are_files(value: Any) -> bool:
    return _table_of(_is_file)(value) and all(map(_is_path, value))


def _or_nothing(check: Check) -> Check:
    return lambda value: value is None or check(value)


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and _is_plain(value)


# What is used or shown of a record is what it should be; whatever else is there is plain.
NUMBER_OR_NOTHING = _or_nothing(_is_number)
EXPORTED: Mapping[str, Check] = {
    "inputs": _table_of(_is_plain), "files": _are_files, "bytes": _is_number, "bits_per_weight": _is_number,
    "seconds": _is_number, "notes": _or_nothing(_are_texts),
}  # fmt: skip
COMPARED: Mapping[str, Check] = {
    "inputs": _table_of(_is_plain), "kld": _table_of(NUMBER_OR_NOTHING), "top1_agreement": _is_number,
    "seconds": _is_number, "notes": _or_nothing(_are_texts), "perplexity_ratio": NUMBER_OR_NOTHING,
}  # fmt: skip


@dataclass(frozen=True)
class TaskRecord:
    """The record of a task.

    Attributes:
        source: the checkpoint: a hub id, or the folder's full path.
        format: of the output.
        scheme: of the output.
        target: the output, from the sweep's folder on; whatever stands there is the sweep's.  Empty before the plan.
        exported: what was made of what: `inputs`; `files` by their names beside the target, each with `bytes` and
            `sha256`; `bytes`, `weights`, `bits_per_weight`, `notes`, `seconds`.  None before that.
        compared: how far the output is from the checkpoint: `inputs`, figures as `compare --json` names them,
            `seconds`.
        error: why the last attempt failed; empty where it did not.
    """

    source: str
    format: str
    scheme: str
    target: str = ""
    exported: Facts | None = None
    compared: Facts | None = None
    error: str = ""


def path_of(task: Task) -> Path:
    """Where the record of `task` lies."""
    key = task.key
    return Path(task.config.out) / STATE / "records" / key.parent / f"{key.name}.json"


def empty(task: Task, error: str = "") -> TaskRecord:
    """The record of a task of which nothing is known but, perhaps, an error."""
    return TaskRecord(task.origin, task.format, task.scheme, error=error)


def read_record(task: Task) -> TaskRecord:
    """The record of `task`; an empty one where there is none, or nothing that can be understood."""
    try:
        return parsed(path_of(task).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return empty(task)


def parsed(text: str) -> TaskRecord:
    """What `dumped` made a text of; raises ValueError."""
    try:
        found = json.loads(text)
        record = TaskRecord(**{field.name: found[field.name] for field in fields(TaskRecord)})
    except (LookupError, TypeError, RecursionError) as error:
        raise ValueError("is not a record") from error
    sound = _is_path(record.target) and all(
        isinstance(text, str) for text in (record.source, record.format, record.scheme, record.error)
    )
    if not (sound and _has(record.exported, EXPORTED) and _has(record.compared, COMPARED)):
        raise ValueError("is not a record")
    return record


def _has(part: Any, checks: Mapping[str, Check]) -> bool:
    if not isinstance(part, dict):
        return part is None
    others = (value for name, value in part.items() if name not in checks)
    return all(check(part.get(name)) for name, check in checks.items()) and all(map(_is_plain, others))


def dumped(record: TaskRecord, indent: int | None = None) -> str:
    """As JSON, on one line without `indent`."""
    return json.dumps(asdict(record), indent=indent, allow_nan=False) + "\n"


def write_record(task: Task, record: TaskRecord) -> None:
    """Replace the record of `task`; raises OutputError."""
    path = path_of(task)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path, force=True) as file:
        file.write(dumped(record, indent=2).encode())


def export_inputs(task: Task) -> dict[str, Any]:
    """All that the output of `task` depends on."""
    return {
        "checkpoint": task.fingerprint,
        "name": task.name,
        "format": task.format,
        "scheme": task.scheme,
        "ignore_config": sorted(task.config.ignore_config),
        "smolexport": task.config.version,
    }


def compare_inputs(task: Task) -> dict[str, Any]:
    """What the comparison depends on besides checkpoint and output."""
    text = (task.config.text or "").encode()
    return {
        "text": hashlib.sha256(text).hexdigest()[:32],
        "window": task.config.window,
        "max_windows": task.config.max_windows,
    }


def done(task: Task, record: TaskRecord) -> tuple[bool, bool]:
    """Whether the export and the comparison that `record` tells of are those that `task` asks for.

    A comparison that is not asked for is done.
    """
    exported = record.exported
    made = exported is not None and exported.get("inputs") == export_inputs(task) and _stands(task, record, exported)
    compared = record.compared is not None and record.compared.get("inputs") == compare_inputs(task)
    return made, made and (compared or task.config.text is None)


def holding(task: Task, record: TaskRecord) -> TaskRecord:
    """`record` without what it tells of another checkpoint, of other wishes, or of an output that is not there."""
    made, compared = done(task, record)
    exported = record.exported if made else None
    return replace(record, exported=exported, compared=record.compared if compared else None)


def _stands(task: Task, record: TaskRecord, exported: Facts) -> bool:
    """Whether every file of the output is there with the recorded size."""
    folder, files = (Path(task.config.out) / record.target).parent, exported["files"]
    try:
        return bool(files) and all((folder / name).stat().st_size == facts["bytes"] for name, facts in files.items())
    except OSError:
        return False
