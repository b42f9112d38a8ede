"""Bandwidth of the plain codecs beside a copy of memory, and what a second thread adds, in one run.

    python -m tests.benchmarks.packing [FORMAT ...] [--megabytes 128] [--repeat 7] [--json]

Encodes bfloat16 rows that no cache holds and copies them, in turn, and prints for each number of threads, the best of
`--repeat`: the bytes read and written per second, by the clock; what share that is of what the copy reads and writes,
by CPU time, which other programs disturb less; and how much faster, by the clock, the threads together are than one.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from smolexport.quant import FORMATS, RowFormat
from smolexport.quant.planar import AffineFormat, NBits, PortableFormat, PortableNBits

COLUMNS = 2048
PACKERS: tuple[RowFormat, ...] = (
    FORMATS["q8_0"],
    FORMATS["q4_0"],
    AffineFormat(bits=4, group=64, dtype="BF16"),
    AffineFormat(bits=8, group=64, dtype="BF16"),
    PortableFormat(bits=4),
    PortableFormat(bits=8),
    NBits(bits=4, group=32, dtype="F32", symmetric=False),
    NBits(bits=4, group=32, dtype="F32", symmetric=True),
    NBits(bits=8, group=32, dtype="F32", symmetric=True),
    PortableNBits(bits=4, dtype="F32"),
    PortableNBits(bits=8, dtype="F32"),
)
SEARCHERS = tuple(FORMATS[name] for name in ("q2_k", "q3_k", "q4_k", "q5_k", "q6_k"))
Work = Callable[[], object]


def label(form: RowFormat) -> str:
    """Its name, with the runtime where two formats have the same one."""
    return f"{form.name}-onnx" if isinstance(form, PortableNBits) else form.name


def seconds(works: Sequence[Work]) -> NDArray[np.float64]:
    """What `works` take, each on a thread of its own: [by the clock, CPU time per thread]."""
    with ThreadPoolExecutor(len(works)) as pool:
        list(pool.map(time.sleep, [0.001] * len(works)))  # the threads exist before the clock starts
        before = np.array([time.perf_counter(), time.process_time()])
        list(pool.map(lambda work: work(), works))
        return (np.array([time.perf_counter(), time.process_time()]) - before) / (1, len(works))


def shared(threads: int, source: NDArray[Any], out: NDArray[Any], work: Callable[..., object]) -> list[Work]:
    """`work(rows, out)` for as many parts of the rows as there are threads."""
    parts = zip(np.array_split(source, threads), np.array_split(out, threads), strict=True)
    return [partial(work, *part) for part in parts]


def encode(form: RowFormat, rows: NDArray[Any], out: NDArray[np.uint8]) -> None:
    form.encode(rows, None, out)


def copy(rows: NDArray[Any], out: NDArray[Any]) -> None:
    np.copyto(out, rows)


def measure(form: RowFormat, source: NDArray[Any], threads: int, repeat: int) -> dict[str, Any]:
    """Figures for 1 ... `threads` threads."""
    counts = range(1, threads + 1)
    packed = np.zeros((len(source), form.row_bytes(COLUMNS)), np.uint8)
    copied = np.zeros_like(source)
    works = {(True, n): shared(n, source, packed, partial(encode, form)) for n in counts}
    works |= {(False, n): shared(n, source, copied, copy) for n in counts}
    encode(form, source[:1], packed[:1])
    best = {key: np.full(2, np.inf) for key in works}
    for _ in range(repeat):  # in turn, so that a slow moment of the machine meets both sides
        for key, parts in works.items():
            best[key] = np.minimum(best[key], seconds(parts))
    moved, doubled = source.nbytes + packed.nbytes, 2 * source.nbytes
    return {
        "format": label(form),
        "gigabytes": {n: moved / best[True, n][0] / 1e9 for n in counts},
        "share": {n: float(moved / best[True, n][1] / (doubled / best[False, n][1])) for n in counts},
        "speedup": {n: float(best[True, 1][0] / best[True, n][0]) for n in counts},
    }


def main() -> int:
    known = {label(form): form for form in (*PACKERS, *SEARCHERS)}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("formats", nargs="*", metavar="FORMAT", help=f"of {', '.join(known)}; default: all")
    parser.add_argument("--megabytes", type=int, default=128, help="of bfloat16 rows")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=7)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if unknown := [name for name in options.formats if name not in known]:
        print(f"unknown formats: {', '.join(unknown)}; choose from {', '.join(known)}", file=sys.stderr)
        return 2
    rows = max(options.threads, options.megabytes * 1_000_000 // (2 * COLUMNS))
    rng = np.random.default_rng(0)
    source = (rng.standard_normal((rows, COLUMNS), np.float32) * np.float32(0.02)).astype(ml_dtypes.bfloat16)
    chosen = [known[name] for name in options.formats] or list(known.values())
    results = [measure(form, source, options.threads, options.repeat) for form in chosen]
    if options.json:
        print(json.dumps(results, indent=2))
        return 0
    print(f"{source.nbytes / 1e6:.0f} MB of bfloat16, rows of {COLUMNS}, for 1 thread and more:")
    print(f"{'':14}{'GB/s':>16}{'of a copy':>16}{'speedup':>16}")
    for result in results:
        cells = (result[key].values() for key in ("gigabytes", "share", "speedup"))
        print(f"{result['format']:14}" + "".join(f"{'  '.join(f'{v:.2f}' for v in values):>16}" for values in cells))
    return 0


if __name__ == "__main__":
    sys.exit(main())
