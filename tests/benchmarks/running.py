"""Our exports through our sessions beside each runtime's own tool on what its own converter makes, in one run.

    python -m tests.benchmarks.running SmolLM2-135M --tokenizer FOLDER

Writes a random bf16 checkpoint of a published model's true shape and measures, each in a process of its own and the two
of a format in turns, with the same number of threads:

* `gguf`: our q4_k_m file in our session; llama.cpp's own quantizer's file in llama-cpp-python's `Llama.generate`;
* `mlx`: our q4 folder in our session; `mlx_lm.convert`'s in mlx-lm's `generate_step`, in float32, with which an x86
  processor is some ten times faster than with bfloat16; a few tokens only, for MLX's processor kernels are slow;
* `onnx`: our int4-pure folder, which has as many bits as theirs everywhere, and our int4 folder, whose embedding and
  head have 8, in our session; the folder of onnxruntime-genai's builder in its generator.

Every side chooses the highest logit after each step.  Prints medians over the turns of tokens per second, by the clock,
with the ratio to the runtime's own tool, turn by turn; what share of the memory's bandwidth, measured in the same run,
reading the weights once per token takes; and how much of a token's time our adapter spends outside of the runtime.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from smolexport.parity.speed import memory_bandwidth
from tests.benchmarks.export_memory import write_random
from tests.benchmarks.turns import Player, in_turns, ratio, serve
from tests.core.published_configs import PUBLISHED

SCHEMES = {"gguf": ("q4_k_m",), "mlx": ("q4",), "onnx": ("int4-pure", "int4")}
RUNTIMES = {"gguf": "smolexport_on_llamacpp", "mlx": "smolexport_on_mlx", "onnx": "smolexport_on_onnxruntime"}
FEW = {"mlx": {"prompt": 32, "tokens": 16}}  # at most


def ours(format_name: str, path: Path, threads: int, context: int) -> Player:
    session = open_session(format_name, path, threads, context)
    return lambda ids: int(np.argmax(session.append(ids, last_only=True)[-1])), lambda: session.rewind(0)


def open_session(format_name: str, path: Path, threads: int, context: int) -> Any:
    import importlib

    return importlib.import_module(RUNTIMES[format_name]).open(path, threads=threads, context=context)


def stepping(begin: Callable[[list[int]], Iterator[object]]) -> Player:
    """A tool that generates by itself: a prompt starts it anew, and each token asks for the next one."""
    steps: Iterator[object] = iter(())

    def feed(ids: list[int]) -> object:
        nonlocal steps
        if len(ids) > 1:
            steps = begin(ids)
        return next(steps)

    return feed, lambda: None


def llama_tool(path: Path, threads: int, context: int) -> Player:
    import llama_cpp

    llm = llama_cpp.Llama(
        str(path), n_ctx=context, n_threads=threads, n_threads_batch=threads, n_batch=512, verbose=False
    )
    feed, _ = stepping(lambda ids: llm.generate(ids, temp=0.0))
    return feed, llm.reset


def mlx_tool(path: Path, context: int) -> Player:
    import mlx.core as mx
    from mlx_lm.generate import generate_step
    from mlx_lm.utils import load_model

    model, _ = load_model(path)
    return stepping(lambda ids: generate_step(mx.array(ids), model, max_tokens=context))


def onnx_tool(path: Path, threads: int, context: int) -> Player:
    import onnxruntime_genai as og

    config = og.Config(str(path))
    config.overlay(json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": threads}}}}))
    model = og.Model(config)

    def begin(ids: list[int]) -> Iterator[object]:
        params = og.GeneratorParams(model)
        params.set_search_options(max_length=context, do_sample=False)
        generator = og.Generator(model, params)
        generator.append_tokens(np.array([ids], np.int32))
        while True:
            generator.generate_next_token()
            yield generator.get_next_tokens()[0]

    return stepping(begin)


def theirs(format_name: str, path: Path, threads: int, context: int) -> Player:
    tools: dict[str, Callable[[], Player]] = {
        "gguf": lambda: llama_tool(path, threads, context),
        "mlx": lambda: mlx_tool(path, context),
        "onnx": lambda: onnx_tool(path, threads, context),
    }
    return tools[format_name]()


def outside(format_name: str, path: Path, threads: int, prompt: int, tokens: int) -> float:
    """Share of a token's time that passes outside of the runtime's own calls; the median over `tokens` steps."""
    session = open_session(format_name, path, threads, prompt + tokens)
    inside = [0.0]

    def timed(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **keywords: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*arguments, **keywords)
            finally:
                inside[0] += time.perf_counter() - start

        return call

    if format_name == "gguf":
        import smolexport_on_llamacpp._session as module

        module.call = timed(module.call)  # the calls into the library, all of them
    elif format_name == "mlx":
        import mlx.core as mx

        session._model, mx.eval = timed(session._model), timed(mx.eval)
    else:
        run, binding = timed(session._session.run_with_iobinding), session._session
        session._session = type("Timed", (), {"run_with_iobinding": staticmethod(run), "kept": binding})()
    ids = np.random.default_rng(0).integers(0, 1000, prompt + tokens)
    session.append(ids[:prompt], last_only=True)
    shares = []
    for token in ids[prompt:]:
        inside[0], start = 0.0, time.perf_counter()
        np.argmax(session.append([int(token)], last_only=True)[-1])
        taken = time.perf_counter() - start
        shares.append(1 - inside[0] / taken)
    return statistics.median(shares)


def quantize_with_llama(checkpoint: Path, path: Path) -> None:
    """llama.cpp's q4_k_m of a bf16 GGUF of the checkpoint."""
    import llama_cpp

    import smolexport
    from smolexport_to_gguf.schemes import SCHEMES as FILE_TYPES

    wide = smolexport.export("gguf", checkpoint, path.with_name("between.gguf"), quant="bf16").path
    listen = llama_cpp.llama_log_callback(lambda *_: None)
    llama_cpp.llama_log_set(listen, ctypes.c_void_p(0))
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = FILE_TYPES["q4_k_m"].file_type
    assert not llama_cpp.llama_model_quantize(str(wide).encode(), str(path).encode(), ctypes.byref(params))
    wide.unlink()


def convert_with(format_name: str, checkpoint: Path, scratch: Path) -> Path:
    """What the runtime's own converter makes of the checkpoint."""
    path = scratch / ("theirs.gguf" if format_name == "gguf" else f"theirs-{format_name}")
    if format_name == "gguf":
        quantize_with_llama(checkpoint, path)
        return path
    if format_name == "mlx":
        code = "import sys; from mlx_lm import convert; convert(*sys.argv[1:], quantize=True, dtype='float32')"
        command = [sys.executable, "-c", code, str(checkpoint), str(path)]
    else:
        command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", str(checkpoint), "-o", str(path)]
        command += ["-p", "int4", "-e", "cpu", "-c", str(scratch / "cache")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{format_name}: its converter does not run here: {done.stderr.strip().splitlines()[-1]}")
    return path


def measure(
    format_name: str, scheme: str, checkpoint: Path, rival: Path, scratch: Path, args: argparse.Namespace
) -> dict[str, Any]:
    """Figures of one export beside `rival`, what the runtime's own converter makes."""
    import smolexport

    made = smolexport.export(format_name, checkpoint, scratch / f"ours-{scheme}.gguf", quant=scheme)
    paths = {"ours": made.path, "theirs": rival}
    prompt, tokens = (
        min(getattr(args, key), FEW.get(format_name, {}).get(key, 1 << 30)) for key in ("prompt", "tokens")
    )
    tail = [str(args.threads), str(prompt), str(tokens)]
    start = [sys.executable, "-m", "tests.benchmarks.running"]
    commands = {who: [*start, "--serve", who, format_name, str(path), *tail] for who, path in paths.items()}
    turns = in_turns(commands, prompt, tokens, args.repetitions)
    share = subprocess.run(
        [*start, "--outside", format_name, str(made.path), *tail], capture_output=True, text=True, check=True
    )
    row: dict[str, Any] = {"format": format_name, "scheme": scheme, "prompt": prompt, "tokens": tokens}
    row |= {"outside": float(share.stdout.split()[-1])}
    for key in ("prefill", "decode"):
        row |= {key: statistics.median(turns["ours"][key]), f"{key}_theirs": statistics.median(turns["theirs"][key])}
        row[f"{key}_ratio"] = ratio(turns["ours"][key], turns["theirs"][key])
    row["bandwidth_share"] = row["decode"] * made.plan.nbytes / memory_bandwidth(args.threads)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", choices=PUBLISHED, default="SmolLM2-135M")
    parser.add_argument("--formats", nargs="+", choices=SCHEMES, default=list(SCHEMES))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--prompt", type=int, default=512, help="tokens fed at once")
    parser.add_argument("--tokens", type=int, default=64, help="tokens generated after it")
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--tokenizer", type=Path, help="folder with tokenizer.json; default: the demo's")
    parser.add_argument("--scratch", type=Path, help="where the files go")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    from smolexport.demo import demo_checkpoint

    with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
        checkpoint = Path(scratch, args.model)
        write_random(checkpoint, PUBLISHED[args.model], args.tokenizer or demo_checkpoint())
        rows = []
        for name in args.formats:
            rival = convert_with(name, checkpoint, Path(scratch))
            rows += [measure(name, scheme, checkpoint, rival, Path(scratch), args) for scheme in SCHEMES[name]]
    if args.json:
        print(json.dumps(rows, indent=2))
        return
    print(f"{args.model}: tokens/s, threads: {args.threads}, medians of {args.repetitions} turns", end="")
    print(f", load of the machine {os.getloadavg()[0]:.1f}")
    print(
        f"{'':13}{'tokens':>9}{'prefill':>9}{'its tool':>10}{'ratio':>7}{'decode':>9}{'its tool':>10}{'ratio':>7}",
        end="",
    )
    print(f"{'of bandwidth':>14}{'outside':>9}")
    for r in rows:
        cells = "".join(f"{r[k]:>9.1f}{r[f'{k}_theirs']:>10.1f}{r[f'{k}_ratio']:>7.2f}" for k in ("prefill", "decode"))
        print(
            f"{r['format']:5}{r['scheme']:10}{r['prompt']:>6}+{r['tokens']}{cells}{r['bandwidth_share']:>14.2f}{r['outside']:>9.1%}"
        )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        side, chosen, where, count, first, then = sys.argv[2:]
        make = ours if side == "ours" else theirs
        serve(make(chosen, Path(where), int(count), int(first) + int(then) + 8), int(first), int(then))
    elif sys.argv[1:2] == ["--outside"]:
        chosen, where, count, first, then = sys.argv[2:]
        print(outside(chosen, Path(where), int(count), int(first), int(then)))
    else:
        main()
