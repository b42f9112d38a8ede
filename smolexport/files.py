"""Files on disk: only regular files are read, and outputs appear whole or not at all.

An output is written to a hidden file or folder beside its target, flushed to disk, then renamed.
"""

from __future__ import annotations

import contextlib
import errno
import math
import os
import re
import secrets
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from io import BufferedReader
from pathlib import Path
from typing import BinaryIO

from smolexport.cleanup import Provisional
from smolexport.errors import OutputError

SUFFIX, ASIDE = ".partial", ".replaced"
STILL_WRITING = 300.0  # seconds without a write after which a hidden file counts as abandoned
LEFT = {
    ASIDE: "is an earlier output that an export had set aside when it was killed; rename or delete it",
    SUFFIX: "is left from an export that was killed; it can be deleted",
}
LOCK_STEP = 0.05  # seconds between two attempts


def open_regular(path: Path) -> BufferedReader:
    """Open a regular file for reading; raises OSError, also for a pipe or device, which might block forever."""
    mode = path.stat().st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):  # the system refuses to open a folder
        raise OSError(errno.EINVAL, "is not a regular file", str(path))
    return path.open("rb")


def check_target(
    path: Path,
    nbytes: int,
    *,
    force: bool = False,
    replaceable: Callable[[Path], bool] | None = None,
    option: str = "-o",
) -> None:
    """Refuse, before any work, a target that exists, whose folder does not, or that does not fit on the disk.

    Args:
        path: the file or folder to be written.
        nbytes: its size.
        force: replace an existing output.
        replaceable: whether an existing folder is an earlier output, which `force` replaces; None = a file is written.
        option: the option that names the target, for messages.

    Raises:
        OutputError: any of these.
    """
    try:
        _check_free(path, force, replaceable, option)
        check_space(path.parent, nbytes, option=option)
    except OSError as error:  # a name that no file can have, a disk that does not answer
        raise OutputError(f"{path}: {error.strerror or error}; give another name with {option}") from error


def _check_free(path: Path, force: bool, replaceable: Callable[[Path], bool] | None, option: str = "-o") -> None:
    """Refuse a target that cannot be written or replaced; arguments and error as for `check_target`."""
    exists, refusal = path.is_symlink() or path.exists(), ""
    if replaceable is None:
        if path.is_dir():
            refusal = "is a folder; give a file name"
        elif exists and not path.exists():
            refusal = "is a link to nothing; remove it, or give another name"
        elif exists and not path.is_file():
            refusal = "is a device or pipe, not a file that can be replaced; give another name"
    elif exists:
        if path.is_symlink() or not path.is_dir():
            refusal = "is not a folder, and the output is one; give another name"
        elif not any(path.iterdir()):
            exists = False
        elif not replaceable(path):
            refusal = "is a folder but not an earlier output, so it is never replaced; give another name"
    if exists and not force:
        refusal = refusal or "exists already; pass --force to replace it, or another name"
    if refusal:
        raise OutputError(f"{path}: {refusal} with {option}")


def check_space(folder: Path, nbytes: int, *, option: str = "-o") -> None:
    """Refuse a folder that is missing, cannot be written to, or has less than `nbytes` free; raises OutputError."""
    if not folder.is_dir():
        raise OutputError(f"{folder}: no such folder; create it, or give another place with {option}")
    if not os.access(folder, os.W_OK):
        raise OutputError(f"{folder}: cannot be written to; give another place with {option}")
    free = shutil.disk_usage(folder).free
    if free < nbytes:
        raise OutputError(f"{folder}: {nbytes / 1e6:,.0f} MB are needed, {free / 1e6:,.0f} MB are free")


def check_parent(folder: Path) -> None:
    """Refuse a folder for outputs that `made_folder` could not create; raises OutputError."""
    try:
        if not folder.is_dir():
            if os.path.lexists(folder):
                raise OutputError(f"{folder}: is not a folder; give another one with -o")
            if not folder.parent.is_dir():
                raise OutputError(f"{folder.parent}: no such folder; create it, or give another place with -o")
    except OSError as error:  # a name that no file can have
        raise OutputError(f"{folder}: {error.strerror or error}; give another folder with -o") from error


def refuse_own_source(path: Path, source: Path, *, folder: bool, ours: Callable[[Path], bool]) -> None:
    """Refuse, even with --force, to replace the checkpoint in `source`, a file of it, or the working folder.

    `folder`: whether the target `path` is a folder; `ours`: whether a file is an output of the same format, which may
    be replaced in the checkpoint's folder, too.  Raises OutputError.
    """
    target = path.resolve()
    for what, place in (("the checkpoint", source.resolve()), ("the working folder", Path.cwd())):
        if folder and (place == target or target in place.parents):
            raise OutputError(f"{path}: is or contains {what}, which is never replaced; give another name with -o")
    if not folder and target.parent == source.resolve() and target.exists() and not ours(target):
        raise OutputError(f"{path}: is a file of the checkpoint itself, never replaced; give another name with -o")


@contextlib.contextmanager
def atomic_file(path: Path, *, force: bool = False) -> Iterator[BinaryIO]:
    """A binary file that appears as `path` if the block ends without an error.

    Raises OutputError if the disk is full, the folder cannot be written to, or `path` has appeared meanwhile.
    """
    partial = _hidden(path)
    with Provisional(lambda: partial.unlink(missing_ok=True), partial):
        try:
            with partial.open("xb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            _publish(partial, path, force)
        except OSError as error:
            raise OutputError(f"{path}: {error.strerror or error}; nothing was written") from error


@contextlib.contextmanager
def atomic_folder(path: Path, *, replaceable: Callable[[Path], bool] | None = None) -> Iterator[Path]:
    """A folder to fill, which appears as `path` if the block ends without an error.

    An existing folder that is `replaceable`, an earlier output, is set aside and removed once the new one is in place;
    None: nothing is replaced.  Raises OutputError as `atomic_file` does.
    """
    partial = _hidden(path)
    aside = partial.with_suffix(ASIDE)
    with Provisional(lambda: _settle(path, partial, aside), partial, aside):
        try:
            partial.mkdir()
            yield partial
            for name in sorted(p for p in partial.rglob("*") if p.is_file()):
                with name.open("r+b") as file:
                    os.fsync(file.fileno())
            _publish_folder(partial, path, aside, replaceable)
        except OSError as error:
            raise OutputError(f"{path}: {error.strerror or error}; nothing was written") from error


@contextlib.contextmanager
def made_folder(path: Path) -> Iterator[None]:
    """Create the folder `path` if missing, and remove it again if the block ends in an error; raises OutputError."""
    if path.is_dir():
        yield
        return
    with Provisional(path.rmdir, keep=True) as made:  # rmdir fails if something else has been put there
        try:
            path.mkdir()
        except OSError as error:
            made.forget()  # another's, if any
            raise OutputError(f"{path}: {error.strerror or error}; give another folder with -o") from error
        yield


@contextlib.contextmanager
def scratch_folder(prefix: str, parent: Path | None = None) -> Iterator[Path]:
    """A folder for the block, in `parent` or the system's temporary folder; its name starts with `prefix`."""
    folder = (parent or Path(tempfile.gettempdir())) / f"{prefix}{secrets.token_hex(8)}"
    with Provisional(lambda: shutil.rmtree(folder, ignore_errors=True), folder):
        folder.mkdir(mode=0o700)
        yield folder


@contextlib.contextmanager
def locked(path: Path, patience: float | None = None, refusal: str = "is in use") -> Iterator[int | None]:
    """Hold the lock on the file `path`, created if missing; yields its descriptor.

    The system releases the lock once the holder and every child that inherited the descriptor have ended.  On a system
    without such locks nothing is held, and None is yielded.  Raises OutputError with `refusal` if another process still
    holds it after `patience` seconds (None: no limit).
    """
    try:
        import fcntl
    except ImportError:  # Windows
        yield None
        return
    try:
        file = path.open("ab")
    except OSError as error:
        raise OutputError(f"{path}: {error.strerror or error}") from error
    with file:
        end = math.inf if patience is None else time.monotonic() + patience
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > end:
                    raise OutputError(f"{path}: {refusal}") from None
                time.sleep(LOCK_STEP)
            except OSError:  # a file system without locks
                break
        yield file.fileno()


def leftovers(path: Path) -> list[str]:
    """A line for each file or folder that earlier exports to `path`, killed minutes ago, left beside it."""
    # The random part has a fixed form: otherwise `x` would claim what belongs to `x.gguf`.
    name = re.compile(re.escape(_prefix(path)) + f"[a-z0-9_]{{8}}({re.escape(SUFFIX)}|{re.escape(ASIDE)})")
    found = []
    with contextlib.suppress(OSError):
        for file in sorted(path.parent.iterdir()):
            with contextlib.suppress(OSError):  # it may vanish meanwhile
                if not name.fullmatch(file.name):
                    continue
                written = max(p.stat().st_mtime for p in (file, *file.rglob("*")))
                if time.time() - written > STILL_WRITING:
                    found.append(f"{file} {LEFT[file.suffix]}")
    return found


def _prefix(path: Path) -> str:
    return f".{path.name[:40]}."


def _hidden(path: Path) -> Path:
    """An unused name beside `path`.

    Not from tempfile, which creates a file before its name is known here: a signal between the two would leave it.
    """
    return path.parent / f"{_prefix(path)}{secrets.token_hex(4)}{SUFFIX}"


def _publish(partial: Path, path: Path, force: bool) -> None:
    """Give `partial` its final name; without `force` only if that is free."""
    linked = False
    if not force:
        try:
            path.hardlink_to(partial)  # fails if the name exists, in one step: of two exports exactly one succeeds
            linked = True
        except OSError:  # or the file system has no hard links
            if os.path.lexists(path):
                raise OutputError(f"{path}: appeared while it was being written; pass --force to replace it") from None
    if not linked:
        partial.replace(path)
    _flush(path.parent)


def _publish_folder(partial: Path, path: Path, aside: Path, replaceable: Callable[[Path], bool] | None) -> None:
    taken = os.path.lexists(path) and (path.is_symlink() or not path.is_dir() or any(path.iterdir()))
    if taken:
        if replaceable is None:
            raise OutputError(f"{path}: appeared while it was being written; pass --force to replace it")
        _check_free(path, True, replaceable)  # once more: minutes have passed
    _flush(partial)
    if taken:
        path.rename(aside)
    partial.rename(path)  # fails, in one step, if a folder that is not empty is in the way
    _flush(path.parent)


def _settle(path: Path, partial: Path, aside: Path) -> None:
    """Leave the new folder, or else the earlier one, as `path`, and nothing beside it."""
    if os.path.lexists(aside) and not os.path.lexists(path):
        aside.rename(path)
    shutil.rmtree(partial, ignore_errors=True)
    shutil.rmtree(aside, ignore_errors=True)


def _flush(path: Path) -> None:
    """fsync a file or folder; skipped where the system cannot sync folders."""
    with contextlib.suppress(OSError):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
