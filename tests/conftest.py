"""What all tests share: where the optional data lie, the demo model, and things made once per run."""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with real tokenizers, a real checkpoint and texts, where it lies beside the repository."""
    if not (SHARED / "data").is_dir():
        pytest.skip("the folder shared/data beside the repository is not there")
    return SHARED / "data"


@pytest.fixture(scope="session")
def demo() -> Path:
    """The embedded demo checkpoint."""
    from smolexport.demo import demo_checkpoint

    return demo_checkpoint()
