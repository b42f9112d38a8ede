"""What calibrated quantization costs at a published model's true shape: statistics, then an export with `gptq`.

    python -m tests.benchmarks.calibration SmolLM2-135M --text FILE --tokenizer FOLDER
    python -m tests.benchmarks.calibration SmolLM2-1.7B --layers 2 --text FILE --tokenizer FOLDER

Writes a random bf16 checkpoint of that shape, of its first layers only with `--layers`, and runs `smolexport calibrate`
and `smolexport gguf --method gptq` on it, each in a fresh process; prints wall time, CPU time and peak resident memory.
With `--layers` a second checkpoint of one layer less is measured too: the difference is what a layer costs, and the
last columns are that times the missing layers plus what was measured, an extrapolation.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from tests.benchmarks.conversion import REPORT, START, child
from tests.benchmarks.export_memory import write_random
from tests.core.published_configs import PUBLISHED

COMMAND = """
from smolexport.cli import main
try:
    main(sys.argv[1:])
except SystemExit as stop:
    assert not stop.code, stop.code
"""


def measure(config: dict[str, Any], args: argparse.Namespace, scratch: Path) -> dict[str, dict[str, float]]:
    """Figures of both commands for a random model of `config`, seconds and bytes."""
    folder, stats = scratch / "model", scratch / "stats"
    write_random(folder, config, args.tokenizer)
    text, tokens, out = str(args.text), str(args.tokens), str(scratch / "x.gguf")
    commands = {
        "calibrate": ["calibrate", str(folder), "-o", str(stats), "--tokens", tokens, "--text", text],
        "gptq": ["gguf", str(folder), "-q", args.quant, "--method", "gptq", "--stats", str(stats), "-o", out],
    }
    threads = ["--threads", str(args.threads)] if args.threads else []
    found = {name: child(START + COMMAND + REPORT, *words, *threads) for name, words in commands.items()}
    found["calibrate"]["size"] = sum(path.stat().st_size for path in stats.iterdir())
    shutil.rmtree(folder)
    shutil.rmtree(stats)
    for path in scratch.glob("x*"):
        path.unlink()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=PUBLISHED)
    parser.add_argument("quant", nargs="?", default="int4")
    parser.add_argument("--text", type=Path, required=True, help="what the model reads")
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder with tokenizer.json")
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--layers", type=int, help="take the first ones only, and extrapolate")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--scratch", type=Path, help="where the files go; some 12 GB for 1.7B")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    config = dict(PUBLISHED[args.model])
    whole = config["num_hidden_layers"]
    counts = [args.layers - 1, args.layers] if args.layers else [whole]
    with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
        runs = {n: measure({**config, "num_hidden_layers": n}, args, Path(scratch)) for n in counts}
    last = runs[counts[-1]]
    if args.layers:
        for name, figures in last.items():
            for key in ("wall", "cpu"):
                step = figures[key] - runs[counts[0]][name][key]
                figures[f"{key}_whole"] = figures[key] + step * (whole - args.layers)
    if args.json:
        print(json.dumps({"model": args.model, "tokens": args.tokens, "layers": counts[-1], **last}))
        return
    print(f"{args.model}, {counts[-1]} of {whole} layers, {args.tokens:,} tokens, {args.quant}")
    print(f"{'':>10}{'wall s':>9}{'CPU s':>9}{'peak RSS MiB':>14}{'whole model: wall s':>21}{'CPU s':>9}")
    for name, f in last.items():
        more = f"{f['wall_whole']:>21.0f}{f['cpu_whole']:>9.0f}" if args.layers else ""
        print(f"{name:>10}{f['wall']:>9.1f}{f['cpu']:>9.1f}{f['rss'] / 2**20:>14.0f}{more}")


if __name__ == "__main__":
    main()
