"""Tokens per second of one ONNX folder in the ways that it can be run, at a published model's true shape.

    python -m tests.benchmarks.onnx_decode SmolLM2-135M int4 --tokenizer FOLDER

Writes a random bf16 checkpoint of that shape, exports it with `smolexport onnx`, and measures, each in a process of its
own and all in turns:

* `session`: our adapter, with one buffer for past and present;
* `fresh`: the same with the outputs of a step bound as the inputs of the next;
* `plain`: the same with `InferenceSession.run`, arrays in and out;
* `genai`: the generator of onnxruntime-genai on our folder, where installed;
* `builder`: the same on what onnxruntime-genai's own builder makes of the checkpoint, where it runs;
* `unshared`: the same with the caches of a step made anew, as that generator did before it shared them;
* `optimum`: optimum's f32 graph of the checkpoint, its outputs bound as the inputs of the next step, where
  SMOLEXPORT_OPTIMUM_PYTHON names a Python that has optimum to export it (`make optimum`);
* `torch`: the checkpoint in bf16.

Prints, for each number of threads, medians over the turns and, turn by turn, ratios to the first way: tokens per second
of the clock and, where other programs want the cores too, of CPU time, in which threads that spin count as well.  Under
it stands what share of the memory's bandwidth, measured in the same run, reading the weights once per token takes.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from smolexport.model.spec import Role
from smolexport.parity.speed import memory_bandwidth
from tests.benchmarks.export_memory import write_random
from tests.benchmarks.turns import Player, in_turns, ratio, serve
from tests.core.published_configs import PUBLISHED
from tests.optimum_for_tests import VARIABLE, export_f32, optimum_python

WAYS = ("session", "fresh", "plain", "genai", "builder", "unshared", "optimum", "torch")
BUILDERS = ("builder", "unshared")
KEYS = ("prefill", "decode", "prefill_cpu", "decode_cpu")


def session(folder: Path, threads: int, context: int, spinning: bool) -> Player:
    import smolexport_on_onnxruntime

    opened = smolexport_on_onnxruntime.open(folder, threads=threads, context=context, spinning=spinning)
    return lambda ids: opened.append(ids, last_only=True), lambda: opened.rewind(0)


def onnxruntime(folder: Path, threads: int, spinning: bool, bound: bool) -> Player:
    """Without a shared buffer: outputs are made anew by each step."""
    import onnxruntime as ort

    from smolexport_on_onnxruntime import _session
    from smolexport_on_onnxruntime.checks import check_folder

    graph = check_folder(folder, None)
    inference = _session.load(graph.path, threads, spinning)
    names = [value.name for value in inference.get_inputs() if value.name.startswith("past")]
    types = {value.name: _session.FLOATS[value.type] for value in inference.get_inputs() if value.name in names}
    empty = {n: np.zeros((1, graph.kv_heads, 0, graph.head_dim), types[n]) for n in names}
    positions = any(value.name == "position_ids" for value in inference.get_inputs())
    outputs = ["logits", *(name.replace("past_key_values", "present") for name in names)]
    past: dict[str, Any] = {}
    held = 0

    def rewind() -> None:
        nonlocal past, held
        values = {n: ort.OrtValue.ortvalue_from_numpy(a) for n, a in empty.items()} if bound else dict(empty)
        past, held = values, 0

    def feed(ids: list[int]) -> object:
        nonlocal past, held
        held += len(ids)
        inputs = {"input_ids": np.array([ids], np.int64), "attention_mask": np.ones((1, held), np.int64)}
        if positions:
            inputs["position_ids"] = np.arange(held - len(ids), held)[None]
        if not bound:
            logits, *present = inference.run(outputs, {**inputs, **past})
        else:
            binding = inference.io_binding()
            for name, array in inputs.items():
                binding.bind_cpu_input(name, array)
            for name, value in past.items():
                binding.bind_ortvalue_input(name, value)
            for name in outputs:
                binding.bind_output(name, "cpu")
            inference.run_with_iobinding(binding)
            first, *present = binding.get_outputs()
            logits = first.numpy()
        past = dict(zip(names, present, strict=True))
        return logits

    rewind()
    return feed, rewind


def genai(folder: Path, threads: int, context: int, spinning: bool, share: bool = True) -> Player:
    import onnxruntime_genai as og

    config = og.Config(str(folder))
    options = {"intra_op_num_threads": threads, "session.intra_op.allow_spinning": str(int(spinning))}
    config.overlay(json.dumps({"model": {"decoder": {"session_options": options}}}))
    model = og.Model(config)
    params = og.GeneratorParams(model)
    params.set_search_options(max_length=context, do_sample=False, past_present_share_buffer=share)
    generator = og.Generator(model, params)

    def feed(ids: list[int]) -> object:
        generator.append_tokens(np.array([ids], np.int32))
        return generator.get_logits()

    def rewind() -> None:
        nonlocal generator
        generator = og.Generator(model, params)

    return feed, rewind


def torch(checkpoint: Path, threads: int, context: int) -> Player:
    import smolexport_on_torch

    opened = smolexport_on_torch.open(checkpoint, threads=threads, context=context)
    return lambda ids: opened.append(ids, last_only=True), lambda: opened.rewind(0)


def player(way: str, folder: Path, threads: int, spinning: bool, context: int) -> Player:
    """One of `WAYS`, opened."""
    ways: dict[str, Callable[[], Player]] = {
        "session": lambda: session(folder, threads, context, spinning),
        "fresh": lambda: onnxruntime(folder, threads, spinning, bound=True),
        "plain": lambda: onnxruntime(folder, threads, spinning, bound=False),
        "genai": lambda: genai(folder, threads, context, spinning),
        "builder": lambda: genai(folder, threads, context, spinning),
        "unshared": lambda: genai(folder, threads, context, spinning, share=False),
        "optimum": lambda: onnxruntime(folder, threads, spinning, bound=True),
        "torch": lambda: torch(folder, threads, context),
    }
    return ways[way]()


def build(checkpoint: Path, folder: Path) -> bool:
    """Let onnxruntime-genai's builder make an int4 folder of the checkpoint; whether it could."""
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", str(checkpoint), "-o", str(folder)]
    options = ["-p", "int4", "-e", "cpu", "-c", str(folder.parent / "cache")]
    done = subprocess.run([*command, *options], capture_output=True, text=True, check=False)
    if done.returncode:
        print(f"the builder does not run here: {done.stderr.strip().splitlines()[-1]}", file=sys.stderr)
    return not done.returncode


def export_optimum(checkpoint: Path, folder: Path) -> bool:
    """Let optimum export the checkpoint; whether it could."""
    if optimum_python() is None:
        print(f"optimum is left out: {VARIABLE} names no Python that has it", file=sys.stderr)
        return False
    export_f32(checkpoint, folder)
    return True


def measure(args: argparse.Namespace, scratch: Path) -> list[dict[str, Any]]:
    """Figures of every way, number of threads and kind of waiting."""
    import smolexport

    checkpoint = scratch / args.model
    write_random(checkpoint, PUBLISHED[args.model], args.tokenizer)
    ours = smolexport.export("onnx", checkpoint, scratch / "ours-onnx", quant=args.scheme)
    folders = {**dict.fromkeys(WAYS, ours.path), "torch": checkpoint, **dict.fromkeys(BUILDERS, scratch / "theirs")}
    folders["optimum"] = scratch / "optimum"
    wanted = set(args.ways) & set(BUILDERS)
    built = bool(wanted) and build(checkpoint, folders["builder"])
    ways = [way for way in args.ways if way not in BUILDERS or built]
    ways = [way for way in ways if way != "optimum" or export_optimum(checkpoint, folders["optimum"])]
    entries = [entry for entry in ours.plan.entries if entry.tensor is not None]
    tied = all(entry.tensor.role is not Role.HEAD for entry in entries if entry.tensor)
    read = sum(entry.nbytes for entry in entries if tied or entry.tensor.role is not Role.EMBED)  # type: ignore[union-attr]
    rows = []
    for threads in args.threads:
        cases = [(w, s) for w in ways for s in (False, True) if not s or (w != "torch" and threads > 1)]
        limit = memory_bandwidth(threads) / read
        tail = [str(args.prompt), str(args.tokens)]
        start = [sys.executable, "-m", "tests.benchmarks.onnx_decode", "--serve"]
        commands = {(w, s): [*start, w, str(folders[w]), str(threads), str(int(s)), *tail] for w, s in cases}
        turns = in_turns(commands, args.prompt, args.tokens, args.repetitions)
        base = turns[cases[0]]
        for (way, spinning), figures in turns.items():
            row: dict[str, Any] = {"way": way, "threads": threads, "spinning": spinning}
            for key in KEYS:
                row |= {key: statistics.median(figures[key]), f"{key}_ratio": ratio(figures[key], base[key])}
            if folders[way] == ours.path:
                row["bandwidth_share"] = row["decode"] / limit
            rows.append(row)
    return rows


def show(rows: list[dict[str, Any]], args: argparse.Namespace) -> None:
    """A table of `rows`."""
    print(f"{args.model} {args.scheme}: tokens/s, medians of {args.repetitions} turns")
    print(f"{args.prompt} + {args.tokens} tokens, load of the machine {os.getloadavg()[0]:.1f}")
    print(f"{'':>10}{'threads':>9}{'spinning':>10}" + "".join(f"{key:>13}{'ratio':>7}" for key in KEYS))
    for r in rows:
        cells = "".join(f"{r[key]:>13.1f}{r[f'{key}_ratio']:>7.2f}" for key in KEYS)
        print(f"{r['way']:>10}{r['threads']:>9}{'yes' if r['spinning'] else 'no':>10}{cells}")
    for r in rows:
        if r["way"] == "session":
            share = f"{r['bandwidth_share']:.2f} of the memory's bandwidth"
            print(f"session, {r['threads']} threads{', spinning' if r['spinning'] else ''}: decodes at {share}")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", choices=PUBLISHED, default="SmolLM2-135M")
    parser.add_argument("scheme", nargs="?", default="int4")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--prompt", type=int, default=512, help="tokens fed at once")
    parser.add_argument("--tokens", type=int, default=64, help="tokens fed one by one after it")
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--tokenizer", type=Path, help="folder with tokenizer.json; default: the demo's")
    parser.add_argument("--scratch", type=Path, help="where the files go")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    if args.tokenizer is None:
        from smolexport.demo import demo_checkpoint

        args.tokenizer = demo_checkpoint()
    with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
        rows = measure(args, Path(scratch))
    if args.json:
        print(json.dumps(rows))
        return
    show(rows, args)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        chosen, where, count, busily, first, then = sys.argv[2:]
        opened = player(chosen, Path(where), int(count), busily == "1", int(first) + int(then))
        serve(opened, int(first), int(then))
    else:
        main()
