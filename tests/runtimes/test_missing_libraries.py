"""Without their libraries the adapters still import, and say what to install."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(code: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", code],
        check=False,
        env={"PYTHONPATH": f"{ROOT}:{ROOT / 'runtimes'}"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.parametrize(
    ("adapter", "library", "line"),
    [
        ("smolexport_on_torch", "torch", "pip install torch transformers"),
        ("smolexport_on_torch", "transformers", "pip install torch transformers"),
        ("smolexport_on_llamacpp", "llama_cpp", "pip install llama-cpp-python"),
        ("smolexport_on_mlx", "mlx", "pip install 'mlx[cpu]' mlx-lm"),
        ("smolexport_on_mlx", "mlx.core", "pip install 'mlx[cpu]' mlx-lm"),
        ("smolexport_on_mlx", "resource", "pip install 'mlx[cpu]' mlx-lm"),
        ("smolexport_on_mlx", "mlx_lm", "pip install 'mlx[cpu]' mlx-lm"),
        ("smolexport_on_onnxruntime", "onnxruntime", "pip install onnxruntime"),
        ("smolexport_on_onnxruntime_genai", "onnxruntime_genai", "pip install onnxruntime-genai"),
    ],
)
def test_the_line_that_installs_it(adapter: str, library: str, line: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"GGUF")
    told = run(f"""
import sys
sys.modules[{library!r}] = None
from pathlib import Path
import {adapter} as adapter
from smolexport.errors import MissingDependencyError
assert adapter.NAME and adapter.INSTALL_HINT == {line!r}
try:
    adapter.open(Path({str(tmp_path / "file")!r}))
except MissingDependencyError as error:
    print(error)
""")
    assert line in told
    assert library in told
    assert len(told.splitlines()) == 1


@pytest.mark.parametrize(
    "adapter",
    [f"smolexport_on_{name}" for name in ("torch", "llamacpp", "mlx", "onnxruntime", "onnxruntime_genai")],
)
def test_importing_an_adapter_loads_nothing_heavy(adapter: str) -> None:
    loaded = run(f"import sys, {adapter}; print(*sys.modules)").split()
    assert adapter in loaded
    heavy = {"torch", "transformers", "llama_cpp", "mlx", "mlx_lm", "onnx", "onnxruntime", "onnxruntime_genai", "numpy"}
    assert not heavy & set(loaded)


def test_generating_needs_numpy_only() -> None:
    loaded = run("import sys, smolexport.run.generate; print(*sys.modules)").split()
    heavy = {"torch", "transformers", "llama_cpp", "mlx", "mlx_lm", "numba", "tokenizers", "huggingface_hub", "psutil"}
    assert not heavy & set(loaded)
