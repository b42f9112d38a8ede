"""The wheel: all packages at the top level, typed, with the demo, without tests."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = (
    "smolexport", "smolexport_to_gguf", "smolexport_to_mlx", "smolexport_to_onnx", "smolexport_on_torch",
    "smolexport_on_llamacpp", "smolexport_on_mlx", "smolexport_on_onnxruntime", "smolexport_on_onnxruntime_genai",
)  # fmt: skip


@pytest.fixture(scope="module")
def names(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """File names in a wheel built from a copy of what git would hold."""
    pytest.importorskip("hatchling")
    copy = tmp_path_factory.mktemp("source")
    skipped = shutil.ignore_patterns("__pycache__", ".*cache", "*.egg-info")
    for name in ("smolexport", "converters", "runtimes", "tests"):
        shutil.copytree(ROOT / name, copy / name, ignore=skipped)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy / name)
    done = subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", "dist"],
        check=False, cwd=copy, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    [wheel] = (copy / "dist").glob("*.whl")
    assert wheel.stat().st_size < 12e6
    with zipfile.ZipFile(wheel) as archive:
        return archive.namelist()


def test_top_level(names: list[str]) -> None:
    top = {name.split("/")[0] for name in names}
    assert set(PACKAGES) <= top
    assert all(name.startswith("smolexport") for name in top)


@pytest.mark.parametrize("package", PACKAGES)
def test_each_package_is_whole_and_typed(package: str, names: list[str]) -> None:
    assert f"{package}/py.typed" in names
    home = next(p for p in (ROOT / package, ROOT / "converters" / package, ROOT / "runtimes" / package) if p.is_dir())
    missing = {f"{package}/{f.relative_to(home).as_posix()}" for f in home.rglob("*.py")} - set(names)
    assert not missing


def test_demo_is_inside(names: list[str], demo: Path) -> None:
    for file in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "held_out.txt"):
        assert (demo / file).is_file()
        assert f"smolexport/demo/checkpoint/{file}" in names
    assert "smolexport/demo/MODEL_CARD.md" in names


def test_what_the_reports_are_made_from_is_inside(names: list[str]) -> None:
    for file in ("report/page.html.j2", "report/page.css", "report/charts.mplstyle", "chat_questions.json"):
        assert f"smolexport/parity/{file}" in names


def test_nothing_else(names: list[str]) -> None:
    assert not [n for n in names if "tests/" in n or "__pycache__" in n or n.endswith((".pyc", ".log", ".nbi", ".nbc"))]
