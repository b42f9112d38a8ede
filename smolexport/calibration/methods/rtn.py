"""Plain rounding."""

from __future__ import annotations

from smolexport.calibration.methods import Method


class Rtn(Method):
    """Every format rounds by itself."""

    about = "to the nearest, as the formats' own tools do"
    rank = 0
    calibrated = False


METHOD = Rtn
