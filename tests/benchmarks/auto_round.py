"""Our calibrated GGUF beside auto-round's, with as many bits and calibrated on the same tokens, in one run.

    python -m venv OTHER; OTHER/bin/pip install torch==2.13.0 auto-round gguf
    python -m tests.benchmarks.auto_round demo --calibration TEXT... --python OTHER/bin/python

`smolexport calibrate` gathers statistics of the text, `smolexport gguf --method` makes a file by each of our methods
from them, and auto-round one by each of its recipes from the same windows of tokens: their number is its `nsamples`,
their length its `seqlen`, everything else is as its documentation has it.  Its quantizer needs an interpreter of its
own, for it wants its own releases of torch and transformers.

* `opt-rtn`: no tuning (`iters=0`), what auto-round itself recommends for GGUF; `light`: `auto-round-light`, 50 steps
  a layer; `default`: 200 steps; `alg-ext`: 200 steps with `enable_alg_ext`, its other recommendation for GGUF.
* Its converter knows the vocabularies of published models by their hash, and stops at any other one, so its file is
  written without; only weights are read.
* KLD: the decoded matrices of the layers play in float32 on torch, on text that is held out, beside the checkpoint.
  Embedding and head are the 8-bit ones of `smolexport gguf -q int4` on every side: auto-round's have 6 bits.
* CPU time and memory are those of whole trees of processes, compilers included, in samples; `smolexport calibrate`,
  once for all methods, is counted in each.  Bits are a weight's in the layers' matrices.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from numpy.typing import NDArray

from smolexport.api import read_back
from smolexport.model.checkpoint import open_checkpoint
from smolexport.model.spec import Role
from smolexport.parity.metrics import Accumulator, read_predictions
from smolexport.parity.results import Accuracy
from smolexport.parity.windows import Window, block_rows, blocks, cut
from smolexport.quant import FORMATS
from smolexport_to_gguf.container import read_gguf

METHODS = ("rtn", "imatrix", "gptq", "distil")
SCHEMES = {"int4": "gguf:q4_0", "q4_k_s": "gguf:q4_k_s", "q4_k_m": "gguf:q4_k_m"}
RECIPES: dict[str, dict[str, Any]] = {
    "opt-rtn": {"iters": 0},
    "light": {"iters": 50, "lr": 5e-3},
    "default": {"iters": 200},
    "alg-ext": {"iters": 200, "enable_alg_ext": True},
}
OURS = "from smolexport.cli import main; main()"
# Arguments: the checkpoint, the output, tokens [n, w] as .npy, scheme, settings, threads.
THEIRS = """
import json, sys
checkpoint, out, tokens, scheme, settings, threads = sys.argv[1:]
import numpy as np
import torch
from auto_round import AutoRound
from auto_round.export.export_to_gguf import export
torch.set_num_threads(int(threads))
wrap = export.wrapper_model_instance
def without_vocabulary(converter, *arguments, **keywords):
    converter.set_vocab = lambda: None
    return wrap(converter, *arguments, **keywords)
export.wrapper_model_instance = without_vocabulary
windows = torch.from_numpy(np.load(tokens).astype(np.int64))
asked = {"dataset": list(windows.split(1)), "nsamples": len(windows), "seqlen": windows.shape[1]}
tuned = AutoRound(checkpoint, scheme=scheme, device_map="cpu", **asked, **json.loads(settings))
tuned.quantize_and_save(out, format=scheme)
"""
PAUSE = 0.1  # seconds between two samples
BLOCK = 64 << 20  # bytes of logits in memory


def measured(command: Sequence[str], env: Mapping[str, str] | None = None) -> dict[str, float]:
    """Run `command` to its end: `cpu` and `wall` seconds and peak `rss` bytes of it and all that it starts."""
    start, cpu, rss = time.perf_counter(), 0.0, 0
    with tempfile.TemporaryFile("w+") as said:
        process = psutil.Popen(command, stdout=said, stderr=subprocess.STDOUT, env=env)
        while process.poll() is None:
            now, held = _tree(process)
            cpu, rss = max(cpu, now), max(rss, held)
            time.sleep(PAUSE)
        if process.returncode:
            said.seek(0)
            raise SystemExit(f"{' '.join(command[:3])} … failed:\n{said.read()[-2000:]}")
    return {"wall": time.perf_counter() - start, "cpu": cpu, "rss": rss}


def _tree(process: psutil.Process) -> tuple[float, int]:
    """CPU seconds so far and resident bytes; what has ended is in the times of the parent that waited for it."""
    cpu, rss = 0.0, 0
    try:
        family = [process, *process.children(recursive=True)]
    except psutil.Error:
        family = [process]
    for one in family:
        try:
            with one.oneshot():
                cpu += sum(one.cpu_times()[:4])  # user, system, children's user and system
                rss += one.memory_info().rss
        except psutil.Error:
            continue
    return cpu, rss


def our_command(*arguments: object) -> list[str]:
    """`smolexport ARGUMENTS` as a child."""
    return [sys.executable, "-c", OURS, *map(str, arguments)]


def theirs(
    python: Path, checkpoint: Path, out: Path, tokens: Path, scheme: str, settings: Mapping[str, Any], threads: int
) -> tuple[Path, dict[str, float]]:
    """Let auto-round make a GGUF under `out`; the file and figures of `measured`.

    Args:
        python: an interpreter that has auto-round.
        checkpoint: folder.
        out: a folder that is made.
        tokens: [n, w] integers as .npy, what it is calibrated on.
        scheme: auto-round's, e.g. `gguf:q4_0`.
        settings: further arguments of `AutoRound`.
        threads: torch's.
    """
    tail = [str(checkpoint), str(out), str(tokens), scheme, json.dumps(settings), str(threads)]
    # nothing of this environment, and nothing from the network
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
    figures = measured([str(python), "-c", THEIRS, *tail], env)
    [path] = out.rglob("*.gguf")
    return path, figures


def bits(path: Path) -> float:
    """Bits per weight of the matrices in the layers."""
    found = [t for t in read_gguf(path).tensors.values() if t.name.startswith("blk.") and len(t.shape) == 2]
    return 8 * sum(t.nbytes for t in found) / sum(t.shape[0] * t.shape[1] for t in found)


def windows_of(checkpoint: Path, text: str, length: int) -> list[Window]:
    """The text's ids cut as `compare` cuts them."""
    import smolexport_on_torch

    with smolexport_on_torch.open(checkpoint, dtype="f32") as session:
        codec = session.codec
        return cut(codec.encode(text), min(length, session.context), bos=next(iter(codec.encode("")), None))


def decoded(checkpoint: Path, path: Path) -> Iterator[tuple[str, NDArray[Any]]]:
    """The file's weights in the checkpoint's names, with the checkpoint's embedding and head rounded to 8 bits."""
    opened, round8 = open_checkpoint(checkpoint), FORMATS["q8_0"]
    own = {(t.role, t.layer, t.part): stored for t, stored in opened.stored.items()}
    for tensor, array in read_back(path, opened.spec):
        if tensor.role in (Role.EMBED, Role.HEAD):
            rows = own[tensor.role, tensor.layer, tensor.part].read_rows().astype(np.float32)
            yield tensor.stored_name, round8.decode(round8.encode(rows), rows.shape[1])
        else:
            yield tensor.stored_name, array


def accuracy(checkpoint: Path, path: Path, windows: Sequence[Window], threads: int) -> Accuracy:
    """Hold the file's weights against the checkpoint's: both on torch, in float32."""
    import smolexport_on_torch

    found = Accumulator()
    with (
        smolexport_on_torch.open(checkpoint, dtype="f32", threads=threads) as base,
        smolexport_on_torch.open(checkpoint, dtype="f32", threads=threads, weights=decoded(checkpoint, path)) as other,
    ):
        rows = block_rows(base.vocab_size, BLOCK)
        for window in windows:
            start = 0
            for a, b in zip(blocks(base, window, rows), blocks(other, window, rows), strict=True):
                following = window.following[start : start + len(a)]
                found.add(read_predictions(a, following), read_predictions(b, following))
                start += len(a)
    return found.result()


def measure(checkpoint: Path, text: str, scratch: Path, args: argparse.Namespace) -> list[dict[str, Any]]:
    """A row of figures for each method of ours and each recipe of theirs."""
    from smolexport.calibration.statistics import open_statistics

    held_out = windows_of(checkpoint, text, args.window)
    stats, tokens = scratch / "stats", scratch / "tokens.npy"
    given = [part for path in args.calibration for part in ("--text", path)]
    limits = ("--tokens", args.windows * args.window, "--window", args.window, "--threads", args.threads)
    gathered = measured(our_command("calibrate", checkpoint, *given, "-o", stats, *limits))
    np.save(tokens, open_statistics(stats).windows())
    rows = [{"who": "smolexport calibrate", **gathered}]

    def add(who: str, path: Path, figures: Mapping[str, float]) -> None:
        found = accuracy(checkpoint, path, held_out, args.threads)
        kld = found.kld.mean
        row = {"who": who, **figures, "bits": bits(path), "kld": kld.value, "error": kld.error}
        rows.append(row | {"positions": found.positions})

    for method in args.methods:
        path = scratch / f"{method}.gguf"
        told = ["--method", method, *(["--stats", stats] if method != "rtn" else []), "--threads", args.threads]
        told += ["--steps", str(args.steps)] if method == "distil" and args.steps else []
        figures = measured(our_command("gguf", checkpoint, "-q", args.scheme, *told, "-o", path))
        if method != "rtn":
            figures = {key: figures[key] + gathered[key] for key in ("wall", "cpu")} | {
                "rss": max(figures["rss"], gathered["rss"])
            }
        add(f"smolexport {method}", path, figures)
    for recipe in args.recipes:
        settings, out = RECIPES[recipe], scratch / f"theirs-{recipe}"
        add(
            f"auto-round {recipe}",
            *theirs(args.python, checkpoint, out, tokens, SCHEMES[args.scheme], settings, args.threads),
        )
    return rows


def options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", nargs="?", default="demo", help="folder, or `demo`")
    parser.add_argument("scheme", nargs="?", default="int4", choices=SCHEMES)
    parser.add_argument("--python", type=Path, required=True, help="interpreter that has auto-round")
    parser.add_argument("--calibration", type=Path, nargs="+", required=True, metavar="TEXT", help="files")
    parser.add_argument("--text", type=Path, help="held-out text to score; default: the demo's")
    parser.add_argument("--steps", type=int, help="of distil")
    parser.add_argument("--methods", nargs="*", choices=METHODS, default=["rtn", "gptq", "distil"])
    parser.add_argument("--recipes", nargs="*", choices=RECIPES, default=["opt-rtn", "light", "default"])
    parser.add_argument("--windows", type=int, default=64, help="most windows to calibrate on")
    parser.add_argument("--window", type=int, default=512, help="tokens of each")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--scratch", type=Path, help="where the files go")
    parser.add_argument("--json", action="store_true")
    return parser


def main() -> None:
    args = options().parse_args()
    from smolexport.demo import demo_text
    from smolexport.model.checkpoint import find_checkpoint

    text = args.text.read_text(encoding="utf-8") if args.text else demo_text()
    with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
        rows = measure(find_checkpoint(args.checkpoint), text, Path(scratch), args)
    if args.json:
        print(json.dumps(rows, indent=2))
        return
    print(f"{args.checkpoint} {args.scheme}: at most {args.windows} windows of {args.window} tokens", end="")
    print(f", KLD over {rows[-1]['positions']} held-out positions")
    print(f"{'':22}{'KLD':>9}{'±':>9}{'bits':>7}{'CPU s':>9}{'wall s':>9}{'peak RSS MiB':>14}")
    for r in rows:
        quality = f"{r['kld']:>9.5f}{r['error']:>9.5f}{r['bits']:>7.3f}" if "kld" in r else f"{'':25}"
        print(f"{r['who']:22}{quality}{r['cpu']:>9.1f}{r['wall']:>9.1f}{r['rss'] / 2**20:>14.0f}")


if __name__ == "__main__":
    main()
