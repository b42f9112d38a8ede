"""Scales trained until the predictions are nearest to the original's, on the codes of gptq."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from smolexport.calibration.methods.gptq import Gptq

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from smolexport.calibration.calibrator import Calibration
    from smolexport.calibration.statistics import Statistics
    from smolexport.conversion.plan import Entry
    from smolexport.model.checkpoint import Checkpoint
    from smolexport.model.spec import Tensor
    from smolexport.quant import RowFormat


@dataclass(frozen=True)
class Kept:
    """An encoder that returns rows which are encoded already."""

    rows: NDArray[np.uint8] = field(repr=False)

    def encode(self, form: RowFormat, rows: NDArray[Any], start: int) -> NDArray[np.uint8]:  # noqa: ARG002
        """The kept rows in place of `rows`."""
        return self.rows[start : start + len(rows)]


class Distil(Gptq):
    """Outputs with the same canonical rows are one student: trained once, its scales go into all of them."""

    about = "and the scales trained until the predictions are nearest to the original's; needs PyTorch"
    rank = 3

    def __init__(self, statistics: Statistics, calibration: Calibration) -> None:
        super().__init__(statistics, calibration)
        self.steps = calibration.training.steps
        self.facts = {**self.facts, "steps": self.steps}

    def refine(
        self, outputs: Sequence[Sequence[Entry]], source: Checkpoint, threads: int, progress: Callable[[int], None]
    ) -> Sequence[Sequence[Entry]]:
        """`outputs` with trained scales; raises MissingDependencyError, CalibrationError."""
        from smolexport.calibration.student import Student, has_scales
        from smolexport.plugins import trainer

        known: dict[frozenset[object], dict[Tensor, Kept]] = {}
        outcomes, results = [], []
        for entries in outputs:
            solved = [entry for entry in entries if has_scales(entry)]
            key = frozenset((e.tensor, e.rounded_through, e.canonical) for e in solved)
            if solved and key not in known:
                student = Student(entries, source, threads)
                outcome = trainer().distil(
                    source.folder, student.frozen(), student, self.statistics.windows(), self.statistics.teacher(),
                    settings=self.calibration.training, rounded=student.stored, progress=lambda _: progress(1),
                )  # fmt: skip
                outcomes.append(outcome)
                kept = {name: Kept(student.with_factors(name, factors)) for name, factors in outcome.factors.items()}
                known[key] = {e.tensor: kept[e.tensor.stored_name] for e in solved if e.tensor}
            rows = known.get(key, {})
            results.append(tuple(replace(e, encoder=rows[e.tensor]) if e.tensor in rows else e for e in entries))
        self.outcomes = outcomes
        return results


METHOD = Distil
