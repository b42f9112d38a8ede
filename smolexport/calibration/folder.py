"""Whose folder it is: a run with the same arguments goes on, one with others is refused, other things stay."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from smolexport.calibration.statistics import (
    HEAD_FILE,
    MANIFEST,
    TEACHER_FILE,
    TOKENS_FILE,
    Manifest,
    read_manifest,
)
from smolexport.errors import CalibrationError, OutputError

__all__ = ["HIDDEN", "claim", "clear"]

HIDDEN = ("hidden-0.f32", "hidden-1.f32")
LONGEST = 60  # characters of a fact in a message
OURS = (MANIFEST, TOKENS_FILE, HEAD_FILE, TEACHER_FILE, *HIDDEN)


def claim(folder: Path, wanted: Manifest, force: bool) -> Manifest | None:
    """Take the folder; returns the manifest of an earlier run with the same arguments, None without one.

    Args:
        folder: one that is there.
        wanted: what is asked for; windows and hashes of ids in it are not looked at.
        force: statistics with other arguments are removed.

    Raises:
        CalibrationError: the folder holds statistics with other arguments.
        OutputError: it holds other things.
    """
    others = sorted(path.name for path in folder.iterdir() if not _is_ours(path.name))
    if others:
        raise OutputError(f"{folder}: holds {others[0]}, which is no statistic; give another folder with -o")
    if force:
        clear(folder)
    for path in folder.glob(".*.partial"):  # left by a run that was killed
        path.unlink()
    if not (folder / MANIFEST).exists():
        clear(folder)
        return None
    found = read_manifest(folder)
    differs = list(_differences(found, wanted))
    if differs:
        raise CalibrationError(
            f"{folder}: holds statistics with {_some(differs, '; ')}; give another folder with -o, or --force"
        )
    return found


def _differences(found: Manifest, wanted: Manifest) -> Iterable[str]:
    """What another run was asked for otherwise."""
    if found.checkpoint != wanted.checkpoint:
        yield "another checkpoint"
    names = {
        "method": "method", "asked": "--tokens", "window": "--window", "seed": "--seed", "layers": "layers",
        "kept": "predictions of",
    }  # fmt: skip
    for key, name in names.items():
        old, new = getattr(found, key), getattr(wanted, key)
        if old != new:
            yield f"{name} {_short(old)}, not {new}"
    if found.method == wanted.method == "text":
        old_texts, new_texts = ([(s.name, s.sha256) for s in m.sources] for m in (found, wanted))
        if old_texts != new_texts:
            yield f"other --text files ({_some([_short(name) for name, _ in old_texts], ', ')})"
    for name in sorted({*found.versions, *wanted.versions}):
        old, new = found.versions.get(name, "nothing"), wanted.versions.get(name, "nothing")
        if old != new:
            yield f"{_short(name)} {_short(old)}, not {new}"


def _short(value: object) -> str:
    """A stranger's fact for a message; a manifest holds only what can be printed."""
    text = str(value)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}…"


def _some(words: Sequence[str], between: str) -> str:
    more = f" and {len(words) - 3} more" if len(words) > 3 else ""
    return between.join(words[:3]) + more


def _is_ours(name: str) -> bool:
    layer = name.startswith("layer-") and name.endswith(".safetensors")
    partial = name.startswith(".") and name.endswith(".partial")
    return name in OURS or layer or partial


def clear(folder: Path) -> None:
    """Remove the statistics, the manifest first: what is left without one is never believed."""
    (folder / MANIFEST).unlink(missing_ok=True)
    for path in folder.iterdir():
        if _is_ours(path.name):
            path.unlink()
