"""What all tests share: where the optional data lie, the demo model, and things made once per run."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from importlib import import_module
from pathlib import Path

import pytest

from smolexport.quant.formats import FORMATS

# What comparisons keep goes nowhere near the user's own cache; set before anything can read it, children inherit it.
CACHE = tempfile.mkdtemp(prefix="smolexport-tests-")
os.environ["HF_ASSETS_CACHE"] = CACHE
atexit.register(shutil.rmtree, CACHE, ignore_errors=True)

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"
# Children import this tree as well, whether it is installed or not.
os.environ["PYTHONPATH"] = os.pathsep.join(str(ROOT / part) for part in (".", "converters", "runtimes"))


def pytest_sessionstart() -> None:
    """Import kernels before threads do: pytest parses what it rewrites, which Python 3.11 cannot do in two at once."""
    for form in FORMATS.values():
        import_module(f"smolexport.quant.kernels.{form.home}")


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


@pytest.fixture(scope="session")
def demo_statistics(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Statistics of the demo model, on 16k tokens that it wrote itself."""
    pytest.importorskip("torch")
    from smolexport.calibration import collect
    from smolexport.model.checkpoint import open_checkpoint

    folder = tmp_path_factory.mktemp("calibrated") / "stats"
    job = collect.open_collection(open_checkpoint(demo), folder, tokens=16384, threads=1)
    return collect.collect(job).folder
