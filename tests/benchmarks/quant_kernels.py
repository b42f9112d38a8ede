"""Speed of the block codecs beside the C quantizer, in one run on one thread.

    python -m tests.benchmarks.quant_kernels [FORMAT ...] [--rows 512] [--columns 2048] [--repeat 5] [--json]

Prints millions of elements per second of CPU time, the best of `--repeat`, for encoding (float32 and bfloat16 rows, and
float32 with importance) and decoding, ours and `ggml_quantize_chunk` in turn, with their ratio; and the CPU seconds of
the first call of each kernel, which is a compilation unless numba's cache had it.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import ml_dtypes
import numpy as np

from smolexport.quant import FORMATS, BlockFormat
from tests.core.quant import libggml


@dataclass(frozen=True)
class Figures:
    """Millions of elements per CPU second; `first` is in CPU seconds, for encode, weighted encode and decode."""

    format: str
    encode: float
    encode_bf16: float
    encode_c: float
    weighted: float
    weighted_c: float
    decode: float
    decode_c: float
    first: tuple[float, float, float]


def cpu_seconds(work: Callable[[], object]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def measure(form: BlockFormat, rows: int, columns: int, repeat: int) -> Figures:
    rng = np.random.default_rng(0)
    weights = (rng.standard_normal((rows, columns)) * 0.02).astype(np.float32)
    brains = weights.astype(ml_dtypes.bfloat16)
    importance = (rng.standard_normal(columns) ** 2).astype(np.float32)
    out = np.empty((rows, form.row_bytes(columns)), np.uint8)
    first = (
        cpu_seconds(lambda: form.encode(weights[:1], None, out[:1])),
        cpu_seconds(lambda: form.encode(weights[:1], importance, out[:1])),
        cpu_seconds(lambda: form.decode(out[:1], columns)),
    )
    work = {
        "encode": lambda: form.encode(weights, None, out),
        "encode_c": lambda: libggml.quantize(form, weights),
        "encode_bf16": lambda: form.encode(brains, None, out),
        "weighted": lambda: form.encode(weights, importance, out),
        "weighted_c": lambda: libggml.quantize(form, weights, importance),
        "decode": lambda: form.decode(out, columns),
        "decode_c": lambda: libggml.dequantize(form, out, columns),
    }
    if form.block == 1:
        del work["decode_c"]
    best = dict.fromkeys(work, float("inf"))
    for _ in range(repeat):  # in turn, so that a slow moment of the machine meets both sides
        for name, call in work.items():
            best[name] = min(best[name], cpu_seconds(call))
    speed = {name: weights.size / seconds / 1e6 for name, seconds in best.items()}
    return Figures(form.name, **({"decode_c": float("nan")} | speed), first=first)


def render(figures: Figures) -> str:
    # The C library has no decoder for plain floats: those cells stay empty.
    f = figures
    columns = (
        f"{f.format:7} {f.encode:7.0f} {f.encode_bf16:7.0f} {f.encode_c:7.0f} {f.encode / f.encode_c:6.1f}x",
        f"{f.weighted:9.0f} {f.weighted_c:7.0f} {f.weighted / f.weighted_c:6.1f}x",
        f"{f.decode:9.0f} {f.decode_c:7.0f} {f.decode / f.decode_c:6.1f}x".replace("nanx", "   -").replace(
            "nan", "  -"
        ),
        f"  {' '.join(f'{s:4.1f}' for s in f.first)}",
    )
    return " ".join(columns)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("formats", nargs="*", metavar="FORMAT", help="default: all")
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--columns", type=int, default=2048)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    unknown = [name for name in options.formats if name not in FORMATS]
    reason = f"unknown formats: {', '.join(unknown)}" if unknown else libggml.why_missing()
    if reason:
        print(reason, file=sys.stderr)
        return 2
    results = []
    if not options.json:
        print(f"M elements per CPU second, [{options.rows}, {options.columns}]; first calls in CPU seconds")
        print("format   encode    bf16       C  ratio  weighted       C  ratio    decode       C  ratio   first calls")
    for name in options.formats or FORMATS:
        results.append(measure(FORMATS[name], options.rows, options.columns, options.repeat))
        if not options.json:
            print(render(results[-1]), flush=True)
    if options.json:
        print(json.dumps([asdict(figures) for figures in results], indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
