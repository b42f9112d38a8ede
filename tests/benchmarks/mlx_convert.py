"""One conversion to an MLX folder beside mlx-lm's own, at a published model's true shape, in one run.

    python -m tests.benchmarks.mlx_convert SmolLM2-1.7B q4 --tokenizer FOLDER

Writes a random bf16 checkpoint of that shape, converts it with `smolexport mlx` and with `mlx_lm.convert`, each in
a fresh process, in turns, and prints wall time, CPU time and peak resident memory with their ratios.  Memory is also
told above that of an interpreter that imports nothing.  Every tensor of the two folders is compared.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.benchmarks.export_memory import write_random
from tests.core.published_configs import PUBLISHED

REPORT = """
import json, os, sys, time
from smolexport.parity.footprint import peak_rss
t = os.times()
print(json.dumps({"rss": peak_rss(), "cpu": t.user + t.system, "wall": time.perf_counter() - started}))
"""
# Without an import, numpy's included; where there is no /proc the figure is 0 and nothing is taken off.
BARE = """
try:
    lines = [line for line in open("/proc/self/status") if line.startswith("VmHWM")]
except OSError:
    lines = []
print('{"rss": %d}' % (int(lines[0].split()[1]) * 1024 if lines else 0))
"""
OURS = """
import sys, time
started = time.perf_counter()
from smolexport.cli import main
try:
    main(["mlx", sys.argv[1], "-q", sys.argv[3], "-o", sys.argv[2], "--json"])
except SystemExit as stop:
    assert not stop.code, stop.code
"""
THEIRS = """
import json, sys, time
started = time.perf_counter()
from mlx_lm import convert
convert(sys.argv[1], sys.argv[2], **json.loads(sys.argv[3]))
"""
# What mlx_lm.convert is told for the same scheme.
SCHEMES: Mapping[str, dict[str, Any]] = {
    "bf16": {},
    **{f"q{bits}": {"quantize": True, "q_bits": bits, "q_group_size": 64} for bits in (2, 3, 4, 5, 6, 8)},
    **{f"q{bits}_g32": {"quantize": True, "q_bits": bits, "q_group_size": 32} for bits in (2, 3, 4, 5, 6, 8)},
    "mixed_4_6": {"quantize": True, "quant_predicate": "mixed_4_6", "q_group_size": 64},
    "mxfp4": {"quantize": True, "q_mode": "mxfp4"},
    "nvfp4": {"quantize": True, "q_mode": "nvfp4"},
    "mxfp8": {"quantize": True, "q_mode": "mxfp8"},
}


def child(code: str, *arguments: str) -> dict[str, float]:
    """Run `code` in a fresh process; the figures that it prints last, bytes and seconds."""
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    figures: dict[str, float] = json.loads(done.stdout[done.stdout.rindex('{"rss"') :])
    return figures


def differing(ours: Path, theirs: Path) -> list[str]:
    """Names of tensors that are not equal to the byte."""
    from smolexport_to_mlx.container import read_arrays

    a, b = read_arrays(ours)[0], read_arrays(theirs)[0]
    wrong = sorted(a.keys() ^ b.keys())
    for name in a.keys() & b.keys():
        x, y = a[name], b[name]
        same = (x.dtype, x.shape) == (y.dtype, y.shape) and _bytes(x) == _bytes(y)
        wrong += [] if same else [name]
    return wrong


def _bytes(array: Any) -> bytes:
    with array.path.open("rb") as file:
        file.seek(array.offset)
        return bytes(file.read(array.nbytes))


def measure(name: str, scheme: str, tokenizer: Path, scratch: Path, repetitions: int = 3) -> dict[str, Any]:
    """Convert the shape `name` with both; median figures, ratios, and tensors that differ."""
    folder = scratch / name
    source = write_random(folder, PUBLISHED[name], tokenizer)
    runs: dict[str, list[dict[str, float]]] = {"ours": [], "theirs": []}
    bare = child(BARE)["rss"]
    wrong: list[str] = []
    for turn in range(repetitions):
        ours, theirs = scratch / f"ours-{turn}", scratch / f"theirs-{turn}"
        runs["ours"].append(child(OURS + REPORT, str(folder), str(ours), scheme))
        runs["theirs"].append(child(THEIRS + REPORT, str(folder), str(theirs), json.dumps(SCHEMES[scheme])))
        wrong = wrong or differing(ours, theirs)
        shutil.rmtree(ours)
        shutil.rmtree(theirs)
    shutil.rmtree(folder)
    middle = {who: {key: statistics.median(r[key] for r in rows) for key in rows[0]} for who, rows in runs.items()}
    ratios = {key: middle["ours"][key] / middle["theirs"][key] for key in middle["ours"]}
    return {
        "model": name,
        "scheme": scheme,
        "source": source,
        "bare_rss": bare,
        **middle,
        "ratio": ratios,
        "differing": wrong,
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=PUBLISHED)
    parser.add_argument("scheme", nargs="?", default="q4", choices=SCHEMES)
    parser.add_argument("--tokenizer", type=Path, help="folder with tokenizer.json; default: the demo's")
    parser.add_argument("--scratch", type=Path, help="where the files go; some 6 GB for 1.7B")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    from smolexport.demo import demo_checkpoint

    with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
        tokenizer = args.tokenizer or demo_checkpoint()
        f = measure(args.model, args.scheme, tokenizer, Path(scratch), args.repetitions)
    if args.json:
        print(json.dumps(f))
        return
    print(f"{f['model']} {f['scheme']}: {f['source'] / 1e9:.2f} GB of weights, medians of {args.repetitions}")
    print(f"{'':>20}{'wall s':>10}{'CPU s':>10}{'peak RSS MiB':>15}{'above bare':>12}")
    for who, label in (("ours", "smolexport"), ("theirs", "mlx_lm.convert")):
        r = f[who]
        above = (r["rss"] - f["bare_rss"]) / 2**20
        print(f"{label:>20}{r['wall']:>10.1f}{r['cpu']:>10.1f}{r['rss'] / 2**20:>15.0f}{above:>12.0f}")
    r = f["ratio"]
    print(f"{'ratio':>20}{r['wall']:>10.2f}{r['cpu']:>10.2f}{r['rss']:>15.2f}")
    print(f"tensors that differ: {len(f['differing'])} {f['differing'][:3]}")


if __name__ == "__main__":
    main()
