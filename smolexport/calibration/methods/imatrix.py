"""Scales searched by the importance of every column: the mean square of its input."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from smolexport.calibration.methods import Method

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from smolexport.calibration.calibrator import Calibration
    from smolexport.calibration.statistics import Statistics
    from smolexport.conversion.plan import RowEncoder
    from smolexport.model.spec import Tensor
    from smolexport.quant import RowFormat


@dataclass(frozen=True)
class ImportanceEncoder:
    """Encodes with the format's own search, weighted by `importance`, [columns] float32."""

    importance: NDArray[np.float32] = field(repr=False)

    def encode(self, form: RowFormat, rows: NDArray[Any], start: int) -> NDArray[np.uint8]:  # noqa: ARG002
        """The rows [n, columns] in `form`."""
        return form.encode(rows, self.importance)


class Imatrix(Method):
    """Searches weighted by the importance matrix, and nothing else."""

    about = "with scales searched by the importance of every input column"
    rank = 1

    def __init__(self, statistics: Statistics, calibration: Calibration) -> None:
        super().__init__(statistics, calibration)
        self._encoders: dict[Tensor, ImportanceEncoder] = {}

    def encoder(self, tensor: Tensor, form: RowFormat) -> RowEncoder | None:  # noqa: ARG002
        """The one encoder of `tensor`, so that outputs can share its rows."""
        if tensor not in self._encoders:
            self._encoders[tensor] = ImportanceEncoder(self.statistics.mean_squares(tensor))
        return self._encoders[tensor]


METHOD = Imatrix
