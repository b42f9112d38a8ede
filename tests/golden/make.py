"""Write the golden plans again: `python -m tests.golden.make`, then read the difference before committing it.

A plan needs no weights: a config, a tokenizer and a scheme decide every tensor and key.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from smolexport import plugins
from smolexport.conversion.plan import Plan
from smolexport.conversion.source_model import SourceModel
from smolexport.model.arch import load_spec
from smolexport.testing.checkpoints import write_tokenizer
from smolexport.tokenizer import read_tokenizer
from tests.core.published_configs import PUBLISHED

__all__ = ["CASES", "FOLDER", "plan_of"]

FOLDER = Path(__file__).parent
SMOLLM3: Mapping[str, Any] = {"num_hidden_layers": 8, "layer_types": None, "no_rope_layers": None}
# Published shapes, with fewer layers where only the depth differs: target, model, changes, scheme.
CASES: Mapping[str, tuple[str, str, Mapping[str, Any], str]] = {
    "smollm2-135m-q4_k_m": ("gguf", "SmolLM2-135M", {}, "q4_k_m"),
    "smollm3-3b-8-layers-q4_k_m": ("gguf", "SmolLM3-3B", SMOLLM3, "q4_k_m"),
    "llama-3.2-1b-3-layers-iq4_nl": ("gguf", "Llama-3.2-1B", {"num_hidden_layers": 3}, "iq4_nl"),
    "qwen2.5-0.5b-3-layers-q2_k": ("gguf", "Qwen2.5-0.5B", {"num_hidden_layers": 3}, "q2_k"),
    "qwen3-0.6b-3-layers-q8_0": ("gguf", "Qwen3-0.6B", {"num_hidden_layers": 3}, "q8_0"),
    "smollm2-135m-2-layers-int4": ("gguf", "SmolLM2-135M", {"num_hidden_layers": 2}, "int4"),
    "mlx-smollm2-135m-2-layers-int4": ("mlx", "SmolLM2-135M", {"num_hidden_layers": 2}, "int4"),
    "mlx-smollm2-135m-2-layers-q4_g128": ("mlx", "SmolLM2-135M", {"num_hidden_layers": 2}, "q4_g128"),
    "mlx-smollm3-3b-8-layers-mixed_3_6": ("mlx", "SmolLM3-3B", SMOLLM3, "mixed_3_6"),
    "mlx-llama-3.2-1b-3-layers-nvfp4": ("mlx", "Llama-3.2-1B", {"num_hidden_layers": 3}, "nvfp4"),
}
SCRATCH = tempfile.TemporaryDirectory()  # plans name the files that would be copied


@cache
def small_tokenizer() -> Path:
    """A small tokenizer in the place of the published ones."""
    return write_tokenizer(Path(SCRATCH.name))


def plan_of(case: str) -> Plan:
    """The plan of one case."""
    target, name, changes, scheme = CASES[case]
    config = {**PUBLISHED[name], **changes}
    spec = load_spec(config)
    model = SourceModel(spec, read_tokenizer(small_tokenizer(), spec.vocab_size), name, small_tokenizer(), config)
    return plugins.converter(target).plan(model, scheme)


if __name__ == "__main__":
    for name in CASES:
        (FOLDER / f"{name}.txt").write_text(plan_of(name).render() + "\n", encoding="utf-8")
        print(f"tests/golden/{name}.txt")
