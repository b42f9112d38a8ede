"""llama.cpp's importance matrices: for each matrix the summed squares of its inputs, column by column; files and use.

Two forms exist.  The present one is a GGUF file of the type `imatrix`, with two f32 tensors per matrix, NAME.in_sum2
and NAME.counts.  The old one, usually `.dat`, is a list of (name, calls, values), the values being mean squares times
the calls, followed by the number of chunks and the name of the text.  Both may come from anywhere: every length and
number is checked before it is used.
Source: llama.cpp `tools/imatrix/imatrix.cpp`, `common/imatrix-loader.cpp`, `tools/quantize/quantize.cpp`,
`src/llama-quant.cpp`.

Notation: m = matrices under one name (1 unless a model has experts), c = input columns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smolexport.conversion import portable
from smolexport.conversion.plan import Entry
from smolexport.errors import FileFormatError, UsageError
from smolexport.files import atomic_file, check_target, open_regular
from smolexport.model.spec import Role, Tensor
from smolexport.quant import FORMATS, RowFormat
from smolexport.text import label, show
from smolexport_to_gguf.architectures import output_name
from smolexport_to_gguf.container import GgufFile, Metadata, Reader, TensorInfo, header_bytes, padding, read_gguf
from smolexport_to_gguf.schemes import Scheme

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

KIND = "imatrix"
DATASETS, CHUNK_COUNT, CHUNK_SIZE = "imatrix.datasets", "imatrix.chunk_count", "imatrix.chunk_size"
KEYS = {DATASETS: "[string]", CHUNK_COUNT: "u32", CHUNK_SIZE: "u32"}
SUMS, COUNTS = ".in_sum2", ".counts"
LONGEST_NAME = 63  # bytes, of any tensor in llama.cpp
MOST = 2**31 - 1  # a count of either form
OTHER = "give a file that llama-imatrix wrote"
LONGEST_VALUE = 127  # bytes that llama.cpp keeps of an overridden text


@dataclass(frozen=True)
class Statistic:
    """The inputs of one matrix.

    `sums` [m, c] float32, finite and not negative, are squares summed over tokens; `counts` [m] int64 are numbers of
    tokens (of the old form: of chunks).
    """

    sums: NDArray[np.float32] = field(repr=False)
    counts: NDArray[np.int64] = field(repr=False)

    def importance(self) -> NDArray[np.float32]:
        """[m * c] mean squares, in float32 as llama.cpp divides them; 1 if nothing was counted."""
        import numpy as np

        counts = self.counts.astype(np.float32)[:, None]
        means = self.sums / np.maximum(counts, np.float32(1))
        return np.where(counts > 0, means, np.float32(1)).reshape(-1)


@dataclass(frozen=True)
class Imatrix:
    """An importance matrix: a statistic per tensor name of the GGUF file that it is for, and names of the texts.

    `chunks` of text and `chunk_size` in tokens are 0 if unknown, as `chunk_size` is in the old form.
    """

    entries: Mapping[str, Statistic] = field(repr=False)
    datasets: tuple[str, ...] = ()
    chunks: int = 0
    chunk_size: int = 0


def read_imatrix(path: Path) -> Imatrix:
    """Read either form; raises FileFormatError."""
    try:
        with open_regular(path) as file:
            if file.read(4) != b"GGUF":
                file.seek(0)
                return _from_dat(Reader(file, path))
            found = read_gguf(path)
            file.seek(0)
            return _from_gguf(found, Reader(file, path))
    except OSError as error:
        raise FileFormatError(f"{path}: {error.strerror}; {OTHER}") from error


def _from_gguf(file: GgufFile, reader: Reader) -> Imatrix:
    kind = file.text("general.type")
    if kind not in (None, KIND):
        raise FileFormatError(f"{file.path}: is a GGUF file of type {show(kind)}, not an importance matrix; {OTHER}")
    for key, expected in KEYS.items():
        if key not in file.metadata or file.metadata[key][0] != expected:
            raise FileFormatError(f"{file.path}: {key} is missing or not {expected}; {OTHER}")
    pairs: dict[str, dict[str, TensorInfo]] = {}
    for name, info in file.tensors.items():
        for suffix in (SUMS, COUNTS):
            if name.endswith(suffix):
                pairs.setdefault(name.removesuffix(suffix), {})[suffix] = info
    entries = {name: _statistic(name, pair, reader) for name, pair in pairs.items()}
    if not entries:
        raise FileFormatError(f"{file.path}: has no tensor NAME{SUMS}; {OTHER}")
    chunks, size = min(file.get(CHUNK_COUNT), MOST), min(file.get(CHUNK_SIZE), MOST)
    return Imatrix(entries, tuple(file.get(DATASETS)), chunks, size)


def _statistic(name: str, pair: Mapping[str, TensorInfo], reader: Reader) -> Statistic:
    import numpy as np

    arrays = {}
    for suffix in (SUMS, COUNTS):
        if suffix not in pair:
            raise reader.fail(f"{label(name)} has no tensor {label(name + suffix)}")
        if pair[suffix].format is not FORMATS["f32"]:
            raise reader.fail(f"the tensor {label(name + suffix)} is {pair[suffix].format.name}, not f32")
        reader.file.seek(pair[suffix].offset)
        raw = reader.file.read(pair[suffix].nbytes)
        if len(raw) < pair[suffix].nbytes:
            raise reader.fail(f"the tensor {label(name + suffix)} was cut while it was read")
        arrays[suffix] = np.frombuffer(raw, "<f4")
    sums, counts = arrays[SUMS], arrays[COUNTS]
    if not counts.size or not sums.size or sums.size % counts.size:
        raise reader.fail(f"the tensor {label(name + SUMS)} has {sums.size} numbers for {counts.size} counts")
    wrong = np.flatnonzero(~((counts >= 0) & (counts <= MOST)))
    if wrong.size:
        raise reader.fail(f"the tensor {label(name + COUNTS)} has {counts[wrong[0]]} at [{wrong[0]}], not a count")
    whole = np.floor(counts.astype(np.float64) + 0.5).astype(np.int64)  # half a token counts as one
    return _checked(name, Statistic(sums.reshape(counts.size, -1).astype(np.float32), whole), reader)


def _from_dat(reader: Reader) -> Imatrix:
    """The old form, which has no magic number: a file of another kind fails at its first numbers."""
    import numpy as np

    size = reader.left
    count = reader.number("i32") if size >= 4 else 0
    if not 1 <= count <= size // 17:  # bytes of the shortest entry
        raise FileFormatError(
            f"{reader.path}: is neither a GGUF file nor an importance matrix of the old form; {OTHER}"
        )
    entries: dict[str, Statistic] = {}
    for number in range(1, count + 1):
        length = reader.number("i32")
        if not 1 <= length <= LONGEST_NAME:
            raise reader.fail(f"entry {number} of {count} has a name of {length} bytes")
        name = reader.take(length).decode("utf-8", "replace")
        if name in entries:
            raise reader.fail(f"{name} appears twice")
        calls, columns = reader.number("i32"), reader.number("i32")
        if calls < 0 or columns < 1:
            raise reader.fail(f"{name} counts {calls} calls" if calls < 0 else f"{name} has {columns} values")
        values = np.frombuffer(reader.take(4 * columns), "<f4").astype(np.float32)
        # Without a call the values are used as they are.
        entries[name] = _checked(name, Statistic(values[None], np.array([max(calls, 1)])), reader)
    chunks, length = (reader.number("i32") if reader.left else 0 for _ in range(2))
    if chunks < 0 or length < 0:
        raise reader.fail(f"it counts {chunks} chunks, and the name of its text has {length} bytes")
    text = reader.take(length)
    if reader.left:
        raise reader.fail(f"{reader.left} bytes follow after its end")
    return Imatrix(entries, (text.decode("utf-8", "replace"),) if text else (), chunks)


def _checked(name: str, statistic: Statistic, reader: Reader) -> Statistic:
    fault = _fault(statistic)
    if fault:
        raise reader.fail(f"{label(name)} {fault}")
    return statistic


def _fault(statistic: Statistic) -> str | None:
    """What is wrong with the sums: none may be negative, infinite or NaN."""
    import numpy as np

    wrong = np.argwhere(~((statistic.sums >= 0) & np.isfinite(statistic.sums)))
    if not wrong.size:
        return None
    row, column = (int(i) for i in wrong[0])
    place = f"[{row}, {column}]" if len(statistic.sums) > 1 else f"[{column}]"
    return f"has {statistic.sums[row, column]} at {place}, not a sum of squares"


def write_imatrix(imatrix: Imatrix, path: Path, *, force: bool = False) -> None:
    """Write the present form, sorted by name as llama-imatrix does; raises UsageError, OutputError."""
    for name, statistic in imatrix.entries.items():
        fault = _fault(statistic) or (f"counts {statistic.counts}" if (statistic.counts < 0).any() else None)
        if fault or not 1 <= len(name.encode()) + len(SUMS) <= LONGEST_NAME:
            raise UsageError(
                f"{path}: {name} {fault or 'is too long a name'}; no reader would accept such an importance matrix"
            )
    content = _gguf_bytes(imatrix)
    check_target(path, len(content), force=force)
    with atomic_file(path, force=force) as file:
        file.write(content)


def _gguf_bytes(imatrix: Imatrix) -> bytes:

    metadata: Metadata = [
        ("general.type", "string", KIND),
        (DATASETS, "[string]", imatrix.datasets),
        (CHUNK_COUNT, "u32", imatrix.chunks),
        (CHUNK_SIZE, "u32", imatrix.chunk_size),
    ]
    arrays: dict[str, NDArray[np.float32]] = {}
    for name, statistic in sorted(imatrix.entries.items()):
        # One matrix is written as a vector: ggml drops axes of length 1.
        several = len(statistic.counts) > 1
        arrays[name + SUMS] = statistic.sums if several else statistic.sums[0]
        arrays[name + COUNTS] = statistic.counts.astype("<f4")[:, None] if several else statistic.counts.astype("<f4")
    header = header_bytes(metadata, ((name, array.shape, FORMATS["f32"]) for name, array in arrays.items()))
    data = (array.astype("<f4").tobytes() for array in arrays.values())
    return b"".join((header, *(raw + bytes(padding(len(raw))) for raw in data)))


@dataclass(frozen=True)
class Importance:
    """An importance matrix for one export; `file` is its path as it was given."""

    file: str
    imatrix: Imatrix

    def of(self, tensor: Tensor, form: RowFormat, scheme: Scheme) -> NDArray[np.float32] | None:
        """[columns] for `tensor`; None if there is no entry, or if `form` does not weigh errors.

        Raises FileFormatError for an entry of another length, or a missing one where `scheme` needs it.
        """
        name, columns = output_name(tensor), tensor.shape[-1]
        if not tensor.is_matrix:
            return None
        found = self.imatrix.entries.get(name)
        if found is not None and found.sums.size != columns:
            if tensor.role is not Role.EMBED:  # a row of the embedding is looked up: llama.cpp lets any length pass
                raise FileFormatError(
                    f"{self.file}: {name} has {found.sums.size} columns, the model's {columns}; "
                    "it was made for another model"
                )
            found = None
        needed = scheme.needs_importance and form.name == scheme.base and tensor.role not in (Role.EMBED, Role.HEAD)
        if found is None and needed:
            raise FileFormatError(
                f"{self.file}: has no entry for {name}, which {scheme.name} needs; make one that covers all layers"
            )
        return found.importance() if found is not None and FORMATS[form.name].weighted else None

    def metadata(self) -> list[tuple[str, str, Any]]:
        """The keys that llama.cpp's tool adds."""
        rows: list[tuple[str, str, Any]] = [("quantize.imatrix.file", "string", _short(self.file))]
        if self.imatrix.datasets:
            rows.append(("quantize.imatrix.dataset", "string", _short(self.imatrix.datasets[0])))
        rows.append(("quantize.imatrix.entries_count", "u32", len(self.imatrix.entries)))
        if self.imatrix.chunks:
            rows.append(("quantize.imatrix.chunks_count", "u32", self.imatrix.chunks))
        return rows

    def notes(self, entries: Sequence[Entry], scheme: Scheme) -> list[str]:
        """What a person should know about the fit of matrix and model; raises FileFormatError."""
        matrices = {e.name: e for e in entries if e.is_matrix}
        known = matrices.keys() & self.imatrix.entries.keys()
        if not known:
            raise FileFormatError(f"{self.file}: has no entry for any matrix of the model; it was made for another one")
        weighed = sum(e.importance is not None for e in entries)
        if not weighed:
            return [f"{scheme.name} does not weigh errors: the importance matrix has no effect"]
        notes = [f"the importance matrix {show(self.file)} weighs the errors of {weighed} of {len(matrices)} matrices"]
        without = [n for n, e in matrices.items() if e.importance is None and FORMATS[e.format.name].weighted]
        if without:
            notes.append(f"without a matching entry, quantized without importance: {_some(without)}")
        foreign = [show(n) for n in self.imatrix.entries if n not in matrices]
        if foreign:
            notes.append(f"entries that match nothing in this model: {_some(foreign)}")
        return notes


def read_importance(file: str | None, scheme: Scheme) -> Importance | None:
    """The importance matrix in `file`; None without one.

    Raises:
        UsageError: `scheme` needs one, or does not allow one.
        FileFormatError: the file is damaged or of another kind.
    """
    if file is None:
        if scheme.needs_importance:
            raise UsageError(f"--quant {scheme.name}: needs an importance matrix; give one with --imatrix, or use q2_k")
        return None
    if scheme.name in portable.NAMES:
        raise UsageError(
            f"--imatrix: {scheme.name} is the same in every format, defined without importance; use {scheme.base}"
        )
    return Importance(file, read_imatrix(Path(file)))


def write_importance(
    sums: Mapping[Tensor, NDArray[np.float32]],
    path: Path,
    *,
    count: int,
    datasets: Sequence[str] = (),
    chunks: int = 0,
    chunk_size: int = 0,
    force: bool = False,
) -> None:
    """Write an importance matrix under llama.cpp's names, for `--imatrix` and its own quantizer.

    Args:
        sums: for each matrix, [columns] squares of its inputs, summed over `count` tokens.
        path: the target.
        count: number of tokens.
        datasets: names of the texts, of which there are `chunks` of `chunk_size` tokens.
        chunks: number of chunks; 0 = unknown.
        chunk_size: tokens of a chunk; 0 = unknown.
        force: replace an existing file.

    Raises:
        UsageError: sums that no reader would accept.
        OutputError: the target exists or cannot be written.
    """
    import numpy as np

    counts = np.array([count], np.int64)
    entries = {output_name(tensor): Statistic(values[None], counts) for tensor, values in sums.items()}
    write_imatrix(Imatrix(entries, tuple(datasets), chunks, chunk_size), path, force=force)


def _short(text: str) -> str:
    """The part of `text` that llama.cpp keeps."""
    return text.partition("\0")[0].encode("utf-8", "replace")[:LONGEST_VALUE].decode("utf-8", "ignore")


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
