from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from smolexport.parity.inputs import Candidate

STANDINS = str(Path(__file__).parent / "standins")
if STANDINS not in sys.path:
    # found by its name, as a stranger's runtime is
    sys.path.append(STANDINS)

import smolexport_on_table as table  # noqa: E402


@pytest.fixture
def make_model(tmp_path):
    """Write a table file and describe it."""

    def make(name, *, options=None, **facts):
        path = tmp_path / name
        path.write_text(json.dumps({"vocab": 96, "seed": 7} | facts))
        return Candidate(
            path=path,
            format="table",
            scheme=name.partition(".")[0],
            runtime=table,
            bytes=path.stat().st_size,
            bits_per_weight=4.5,
            options=options or {},
        )

    return make


@pytest.fixture
def text():
    words = "the quick brown fox jumps over the lazy dog while seven wizards brew strange potions".split()
    return " ".join(words[(i * i + 3 * i) % len(words)] for i in range(500))
