"""What an MLX folder is, for `inspect` and `compare`: format, scheme, sizes, metadata, tensors."""

from __future__ import annotations

from collections import Counter
from math import prod
from pathlib import Path

from smolexport.description import Description, TensorRow
from smolexport_to_mlx.container import read_header
from smolexport_to_mlx.reading import Folder, read_folder
from smolexport_to_mlx.schemes import SCHEMES

__all__ = ["NAME_KEY", "SCHEME_KEY", "describe", "recognises"]

SCHEME_KEY, NAME_KEY = "smolexport.scheme", "smolexport.name"
MARK = ("format", "mlx")


def recognises(path: Path) -> bool:
    """Whether `path` is a folder whose weight files say that they are MLX's."""
    from smolexport.errors import FileFormatError

    try:
        if not (path / "config.json").is_file():
            return False
        first = min(path.glob("model*.safetensors"), default=None)
        return first is not None and read_header(first)[0].get(MARK[0]) == MARK[1]
    except (OSError, FileFormatError):
        return False


def describe(path: Path) -> Description:
    """Read the headers in the folder `path`; no tensor data.

    Raises:
        FileFormatError: damaged, or no MLX folder.
    """
    folder = read_folder(path)
    rows = tuple(
        TensorRow(tensor.source, stored.shape, stored.form.name, stored.nbytes, stored.parts[0].offset)
        for tensor, stored in folder.tensors.items()
    )
    nbytes, count = sum(r.nbytes for r in rows), sum(prod(r.shape) for r in rows)
    return Description(
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
    for stored in folder.tensors.values():
        sizes[stored.form.name] += prod(stored.shape)
    return sizes.most_common(1)[0][0] if sizes else "?"
