"""Hash every file of every scheme of every format: `python -m tests.golden.hashes > LIST`, before and after a change.

The models are the demo, the twin in tests/fixtures, and every family in the published widths with two layers and the
demo's vocabulary.  A scheme that a converter refuses is listed with the class of the error.  Model cards are prose
and are left out.  Two lists are compared with `diff`.
"""

from __future__ import annotations

import hashlib
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from smolexport import export, plugins
from smolexport.demo import demo_checkpoint
from smolexport.errors import SmolexportError
from smolexport.testing.checkpoints import write_checkpoint
from tests.core.published_configs import PUBLISHED

TWIN = Path(__file__).parents[1] / "fixtures" / "smollm3_twin"
TARGETS = ("gguf", "mlx", "onnx")
SMALL: Mapping[str, Any] = {"num_hidden_layers": 2}
SHAPES = ("SmolLM2-135M", "SmolLM3-3B", "Llama-3.2-1B", "Qwen2.5-0.5B", "Qwen3-0.6B")
TOKENS: Mapping[str, Any] = {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 2}


def models(scratch: Path) -> Iterator[tuple[str, Path]]:
    """Name and folder of each checkpoint."""
    demo = demo_checkpoint()
    yield "demo", demo
    twin = scratch / "twin"
    shutil.copytree(TWIN, twin)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(demo / file, twin / file)
    yield "twin", twin
    for name in SHAPES:
        config = dict(PUBLISHED[name])
        kept = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim")
        shape = {key: config[key] for key in kept if config.get(key)}
        shape |= {key: config[key] for key in ("rope_scaling", "rope_theta", "tie_word_embeddings") if key in config}
        if shape["hidden_size"] > 1024:  # the widths of the large ones, with fewer rows
            shape["intermediate_size"] = 2048
        yield name, write_checkpoint(scratch / name, config["model_type"], tokenizer=demo, **SMALL, **TOKENS, **shape)


def hashes(target: str, source: Path, scheme: str, out: Path) -> Iterator[str]:
    """A line for each file that is written, or one that says why there is none."""
    try:
        made = export(target, source, out / "made", quant=scheme, name="model").path
    except SmolexportError as error:
        yield f"refused: {type(error).__name__}"
        return
    for file in sorted(p for p in ([made] if made.is_file() else made.rglob("*")) if p.is_file()):
        if file.name == "README.md":
            continue
        with file.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        yield f"{file.name} {digest}"


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        for model, source in models(scratch):
            for target in TARGETS:
                for scheme in plugins.converter(target).SCHEMES:
                    out = scratch / "out"
                    shutil.rmtree(out, ignore_errors=True)
                    out.mkdir()
                    for line in hashes(target, source, scheme, out):
                        print(model, target, scheme, line)
                print(f"{model} {target}", file=sys.stderr)


if __name__ == "__main__":
    main()
