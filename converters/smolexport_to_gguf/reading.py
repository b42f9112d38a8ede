"""What a GGUF file contains: weights, a description, and what llama.cpp would refuse in it.

Facts: llama.cpp `ggml/src/gguf.cpp`, `src/llama-model-loader.cpp`, `src/llama-model.cpp`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from smolexport.conversion import portable
from smolexport.conversion.inspect import FileInfo, StoredArray, StoredRows, TensorRow
from smolexport.conversion.plan import InterleaveHeads
from smolexport.conversion.source_model import SCHEME_KEY
from smolexport.errors import FileFormatError
from smolexport.files import open_regular
from smolexport.model.spec import Role, Tensor
from smolexport.text import label, show
from smolexport_to_gguf import architectures
from smolexport_to_gguf.container import MAGIC, GgufFile, TensorInfo, read_gguf
from smolexport_to_gguf.schemes import SCHEMES

MAX_LAYERS = 4096
MAX_NAME = 63  # bytes; ggml keeps names in 64 with the zero behind them
EMBEDDING = "token_embd.weight"
TOKENS = "tokenizer.ggml.tokens"


def recognises(path: Path) -> bool:
    """Whether `path` is a file that starts like GGUF."""
    try:
        with open_regular(path) as file:
            return file.read(4) == MAGIC
    except OSError:
        return False


def describe(path: Path) -> FileInfo:
    """Read the header of `path`; no tensor data.  Raises FileFormatError: not GGUF, or damaged."""
    file = read_gguf(path)
    name = file.text("general.name")
    return FileInfo(
        path=path,
        format="gguf",
        architecture=file.text("general.architecture") or "?",
        name=path.stem if name is None else name,
        scheme=_scheme_name(file),
        bytes=path.stat().st_size,
        metadata={key: value for key, (_, value) in file.metadata.items()},
        tensors=tuple(TensorRow(t.name, t.shape, t.format.name, t.nbytes, t.offset) for t in file.tensors.values()),
    )


def _scheme_name(file: GgufFile) -> str:
    recorded, code = file.text(SCHEME_KEY), file.whole("general.file_type")
    if recorded is not None and recorded in SCHEMES:
        return recorded
    return next(
        (s.name for s in SCHEMES.values() if s.file_type == code and s.name not in portable.NAMES),
        "?" if code is None else f"file type {code}",
    )


def lint(path: Path) -> list[str]:
    """What llama.cpp is known to refuse in the file `path`; raises FileFormatError.

    Checked: the architecture is named, tensor names fit, the embedding has a row for every token.
    """
    return list(_findings(read_gguf(path)))


def _findings(file: GgufFile) -> Iterator[str]:
    if file.text("general.architecture") is None:
        yield "general.architecture is missing or not text; llama.cpp does not load such a file"
    for name in file.tensors:
        if len(name.encode("utf-8", "replace")) > MAX_NAME:
            yield f"the tensor name {label(name)} has more than {MAX_NAME} bytes; llama.cpp does not load such a file"
    embedding, (kind, tokens) = file.tensors.get(EMBEDDING), file.metadata.get(TOKENS, ("", ()))
    listed = kind == "[string]" and file.text("tokenizer.ggml.model") != "none"
    if embedding is not None and listed and len(tokens) != embedding.shape[0]:
        yield f"{TOKENS} holds {len(tokens)} tokens, {EMBEDDING} has {embedding.shape[0]} rows; llama.cpp refuses that"


def weights(path: Path) -> dict[Tensor, StoredRows]:
    """The tensors of the file `path` in the checkpoint's terms and order of rows; raises FileFormatError."""
    file = read_gguf(path)
    a, known = file.text("general.architecture"), ", ".join({row.name: None for row in architectures.ROWS.values()})
    row = next((r for r in architectures.ROWS.values() if r.name == a), None)
    if a is None:
        raise FileFormatError(f"{path}: general.architecture is missing or not text; known: {known}")
    if row is None:
        raise FileFormatError(f"{path}: unknown architecture {show(a)}; known: {known}")
    interleave = InterleaveHeads(_head_dim(file, row.name)) if row.pairs else None
    found, left = {}, set(file.tensors) - {"rope_freqs.weight"}
    for tensor in _candidates(file, row.name):
        info = file.tensors.get(architectures.output_name(tensor))
        if info is None:
            continue
        moved = interleave if tensor.role in (Role.Q, Role.K) else None
        if len(info.shape) > 2 or (moved and info.shape[0] % moved.head_dim):
            raise FileFormatError(
                f"{path}: tensor {label(info.name)} has shape {list(info.shape)}; the file is damaged"
            )
        found[replace(tensor, shape=info.shape)] = _stored(path, info, moved)
        left.discard(info.name)
    if left:
        raise FileFormatError(f"{path}: tensor {label(min(left))} has no role in the architecture {row.name}")
    return found


def _stored(path: Path, info: TensorInfo, interleaved: InterleaveHeads | None) -> StoredRows:
    array = StoredArray(info.name, path, info.format.name, info.shape, info.offset, info.nbytes)
    return StoredRows(info.format, info.shape, (array,), transform=interleaved)


def _head_dim(file: GgufFile, a: str) -> int:
    """Rows of a head, from the first key that exists; raises FileFormatError unless they are an even number."""
    for key in (f"{a}.attention.key_length", f"{a}.rope.dimension_count"):
        if key in file.metadata:
            return _pairs(file, file.whole(key), key)
    heads, width = file.whole(f"{a}.attention.head_count"), file.whole(f"{a}.embedding_length")
    if heads is None or width is None or heads < 1 or width % heads:
        raise FileFormatError(f"{file.path}: has no head length; the file is damaged")
    return _pairs(file, width // heads, f"{a}.embedding_length / {a}.attention.head_count")


def _pairs(file: GgufFile, length: int | None, source: str) -> int:
    if length is None or length < 2 or length % 2:
        found = "not an integer" if length is None else f"{length}, not a positive even number"
        raise FileFormatError(f"{file.path}: the length of a head ({source}) is {found}; the file is damaged")
    return length


def _candidates(file: GgufFile, a: str) -> list[Tensor]:
    count = file.whole(f"{a}.block_count")
    if count is None or not 0 <= count <= MAX_LAYERS:
        found = "missing or not an integer" if count is None else f"{count}"
        raise FileFormatError(f"{file.path}: {a}.block_count is {found}; the file is damaged")
    layered = {role: "{}" in name for role, name in architectures.NAMES.items()}
    places: list[tuple[Role, tuple[int, ...]]] = [(role, ()) for role in Role if not layered[role]]
    places += [(role, (layer,)) for layer in range(count) for role in Role if layered[role]]
    return [Tensor(role, index, part, ()) for role, index in places for part in ("weight", "bias")]
