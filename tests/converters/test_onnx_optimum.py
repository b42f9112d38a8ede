"""Optimum's `ORTModelForCausalLM` on our folders: the same greedy tokens as our own loop's.

It runs in an environment of its own (`make optimum`) and is skipped where there is none.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import smolexport
from smolexport.demo import demo_checkpoint
from smolexport.model.arch import architectures
from smolexport.run.generate import generate
from smolexport.testing.checkpoints import write_checkpoint, write_tokenizer
from tests.onnx_for_tests import onnxruntime
from tests.optimum_for_tests import VARIABLE, optimum_python, run_optimum

pytestmark = pytest.mark.skipif(
    optimum_python() is None, reason=f"{VARIABLE} names no Python that has optimum: make optimum"
)

GENERATE = """
import json, sys
import torch
from optimum.onnxruntime import ORTModelForCausalLM
folder, file, prompt, count = sys.argv[1], sys.argv[2], json.loads(sys.argv[3]), int(sys.argv[4])
ids = torch.tensor([prompt])
found = []
for binding in (False, True):
    model = ORTModelForCausalLM.from_pretrained(folder, subfolder="onnx", file_name=file, use_io_binding=binding)
    assert model.can_use_cache
    model.generation_config.eos_token_id = None
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False)
    found.append(out[0, len(prompt) :].tolist())
print(json.dumps(found))
"""


def ours(folder: Path, prompt: list[int], count: int, **options: Any) -> list[int]:
    import smolexport_on_onnxruntime

    with smolexport_on_onnxruntime.open(folder, threads=1, **options) as session:
        return list(generate(session, prompt, max_tokens=count, stop_tokens=[], with_text=False).tokens)


def theirs(folder: Path, file: str, prompt: list[int], count: int) -> list[list[int]]:
    """Greedy tokens without and with IO binding."""
    found: list[list[int]] = run_optimum(GENERATE, str(folder), file, json.dumps(prompt), str(count))
    return found


@pytest.mark.parametrize("family", architectures())
def test_every_architecture(tmp_path: Path, family: str) -> None:
    """Heads of hidden_size / num_attention_heads: optimum 0.1 reads no head_dim, and cannot run others.

    Nor those of its own making, such as Qwen3's smaller models.
    """
    onnxruntime()
    tokenizer = write_tokenizer(tmp_path / "tokenizer")
    source = write_checkpoint(tmp_path / family, family, tokenizer=tokenizer, head_dim=16)
    folder = smolexport.export("onnx", source, tmp_path / "out", quant="f32").path
    prompt = [1, 50, 60, 70, 80]
    expected = ours(folder, prompt, 24)
    assert len(set(expected)) > 1
    assert theirs(folder, "model.onnx", prompt, 24) == [expected, expected]


@pytest.mark.parametrize(("scheme", "file"), [("int4", "model_q4.onnx"), ("int8", "model_int8.onnx")])
def test_the_demo(tmp_path: Path, scheme: str, file: str) -> None:
    """8-bit activations are rounded by block of a row, so that how the prompt is cut does not matter here."""
    onnxruntime()
    folder = smolexport.export("onnx", demo_checkpoint(), tmp_path / "out", quant=scheme).path
    prompt = [1, 608, 530, 441, 201, 4, 43]
    expected = ours(folder, prompt, 32)
    assert theirs(folder, file, prompt, 32) == [expected, expected]
