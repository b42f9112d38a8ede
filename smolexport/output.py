"""Outputs appear whole or not at all: a hidden file or folder beside the target, flushed to disk, then renamed."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from smolexport.errors import OutputError

__all__ = ["atomic_file", "atomic_folder", "check_target", "leftovers", "made_folder"]

SUFFIX = ".partial"
STILL_WRITING = 300.0  # seconds without a write after which a hidden file is taken for abandoned


def check_target(
    path: Path, nbytes: int, *, force: bool = False, replaceable: Callable[[Path], bool] | None = None
) -> None:
    """Refuse, before any work, a target that exists, has no folder, or does not fit on the disk.

    Args:
        path: the file or folder to be written.
        nbytes: its size.
        force: an existing output may be replaced.
        replaceable: for a folder, whether an existing one is an earlier output, which alone `force` may replace;
            None = the target is a file.

    Raises:
        OutputError: says which of these, and what to do.
    """
    try:
        if replaceable is None:
            _check_file(path, force)
        else:
            _check_folder(path, force, replaceable)
        _check_place(path.parent, nbytes)
    except OSError as error:  # a name that no file can have, a disk that does not answer
        raise OutputError(f"{path}: {error.strerror or error}; give another name with -o") from error


def _check_file(path: Path, force: bool) -> None:
    if path.is_dir():
        raise OutputError(f"{path}: is a folder; give a file name with -o")
    if path.exists() and not path.is_file():
        raise OutputError(f"{path}: is a device or pipe, not a file that can be replaced; give another name with -o")
    if path.exists() and not force:
        raise OutputError(f"{path}: exists already; pass --force to replace it, or another name with -o")


def _check_folder(path: Path, force: bool, replaceable: Callable[[Path], bool]) -> None:
    if not path.exists() and not path.is_symlink():
        return
    if path.is_symlink() or not path.is_dir():
        raise OutputError(f"{path}: is no folder, and one is to be written; give another name with -o")
    if not any(path.iterdir()):
        return
    if not replaceable(path):
        raise OutputError(f"{path}: is a folder with other things in it, never replaced; give another name with -o")
    if not force:
        raise OutputError(f"{path}: exists already; pass --force to replace it, or another name with -o")


def _check_place(folder: Path, nbytes: int) -> None:
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


@contextlib.contextmanager
def atomic_folder(path: Path, *, force: bool = False) -> Iterator[Path]:
    """A folder to fill, which appears as `path` when the block ends without an error, and never otherwise.

    With `force` a folder that stands there is set aside, and removed once the new one is in its place.

    Raises:
        OutputError: the disk is full or the place cannot be written to; also when `path` appeared meanwhile.
    """
    try:
        partial = Path(tempfile.mkdtemp(dir=path.parent, prefix=_prefix(path), suffix=SUFFIX))
    except OSError as error:
        raise OutputError(f"{path}: {error.strerror}; nothing was written") from error
    try:
        yield partial
        for name in sorted(p for p in partial.rglob("*") if p.is_file()):
            with name.open("r+b") as file:
                os.fsync(file.fileno())
        _publish_folder(partial, path, force)
    except OSError as error:
        raise OutputError(f"{path}: {error.strerror or error}; nothing was written") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextlib.contextmanager
def made_folder(path: Path) -> Iterator[None]:
    """Make the folder `path` for outputs, unless it is there, and remove it again when the block ends in an error.

    Raises:
        OutputError: it cannot be made.
    """
    made = not path.is_dir()
    try:
        if made:
            path.mkdir()
    except OSError as error:
        raise OutputError(f"{path}: {error.strerror or error}; give another folder with -o") from error
    try:
        yield
    except BaseException:
        if made:
            with contextlib.suppress(OSError):  # something else may have been put there meanwhile
                path.rmdir()
        raise


def leftovers(path: Path) -> list[Path]:
    """What earlier exports to `path` left hidden beside it when killed, and nobody has written to for minutes."""
    # The middle is what tempfile makes up: without this, `x` would claim what belongs to `x.gguf`.
    name = re.compile(re.escape(_prefix(path)) + "[a-z0-9_]{8}" + re.escape(SUFFIX))
    now, found = time.time(), []
    with contextlib.suppress(OSError):
        for file in path.parent.iterdir():
            with contextlib.suppress(OSError):  # it may vanish while we look
                if name.fullmatch(file.name) and now - _last_write(file) > STILL_WRITING:
                    found.append(file)
    return sorted(found)


def _last_write(path: Path) -> float:
    """Of a file, or of anything in a folder; seconds since the epoch."""
    return max(p.stat().st_mtime for p in (path, *path.rglob("*")))


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
    _open_up(partial, 0o666)
    if force or not _link(partial, path):
        partial.replace(path)
    _flush(path.parent)


def _publish_folder(partial: Path, path: Path, force: bool) -> None:
    _open_up(partial, 0o777)
    aside = partial.with_suffix(".replaced")
    if path.exists() and any(path.iterdir()):
        if not force:
            raise OutputError(f"{path}: appeared while it was being written; pass --force to replace it")
        path.rename(aside)
    try:
        partial.rename(path)  # fails, in one step, where a folder with something in it stands
    except OSError:
        if aside.exists():
            aside.rename(path)
        raise
    _flush(path.parent)
    shutil.rmtree(aside, ignore_errors=True)


def _open_up(partial: Path, mode: int) -> None:
    """Give what tempfile made private the usual permissions."""
    mask = os.umask(0)
    os.umask(mask)
    partial.chmod(mode & ~mask)


def _flush(path: Path) -> None:
    """To the disk, as far as the system can: not every one can flush a folder."""
    with contextlib.suppress(OSError):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
