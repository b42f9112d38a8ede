"""llama.cpp's own quantizer as an oracle, in a process of its own since its log has one listener per process.

    python -m tests.converters.llama_quantize SOURCE.gguf TARGET.gguf|- IMPORTANCE.npz|- CODE [CODE ...]

Prints JSON: file type code -> {tensor: type}.  A target of `-` = dry run: types only, no weight is touched.  With
several codes the target's name gets `.CODE` appended.  IMPORTANCE holds a float32 vector per tensor name.
"""

from __future__ import annotations

import ctypes
import json
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from numpy.typing import NDArray

LINE = re.compile(r"\] (\S+)\s+- \[[^]]*\], type =\s+(\w+), (.*)")
INTO = re.compile(r"MiB \((\w+)\)|converting to (\w+)")


def oracle(
    source: Path, target: Path | None, codes: list[int], importance: Mapping[str, NDArray[np.float32]] | None = None
) -> dict[int, dict[str, str]]:
    """What llama.cpp's quantizer chooses for every tensor of `source`, per file type."""
    command = [sys.executable, "-m", "tests.converters.llama_quantize", str(source), str(target or "-")]
    root = Path(__file__).resolve().parents[2]
    with TemporaryDirectory() as folder:
        vectors = f"{folder}/importance.npz" if importance is not None else "-"
        if importance is not None:
            np.savez(vectors, **importance)  # type: ignore[arg-type]
        done = subprocess.run(
            [*command, vectors, *map(str, codes)], cwd=root, capture_output=True, text=True, check=False, timeout=600
        )
    assert done.returncode == 0, done.stderr[-2000:]
    return {int(k): v for k, v in json.loads(done.stdout).items()}


def _vectors(path: str) -> Any:
    """The vectors in `path` as the library takes them, an array that ends with an empty element."""
    import llama_cpp

    with np.load(path) as found:
        items = {name: np.ascontiguousarray(found[name], np.float32) for name in found.files}
    array = (llama_cpp.llama_model_imatrix_data * (len(items) + 1))()
    for slot, (name, vector) in zip(array, items.items(), strict=False):
        pointer = vector.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        slot.name, slot.data, slot.size = name.encode(), pointer, vector.size
    array.alive = items  # the pointers do not keep them
    return array


def _main(source: str, target: str, vectors: str, codes: list[int]) -> None:
    import llama_cpp

    lines: list[str] = []

    @llama_cpp.llama_log_callback
    def listen(_level: int, text: bytes, _data: ctypes.c_void_p) -> None:
        lines.append(text.decode("utf-8", "replace"))

    llama_cpp.llama_log_set(listen, ctypes.c_void_p(0))
    result = {}
    weights = None if vectors == "-" else _vectors(vectors)
    for code in codes:
        lines.clear()
        params = llama_cpp.llama_model_quantize_default_params()
        params.ftype, params.nthread, params.dry_run = code, 1, target == "-"
        if weights is not None:
            params.imatrix = weights
        name = "/dev/null" if target == "-" else target if len(codes) == 1 else f"{target}.{code}"
        status = llama_cpp.llama_model_quantize(source.encode(), name.encode(), ctypes.byref(params))
        log = "".join(lines)
        if status:
            sys.exit(f"llama_model_quantize failed: {log[-1000:]}")
        result[code] = types_in(log)
    print(json.dumps(result))


def types_in(log: str) -> dict[str, str]:
    """Tensor -> type from the quantizer's log."""
    found = {}
    for line in log.splitlines():
        match = LINE.search(line)
        if match:
            name, before, rest = match.groups()
            into = INTO.search(rest)
            found[name] = next((g for g in into.groups() if g), before) if into else before
    return found


if __name__ == "__main__":
    _main(sys.argv[1], sys.argv[2], sys.argv[3], [int(code) for code in sys.argv[4:]])
