"""Outputs appear whole or not at all: a hidden file beside the target, flushed to disk, then renamed."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from smolexport.errors import OutputError

__all__ = ["atomic_file", "check_target", "leftovers"]

SUFFIX = ".partial"
STILL_WRITING = 300.0  # seconds without a write after which a hidden file is taken for abandoned


def check_target(path: Path, nbytes: int, *, force: bool = False) -> None:
    """Refuse, before any work, a target that exists, has no folder, or does not fit on the disk.

    Args:
        path: the file to be written.
        nbytes: its size.
        force: an existing file may be replaced.

    Raises:
        OutputError: says which of these, and what to do.
    """
    try:
        _check_target(path, nbytes, force)
    except OSError as error:  # a name that no file can have, a disk that does not answer
        raise OutputError(f"{path}: {error.strerror or error}; give another name with -o") from error


def _check_target(path: Path, nbytes: int, force: bool) -> None:
    folder = path.parent
    if path.is_dir():
        raise OutputError(f"{path}: is a folder; give a file name with -o")
    if path.exists() and not path.is_file():
        raise OutputError(f"{path}: is a device or pipe, not a file that can be replaced; give another name with -o")
    if path.exists() and not force:
        raise OutputError(f"{path}: exists already; pass --force to replace it, or another name with -o")
    if not folder.is_dir():
        raise OutputError(f"{folder}: no such folder; create it, or give another place with -o")
    if not os.access(folder, os.W_OK):
        raise OutputError(f"{folder}: cannot be written to; give another place with -o")
    free = shutil.disk_usage(folder).free
    if free < nbytes:
        raise OutputError(f"{folder}: {nbytes / 1e6:,.0f} MB are needed, {free / 1e6:,.0f} MB are free")


@contextlib.contextmanager
def atomic_file(path: Path, *, force: bool = False) -> Iterator[BinaryIO]:
    """A binary file that appears as `path` when the block ends without an error, and never otherwise.

    Raises:
        OutputError: the disk is full or the folder cannot be written to; also when `path` appeared meanwhile.
    """
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=_prefix(path), suffix=SUFFIX)
    except OSError as error:
        raise OutputError(f"{path}: {error.strerror}; nothing was written") from error
    partial = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        _publish(partial, path, force)
    except OSError as error:
        raise OutputError(f"{path}: {error.strerror or error}; nothing was written") from error
    finally:
        partial.unlink(missing_ok=True)


def leftovers(path: Path) -> list[Path]:
    """Hidden files of earlier exports to `path` that were killed, and that nobody has written to for minutes."""
    # The middle is what tempfile makes up: without this, `x` would claim what belongs to `x.gguf`.
    name = re.compile(re.escape(_prefix(path)) + "[a-z0-9_]{8}" + re.escape(SUFFIX))
    now, found = time.time(), []
    with contextlib.suppress(OSError):
        for file in path.parent.iterdir():
            with contextlib.suppress(OSError):  # it may vanish while we look
                if name.fullmatch(file.name) and now - file.stat().st_mtime > STILL_WRITING:
                    found.append(file)
    return sorted(found)


def _prefix(path: Path) -> str:
    return f".{path.name[:40]}."


def _link(partial: Path, path: Path) -> bool:
    """Give `partial` its final name unless that is taken; False where the file system has no hard links.

    A link fails when the name exists, in one step: of two exports to one name exactly one succeeds.
    """
    try:
        path.hardlink_to(partial)
    except OSError:
        if path.exists():
            raise OutputError(f"{path}: appeared while it was being written; pass --force to replace it") from None
        return False
    return True


def _publish(partial: Path, path: Path, force: bool) -> None:
    # mkstemp makes files private; give the output the usual permissions.
    mask = os.umask(0)
    os.umask(mask)
    partial.chmod(0o666 & ~mask)
    if force or not _link(partial, path):
        partial.replace(path)
    with contextlib.suppress(OSError):  # not every system can flush a folder
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
