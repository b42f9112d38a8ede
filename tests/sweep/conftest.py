"""Checkpoints of all sizes that sweeps are tested on; read only."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from smolexport.testing.checkpoints import write_checkpoint, write_tokenizer

TWIN = Path(__file__).resolve().parents[1] / "fixtures" / "smollm3_twin"


@pytest.fixture(scope="session")
def twin(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model's twin as a SmolLM3, with the demo's tokenizer beside it."""
    folder = tmp_path_factory.mktemp("twins") / "twin"
    shutil.copytree(TWIN, folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(demo / name, folder)
    return folder


@pytest.fixture(scope="session")
def middling(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 16 million weights: some seconds of work in the slowest scheme."""
    folder = tmp_path_factory.mktemp("middling")
    wide: dict[str, Any] = {
        "hidden_size": 512,
        "intermediate_size": 2048,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
    }
    return write_checkpoint(folder / "middling", "llama", tokenizer=write_tokenizer(folder / "tokens"), **wide)


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A checkpoint of two layers that a test may change."""
    return checkpoint(tmp_path / "small", "llama")


@pytest.fixture
def other(tmp_path: Path) -> Path:
    """Another one, of another architecture."""
    return checkpoint(tmp_path / "other", "smollm3")


def checkpoint(folder: Path, model_type: str) -> Path:
    tokens = write_tokenizer(folder.parent / "tokens")
    return write_checkpoint(folder, model_type, tokenizer=tokens, num_hidden_layers=4)
