"""Two converters of one checkpoint side by side: what `mlx_convert` and `onnx_convert` share.

Each runs in fresh processes, in turns, on a random bf16 checkpoint of a published model's true shape; our kernels are
compiled beforehand.  A process tells its own figures: the system's counter of a finished child starts from the size of
its parent.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from tests.benchmarks.export_memory import own_tokenizer, write_random
from tests.core.published_configs import PUBLISHED

__all__ = ["OURS", "child", "command_line", "measure"]

START = "import sys, time\nstarted = time.perf_counter()\n"
REPORT = """
import json, os, time
from smolexport.parity.peak_memory import peak_rss
t = os.times()
cpu = t.user + t.system + t.children_user + t.children_system
print(json.dumps({"rss": peak_rss(), "cpu": cpu, "wall": time.perf_counter() - started}))
"""
# Without an import, numpy's included; where there is no /proc the figure is 0 and nothing is taken off.
BARE = """
try:
    lines = [line for line in open("/proc/self/status") if line.startswith("VmHWM")]
except OSError:
    lines = []
print('{"rss": %d}' % (int(lines[0].split()[1]) * 1024 if lines else 0))
"""
# Arguments of every converter's code: the checkpoint, the output, and its own.  Ours: the command and the scheme.
OURS = """
from smolexport.cli import main
try:
    main([sys.argv[3], sys.argv[1], "-q", sys.argv[4], "-o", sys.argv[2], "--json"])
except SystemExit as stop:
    assert not stop.code, stop.code
"""


def child(code: str, *arguments: str) -> dict[str, float]:
    """Run `code` in a fresh process; the figures that it prints last, bytes and seconds."""
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    figures: dict[str, float] = json.loads(done.stdout[done.stdout.rindex('{"rss"') :])
    return figures


def measure(
    name: str,
    tokenizer: Path,
    scratch: Path,
    repetitions: int,
    converters: Mapping[str, tuple[str, ...]],
    differing: Callable[[Path, Path], list[str]] | None = None,
) -> dict[str, Any]:
    """Convert the shape `name` with both; median figures in seconds and bytes, and ratios.

    Args:
        name: of a published model.
        tokenizer: folder with tokenizer.json.
        scratch: where the files go and are removed again.
        repetitions: turns.
        converters: for `ours` and `theirs` the code and its own arguments.
        differing: names what is not equal in the two outputs.
    """
    folder = scratch / name
    source = write_random(folder, PUBLISHED[name], tokenizer)
    _fill_cache(scratch / "first", *converters["ours"])
    runs: dict[str, list[dict[str, float]]] = {who: [] for who in converters}
    bare = child(BARE)["rss"]
    wrong: list[str] = []
    for turn in range(repetitions):
        made = {who: scratch / f"{who}-{turn}" for who in converters}
        for who, (code, *arguments) in converters.items():
            found = child(START + code + REPORT, str(folder), str(made[who]), *arguments)
            size = sum(path.stat().st_size for path in made[who].rglob("*") if path.is_file())
            runs[who].append({**found, "size": size})
        wrong = wrong or (differing(made["ours"], made["theirs"]) if differing else [])
        for out in made.values():
            shutil.rmtree(out)
    shutil.rmtree(folder)
    middle = {who: {key: statistics.median(r[key] for r in rows) for key in rows[0]} for who, rows in runs.items()}
    ratios = {key: middle["ours"][key] / middle["theirs"][key] for key in middle["ours"]}
    return {"model": name, "source": source, "bare_rss": bare, **middle, "ratio": ratios, "differing": wrong}


def _fill_cache(out: Path, code: str, *arguments: str) -> None:
    """Compile the kernels of our conversion, which every machine does once; `startup` measures that."""
    from smolexport.demo import demo_checkpoint

    child(START + code + REPORT, str(demo_checkpoint()), str(out), *arguments)
    shutil.rmtree(out)


def command_line(
    about: str, label: str, schemes: Collection[str], default: str, run: Callable[..., dict[str, Any]]
) -> None:
    """Measure as the arguments ask, with `run(model, scheme, tokenizer, scratch, repetitions)`, and print a table."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=PUBLISHED)
    parser.add_argument("scheme", nargs="?", default=default, choices=schemes)
    parser.add_argument("--tokenizer", type=Path, help="folder with tokenizer.json; default: the model's own")
    parser.add_argument("--scratch", type=Path, help="where the files go; some 6 GB for 1.7B")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
        tokenizer = args.tokenizer or own_tokenizer(args.model)
        f = run(args.model, args.scheme, tokenizer, Path(scratch), args.repetitions)
    if args.json:
        print(json.dumps(f))
        return
    print(f"{f['model']} {f['scheme']}: {f['source'] / 1e9:.2f} GB of weights, medians of {args.repetitions}")
    print(f"{'':>20}{'wall s':>10}{'CPU s':>10}{'peak RSS MiB':>15}{'above bare':>12}{'written MB':>12}")
    for who, name in (("ours", "smolexport"), ("theirs", label)):
        r = f[who]
        above = (r["rss"] - f["bare_rss"]) / 2**20
        memory = f"{r['rss'] / 2**20:>15.0f}{above:>12.0f}"
        print(f"{name:>20}{r['wall']:>10.1f}{r['cpu']:>10.1f}{memory}{r['size'] / 1e6:>12.1f}")
    r = f["ratio"]
    print(f"{'ratio':>20}{r['wall']:>10.2f}{r['cpu']:>10.2f}{r['rss']:>15.2f}{'':>12}{r['size']:>12.2f}")
    if "differing" in f:
        print(f"tensors that differ: {len(f['differing'])} {f['differing'][:3]}")
