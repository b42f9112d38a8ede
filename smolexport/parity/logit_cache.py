"""Cache of the reference's logits on disk: scoring can read them repeatedly, and a second comparison need not run the
reference.

An entry is a folder named by a hash of everything that the logits depend on: the checkpoint's bytes, the runtime with
its version and options, the windows.  Entries appear completely or not at all; the least recently used ones are removed
to make room.  Each entry holds a checksum of its files and is not used if it does not match.

Notation: n = rows, v = vocab_size.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from smolexport.errors import FileFormatError, OutputError, SessionError
from smolexport.files import check_space, open_regular, scratch_folder

LOGITS, FACTS, SUM = "logits.npy", "facts.json", "blake2b"
ROOM = 16 << 30  # most bytes of all entries together
SETTLED = 2.0  # seconds after a write in which another write could leave the same modification time
BF16, F32 = np.dtype("<u2"), np.dtype("<f4")
# NumPy's header for these arrays; NumPy's own reader evaluates the header as Python.
HEADER_BYTES = 128
HEADER = re.compile(
    rb"\x93NUMPY\x01\x00\x76\x00\{'descr': '(<u2|<f4)', 'fortran_order': False, "
    rb"'shape': \(([1-9][0-9]{0,14}), ([1-9][0-9]{0,14})\), \} *\n"
)


class LogitStore:
    """Logits [n, v] in a .npy file: float32, or bfloat16 as the upper halves of float32 numbers."""

    def __init__(self, path: Path) -> None:
        """Raises FileFormatError if `path` was not written by `write_logits`."""
        self._path = path
        try:
            with path.open("rb") as file:
                found = HEADER.fullmatch(file.read(HEADER_BYTES))
            size = path.stat().st_size
        except OSError as error:
            raise FileFormatError(f"{path}: is not an array of logits ({error.strerror})") from error
        if found is None:
            raise FileFormatError(f"{path}: is not an array of logits; delete it")
        self._dtype, (self.rows, self.vocab_size) = np.dtype(found[1].decode()), map(int, found.groups()[1:])
        if size != HEADER_BYTES + math.prod((self.rows, self.vocab_size, self._dtype.itemsize)):
            raise FileFormatError(f"{path}: is damaged; delete it")

    def blocks(self, first: int, count: int, step: int) -> Iterator[NDArray[np.float32]]:
        """Rows [first, first + count), in even parts of at most `step` rows: [.., v] float32.

        Raises FileFormatError if the file is truncated.
        """
        for part in np.array_split(np.arange(first, first + count), -(-count // step)):
            size = len(part) * self.vocab_size
            offset = HEADER_BYTES + int(part[0]) * self.vocab_size * self._dtype.itemsize
            stored = np.fromfile(self._path, self._dtype, size, offset=offset)
            if len(stored) < size:
                raise FileFormatError(f"{self._path}: is truncated; delete it")
            rows = stored.reshape(len(part), self.vocab_size)
            yield rows if self._dtype == F32 else (rows.astype("<u4") << 16).view("<f4")


def write_logits(path: Path, rows: int, vocab_size: int, blocks: Iterable[NDArray[np.float32]], *, bf16: bool) -> None:
    """Write `blocks` of logits, together [rows, v], for `LogitStore`; `bf16`: they are bfloat16 numbers.

    Raises OutputError if the disk has not enough room, and SessionError if they should be bfloat16 numbers and are not.
    """
    dtype = BF16 if bf16 else F32
    check_space(path.parent, rows * vocab_size * dtype.itemsize)
    shape = {"descr": npy.dtype_to_descr(dtype), "fortran_order": False, "shape": (rows, vocab_size)}
    with path.open("wb") as file:
        npy.write_array_header_1_0(file, shape)
        for logits in blocks:
            bits = np.ascontiguousarray(logits, "<f4")
            if bf16:
                halves = bits.view("<u4")
                if (halves & 0xFFFF).any():
                    raise SessionError("the reference computes in bf16, but its logits are not bfloat16 numbers")
                bits = (halves >> 16).astype(BF16)
            file.write(bits.reshape(-1).view(np.uint8).data)
        file.flush()
        os.fsync(file.fileno())  # after a power loss a file may have its full length but hold zeros


class LogitCache:
    """The entries in `folder`; with None, in a temporary folder that is removed on exit.

    Attributes:
        folder: where the entries are.
        notes: a line per damaged entry.
    """

    def __init__(self, folder: Path | None) -> None:
        self._own = ExitStack()
        self.folder = folder or self._own.enter_context(scratch_folder("smolexport-logits-"))
        self.folder.mkdir(parents=True, exist_ok=True)
        self._sound: set[str] = set()  # keys of entries whose checksum was verified
        self.notes: list[str] = []

    def __enter__(self) -> LogitCache:
        return self

    def __exit__(self, *exc: object) -> None:
        self._own.close()

    def find(self, key: str) -> tuple[Path, dict[str, Any]] | None:
        """The entry's folder and facts; None if it is missing, or damaged and therefore removed."""
        entry = self.folder / key
        if not os.path.lexists(entry):
            return None
        try:
            if key not in self._sound and (entry / SUM).read_text(encoding="ascii") != _sum(entry):
                raise FileFormatError(f"{entry}: is damaged; delete it")
            facts = dict(json.loads((entry / FACTS).read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError, RecursionError, FileFormatError):
            self.remove(key)
            return None
        self._sound.add(key)
        with suppress(OSError):
            os.utime(entry)  # last use
        return entry, facts

    def remove(self, key: str) -> None:
        """Remove the damaged entry `key`."""
        entry = self.folder / key
        self._sound.discard(key)
        self.notes.append(f"{entry}: the cached logits were damaged; the reference was run again")
        shutil.rmtree(entry, ignore_errors=True)
        with suppress(OSError):
            entry.unlink(missing_ok=True)  # not a folder

    @contextmanager
    def making(self, key: str) -> Iterator[tuple[Path, dict[str, Any]]]:
        """A folder to write the entry in, and a dict for its facts; the entry appears when the block ends."""
        facts: dict[str, Any] = {}
        with scratch_folder(".making-", self.folder) as made:
            partial = made / key
            partial.mkdir()
            yield partial, facts
            (partial / FACTS).write_text(json.dumps(facts), encoding="utf-8")
            (partial / SUM).write_text(_sum(partial), encoding="ascii")
            with suppress(OSError):  # another process wrote the same entry
                partial.rename(self.folder / key)
                self._sound.add(key)
        with suppress(OSError):  # another process makes room too
            self._make_room(key)

    def _make_room(self, key: str) -> None:
        """Remove the least recently used entries while all of them together are too large, but not `key`."""
        entries = [entry for entry in self.folder.iterdir() if not entry.name.startswith(".")]
        sizes = {entry: sum(file.stat().st_size for file in entry.iterdir()) for entry in entries if entry.is_dir()}
        for entry in sorted(sizes, key=lambda entry: entry.stat().st_mtime):
            if sum(sizes.values()) <= ROOM:
                break
            if entry.name != key:
                shutil.rmtree(entry, ignore_errors=True)
                del sizes[entry]


def _sum(entry: Path) -> str:
    """Checksum of the names and contents of all files of an entry, except the checksum file."""
    total = hashlib.blake2b(digest_size=16)
    for file in sorted(entry.iterdir()):
        if file.name != SUM:
            total.update(f"{file.name} {_content.__wrapped__(file)}\n".encode())
    return total.hexdigest()


def usual_folder() -> Path:
    """The usual folder: in the assets of the Hugging Face cache, which HF_HOME and HF_ASSETS_CACHE move.

    Raises:
        OutputError: it cannot be created or written to.
    """
    from huggingface_hub import cached_assets_path

    try:
        folder = Path(cached_assets_path(library_name="smolexport", namespace="parity", subfolder="logits"))
    except (OSError, ValueError) as error:
        raise OutputError(str(error)) from error
    if not os.access(folder, os.W_OK):
        raise OutputError(f"{folder}: cannot be written to")
    return folder


def digest(path: Path, facts: Mapping[str, object], arrays: Sequence[NDArray[Any]]) -> str:
    """Key of an entry: a hash of `facts` (plain JSON values), `arrays` and the model at `path`.

    For a folder, config.json and all safetensors files count, with their names.  A process reads a file once, and again
    only if it has changed.
    """
    total = hashlib.blake2b(json.dumps(facts, sort_keys=True).encode(), digest_size=16)
    files = [path] if path.is_file() else sorted([*path.glob("config.json"), *path.glob("*.safetensors")])
    for file in files:
        stat = file.stat()
        written = max(stat.st_mtime, stat.st_ctime)
        read = _content if abs(time.time() - written) > SETTLED else _content.__wrapped__
        seen = (stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino, stat.st_dev)
        total.update(f"\n{file.name} {stat.st_size} {read(file, seen)}\n".encode())
    for array in arrays:
        total.update(f"\n{array.dtype.str} {array.shape}\n".encode())
        total.update(np.ascontiguousarray(array).tobytes())
    return total.hexdigest()


@lru_cache(maxsize=1024)
def _content(path: Path, _seen: tuple[int, ...] = ()) -> str:
    """Hash of the contents; `_seen` (size, times and inode) decides whether a known hash is still valid."""
    with open_regular(path) as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
