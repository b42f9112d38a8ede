"""The files of a checkpoint's folder: they must be inside it, and must not change while they are read.

A checkpoint comes from strangers, and exports of it get published.  A symbolic link named like one of its files may
point to any file of the user's, so every file is looked up here before it is read or copied.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import TypeAlias

from smolexport.errors import CheckpointError
from smolexport.text import label

# Fetched for a hub id, besides its weights.  The hub's `*` crosses folders, so these cover all chat templates; a local
# folder needs the last pattern of the second line for them.
SMALL_FILES = ("*.json", "*.jinja", "merges.txt", "README.md", "LICENSE*")
PATTERNS = (*SMALL_FILES, "*.safetensors", "additional_chat_templates/*.jinja")
# Those that affect an export.  Trainers and exports write others into the same folder.
DECIDING = (
    """config.json generation_config.json tokenizer.json tokenizer_config.json special_tokens_map.json added_tokens.json
    vocab.json merges.txt chat_template.json *.safetensors.index.json *.safetensors *.jinja LICENSE* README.md
    additional_chat_templates/*.jinja"""
).split()
# Suffixes of the files that any reader of such a folder may open.
READ = frozenset(
    {".json", ".jinja", ".txt", ".model", ".md", ".tiktoken", ".safetensors", ".onnx", ".onnx_data", ".data"}
)

Stamp: TypeAlias = tuple[int, int, int, int]
Stamps: TypeAlias = Mapping[str, Stamp]


def file_in(folder: Path, name: str) -> Path | None:
    """The file `name` of the checkpoint in `folder`; None if it does not exist.

    Symbolic links are followed inside the folder, and into the blobs of the hub's cache if the folder is a snapshot.

    Raises:
        CheckpointError: a link out of the folder or to nothing, not a regular file (reading a pipe would block), or a
            path that cannot be examined.
    """
    path, shown = folder / name, folder / label(name)
    try:
        if not os.path.lexists(path):
            return None
        target, home = Path(os.path.realpath(path)), Path(os.path.realpath(folder))
        homes = [home, home.parent.parent / "blobs"] if home.parent.name == "snapshots" else [home]
        if not any(target.is_relative_to(place) for place in homes):
            raise CheckpointError(
                f"{shown}: is a link out of the checkpoint's folder, which is never followed; "
                "put a copy of the file in its place, or remove it"
            )
        mode = path.stat().st_mode
    except FileNotFoundError:
        raise CheckpointError(f"{shown}: is a link to nothing; the download is incomplete") from None
    except OSError as error:  # a name that no file can have, links in a circle
        raise CheckpointError(f"{shown}: {error.strerror or error}") from error
    if not stat.S_ISREG(mode):
        raise CheckpointError(f"{shown}: is not a regular file; put the checkpoint's own file in its place")
    return path


def files_in(folder: Path, pattern: str) -> list[Path]:
    """The files, not folders, of a checkpoint in `folder` that match a pattern, sorted; raises CheckpointError."""
    names = sorted(path.relative_to(folder).as_posix() for path in folder.glob(pattern) if not path.is_dir())
    return [path for name in names if (path := file_in(folder, name))]


def refuse_links(folder: Path) -> None:
    """Raise CheckpointError if a file in `folder` is a link out of it: for libraries, which follow every link."""
    for pattern in ("*", "*/*"):
        for path in sorted(folder.glob(pattern)):
            if path.suffix in READ and not (path.is_dir() and not path.is_symlink()):
                file_in(folder, path.relative_to(folder).as_posix())


def stamps(folder: Path) -> Stamps:
    """Device, inode, size and modification time of each file that affects an export, by name."""
    found = {}
    for path in {path for pattern in DECIDING for path in folder.glob(pattern)}:
        try:
            at = path.stat()
        except OSError:  # reported by whoever reads it
            continue
        found[path.relative_to(folder).as_posix()] = at.st_dev, at.st_ino, at.st_size, at.st_mtime_ns
    return found


def refuse_changes(folder: Path, before: Stamps) -> None:
    """Raise CheckpointError if a file was replaced, rewritten, added or removed since `before` was taken."""
    now = stamps(folder)
    for name in sorted(before.keys() | now.keys()):
        if before.get(name) != now.get(name):
            raise CheckpointError(
                f"{folder / label(name)}: changed while the checkpoint was read, and nothing was written; "
                "wait until whatever writes to the folder is done, then start again"
            )
