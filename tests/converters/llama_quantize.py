"""llama.cpp's own quantizer as an oracle, in a process of its own since its log has one listener per process.

    python -m tests.converters.llama_quantize SOURCE.gguf TARGET.gguf|- CODE [CODE ...]

Prints JSON: file type code -> {tensor: type}.  `-` = dry run: types only, no weight is touched.  With several codes
the target's name gets `.CODE` appended.
"""

from __future__ import annotations

import ctypes
import json
import re
import subprocess
import sys
from pathlib import Path

LINE = re.compile(r"\] (\S+)\s+- \[[^]]*\], type =\s+(\w+), (.*)")
INTO = re.compile(r"MiB \((\w+)\)|converting to (\w+)")


def oracle(source: Path, target: Path | None, codes: list[int]) -> dict[int, dict[str, str]]:
    """What llama.cpp's quantizer chooses for every tensor of `source`, per file type."""
    command = [sys.executable, "-m", "tests.converters.llama_quantize", str(source), str(target or "-")]
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [*command, *map(str, codes)], cwd=root, capture_output=True, text=True, check=False, timeout=600
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return {int(k): v for k, v in json.loads(done.stdout).items()}


def _main(source: str, target: str, codes: list[int]) -> None:
    import llama_cpp

    lines: list[str] = []

    @llama_cpp.llama_log_callback
    def listen(_level: int, text: bytes, _data: ctypes.c_void_p) -> None:
        lines.append(text.decode("utf-8", "replace"))

    llama_cpp.llama_log_set(listen, ctypes.c_void_p(0))
    result = {}
    for code in codes:
        lines.clear()
        params = llama_cpp.llama_model_quantize_default_params()
        params.ftype, params.nthread, params.dry_run = code, 1, target == "-"
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
    _main(sys.argv[1], sys.argv[2], [int(code) for code in sys.argv[3:]])
