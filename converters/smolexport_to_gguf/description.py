"""What a GGUF file is, for `inspect`, `list` and `compare`: format, scheme, sizes, metadata, tensors."""

from __future__ import annotations

from math import prod
from pathlib import Path

from smolexport.conversion import portable
from smolexport.conversion.file_info import FileInfo, TensorRow
from smolexport_to_gguf.container import GgufFile, read_gguf
from smolexport_to_gguf.metadata import SCHEME_KEY
from smolexport_to_gguf.schemes import SCHEMES


def describe(path: Path) -> FileInfo:
    """Read the header of `path`; no tensor data.

    Raises:
        FileFormatError: not GGUF, or damaged.
    """
    file = read_gguf(path)
    rows = tuple(TensorRow(t.name, t.shape, t.format.name, t.nbytes, t.offset) for t in file.tensors.values())
    name = file.text("general.name")
    nbytes, weights = sum(r.nbytes for r in rows), sum(prod(r.shape) for r in rows)
    return FileInfo(
        path=path,
        format="gguf",
        architecture=file.text("general.architecture") or "?",
        name=path.stem if name is None else name,
        scheme=_scheme_name(file),
        bytes=path.stat().st_size,
        weights=weights,
        bits_per_weight=8 * nbytes / weights if weights else 0.0,
        metadata={key: value for key, (_, value) in file.metadata.items()},
        tensors=rows,
    )


def _scheme_name(file: GgufFile) -> str:
    recorded, code = file.text(SCHEME_KEY), file.whole("general.file_type")
    if recorded is not None and recorded in SCHEMES:
        return recorded
    return next(
        (s.name for s in SCHEMES.values() if s.file_type == code and s.name not in portable.NAMES),
        "?" if code is None else f"file type {code}",
    )
