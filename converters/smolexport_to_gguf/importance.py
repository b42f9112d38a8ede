"""What an importance matrix does to a plan: a vector per tensor, keys that tell of it, and notes.

Source: llama.cpp `src/llama-quant.cpp` (use) and `tools/quantize/quantize.cpp` (keys).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from smolexport.conversion import portable
from smolexport.conversion.plan import Entry
from smolexport.errors import FileFormatError, UsageError
from smolexport.model.spec import Role, Tensor
from smolexport.quant import FORMATS, BlockFormat
from smolexport.text import show
from smolexport_to_gguf.architectures import output_name
from smolexport_to_gguf.imatrix import Imatrix, Statistic, read_imatrix, write_imatrix
from smolexport_to_gguf.schemes import Scheme

LONGEST_VALUE = 127  # bytes that llama.cpp keeps of a text that is set from outside


@dataclass(frozen=True)
class Importance:
    """An importance matrix for one export.

    Attributes:
        file: where it lies, as it was given.
        imatrix: its content.
    """

    file: str
    imatrix: Imatrix

    def of(self, tensor: Tensor, form: BlockFormat, scheme: Scheme) -> NDArray[np.float32] | None:
        """[columns] for `tensor`; None where there is no entry, or where `form` weighs no errors.

        Raises:
            FileFormatError: the entry is of another length, or is missing where `scheme` cannot do without.
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
        return found.importance() if found is not None and form.weighted else None

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
        """What a person should know about the fit of matrix and model.

        Raises:
            FileFormatError: it has no entry for any matrix of the model.
        """
        matrices = {e.name: e for e in entries if e.is_matrix}
        known = matrices.keys() & self.imatrix.entries.keys()
        if not known:
            raise FileFormatError(f"{self.file}: has no entry for any matrix of the model; it was made for another one")
        weighed = sum(e.importance is not None for e in entries)
        if not weighed:
            return [f"{scheme.name} weighs no errors: the importance matrix changes nothing"]
        notes = [f"the importance matrix {show(self.file)} weighs the errors of {weighed} of {len(matrices)} matrices"]
        without = [n for n, e in matrices.items() if e.importance is None and FORMATS[e.format.name].weighted]
        if without:
            notes.append(f"without a fitting entry, quantized as without importance: {_some(without)}")
        foreign = [show(n) for n in self.imatrix.entries if n not in matrices]
        if foreign:
            notes.append(f"entries for nothing in this model: {_some(foreign)}")
        return notes


def read_importance(file: str | None, scheme: Scheme) -> Importance | None:
    """The importance matrix in `file`; None without one.

    Raises:
        UsageError: `scheme` cannot do without one, or is defined without.
        FileFormatError: the file is damaged or of another kind.
    """
    if file is None:
        if scheme.needs_importance:
            raise UsageError(
                f"--quant {scheme.name}: needs an importance matrix; give one with --imatrix, or take q2_k"
            )
        return None
    if scheme.name in portable.NAMES:
        raise UsageError(
            f"--imatrix: {scheme.name} is the same in every format, defined without importance; take {scheme.base}"
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
        sums: for each matrix, [columns] squares of what it reads, summed over tokens.
        path: the target.
        count: how many tokens.
        datasets: names of the texts.
        chunks: how many chunks of text.
        chunk_size: tokens of a chunk.
        force: replace an existing file.

    Raises:
        UsageError: sums that no reader would take.
        OutputError: the target exists or cannot be written.
    """
    counts = np.array([count], np.int64)
    entries = {output_name(tensor): Statistic(values[None], counts) for tensor, values in sums.items()}
    write_imatrix(Imatrix(entries, tuple(datasets), chunks, chunk_size), path, force=force)


def _short(text: str) -> str:
    """`text` as far as llama.cpp keeps it."""
    return text.partition("\0")[0].encode("utf-8", "replace")[:LONGEST_VALUE].decode("utf-8", "ignore")


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
