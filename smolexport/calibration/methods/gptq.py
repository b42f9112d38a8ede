"""Codes chosen with error feedback, on the grid that imatrix finds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from smolexport.calibration.methods.imatrix import Imatrix

if TYPE_CHECKING:
    from smolexport.calibration.calibrator import Calibration
    from smolexport.calibration.statistics import Statistics
    from smolexport.conversion.plan import RowEncoder
    from smolexport.model.spec import Tensor
    from smolexport.quant import RowFormat


class Gptq(Imatrix):
    """GPTQ for formats with a grid, imatrix for the others."""

    about = "and what rounding one column changes made up for by the columns after it"
    rank = 2

    def __init__(self, statistics: Statistics, calibration: Calibration) -> None:
        from smolexport.calibration.gptq import GptqEncoders

        super().__init__(statistics, calibration)
        self._gptq = GptqEncoders(statistics, calibration.damping)
        self.facts = {"damping": calibration.damping}

    def encoder(self, tensor: Tensor, form: RowFormat) -> RowEncoder | None:
        """The one encoder of `tensor` for all formats with a grid."""
        from smolexport.quant.affine_view import has_grid

        return self._gptq.encoder(tensor) if has_grid(form) else super().encoder(tensor, form)

    def errors(self, tensors: Iterable[Tensor]) -> Mapping[str, Mapping[str, float]]:
        """Relative squared error of the outputs, with the format's own rounding and with error feedback."""
        return self._gptq.errors(tensors)


METHOD = Gptq
