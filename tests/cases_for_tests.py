"""Checkpoints with a fault or an oddity, each made by a recipe that is kept beside the repository."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

__all__ = ["made_case"]

ROOT = Path(__file__).resolve().parents[1]
CASES = ROOT.parent / "shared" / "cases"


def made_case(number: str, out: Path, *arguments: str) -> Path:
    """The checkpoint that recipe `number` makes of the demo model, in the folder `out`.

    Args:
        number: the digits that open the recipe's name, e.g. `72`.
        out: the folder that gets the checkpoint; an existing one is replaced.
        arguments: further ones that the recipe knows.
    """
    recipe = next(CASES.glob(f"{number}-*/make.py"), None)
    if recipe is None:
        pytest.skip(f"recipe {number} is not in the folder shared/cases beside the repository")
    places = [ROOT, ROOT / "converters", ROOT / "runtimes", os.environ.get("PYTHONPATH", "")]
    path = os.pathsep.join(str(place) for place in places if str(place))
    made = subprocess.run(
        [sys.executable, str(recipe), str(out), *arguments],
        env=os.environ | {"PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert made.returncode == 0, made.stderr
    return out
