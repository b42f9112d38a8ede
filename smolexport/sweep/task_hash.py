"""Whether a checkpoint is still the same: a hash over its files, of which only those that changed are read again."""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from smolexport.files import atomic_file
from smolexport.model.identity import combined_hash, file_hash, files_of

SETTLED = 2.0  # seconds since the last write, below which a second one could leave the same date


def signature(folder: Path) -> str:
    """Sizes and dates of the files of a checkpoint: another one means that some have changed."""
    total = hashlib.sha256()
    for path in files_of(folder):
        stat = path.stat()
        total.update(f"{path.relative_to(folder).as_posix()} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    return total.hexdigest()


class Hashes:
    """Hashes of files, kept from sweep to sweep with the sizes and dates at which they were taken."""

    def __init__(self, path: Path) -> None:
        """`path`: where they are kept; what is not readable there is as good as nothing."""
        self._path = path
        self._known: dict[str, Sequence[Any]] = {}
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return
        if isinstance(found, dict):
            self._known = {name: value for name, value in found.items() if _is_hash(value)}

    def fingerprint(self, folder: Path) -> str:
        """One hash for names and contents of all files of the checkpoint in `folder`.

        Raises:
            CheckpointError: a file cannot be read.
        """
        return combined_hash([(path.relative_to(folder).as_posix(), path) for path in files_of(folder)], self._hash)

    def _hash(self, path: Path) -> str:
        stat = path.stat()
        # the second date is the system's: copying and unpacking can restore the first one, but not that
        seen = [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]
        known = self._known.get(str(path))
        if known is not None and seen == list(known[:4]):
            return cast(str, known[4])
        mark = file_hash(path)
        if abs(time.time() - max(stat.st_mtime, stat.st_ctime)) > SETTLED:
            self._known[str(path)] = [*seen, mark]
        return mark

    def save(self) -> None:
        """Keep what is known; raises OutputError."""
        kept: Mapping[str, Sequence[Any]] = dict(sorted(self._known.items()))
        with atomic_file(self._path, force=True) as file:
            file.write(json.dumps(kept, indent=1).encode())


def _is_hash(value: Any) -> bool:
    """Whether `value` is size, two dates, number and hash of a file."""
    if not isinstance(value, list) or [type(one) for one in value] != [int, int, int, int, str]:
        return False
    return re.fullmatch("[0-9a-f]{64}", value[4]) is not None
