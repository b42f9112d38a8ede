"""How long the command line takes to answer, as whole processes, and what the first use of a scheme costs.

    python -m tests.benchmarks.startup [FORMAT:SCHEME ...]

Prints medians of `smolexport --help` and of exports of the demo model, with numba's cache filled (warm), and of the
first run with an empty one (cold), which compiles the kernels of the scheme: seconds by the clock, and the CPU seconds
that the first run takes longer.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

DEFAULT = ("gguf:q4_k_m", "gguf:q4_k_s", "gguf:q6_k", "gguf:q3_k_m", "gguf:q2_k", "gguf:q8_0", "gguf:q4_0", "mlx:q4",
           "mlx:mxfp4", "gguf:int4", "mlx:int4", "onnx:int4", "onnx:int8", "all:int4")  # fmt: skip
MAIN = """
import os, sys, time
started = time.perf_counter()
from smolexport.cli import main
try:
    main(sys.argv[1:])
except SystemExit as stop:
    assert not stop.code, stop.code
t = os.times()
print("\\n", time.perf_counter() - started, t.user + t.system, file=sys.stderr)
"""


def run(arguments: Sequence[str], cache: Path) -> NDArray[np.float64]:
    """[seconds by the clock without the interpreter's own start, CPU seconds] of one process."""
    env = {**os.environ, "NUMBA_CACHE_DIR": str(cache)}
    command = [sys.executable, "-c", MAIN, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    if done.returncode:
        raise SystemExit(done.stderr)
    return np.array([float(word) for word in done.stderr.split()[-2:]])


def measure(arguments: Sequence[str], scratch: Path, repetitions: int) -> dict[str, float]:
    """Cold and warm figures of one command; every cold run has an empty cache."""
    cold, warm = [], []
    for turn in range(repetitions):
        cache = scratch / f"cache-{'-'.join(arguments).replace('/', '_')}-{turn}"
        cold.append(run(arguments, cache))
        warm.append(run(arguments, cache))
    extra = [float(a[1] - b[1]) for a, b in zip(cold, warm, strict=True)]
    medians = {
        name: float(statistics.median(row[0] for row in rows)) for name, rows in (("cold", cold), ("warm", warm))
    }
    return {**medians, "compile_cpu": statistics.median(extra)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("schemes", nargs="*", metavar="FORMAT:SCHEME", default=DEFAULT)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        found = {"--help": measure(["--help"], scratch, options.repetitions)}
        for word in options.schemes:
            command, _, scheme = word.partition(":")
            out = scratch / "out" / word.replace(":", "-")
            out.mkdir(parents=True)
            arguments = [command, "demo", "-q", scheme, "-o", str(out), "--force"]
            found[word] = measure(arguments, scratch, options.repetitions)
    if options.json:
        print(json.dumps(found, indent=2))
        return
    print(f"{'':14}{'warm s':>8}{'cold s':>8}{'compiling, CPU s':>18}")
    for word, row in found.items():
        print(f"{word:14}{row['warm']:>8.2f}{row['cold']:>8.2f}{row['compile_cpu']:>18.2f}")


if __name__ == "__main__":
    main()
