"""Time and peak memory of solving one decoder layer at the published models' true shapes: factors, lattice, codes.

    python -m tests.benchmarks.calibrating [MODEL ...] [--formats q4_0 q4_k] [--threads 2] [--json]

Inputs are random vectors with correlations, weights are random.  Each pair of a model and a format runs in a process of
its own, which holds the Hessian of one input and one matrix at a time; kernels are compiled, or read from numba's
cache, before the clock starts.  Rows that are not whole super-blocks take q5_0 instead, as llama.cpp does.

On a machine with other work, threads of BLAS that wait for each other take many times as long; `--threads 1` and its
CPU seconds can be compared there.

The last column is the layer's time by the number of layers: an extrapolation, without reading statistics, reading
weights, and the embedding.  Errors are of the outputs, relative to their square: the lattice alone, and solved.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from typing import Any

import numpy as np
from numpy.typing import NDArray

from smolexport.arch import load_spec
from smolexport.calibration.gptq import factor, relative_error, solve
from smolexport.parity.footprint import peak_rss
from smolexport.quant import FORMATS, BlockFormat
from smolexport.quant.grids import grid_of, with_codes
from smolexport.spec import Role
from tests.core.published_configs import PUBLISHED

MODELS, SCHEMES = ("SmolLM2-135M", "SmolLM2-1.7B"), ("q4_0", "q4_k")
INPUTS = ((Role.Q, Role.K, Role.V), (Role.O,), (Role.GATE, Role.UP), (Role.DOWN,))
TOKENS = 2048
PARTS = ("factor", "lattice", "solve")


def hessian(rng: np.random.Generator, columns: int) -> NDArray[np.float32]:
    """Of inputs that share 64 directions, some columns far larger than others."""
    x = rng.standard_normal((TOKENS, 64), np.float32) @ rng.standard_normal((64, columns), np.float32) / np.float32(8)
    x += rng.standard_normal((TOKENS, columns), np.float32)
    x *= np.exp(rng.standard_normal(columns)).astype(np.float32)
    made: NDArray[np.float32] = x.T @ x
    made /= np.float32(TOKENS)
    return made


def solve_input(
    rng: np.random.Generator, columns: int, outputs: list[int], form: BlockFormat, threads: int
) -> dict[str, Any]:
    """Seconds of each part, and the errors of all matrices that read one input; the errors take no part in the time."""
    h = hessian(rng, columns)
    seconds, before, after = dict.fromkeys(PARTS, 0.0), [], []
    start, cpu = time.perf_counter(), time.process_time()
    factored = factor(h)
    seconds["factor"], cpu = time.perf_counter() - start, time.process_time() - cpu
    for count in outputs:
        weights = rng.standard_normal((count, columns), np.float32) * np.float32(0.02)
        marks, begun = [time.perf_counter()], time.process_time()
        data = form.encode(weights, h.diagonal().copy())
        grid = grid_of(form, data, columns)
        marks.append(time.perf_counter())
        made = with_codes(form, data, solve(weights, grid, factored, threads))
        marks.append(time.perf_counter())
        cpu += time.process_time() - begun
        seconds["lattice"] += marks[1] - marks[0]
        seconds["solve"] += marks[2] - marks[1]
        some = slice(0, 256)  # rows to judge
        for errors, rows in ((before, data), (after, made)):
            errors.append(relative_error(weights[some], form.decode(rows[some], columns), h))
    return {
        "columns": columns,
        "outputs": outputs,
        "format": form.name,
        **seconds,
        "cpu": cpu,
        "before": before,
        "after": after,
    }


def measure(model: str, scheme: str, threads: int) -> dict[str, Any]:
    """One layer, in this process."""
    spec, rng, wanted = load_spec(PUBLISHED[model]), np.random.default_rng(0), FORMATS[scheme]
    shapes = {t.role: t.shape for t in spec.tensors() if t.layer == 0 and len(t.shape) == 2}
    chosen = [
        (shapes[roles[0]][1], [shapes[role][0] for role in roles], wanted if wanted.fits(shapes[roles[0]][1]) else None)
        for roles in INPUTS
    ]
    for form in {form or FORMATS["q5_0"] for _, _, form in chosen}:
        solve_input(rng, 256, [64], form, threads)
    found = [solve_input(rng, columns, n, form or FORMATS["q5_0"], threads) for columns, n, form in chosen]
    layer = {part: sum(row[part] for row in found) for part in PARTS}
    total = sum(layer.values())
    cpu = sum(row["cpu"] for row in found)
    return {
        "model": model,
        "format": scheme,
        "threads": threads,
        "inputs": found,
        "seconds": layer | {"layer": total, "cpu": cpu, "model": total * len(spec.layers)},
        "layers": len(spec.layers),
        "peak_rss": peak_rss(),
    }


def alone(model: str, scheme: str, threads: int) -> dict[str, Any]:
    """The same in a fresh process."""
    argv = [sys.executable, "-m", "tests.benchmarks.calibrating", model, "--formats", scheme, "--here", "--json"]
    limits = {name: str(threads) for name in ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_NUM_THREADS")}
    run = subprocess.run(
        [*argv, "--threads", str(threads)], env=os.environ | limits, stdout=subprocess.PIPE, text=True, check=True
    )
    (row,) = json.loads(run.stdout)
    return dict(row)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", metavar="MODEL", help=f"default: {', '.join(MODELS)}")
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=SCHEMES, metavar="FORMAT")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--here", action="store_true", help="in this process")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    unknown = [name for name in options.models if name not in PUBLISHED]
    if unknown:
        print(f"unknown models: {', '.join(unknown)}; known are {', '.join(PUBLISHED)}", file=sys.stderr)
        return 2
    if not options.json:
        print(f"one layer on {options.threads} threads, seconds; then all layers, extrapolated")
        print(
            f"{'':22}{'factor':>8}{'lattice':>9}{'solve':>8}{'layer':>8}{'CPU':>8}{'peak RSS MB':>13}{'model s':>9}"
            "  errors"
        )
    results = []
    for model in options.models or MODELS:
        for scheme in options.formats:
            row = (measure if options.here else alone)(model, scheme, options.threads)
            results.append(row)
            if not options.json:
                s, (before, after) = (
                    row["seconds"],
                    (
                        np.mean([error for found in row["inputs"] for error in found[key]])
                        for key in ("before", "after")
                    ),
                )
                print(
                    f"{model:14}{scheme:8}{s['factor']:>8.2f}{s['lattice']:>9.2f}{s['solve']:>8.2f}{s['layer']:>8.2f}"
                    f"{s['cpu']:>8.2f}"
                    f"{row['peak_rss'] / 1e6:>13.0f}{s['model']:>9.1f}  {before:.5f} -> {after:.5f}",
                    flush=True,
                )
    if options.json:
        print(json.dumps(results, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
