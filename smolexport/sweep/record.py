"""What is known from earlier sweeps: a record per task, and hashes of the checkpoints' files.

Both are JSON files that anything may have damaged; what cannot be understood counts as missing.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path, PurePath
from typing import Any

from smolexport.files import atomic_file
from smolexport.model.identity import combined_hash, file_hash, files_of
from smolexport.sweep.plan import STATE, Task

Facts = Mapping[str, Any]
Shape = Mapping[Any, Any]

SETTLED = 2.0  # seconds since the last write, below which a second one could leave the same date

# Shapes of JSON values: a type, a tuple of alternatives, [shape of all items], {key: shape, ...: shape of the others}.
NUMBER = (float, None)
PLAIN = (None, bool, float, str, [str])
EXPORTED: Shape = {
    "inputs": {...: PLAIN}, "files": {...: {"bytes": float, ...: PLAIN}}, "bytes": float, "bits_per_weight": float,
    "seconds": float, "notes": (None, [str]), ...: PLAIN,
}  # fmt: skip
COMPARED: Shape = {
    "inputs": {...: PLAIN}, "kld": {...: NUMBER}, "top1_agreement": float, "perplexity_ratio": NUMBER,
    "seconds": float, "notes": (None, [str]), ...: PLAIN,
}  # fmt: skip
RECORD: Shape = {
    "source": str, "format": str, "scheme": str, "target": str, "error": str, "exported": (None, EXPORTED),
    "compared": (None, COMPARED), ...: PLAIN,
}  # fmt: skip


@dataclass(frozen=True)
class TaskRecord:
    """The record of a task."""

    source: str  # the checkpoint: a hub id, or the folder's full path
    format: str
    scheme: str
    target: str = ""  # the output, relative to the sweep's folder; what has this name belongs to the sweep
    # `inputs`, all that the output depends on; `files` by name, each with `bytes` and `sha256`; `bytes`, `weights`,
    # `bits_per_weight`, `notes`, `seconds`
    exported: Facts | None = None
    compared: Facts | None = None  # `inputs`; figures as `compare --json` names them; `notes`, `seconds`
    error: str = ""  # why the last attempt failed


def path_of(task: Task) -> Path:
    """The file of the record of `task`."""
    return Path(task.config.out) / STATE / "records" / task.name / f"{task.key.name}.json"


def empty(task: Task, error: str = "") -> TaskRecord:
    """A record of `task` with nothing in it but, perhaps, an error."""
    return TaskRecord(task.origin, task.format, task.scheme, error=error)


def read_record(task: Task) -> TaskRecord:
    """The record of `task`; an empty one if there is none, or none that can be understood."""
    try:
        return parsed(path_of(task).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return empty(task)


def parsed(text: str) -> TaskRecord:
    """The inverse of `dumped`; raises ValueError."""
    try:
        found = json.loads(text)
    except RecursionError as error:
        raise ValueError("is not a record") from error
    if not _fits(found, RECORD):
        raise ValueError("is not a record")
    record = TaskRecord(**{field.name: found.get(field.name) for field in fields(TaskRecord)})
    if not all(map(_is_path, [record.target, *(record.exported or {"files": ()})["files"]])):
        raise ValueError("is not a record")
    return record


def _fits(value: Any, shape: Any) -> bool:
    """Whether a JSON value has this shape; a number is finite."""
    if isinstance(shape, tuple):
        return any(_fits(value, one) for one in shape)
    if isinstance(shape, list):
        return isinstance(value, list) and all(_fits(item, shape[0]) for item in value)
    if isinstance(shape, dict):
        keys = (shape.keys() | value.keys()) - {...} if isinstance(value, dict) else ()
        return isinstance(value, dict) and all(_fits(value.get(key), shape.get(key, shape[...])) for key in keys)
    if shape is float:
        return type(value) in (int, float) and abs(value) <= sys.float_info.max  # which NaN is not
    return value is None if shape is None else isinstance(value, shape)


def _is_path(name: str) -> bool:
    """Whether this system could have a file of this name below a folder."""
    try:
        os.fsencode(name)
    except UnicodeError:
        return False
    return "\0" not in name and not PurePath(name).is_absolute() and ".." not in PurePath(name).parts


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
    """Whether `record` holds the export and the comparison that `task` needs; a comparison may not be needed."""
    exported, compared = record.exported or {}, record.compared or {}
    made = exported.get("inputs") == export_inputs(task) and _is_present(task, record, exported["files"])
    return made, made and (task.config.text is None or compared.get("inputs") == compare_inputs(task))


def holding(task: Task, record: TaskRecord) -> TaskRecord:
    """`record` without an export or a comparison that is not the one that `task` needs."""
    made, compared = done(task, record)
    return replace(record, exported=record.exported if made else None, compared=record.compared if compared else None)


def _is_present(task: Task, record: TaskRecord, files: Facts) -> bool:
    """Whether every file of the output has the recorded size."""
    folder = (Path(task.config.out) / record.target).parent
    try:
        return bool(files) and all((folder / name).stat().st_size == facts["bytes"] for name, facts in files.items())
    except OSError:
        return False


def signature(folder: Path) -> str:
    """A hash of names, sizes and dates of a checkpoint's files, which changes whenever one of them does."""
    total = hashlib.sha256()
    for path in files_of(folder):
        stat = path.stat()
        total.update(f"{path.relative_to(folder).as_posix()} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    return total.hexdigest()


class Hashes:
    """Hashes of files, kept from sweep to sweep with the sizes and dates at which they were taken."""

    def __init__(self, path: Path) -> None:
        """`path`: the file that holds them."""
        self._path = path
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            found = None
        entries = found.items() if isinstance(found, dict) else ()
        self._known: dict[str, list[Any]] = {name: value for name, value in entries if _is_entry(value)}

    def fingerprint(self, folder: Path) -> str:
        """One hash for names and contents of all files of the checkpoint in `folder`; raises CheckpointError."""
        return combined_hash([(path.relative_to(folder).as_posix(), path) for path in files_of(folder)], self._hash)

    def _hash(self, path: Path) -> str:
        stat = path.stat()
        # the second date is the system's: copying and unpacking can restore the first one, but not that
        seen = [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]
        *earlier, mark = self._known.get(str(path), [""])
        if seen == earlier:
            return str(mark)
        mark = file_hash(path)
        if abs(time.time() - max(stat.st_mtime, stat.st_ctime)) > SETTLED:
            self._known[str(path)] = [*seen, mark]
        return mark

    def save(self) -> None:
        """Write them to the file; raises OutputError."""
        with atomic_file(self._path, force=True) as file:
            file.write(json.dumps(self._known, indent=1, sort_keys=True).encode())


def _is_entry(value: Any) -> bool:
    """Whether `value` holds size, two dates, inode number and hash of a file."""
    if not isinstance(value, list) or [type(one) for one in value] != [int, int, int, int, str]:
        return False
    return re.fullmatch("[0-9a-f]{64}", value[4]) is not None
