"""What an MLX folder is, for `inspect` and `compare`: format, scheme, sizes, metadata, tensors."""

from __future__ import annotations

import re
from collections import Counter
from math import prod
from pathlib import Path

from smolexport.conversion.file_info import FileInfo, TensorRow
from smolexport.conversion.folder_files import TEMPLATES, is_companion
from smolexport.errors import FileFormatError
from smolexport_to_mlx.container import INDEX, read_header
from smolexport_to_mlx.reading import Folder, read_folder
from smolexport_to_mlx.schemes import SCHEMES

SCHEME_KEY, NAME_KEY = "smolexport.scheme", "smolexport.name"
MARK = ("format", "mlx")
WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors")
OURS = frozenset({"config.json", "README.md", INDEX})


def recognises(path: Path) -> bool:
    """Whether `path` is a folder whose weight files say that they are MLX's."""
    try:
        if not (path / "config.json").is_file():
            return False
        first = min(path.glob("model*.safetensors"), default=None)
        return first is not None and read_header(first)[0].get(MARK[0]) == MARK[1]
    except (OSError, FileFormatError):
        return False


def replaceable(path: Path) -> bool:
    """Whether `path` is a folder that smolexport made, every weight file of it, and that holds nothing else.

    A file with a name that no export writes, a link or a folder of another name makes it somebody's own.
    """
    try:
        if path.is_symlink() or not path.is_dir():
            return False
        weights = []
        for entry in path.rglob("*"):
            name = entry.relative_to(path).as_posix()
            if entry.is_symlink() or not (entry.is_file() or (entry.is_dir() and name == TEMPLATES)):
                return False
            if WEIGHTS.fullmatch(name):
                weights.append(entry)
            elif entry.is_file() and name not in OURS and not is_companion(name):
                return False
        return bool(weights) and all(SCHEME_KEY in read_header(file)[0] for file in weights)
    except (OSError, FileFormatError):
        return False


def describe(path: Path) -> FileInfo:
    """Read the headers in the folder `path`, of any architecture; no tensor data.

    What is not a weight of a known kind is listed as the array that it is.

    Raises:
        FileFormatError: damaged, or no MLX folder.
    """
    folder = read_folder(path)
    rows = (
        *(TensorRow(name, s.shape, s.form.name, s.nbytes, s.parts[0].offset) for name, s in folder.stored.items()),
        *(TensorRow(a.name, a.shape, a.dtype.lower(), a.nbytes, a.offset) for a in folder.others),
    )
    nbytes, count = sum(r.nbytes for r in rows), sum(prod(r.shape) for r in rows)
    return FileInfo(
        path=path,
        format="mlx",
        architecture=str(folder.config.get("model_type", "?")),
        name=folder.metadata.get(NAME_KEY, path.resolve().name),
        scheme=_scheme(folder),
        bytes=sum(file.stat().st_size for file in path.rglob("*") if file.is_file()),
        weights=count,
        bits_per_weight=8 * nbytes / count if count else 0.0,
        metadata={**folder.metadata, **{f"config.{key}": value for key, value in folder.config.items()}},
        tensors=rows,
    )


def _scheme(folder: Folder) -> str:
    """The scheme on record; of a folder that another tool made, the format of most weights."""
    recorded = folder.metadata.get(SCHEME_KEY)
    if recorded in SCHEMES:
        return str(recorded)
    sizes: Counter[str] = Counter()
    for stored in folder.stored.values():
        sizes[stored.form.name] += prod(stored.shape)
    return sizes.most_common(1)[0][0] if sizes else "?"
