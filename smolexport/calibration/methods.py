"""Methods of quantization, from plain rounding to trained scales, and what each does to a plan.

A method changes no decision of the plan: names, formats, sizes stay, only the numbers inside differ.  So a file made
with it has the bytes of its plain twin, runs wherever that runs, and where several formats share a lattice they share
the calibrated one.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from smolexport.calibration import METHODS
from smolexport.calibration.budget import Budget, Mixed
from smolexport.calibration.distillation import Distilled, Settings, Step
from smolexport.calibration.feedback import Feedback
from smolexport.calibration.statistics import Statistics
from smolexport.checkpoint import Checkpoint
from smolexport.errors import UsageError
from smolexport.plan import Entry, Plan
from smolexport.portable import MIX
from smolexport.quant import AffineFormat, BlockFormat, NBits, RowFormat
from smolexport.quant.grids import has_grid
from smolexport.spec import Role

__all__ = ["Calibration", "Calibrator", "reaches", "sidecar_of"]

SOLVED = ("gptq", "distil")
DAMPING = 0.01


@dataclass(frozen=True)
class Calibration:
    """How weights are to be quantized.

    Attributes:
        method: a name of `METHODS`.
        statistics: folder that `smolexport calibrate` made; None for rtn.
        damping: share of the mean of the Hessian's diagonal that is added to it, for gptq and distil.
        training: how scales are distilled.
        budget: what bits are chosen under, matrix by matrix; None: they are those of a scheme.
    """

    method: str = "rtn"
    statistics: Path | None = None
    damping: float = DAMPING
    training: Settings = field(default_factory=Settings)
    budget: Budget | None = None

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise UsageError(f"--method {self.method}: should be one of {', '.join(METHODS)}")
        if self.budget is not None and self.statistics is None:
            raise UsageError(
                "a budget needs statistics, which say what each matrix costs; make them with "
                "`smolexport calibrate CHECKPOINT -o STATS` and give --stats STATS"
            )
        if self.method == "rtn" and self.statistics is not None and self.budget is None:
            raise UsageError(f"--stats {self.statistics}: rtn uses no statistics; give --method gptq, or leave it out")
        if self.method != "rtn" and self.statistics is None:
            raise UsageError(
                f"--method {self.method}: needs statistics; make them with `smolexport calibrate CHECKPOINT -o STATS` "
                "and give --stats STATS"
            )


class Calibrator:
    """A method, or a budget, at work on the plans of one export."""

    def __init__(self, calibration: Calibration, statistics: Statistics, mixed: Mixed | None = None) -> None:
        """`statistics` are those of the checkpoint that is exported; `mixed`, what was decided under a budget."""
        self.mixed = mixed
        self.calibration = calibration
        self.statistics = statistics
        self.feedback = Feedback(statistics, calibration.damping)
        self.outcomes: list[Distilled] = []

    def record(self) -> str:
        """What was done with what, as JSON on one line, for the metadata of the files."""
        facts: dict[str, object] = {"method": self.calibration.method}
        if self.calibration.method in SOLVED:
            facts["damping"] = self.calibration.damping
        if self.calibration.method == "distil":
            facts["steps"] = self.calibration.training.steps
        if self.mixed:
            facts["budget"] = self.mixed.facts()
        found = self.statistics.manifest
        facts |= {
            "tokens": found.tokens, "window": found.window, "seed": found.seed, "written_by": found.method,
            "texts": [asdict(source) for source in found.sources], "windows_sha256": found.sha256,
        }  # fmt: skip
        return json.dumps(facts, ensure_ascii=False, separators=(",", ":"))

    def applied(self, plan: Plan) -> Plan:
        """`plan` with importances, and for gptq and distil solvers, in the entries that the method reaches.

        Raises:
            CalibrationError: a statistic is missing, or of another length.
            UsageError: the method reaches no entry.
        """
        if self.mixed:
            plan = replace(plan, notes=(self.mixed.note(), *plan.notes))
        method = self.calibration.method
        if method == "rtn":
            return plan
        untied = _untied(plan)
        entries = tuple(self._entry(entry, untied) for entry in plan.entries)
        count = sum(entry.importance is not None for entry in entries)
        if not count and plan.scheme == MIX:
            return plan
        if not count:  # as `reaches` says beforehand
            raise UsageError(
                f"--method {method}: {plan.scheme} has no matrix of less than 8 bits that it reaches; take --method rtn"
            )
        matrices = sum(entry.is_matrix for entry in entries)
        note = f"{method}: calibrates {count} of {matrices} matrices on {self.statistics.manifest.tokens:,} tokens"
        return replace(plan, entries=entries, notes=(note, *plan.notes))

    def trained(
        self,
        outputs: Sequence[Sequence[Entry]],
        checkpoint: Checkpoint,
        threads: int,
        progress: Callable[[Step], None] | None = None,
    ) -> list[Sequence[Entry]]:
        """`outputs` with trained scales, where there are any; see `training.distilled`."""
        if not any(entry.solver for entries in outputs for entry in entries):
            return list(outputs)
        from smolexport.calibration.training import distilled

        settings = self.calibration.training
        results, self.outcomes = distilled(
            outputs, checkpoint, self.statistics, settings, threads=threads, progress=progress
        )
        return list(results)

    def report(self, plan: Plan) -> bytes:
        """What stands beside a file, as JSON: the record, how the training went, the error of each matrix."""
        facts = json.loads(self.record())
        facts["trainings"] = [str(outcome) for outcome in self.outcomes]
        facts["tensors"] = self.feedback.errors(e.tensor for e in plan.entries if e.tensor is not None)
        return (json.dumps(facts, indent=2, ensure_ascii=False) + "\n").encode()

    def _entry(self, entry: Entry, untied: bool) -> Entry:
        tensor = entry.tensor
        if tensor is None or not _reached(entry, untied):
            return entry
        form = searching(entry.format)
        base = form.lattice or form
        importance = self.statistics.mean_squares(tensor)
        solver = self.feedback.solver(tensor) if self.calibration.method in SOLVED and has_grid(base) else None
        return replace(entry, format=form, importance=importance, solver=solver)


def reaches(plan: Plan) -> bool:
    """Whether calibration, by any method, changes anything of `plan`."""
    untied = _untied(plan)
    return any(_reached(entry, untied) for entry in plan.entries)


def _untied(plan: Plan) -> bool:
    return any(entry.tensor is not None and entry.tensor.role is Role.HEAD for entry in plan.entries)


def _reached(entry: Entry, untied: bool) -> bool:
    tensor = entry.tensor
    # A row of an embedding that is no head as well is looked up, not multiplied: no column matters more.
    if tensor is None or not tensor.is_matrix or (untied and tensor.role is Role.EMBED):
        return False
    form = searching(entry.format)
    base = form.lattice or form
    return has_grid(base) or (isinstance(base, BlockFormat) and base.weighted)


def searching(form: RowFormat) -> RowFormat:
    """`form` with the encoder that looks for the least weighted error, where it has a choice."""
    return replace(form, encoder="search") if isinstance(form, (AffineFormat, NBits)) else form


def sidecar_of(path: Path) -> Path:
    """Where the report on the calibrated output `path` lies."""
    return path.with_name(f"{path.name}.calibration.json")
