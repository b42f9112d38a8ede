"""Quantization methods: one file each, and the file name is the registry.

A file NAME.py defines a subclass of `Method` as `METHOD`.  The command line lists methods before NumPy is loaded, so
these files import the rest where it is used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib import import_module
from pkgutil import iter_modules
from typing import TYPE_CHECKING, ClassVar

from smolexport.errors import UsageError

if TYPE_CHECKING:
    from smolexport.calibration.calibrator import Calibration
    from smolexport.calibration.statistics import Statistics
    from smolexport.conversion.plan import Entry, RowEncoder
    from smolexport.model.checkpoint import Checkpoint
    from smolexport.model.spec import Tensor
    from smolexport.quant import RowFormat


class Method:
    """A method at work on one export; whatever a subclass leaves out works as in plain rounding.

    Attributes:
        about: a line for people.
        rank: position among all methods; plain rounding is 0.
        calibrated: whether it needs statistics even without a budget.
        rewrites: whether `prepare` changes weights, so that it affects every scheme.
        facts: what it adds to the record in the files' metadata.
        steps: training steps that `refine` takes for each set of weights.
        outcomes: how each training went, as lines for people.
    """

    about: ClassVar[str]
    rank: ClassVar[int]
    calibrated: ClassVar[bool] = True
    rewrites: ClassVar[bool] = False

    def __init__(self, statistics: Statistics, calibration: Calibration) -> None:
        """`statistics` are those of the exported checkpoint."""
        self.statistics, self.calibration = statistics, calibration
        self.facts: Mapping[str, object] = {}
        self.steps = 0
        self.outcomes: Sequence[object] = ()

    def prepare(self, source: Checkpoint) -> Checkpoint:
        """`source`, or a view of it with the same tensors whose rows are changed when read."""
        return source

    def encoder(self, tensor: Tensor, form: RowFormat) -> RowEncoder | None:  # noqa: ARG002
        """The encoder of a matrix's rows in `form`, the same object each time; None = the format's own rounding.

        Raises:
            CalibrationError: a statistic is missing, damaged, or of another length.
        """
        return None

    def refine(
        self,
        outputs: Sequence[Sequence[Entry]],
        source: Checkpoint,  # noqa: ARG002
        threads: int,  # noqa: ARG002
        progress: Callable[[int], None],  # noqa: ARG002
    ) -> Sequence[Sequence[Entry]]:
        """The entries of all outputs, trained; `progress` is called with 1 for each step."""
        return outputs

    def errors(self, tensors: Iterable[Tensor]) -> Mapping[str, Mapping[str, float]]:  # noqa: ARG002
        """By source name the measured output error of each of `tensors`, `before` and `after`."""
        return {}


def methods() -> dict[str, type[Method]]:
    """All methods by name, plain rounding first."""
    names = (module.name for module in iter_modules(__path__) if not module.name.startswith("_"))
    found: dict[str, type[Method]] = {name: import_module(f"{__name__}.{name}").METHOD for name in names}
    return dict(sorted(found.items(), key=lambda item: (item[1].rank, item[0])))


def find_method(name: str) -> type[Method]:
    """The method of that name; raises UsageError, which names the known ones."""
    known = methods()
    if name not in known:
        raise UsageError(f"--method {name}: must be one of {', '.join(known)}")
    return known[name]
