"""The files that make up a checkpoint, and hashes of them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from smolexport.errors import CheckpointError
from smolexport.files import open_regular
from smolexport.model.checkpoint import Checkpoint
from smolexport.model.source_files import PATTERNS, file_in, files_in


def files_of(folder: Path) -> list[Path]:
    """The files of a checkpoint that an export may read, in a fixed order.  Raises CheckpointError."""
    return sorted({path for pattern in PATTERNS for path in files_in(folder, pattern)})


def file_hash(path: Path) -> str:
    """SHA-256 of a regular file; raises OSError."""
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def combined_hash(files: Sequence[tuple[str, Path]], hash_of: Callable[[Path], str] = file_hash) -> str:
    """One hash of the names and contents of `files`, in their order; several are read at a time.

    Raises:
        CheckpointError: a file cannot be read.
    """
    total = hashlib.sha256()
    try:
        with ThreadPoolExecutor(4, thread_name_prefix="hash") as pool:
            for (name, _), mark in zip(files, pool.map(hash_of, (path for _, path in files)), strict=True):
                total.update(f"{mark} {name}\n".encode())
    except OSError as error:
        raise CheckpointError(f"{error.filename or files[0][1]}: {error.strerror or error}") from error
    return total.hexdigest()[:32]


def identity(checkpoint: Checkpoint) -> str:
    """One hash of what determines a checkpoint's output: its config.json, weights and tokenizer.json.

    Raises:
        CheckpointError: a file cannot be read.
    """
    small = [path for name in ("config.json", "tokenizer.json") if (path := file_in(checkpoint.folder, name))]
    paths = {*small, *(place.path for place in checkpoint.stored.values())}
    return combined_hash([(path.name, path) for path in sorted(paths, key=lambda path: path.name)])
