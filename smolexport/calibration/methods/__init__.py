"""Methods of quantization: one file each, and the file name is the registry.

A file NAME.py names its subclass of `Method` as `METHOD`.  A method may change weights before anything is encoded
(`prepare`), encode single matrices its own way (`encoder`), and train what was encoded (`refine`); what it leaves out
stays as plain rounding has it.  The command line lists methods before NumPy is loaded, so their files import the rest
where it is needed.
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
    """A method at work on one export.

    Attributes:
        about: a line for people.
        rank: place among all methods, from plain rounding on.
        calibrated: whether it needs statistics by itself, without a budget.
        rewrites: whether `prepare` changes weights, so that it has an effect in every scheme.
        facts: what it adds to the record in the files' metadata.
        steps: training steps that `refine` takes for each set of weights.
        outcomes: how each training went, as lines for people.
    """

    about: ClassVar[str]
    rank: ClassVar[int]
    calibrated: ClassVar[bool] = True
    rewrites: ClassVar[bool] = False

    def __init__(self, statistics: Statistics, calibration: Calibration) -> None:
        """`statistics` are those of the checkpoint that is exported."""
        self.statistics, self.calibration = statistics, calibration
        self.facts: Mapping[str, object] = {}
        self.steps = 0
        self.outcomes: Sequence[object] = ()

    def prepare(self, source: Checkpoint) -> Checkpoint:
        """`source`, or a view of it with other weights: the same tensors, and rows that are changed when read."""
        return source

    def encoder(self, tensor: Tensor, form: RowFormat) -> RowEncoder | None:  # noqa: ARG002
        """What encodes the rows of a matrix in `form`, the same object each time; None = the format's own rounding.

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
        """By source name the error of what each of `tensors` puts out, `before` and `after`, where it was measured."""
        return {}


def methods() -> dict[str, type[Method]]:
    """All methods by name, from plain rounding on."""
    names = (module.name for module in iter_modules(__path__) if not module.name.startswith("_"))
    found: dict[str, type[Method]] = {name: import_module(f"{__name__}.{name}").METHOD for name in names}
    return dict(sorted(found.items(), key=lambda item: (item[1].rank, item[0])))


def find_method(name: str) -> type[Method]:
    """The method of that name; raises UsageError, which names the known ones."""
    known = methods()
    if name not in known:
        raise UsageError(f"--method {name}: should be one of {', '.join(known)}")
    return known[name]
