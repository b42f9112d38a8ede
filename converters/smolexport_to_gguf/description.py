"""What a GGUF file is, for `inspect`, `list` and `compare`: format, scheme, sizes, metadata, tensors."""

from __future__ import annotations

from math import prod
from pathlib import Path

from smolexport import portable
from smolexport.description import Description, TensorRow
from smolexport_to_gguf.container import GgufFile, read_gguf
from smolexport_to_gguf.metadata import SCHEME_KEY
from smolexport_to_gguf.schemes import SCHEMES

__all__ = ["describe"]


def describe(path: Path) -> Description:
    """Read the header of `path`; no tensor data.

    Raises:
        FileFormatError: not GGUF, or damaged.
    """
    file = read_gguf(path)
    rows = tuple(TensorRow(t.name, t.shape, t.format.name, t.nbytes, t.offset) for t in file.tensors.values())
    nbytes, weights = sum(r.nbytes for r in rows), sum(prod(r.shape) for r in rows)
    return Description(
        path=path,
        format="gguf",
        architecture=str(file.get("general.architecture", "?")),
        name=str(file.get("general.name", path.stem)),
        scheme=_scheme_name(file),
        bytes=path.stat().st_size,
        weights=weights,
        bits_per_weight=8 * nbytes / weights if weights else 0.0,
        metadata={key: value for key, (_, value) in file.metadata.items()},
        tensors=rows,
    )


def _scheme_name(file: GgufFile) -> str:
    if file.get(SCHEME_KEY) in SCHEMES:
        return str(file.get(SCHEME_KEY))
    code = file.get("general.file_type")
    return next(
        (s.name for s in SCHEMES.values() if s.file_type == code and s.name not in portable.SCHEMES),
        "?" if code is None else f"file type {code}",
    )
