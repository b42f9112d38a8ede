"""One tiny checkpoint and its export for all tests of the command line; read only."""

from __future__ import annotations

from pathlib import Path

import pytest

from smolexport.conversion.pipeline import export
from tests.cli.commands import tiny_checkpoint


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="session")
def exported(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export("gguf", tiny, tmp_path_factory.mktemp("exported") / "tiny-q8_0.gguf", quant="q8_0").path


@pytest.fixture(scope="session")
def folder(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export("mlx", tiny, tmp_path_factory.mktemp("folder") / "tiny-q8-mlx", quant="q8").path
