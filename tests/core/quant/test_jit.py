"""Kernels without a place for the cache, and the cache when a helper changes."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import smolexport

PROGRAM = """
import numpy as np, smolexport
from smolexport.quant import FORMATS
from smolexport.quant.kernels.legacy_quants import encode_q8_0
data = FORMATS["q8_0"].encode(np.arange(-16, 16, dtype=np.float32).reshape(1, 32))
print(smolexport.__file__, int(data.astype(np.int64).sum()), sum(encode_q8_0.stats.cache_hits.values()))
"""

ELSEWHERE = """
import numpy as np, smolexport
from smolexport.calibration.gptq_kernels import round_block
one, two, grid = np.ones((1, 1), np.float32), np.zeros((1, 32), np.float32), np.ones((1, 32), np.float32)
codes = np.zeros((1, 32), np.uint8)
round_block(one, two, 7 * grid, grid, two, np.zeros(1, np.int64), 15, 0, codes)
print(smolexport.__file__, int(codes.sum()), sum(round_block.stats.cache_hits.values()))
"""


def install(folder: Path) -> Path:
    """A copy of the package's parts that quantization needs, without bytecode and kernels."""
    source = Path(smolexport.__file__).parent
    package = folder / "smolexport"
    shutil.copytree(source / "quant", package / "quant", ignore=shutil.ignore_patterns("__pycache__"))
    for module in ("errors.py", "heap.py", "text.py"):
        shutil.copy(source / module, package)
    (package / "calibration").mkdir()
    (package / "calibration" / "__init__.py").touch()
    shutil.copy(source / "calibration" / "gptq_kernels.py", package / "calibration")
    (package / "__init__.py").touch()
    return package


def encode(folder: Path, program: str = PROGRAM, **environment: str) -> tuple[str, str, int]:
    """Run a program on the package in `folder`: where it was found, sum of the bytes, kernels read from the cache."""
    env = {key: value for key, value in os.environ.items() if not key.startswith("NUMBA_")}
    env |= {"PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"} | environment
    command = [sys.executable, "-c", program]
    run = subprocess.run(command, env=env, cwd=folder, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    found, total, hits = run.stdout.rsplit(maxsplit=2)
    return found, total, int(hits)


def test_works_where_nothing_can_be_written(tmp_path: Path) -> None:
    package = install(tmp_path)
    # A file where the folder should be stops root too, whom permissions do not.
    nowhere = tmp_path / "file"
    for name in (nowhere, package / "quant" / "kernels" / "__pycache__"):
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
    helper = package / "quant" / "kernels" / "floats.py"  # inlined into the kernel, which lies in another file
    text = helper.read_text()
    changed = text.replace(
        "builder.or_(rounded, sign_bit(builder, bits, 16))", "builder.xor(rounded, constant(WORDS, 1))"
    )
    assert changed != text
    helper.write_text(changed)
    _, other, hits = encode(tmp_path, NUMBA_CACHE_DIR=cache)
    assert hits == 0
    assert other != total


def test_kernels_of_other_folders_are_recompiled_when_theirs_or_this_changes(tmp_path: Path) -> None:
    package, cache = install(tmp_path), str(tmp_path / "cache")
    assert [encode(tmp_path, ELSEWHERE, NUMBA_CACHE_DIR=cache)[1:] for _ in range(2)] == [
        (str(7 * 32), 0),
        (str(7 * 32), 1),
    ]
    own, helper = package / "calibration" / "gptq_kernels.py", package / "quant" / "kernels" / "lanes.py"
    own.write_text(own.read_text().replace("place = where(place > zero", "place = where(place > last"))
    assert encode(tmp_path, ELSEWHERE, NUMBA_CACHE_DIR=cache)[1:] == ("0", 0)
    helper.write_text(helper.read_text() + "\n")
    assert encode(tmp_path, ELSEWHERE, NUMBA_CACHE_DIR=cache)[1:] == ("0", 0)


@pytest.mark.parametrize("words", [("mlx", "-q", "int4"), ("onnx", "-q", "int4"), ("mlx", "-q", "q4")])
def test_a_second_run_compiles_nothing(words: tuple[str, ...], tmp_path: Path) -> None:
    """A kernel made in a function is found again only if what it encloses is numbers."""
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path / "cache")}
    code = f"from smolexport.cli import main; main({[words[0], 'demo', *words[1:], '-f', '-o', str(tmp_path / 'x')]!r})"
    kernels = []
    for _ in range(2):
        subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, env=environment)
        kernels.append({path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*.nb[ci]")})
    assert kernels[0]
    assert kernels[1] == kernels[0]
