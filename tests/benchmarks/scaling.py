"""Time and peak memory of an export from 135M to 3B weights, at the published models' true shapes, with a plot.

    python -m tests.benchmarks.scaling q4_k_m --plot scaling.svg

Writes a random bf16 checkpoint of each shape, exports it in a fresh process (`tests.benchmarks.export_memory`), the
shapes by turns, and prints medians with what a line through them says: seconds per GB, seconds at no bytes, and how
much of the variance it explains.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from tests.benchmarks.export_memory import measure
from tests.core.published_configs import PUBLISHED

SHAPES = ("SmolLM2-135M", "SmolLM2-360M", "SmolLM2-1.7B", "SmolLM3-3B")
MIDDLE = ("wall", "cpu", "peak_rss")


def through(x: list[float], y: list[float]) -> dict[str, float]:
    """The line of least squares through the points, and the share of y's variance that it explains."""
    slope, start = np.polyfit(x, y, 1)
    left = np.var(np.asarray(y) - (slope * np.asarray(x) + start))
    return {"slope": float(slope), "start": float(start), "explained": float(1 - left / np.var(y))}


def plot(rows: list[dict[str, Any]], lines: dict[str, dict[str, float]], title: str, path: Path) -> None:
    """Time over bytes with its line, and peak memory over bytes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    time, memory = figure.subplots(1, 2)
    gigabytes = [row["source"] / 1e9 for row in rows]
    for key, label in (("wall", "wall"), ("cpu", "CPU")):
        points = time.plot(gigabytes, [row[key] for row in rows], "o", label=label)
        ends = np.array([0, gigabytes[-1]])
        time.plot(ends, lines[key]["start"] + lines[key]["slope"] * ends, "-", color=points[0].get_color(), alpha=0.5)
    time.set(ylabel="seconds", title=title, ylim=(0, None))
    time.legend(frameon=False)
    memory.plot(gigabytes, [row["peak_rss"] / 1e6 for row in rows], "o-")
    memory.set(ylabel="peak RSS, MB", title="memory", ylim=(0, 420))
    for axis in (time, memory):
        axis.set_xlabel("checkpoint, GB")
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
        for row, x in zip(rows, gigabytes, strict=True):
            axis.annotate(row["model"].split("-")[-1], (x, 0), (0, 3), textcoords="offset points", ha="center", size=8)
    figure.savefig(path)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scheme", nargs="?", default="q4_k_m")
    parser.add_argument("--command", default="gguf", help="what is run: gguf, mlx, onnx, all")
    parser.add_argument("--shapes", nargs="+", choices=PUBLISHED, default=SHAPES, metavar="MODEL")
    parser.add_argument("--tokenizer", type=Path, help="folder with tokenizer.json; default: each model's own")
    parser.add_argument("--scratch", type=Path, help="where the files go; some 10 GB for 3B")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--plot", type=Path, help="write the plot here, as .svg, .png or .pdf")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if len(options.shapes) < 2:
        print("a line needs two shapes", file=sys.stderr)
        return 2
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in options.shapes}
    for _ in range(options.repetitions):
        for name in options.shapes:
            with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
                found[name].append(
                    measure(name, options.scheme, options.tokenizer, Path(scratch), command=options.command)
                )
    rows = [{**runs[0], **{key: statistics.median(r[key] for r in runs) for key in MIDDLE}} for runs in found.values()]
    gigabytes = [row["source"] / 1e9 for row in rows]
    lines = {key: through(gigabytes, [row[key] for row in rows]) for key in ("wall", "cpu")}
    title = f"{options.command} {options.scheme}"
    if options.plot:
        plot(rows, lines, title, options.plot)
    if options.json:
        print(json.dumps({"rows": rows, "lines": lines}, indent=2))
        return 0
    print(f"{title}: medians of {options.repetitions}")
    print(f"{'':14}{'GB':>8}{'written':>9}{'wall s':>8}{'CPU s':>8}{'s per GB':>10}{'peak RSS MB':>13}")
    for row, size in zip(rows, gigabytes, strict=True):
        print(
            f"{row['model']:14}{size:>8.2f}{row['output'] / 1e9:>9.2f}{row['wall']:>8.1f}{row['cpu']:>8.1f}"
            f"{row['wall'] / size:>10.2f}{row['peak_rss'] / 1e6:>13.0f}"
        )
    for key, line in lines.items():
        print(f"{key}: {line['start']:.2f} s + {line['slope']:.2f} s per GB, explains {line['explained']:.4f} of it")
    return 0


if __name__ == "__main__":
    sys.exit(main())
