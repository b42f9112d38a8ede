"""A calibration method at work on the plans of one export, with bits chosen under a budget.

A method changes no decision of the plan: names, formats and sizes stay, only the numbers inside differ.  So a
calibrated file has the size of its plain twin, runs wherever that runs, and formats that share codes share the
calibrated ones.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from smolexport.calibration.bit_allocation import BitAllocator, bit_choices_of
from smolexport.calibration.knapsack import Allocation, Budget
from smolexport.calibration.methods import find_method
from smolexport.calibration.statistics import Statistics, open_statistics
from smolexport.calibration.trainer import DistilSettings
from smolexport.conversion.converter import Converter
from smolexport.conversion.plan import Entry, Plan
from smolexport.conversion.portable import AUTO_BITS
from smolexport.conversion.source_model import SourceModel
from smolexport.errors import UsageError
from smolexport.model.checkpoint import Checkpoint
from smolexport.model.spec import Role
from smolexport.quant import BlockFormat, RowFormat
from smolexport.quant.affine_view import has_grid
from smolexport.quant.planar import AffineFormat, NBits
from smolexport.recipe import Quantizer


@dataclass(frozen=True)
class Calibration:
    """How to quantize weights: the `Recipe` of an export.

    Attributes:
        method: a name of `smolexport.calibration.methods`.
        statistics: folder made by `smolexport calibrate`; None for rtn.
        damping: share of the mean of the Hessian's diagonal that is added to it, for gptq and distil.
        training: how scales are distilled.
        budget: for bits chosen matrix by matrix; None = the bits of a scheme.
    """

    method: str = "rtn"
    statistics: Path | None = None
    damping: float = 0.01
    training: DistilSettings = field(default_factory=DistilSettings)
    budget: Budget | None = None

    def __post_init__(self) -> None:
        calibrated = find_method(self.method).calibrated
        if self.budget is not None and self.statistics is None:
            raise UsageError(
                "a budget needs statistics, which say what each matrix costs; make them with "
                "`smolexport calibrate CHECKPOINT -o STATS` and give --stats STATS"
            )
        if not calibrated and self.statistics is not None and self.budget is None:
            raise UsageError(
                f"--stats {self.statistics}: {self.method} uses no statistics; give --method gptq, or leave it out"
            )
        if calibrated and self.statistics is None:
            raise UsageError(
                f"--method {self.method}: needs statistics; make them with `smolexport calibrate CHECKPOINT -o STATS` "
                "and give --stats STATS"
            )

    @property
    def suffix(self) -> str:
        """Suffix of the default names of outputs; empty for plain rounding."""
        return self.method if find_method(self.method).calibrated else ""

    @property
    def chooses_bits(self) -> bool:
        """Whether there is a budget."""
        return self.budget is not None

    def open(
        self,
        model: SourceModel,
        checkpoint: Checkpoint | None,
        modules: Sequence[Converter],
        planned: Callable[[Converter, SourceModel], Plan],
    ) -> tuple[Quantizer | None, SourceModel]:
        """Open the statistics, and choose bits under a budget; see `smolexport.recipe.Recipe`."""
        if self.statistics is None:
            return None, model
        calibrator = trial = Calibrator(self, open_statistics(self.statistics, checkpoint), checkpoint)
        if self.budget is not None and trial.source is None:  # plan the largest possible files
            model = replace(model, bits={t: bits[0] for t, bits in bit_choices_of(modules, model.spec).items()})
        elif self.budget is not None and trial.source is not None:
            allocation = BitAllocator(
                modules, model, trial.source, trial.statistics, self.budget,
                lambda module, decided: trial.apply(planned(module, decided)), trial.record,
            ).decide()  # fmt: skip
            # a new one: its errors are those of the final encoding alone
            calibrator = Calibrator(self, trial.statistics, checkpoint, allocation)
            model = replace(model, bits=allocation.bits)
        return calibrator, replace(model, calibration=calibrator.record())


class Calibrator:
    """The `Quantizer` of a calibration.

    Attributes:
        source: the weights as the method prepared them; None before the download.
        statistics: of the checkpoint.
    """

    def __init__(
        self,
        calibration: Calibration,
        statistics: Statistics,
        checkpoint: Checkpoint | None,
        allocation: Allocation | None = None,
    ) -> None:
        """`allocation`: the bits chosen under a budget."""
        self.statistics = statistics
        self._name, self._allocation = calibration.method, allocation
        self._method = find_method(calibration.method)(statistics, calibration)
        self.source = self._method.prepare(checkpoint) if checkpoint else None

    @property
    def steps(self) -> int:
        """Training steps of each set of weights; 0 = nothing is trained."""
        return self._method.steps

    @property
    def outcomes(self) -> Sequence[object]:
        """How each training went."""
        return self._method.outcomes

    def record(self, allocation: Allocation | None = None) -> str:
        """Method, data and `allocation` (None = its own) as one line of JSON, for the metadata of the files."""
        allocation = allocation or self._allocation
        facts: dict[str, object] = {"method": self._name, **self._method.facts}
        if allocation:
            facts["budget"] = allocation.facts()
        found = self.statistics.manifest
        facts |= {
            "tokens": found.tokens, "window": found.window, "seed": found.seed, "written_by": found.method,
            "texts": [asdict(source) for source in found.sources], "windows_sha256": found.sha256,
        }  # fmt: skip
        return json.dumps(facts, ensure_ascii=False, separators=(",", ":"))

    def apply(self, plan: Plan) -> Plan:
        """`plan` with the method's encoders in all entries that calibration affects.

        Raises:
            CalibrationError: a statistic is missing, or of another length.
            UsageError: calibration affects no entry.
        """
        if self._allocation:
            plan = replace(plan, notes=(self._allocation.note(), *plan.notes))
        if plan.scheme != AUTO_BITS and not self._method.rewrites and not reaches(plan):
            raise UsageError(
                f"--method {self._name}: {plan.scheme} has no matrix of less than 8 bits that it reaches; "
                "take --method rtn"
            )
        untied = _untied(plan)
        entries = tuple(self._entry(entry) if _reached(entry, untied) else entry for entry in plan.entries)
        count = sum(entry.encoder is not None for entry in entries)
        if not count:
            return plan
        matrices = sum(entry.is_matrix for entry in entries)
        note = f"{self._name}: calibrates {count} of {matrices} matrices on {self.statistics.manifest.tokens:,} tokens"
        return replace(plan, entries=entries, notes=(note, *plan.notes))

    def _entry(self, entry: Entry) -> Entry:
        found = replace(entry, format=_searching(entry.format))
        encoder = self._method.encoder(found.tensor, found.canonical) if found.tensor else None
        return replace(found, encoder=encoder) if encoder else entry

    def refine(
        self, outputs: Sequence[Sequence[Entry]], threads: int, progress: Callable[[int], None] = lambda _: None
    ) -> Sequence[Sequence[Entry]]:
        """`outputs` with trained scales; raises MissingDependencyError, CalibrationError."""
        return self._method.refine(outputs, self.source, threads, progress) if self.source else outputs

    def report(self, plan: Plan) -> bytes:
        """JSON for a file beside the output: the record, how the training went, the error of each matrix."""
        facts = json.loads(self.record())
        facts["trainings"] = [str(outcome) for outcome in self.outcomes]
        facts["tensors"] = self._method.errors(e.tensor for e in plan.entries if e.tensor is not None)
        return (json.dumps(facts, indent=2, ensure_ascii=False) + "\n").encode()


def reaches(plan: Plan) -> bool:
    """Whether calibration, by any method, affects any entry of `plan`."""
    untied = _untied(plan)
    return any(_reached(entry, untied) for entry in plan.entries)


def _untied(plan: Plan) -> bool:
    return any(entry.tensor is not None and entry.tensor.role is Role.HEAD for entry in plan.entries)


def _reached(entry: Entry, untied: bool) -> bool:
    tensor = entry.tensor
    # Rows of an embedding that is not the head are looked up, not multiplied: no column matters more than another.
    if tensor is None or not tensor.is_matrix or (untied and tensor.role is Role.EMBED):
        return False
    form = replace(entry, format=_searching(entry.format)).canonical
    return has_grid(form) or (isinstance(form, BlockFormat) and form.weighted)


def _searching(form: RowFormat) -> RowFormat:
    """`form` with the encoder that minimizes the weighted error, if it has a choice."""
    return replace(form, encoder="search") if isinstance(form, (AffineFormat, NBits)) else form
