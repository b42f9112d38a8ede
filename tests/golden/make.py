"""Write the golden plans again: `python -m tests.golden.make`, then read the difference before committing it.

A plan needs no weights: a config, a tokenizer and a scheme decide every tensor and key.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import smolexport_to_gguf
from smolexport.arch import load_spec
from smolexport.plan import Plan
from smolexport.testing.checkpoints import write_tokenizer
from smolexport.tokenizer import read_tokenizer
from tests.core.published_configs import PUBLISHED

__all__ = ["CASES", "FOLDER", "plan_of"]

FOLDER = Path(__file__).parent
# Published shapes, with fewer layers where only the depth differs.
CASES: Mapping[str, tuple[str, Mapping[str, Any], str]] = {
    "smollm2-135m-q4_k_m": ("SmolLM2-135M", {}, "q4_k_m"),
    "smollm3-3b-8-layers-q4_k_m": (
        "SmolLM3-3B",
        {"num_hidden_layers": 8, "layer_types": None, "no_rope_layers": None},
        "q4_k_m",
    ),
    "llama-3.2-1b-3-layers-iq4_nl": ("Llama-3.2-1B", {"num_hidden_layers": 3}, "iq4_nl"),
    "qwen2.5-0.5b-3-layers-q2_k": ("Qwen2.5-0.5B", {"num_hidden_layers": 3}, "q2_k"),
    "qwen3-0.6b-3-layers-q8_0": ("Qwen3-0.6B", {"num_hidden_layers": 3}, "q8_0"),
}


def plan_of(case: str) -> Plan:
    """The plan of one case, with a small tokenizer in the place of the published one."""
    model, changes, scheme = CASES[case]
    spec = load_spec({**PUBLISHED[model], **changes})
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = read_tokenizer(write_tokenizer(Path(folder)), spec.vocab_size)
    return smolexport_to_gguf.plan(spec, tokenizer, scheme, name=model)


if __name__ == "__main__":
    for name in CASES:
        (FOLDER / f"{name}.txt").write_text(plan_of(name).render() + "\n", encoding="utf-8")
        print(f"tests/golden/{name}.txt")
