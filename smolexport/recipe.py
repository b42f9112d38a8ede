"""How an export is told to quantize: the interface between the export and whoever calibrates.

`prepare` is handed a `Recipe`, opens it once the checkpoint is known, and asks the `Quantizer` that it returns what
changes in each plan.  The export knows no methods and statistics; without a recipe every format rounds by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from smolexport.conversion.converter import Converter
from smolexport.conversion.plan import Entry, Plan
from smolexport.conversion.source_model import SourceModel
from smolexport.model.checkpoint import Checkpoint


class Quantizer(Protocol):
    """A recipe applied to one export."""

    @property
    def source(self) -> Checkpoint | None:
        """Where weights are read: the checkpoint, or a view of it with other weights; None before the download."""
        ...

    @property
    def steps(self) -> int:
        """Training steps that `refine` takes for each set of weights; 0 = it does not train."""
        ...

    @property
    def outcomes(self) -> Sequence[object]:
        """The result of each training, printable as a line."""
        ...

    def apply(self, plan: Plan) -> Plan:
        """`plan` with encoders where the recipe changes something; raises CalibrationError, UsageError."""
        ...

    def refine(
        self, outputs: Sequence[Sequence[Entry]], threads: int, progress: Callable[[int], None]
    ) -> Sequence[Sequence[Entry]]:
        """The entries of all outputs after training, if any; `progress` is called with 1 for each step."""
        ...

    def report(self, plan: Plan) -> bytes:
        """Content of the file beside the output: how it was calibrated, and the error of each matrix."""
        ...


class Recipe(Protocol):
    """How weights are quantized: method, statistics, budget."""

    @property
    def suffix(self) -> str:
        """Ending of the default names of outputs, e.g. `gptq`; empty for plain rounding."""
        ...

    @property
    def chooses_bits(self) -> bool:
        """Whether the bits of each matrix are chosen under a budget, so that the scheme is `auto-bits`."""
        ...

    def open(
        self,
        model: SourceModel,
        checkpoint: Checkpoint | None,
        modules: Sequence[Converter],
        planned: Callable[[Converter, SourceModel], Plan],
    ) -> tuple[Quantizer | None, SourceModel]:
        """Start on an export.

        Args:
            model: what is exported.
            checkpoint: its weights; None while they are still on the hub.
            modules: the formats' converters.
            planned: the plan of a converter for a model with chosen bits.

        Returns:
            The quantizer, None for plain rounding; and `model` with chosen bits and the record for the metadata.

        Raises:
            CalibrationError: a statistic is missing, damaged, or of another checkpoint.
            UsageError: the budget cannot be met.
            MissingDependencyError: choosing bits needs a library that is not installed.
        """
        ...


def sidecar_of(path: Path) -> Path:
    """Path of the report on the calibrated output `path`."""
    return path.with_name(f"{path.name}.calibration.json")
