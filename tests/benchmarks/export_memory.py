"""Time and peak memory of one export at a published model's true shape.

    python -m tests.benchmarks.export_memory SmolLM2-1.7B q4_k --tokenizer FOLDER
    python -m tests.benchmarks.export_memory SmolLM2-1.7B int4 --command all --tokenizer FOLDER

Writes a random bf16 checkpoint of that shape (a block of random weights over and over) and exports it with the
command line in a fresh process, which reports its own peak resident memory as the system counts it, mapped pages
included.  Without `--tokenizer` the model's own serves where `../shared/data` has it, else the embedded demo
model's, its vocabulary padded to the shape's.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from smolexport.model.arch import load_spec
from tests.core.published_configs import PUBLISHED

SHARED = Path("../shared/data")
OWN = {"SmolLM2": "smollm2-tokenizer", "SmolLM3": "smollm3-tokenizer"}
CHILD = """
import json, sys, time
from smolexport.cli import main
from smolexport.parity.peak_memory import peak_rss
started, cpu = time.perf_counter(), time.process_time()
try:
    main(sys.argv[1:])
except SystemExit as stop:
    assert not stop.code, stop.code
print(json.dumps({"peak_rss": peak_rss(), "wall": time.perf_counter() - started, "cpu": time.process_time() - cpu}))
"""


def write_random(folder: Path, config: dict[str, Any], tokenizer: Path) -> int:
    """A bf16 checkpoint of random weights; returns its bytes.  Memory stays at one block."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    for path in tokenizer.glob("*.json"):
        if path.name not in ("config.json", "generation_config.json"):
            shutil.copy(path, folder)
    block = np.random.default_rng(0).normal(0, 0.02, 1 << 22).astype(ml_dtypes.bfloat16).tobytes()
    header, offset = {}, 0
    for tensor in load_spec(config).tensors():
        end = offset + 2 * tensor.size
        header[tensor.stored_name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        for start in range(0, offset, len(block)):
            file.write(block[: offset - start])
    return offset


def own_tokenizer(name: str) -> Path:
    """A folder with the tokenizer.json of the model `name`, or of the demo model where there is none of it here."""
    from smolexport.demo import demo_checkpoint

    folder = SHARED / OWN.get(name.split("-", maxsplit=1)[0], "none")
    return folder if (folder / "tokenizer.json").is_file() else demo_checkpoint()


def measure(
    name: str,
    scheme: str,
    tokenizer: Path | None,
    scratch: Path,
    threads: int | None = None,
    command: str = "gguf",
    layers: int | None = None,
) -> dict[str, Any]:
    """Export the shape `name` with `smolexport COMMAND`; returns figures in bytes and seconds.

    `tokenizer`: None = `own_tokenizer`.  `layers`: None = all of them.
    """
    folder = scratch / name
    config = PUBLISHED[name]
    if layers:
        config = {k: v[:layers] if isinstance(v, list) and len(v) > layers else v for k, v in config.items()}
        config["num_hidden_layers"] = layers
    source = write_random(folder, config, tokenizer or own_tokenizer(name))
    out = scratch / "out"
    out.mkdir()
    argv = [sys.executable, "-c", CHILD, command, str(folder), "-q", scheme, "-o", str(out), "--json"]
    argv += ["--threads", str(threads)] if threads else []
    done = subprocess.run(argv, capture_output=True, text=True, check=True)
    figures = json.loads(done.stdout[done.stdout.rindex('{"peak_rss"') :])
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    shutil.rmtree(folder)
    return {"model": name, "scheme": scheme, "source": source, "output": size, **figures}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=PUBLISHED)
    parser.add_argument("scheme", nargs="?", default="q4_k")
    parser.add_argument("--command", default="gguf", help="what is run: gguf, mlx, all")
    parser.add_argument("--tokenizer", type=Path, help="folder with tokenizer.json; default: the model's own")
    parser.add_argument("--layers", type=int, help="as many of them; default: all")
    parser.add_argument("--scratch", type=Path, help="where the files go; some 5 GB for 1.7B")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
        f = measure(args.model, args.scheme, args.tokenizer, Path(scratch), args.threads, args.command, args.layers)
    if args.json:
        print(json.dumps(f))
        return
    print(f"{args.command} {f['model']} {f['scheme']}: {f['source'] / 1e9:.2f} GB -> {f['output'] / 1e9:.2f} GB")
    print(f"peak RSS {f['peak_rss'] / 1e6:.0f} MB, {f['wall']:.1f} s wall, {f['cpu']:.1f} CPU seconds")


if __name__ == "__main__":
    main()
