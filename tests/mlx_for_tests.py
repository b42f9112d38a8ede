"""mlx-lm as the oracle of tests, imported without what that does to the limits of the whole test process."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest

import smolexport_on_mlx

__all__ = ["MISSING", "mlx_lm", "needs_mlx"]

MISSING = "the mlx extra is not installed"
needs_mlx = pytest.mark.skipif(importlib.util.find_spec("mlx_lm") is None, reason=MISSING)


def mlx_lm(module: str = "") -> Any:
    """mlx-lm or a module inside it, or the test is skipped; the process may open as many files as before."""
    pytest.importorskip("mlx.core", reason=MISSING)
    with smolexport_on_mlx.importing_libraries():
        return pytest.importorskip(f"mlx_lm.{module}".rstrip("."), reason=MISSING)
