"""Scale distillation of an export: every matrix quantized, the scales trained, and the result kept for the writing.

Outputs whose matrices get the same lattices are one student: it is trained once, and all of them hold its scales.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from smolexport.calibration.distillation import AffineBlocks, Distilled, Settings, Step, Trained
from smolexport.calibration.statistics import Statistics
from smolexport.checkpoint import Checkpoint
from smolexport.errors import CalibrationError
from smolexport.plan import Entry
from smolexport.plugins import runtime
from smolexport.quant import RowFormat
from smolexport.quant.grids import factors_of, with_factors
from smolexport.spec import Tensor

__all__ = ["ENGINE", "Kept", "Student", "distilled", "encode_rows", "lattice_of"]

ENGINE = "torch"
CHUNK = 1 << 20  # elements that a thread encodes at a time


@dataclass(frozen=True)
class Kept:
    """Hands out rows that are encoded already."""

    rows: NDArray[np.uint8] = field(repr=False)

    def encode(self, form: RowFormat, rows: NDArray[Any], start: int) -> NDArray[np.uint8]:  # noqa: ARG002
        """The kept rows in the place of `rows`."""
        return self.rows[start : start + len(rows)]


class Student:
    """The entries of one output, quantized: frozen weights as they will be read, and lattices with open factors."""

    def __init__(self, entries: Sequence[Entry], checkpoint: Checkpoint, threads: int) -> None:
        """Encodes every matrix that has a solver."""
        if checkpoint.spec.rearranged:  # torch knows the trained matrices by the checkpoint's names
            raise CalibrationError(f"distil: the checkpoint rearranges {checkpoint.spec.rearranged[0]}; use gptq")
        self._checkpoint = checkpoint
        self._entries = {e.tensor: e for e in entries if e.tensor is not None}
        with ThreadPoolExecutor(threads, thread_name_prefix="encode") as pool:
            self.rows = {
                t.stored_name: self._encoded(e, t, pool) for t, e in self._entries.items() if e.solver is not None
            }
        self.forms = {t.stored_name: lattice_of(e) for t, e in self._entries.items() if e.solver is not None}
        self.columns = {t.stored_name: t.shape[-1] for t in self._entries}

    def _encoded(self, entry: Entry, tensor: Tensor, pool: ThreadPoolExecutor) -> NDArray[np.uint8]:
        stored = self._checkpoint.stored[tensor]
        step = max(1, CHUNK // tensor.shape[1])

        def encode(start: int) -> NDArray[np.uint8]:
            return encode_rows(entry, stored.read_rows(start, min(start + step, tensor.shape[0])), start)

        return np.concatenate(list(pool.map(encode, range(0, tensor.shape[0], step))))

    def frozen(self) -> Iterator[tuple[str, NDArray[np.float32]]]:
        """(name in the checkpoint, values) of all that is not trained, as a reader of the output will see it."""
        for tensor, entry in self._entries.items():
            if tensor.stored_name not in self.rows:
                rows = _rounded(self._checkpoint.stored[tensor].read_rows(), entry)
                values = entry.format.decode(entry.format.encode(rows, entry.importance), tensor.shape[-1])
                yield tensor.stored_name, values.reshape(tensor.shape)

    def with_factors(self, name: str, factors: Trained) -> NDArray[np.uint8]:
        """The encoded rows of the matrix `name` with other factors, rounded as they are stored."""
        return with_factors(self.forms[name], self.rows[name], self.columns[name], factors.d, factors.m)

    def stored(self, name: str, factors: Trained) -> Trained:
        """What a reader of the output will see of `factors`."""
        found = factors_of(self.forms[name], self.with_factors(name, factors), self.columns[name])
        return Trained(found.d, found.m)


class Lattices(Mapping[str, AffineBlocks]):
    """The trained matrices of a student, unpacked one at a time: all of them at once would be the model in float32."""

    def __init__(self, student: Student) -> None:
        """Of `student`."""
        self._student = student

    def __getitem__(self, name: str) -> AffineBlocks:
        rows = self._student.rows[name]
        return factors_of(self._student.forms[name], rows, self._student.columns[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._student.rows)

    def __len__(self) -> int:
        return len(self._student.rows)


def lattice_of(entry: Entry) -> RowFormat:
    """The format that an entry's rows are first encoded in."""
    return entry.format.lattice or entry.format


def encode_rows(entry: Entry, rows: NDArray[Any], start: int) -> NDArray[np.uint8]:
    """Some rows of a matrix, those from `start` on, in the lattice of its entry."""
    form, rows = lattice_of(entry), _rounded(rows, entry)
    return entry.solver.encode(form, rows, start) if entry.solver else form.encode(rows, entry.importance)


def _rounded(rows: NDArray[Any], entry: Entry) -> NDArray[Any]:
    return entry.via.decode(entry.via.encode(rows), rows.shape[1]) if entry.via else rows


def distilled(
    outputs: Sequence[Sequence[Entry]],
    checkpoint: Checkpoint,
    statistics: Statistics,
    settings: Settings,
    *,
    threads: int,
    progress: Callable[[Step], None] | None = None,
) -> tuple[list[tuple[Entry, ...]], list[Distilled]]:
    """`outputs` with trained scales, and how each training went.

    Args:
        outputs: entries with solvers, of gptq.
        checkpoint: where the weights are.
        statistics: the windows and what the original predicts on them.
        settings: of the training.
        threads: that encode.
        progress: called after each step.

    Raises:
        MissingDependencyError: torch is not installed.
        CalibrationError: the statistics lack something.
    """
    engine: Any = runtime(ENGINE)
    known: dict[frozenset[object], dict[Tensor, Kept]] = {}
    outcomes, results = [], []
    for entries in outputs:
        key = frozenset((e.tensor, e.via, lattice_of(e)) for e in entries if e.solver is not None)
        if key not in known:
            student = Student(entries, checkpoint, threads)
            outcome = cast(
                Distilled,
                engine.distil(
                    checkpoint.folder, student.frozen(), Lattices(student), statistics.windows(), statistics.teacher(),
                    settings=settings, rounded=student.stored, progress=progress,
                ),
            )  # fmt: skip
            outcomes.append(outcome)
            kept = {name: Kept(student.with_factors(name, factors)) for name, factors in outcome.factors.items()}
            known[key] = {e.tensor: kept[e.tensor.stored_name] for e in entries if e.tensor and e.solver is not None}
        rows = known[key]
        results.append(tuple(e if e.tensor not in rows else replace(e, solver=rows[e.tensor]) for e in entries))
    return results, outcomes
