"""Optimum, which is held at transformers below 4.58, in an environment of its own: `make optimum` makes it.

The variable SMOLEXPORT_OPTIMUM_PYTHON names that environment's Python.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

__all__ = ["VARIABLE", "export_f32", "optimum_python", "run_optimum"]

VARIABLE = "SMOLEXPORT_OPTIMUM_PYTHON"
EXPORT = """
import sys
from optimum.exporters.onnx import main_export
main_export(
    sys.argv[1], sys.argv[2], task="text-generation-with-past", dtype="fp32", do_validation=False, local_files_only=True
)
print("{}")
"""


def optimum_python() -> str | None:
    """The Python that has optimum, or None where the variable names none."""
    return os.environ.get(VARIABLE) or None


def run_optimum(code: str, *arguments: str) -> Any:
    """Run `code` with optimum's Python; the JSON in the last line that it prints.

    Raises:
        RuntimeError: the variable names no Python, or the code fails there.
    """
    python = optimum_python()
    if python is None:
        raise RuntimeError(f"{VARIABLE} names no Python")
    # Nothing of this environment, and nothing from the network.
    own = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run([python, "-c", code, *arguments], capture_output=True, text=True, check=False, env=own)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def export_f32(checkpoint: Path, folder: Path) -> Path:
    """Let optimum export `checkpoint` as it does by default, in f32, to `folder`, laid out as our folders are."""
    run_optimum(EXPORT, str(checkpoint), str(folder / "onnx"))
    (folder / "onnx" / "config.json").rename(folder / "config.json")
    return folder
