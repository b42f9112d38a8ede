"""One pass for all formats beside each format alone, at a published model's true shape, in one run.

    python -m tests.benchmarks.all_formats SmolLM2-1.7B int4 --tokenizer FOLDER

Writes a random bf16 checkpoint of that shape and exports it, in fresh processes and in turns, with `smolexport gguf`,
`mlx`, `onnx` and `all`; `copy` then copies what `all` wrote and waits for the disk as an export does, so that one sees
what the writing alone takes.  Prints medians, each also as a ratio to the slowest single format: time by the clock, CPU
time of the program and of the system for it, and bytes.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tests.benchmarks.export_memory import write_random
from tests.core.published_configs import PUBLISHED

SINGLE = ("gguf", "mlx", "onnx")
KEYS = ("wall", "user", "system", "peak_rss", "written")
EXPORT = """
from smolexport.cli import main
try:
    main(sys.argv[1:])
except SystemExit as stop:
    assert not stop.code, stop.code
"""
COPY = """
import os, pathlib, shutil
for name in sorted(p for p in pathlib.Path(sys.argv[1]).rglob("*") if p.is_file()):
    with name.open("rb") as source, open(os.path.join(sys.argv[2], f"{len(os.listdir(sys.argv[2]))}"), "wb") as target:
        shutil.copyfileobj(source, target, 1 << 20)
        target.flush()
        os.fsync(target.fileno())
"""
START = "import sys, time\nstarted = time.perf_counter()\n"
REPORT = """
import json, os
from smolexport.parity.peak_memory import peak_rss
t = os.times()
wall = time.perf_counter() - started
print(json.dumps({"wall": wall, "user": t.user, "system": t.system, "peak_rss": peak_rss()}))
"""


def child(code: str, arguments: Sequence[str], out: Path) -> dict[str, float]:
    """Figures of `code` in a fresh process, and of what it wrote to the folder `out`."""
    out.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", START + code + REPORT, *arguments], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    figures: dict[str, float] = json.loads(done.stdout[done.stdout.rindex('{"wall"') :])
    return {**figures, "written": sum(path.stat().st_size for path in out.rglob("*") if path.is_file())}


def measure(name: str, scheme: str, tokenizer: Path, scratch: Path, turns: int) -> dict[str, dict[str, float]]:
    """Medians of every command's figures, seconds and bytes."""
    folder = scratch / name
    write_random(folder, PUBLISHED[name], tokenizer)
    runs: dict[str, list[dict[str, float]]] = {command: [] for command in (*SINGLE, "all", "copy")}
    for _ in range(turns):
        for command in (*SINGLE, "all"):
            out = scratch / command
            runs[command].append(child(EXPORT, [command, str(folder), "-q", scheme, "-o", str(out), "--json"], out))
            if command != "all":
                shutil.rmtree(out)
        runs["copy"].append(child(COPY, [str(scratch / "all"), str(scratch / "copy")], scratch / "copy"))
        shutil.rmtree(scratch / "all")
        shutil.rmtree(scratch / "copy")
    return {who: {key: statistics.median(row[key] for row in rows) for key in KEYS} for who, rows in runs.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=PUBLISHED)
    parser.add_argument("scheme", nargs="?", default="int4", help="one that all formats have")
    parser.add_argument("--tokenizer", type=Path, help="folder with tokenizer.json; default: the demo's")
    parser.add_argument("--scratch", type=Path, help="where the files go; some 11 GB for 1.7B")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    from smolexport.demo import demo_checkpoint

    with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
        found = measure(args.model, args.scheme, args.tokenizer or demo_checkpoint(), Path(scratch), args.repetitions)
    if args.json:
        print(json.dumps(found, indent=2))
        return
    slowest = {key: max(found[command][key] for command in SINGLE) for key in KEYS}
    print(f"{args.model} {args.scheme}: medians of {args.repetitions}; ratios to the slowest single format")
    print(
        f"{'':6}" + "".join(f"{label:>14}" for label in ("wall s", "user s", "system s", "peak RSS MB", "written MB"))
    )
    for command, row in found.items():
        units = (1, 1, 1, 1e6, 1e6)
        cells = (
            f"{row[key] / unit:>8.{1 if unit == 1 else 0}f}{row[key] / slowest[key]:>6.2f}"
            for key, unit in zip(KEYS, units, strict=True)
        )
        print(f"{command:6}" + "".join(cells))


if __name__ == "__main__":
    main()
