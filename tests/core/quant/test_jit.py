"""Kernels without a place for the cache, and the cache when a helper changes."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import smolexport

PROGRAM = """
import numpy as np, smolexport
from smolexport.quant import FORMATS
from smolexport.quant.q8 import encode_q8_0
data = FORMATS["q8_0"].encode(np.arange(-16, 16, dtype=np.float32).reshape(1, 32))
print(smolexport.__file__, int(data.astype(np.int64).sum()), sum(encode_q8_0.stats.cache_hits.values()))
"""


def install(folder: Path) -> Path:
    """A copy of the package's parts that quantization needs, without bytecode and kernels."""
    source = Path(smolexport.__file__).parent
    package = folder / "smolexport"
    shutil.copytree(source / "quant", package / "quant", ignore=shutil.ignore_patterns("__pycache__"))
    for module in ("errors.py", "memory.py"):
        shutil.copy(source / module, package)
    (package / "__init__.py").touch()
    return package


def encode(folder: Path, **environment: str) -> tuple[str, str, int]:
    """Run PROGRAM on the package in `folder`: where it was found, sum of the bytes, kernels read from the cache."""
    env = {key: value for key, value in os.environ.items() if not key.startswith("NUMBA_")}
    env |= {"PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"} | environment
    command = [sys.executable, "-c", PROGRAM]
    run = subprocess.run(command, env=env, cwd=folder, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    found, total, hits = run.stdout.rsplit(maxsplit=2)
    return found, total, int(hits)


def test_works_where_nothing_can_be_written(tmp_path: Path) -> None:
    package = install(tmp_path)
    # A file where the folder should be stops root too, whom permissions do not.
    nowhere = tmp_path / "file"
    for name in (nowhere, package / "quant" / "__pycache__"):
        name.write_text("not a folder")
    blocked = {name: str(nowhere / "deeper") for name in ("HOME", "XDG_CACHE_HOME", "NUMBA_CACHE_DIR", "LOCALAPPDATA")}
    found, total, hits = encode(tmp_path, **blocked)
    assert Path(found).parent == package
    assert hits == 0
    assert total == encode(tmp_path, NUMBA_CACHE_DIR=str(tmp_path / "cache"))[1]


def test_cache_is_used_until_any_file_of_the_folder_changes(tmp_path: Path) -> None:
    package, cache = install(tmp_path), str(tmp_path / "cache")
    assert encode(tmp_path, NUMBA_CACHE_DIR=cache)[2] == 0
    _, total, hits = encode(tmp_path, NUMBA_CACHE_DIR=cache)
    assert hits == 1
    helper = package / "quant" / "lane_codes.py"  # inlined into the kernel, which lies in another file
    text = helper.read_text()
    changed = text.replace("builder.or_(rounded, sign)", "builder.xor(rounded, constant(WORDS, 1))")
    assert changed != text
    helper.write_text(changed)
    _, other, hits = encode(tmp_path, NUMBA_CACHE_DIR=cache)
    assert hits == 0
    assert other != total
