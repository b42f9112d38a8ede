"""The embedded model: small, whole, trained to what its card says, and near itself in every file."""

from __future__ import annotations

import hashlib
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest

import smolexport
from smolexport.conversion.pipeline import export
from smolexport.demo import demo_text
from smolexport.model.checkpoint import open_checkpoint
from smolexport.parity.inputs import Settings
from smolexport.run.generate import StopReason, generate
from smolexport.tokenizer import PreTokenizer, open_tokenizer, read_tokenizer

ROOT = Path(__file__).resolve().parents[2]
TRAINING = ROOT / "examples" / "train_demo_model"
MOST_BYTES, MOST_BITS = 9_000_000, 1.65


def test_it_is_small_and_understood(demo: Path) -> None:
    checkpoint = open_checkpoint(demo)
    spec = checkpoint.spec
    assert sum(p.stat().st_size for p in demo.iterdir()) <= MOST_BYTES
    assert checkpoint.dtype == "BF16"
    assert (spec.model_type, spec.hidden_size, spec.tied) == ("llama", 256, True)
    assert spec.layers[0].mlp.intermediate_size % 256 == 0
    assert spec.attention.num_key_value_heads < spec.attention.num_attention_heads


def test_its_tokenizer_is_smollm2s_kind(demo: Path) -> None:
    spec = read_tokenizer(demo, open_checkpoint(demo).spec.vocab_size)
    assert spec.pre_tokenizer is PreTokenizer.DIGITS_GPT2
    assert spec.tokens[:3] == ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    assert spec.chat_template
    assert not spec.add_bos
    codec = open_tokenizer(demo, spec)
    assert len(codec.encode("2026")) == 4


def test_the_card_states_what_the_log_says() -> None:
    rows = [json.loads(line) for line in (TRAINING / "log.jsonl").read_text().splitlines()]
    final = rows[-1]["held_out_bits_per_byte"]
    assert final <= MOST_BITS
    card = (ROOT / "smolexport" / "demo" / "MODEL_CARD.md").read_text()
    assert re.search(rf"\| held out \| {final:.2f} bits per byte", card)


def test_it_predicts_text_that_it_has_not_seen(demo: Path) -> None:
    pytest.importorskip("torch")
    from smolexport.plugins import runtime

    text = demo_text()
    with runtime("torch").open(demo, threads=1) as session:
        ids = session.codec.encode(text)
        nats, window = 0.0, 511
        for start in range(0, len(ids), window):
            part = [0, *ids[start : start + window]]
            session.rewind(0)
            logits = session.append(part[:-1]).astype(np.float64)
            logits -= logits.max(-1, keepdims=True)
            chosen = logits[np.arange(len(part) - 1), part[1:]] - np.log(np.exp(logits).sum(-1))
            nats -= float(chosen.sum())
    assert nats / math.log(2) / len(text.encode()) <= MOST_BITS


def test_the_held_out_text_was_held_out(shared: Path) -> None:
    """No paragraph of it stands in the training part of any book, and every book is the pinned one."""
    trained = []
    for book in json.loads((TRAINING / "books.json").read_text()):
        raw = (shared / "standardebooks-corpus" / book["file"]).read_bytes()
        assert hashlib.sha256(raw).hexdigest() == book["sha256"]
        paragraphs = [p.strip() for p in raw.decode().split("\n") if p.strip()]
        trained += paragraphs[: -max(1, round(len(paragraphs) * 0.02))]
    seen = set(trained)
    long = [p for p in demo_text().splitlines() if len(p) > 80]
    assert len(long) > 20
    assert not [p for p in long if p in seen]


def test_exports_stay_near_bf16(demo: Path, tmp_path: Path) -> None:
    """The figures that `make demo` prints."""
    pytest.importorskip("torch")
    pytest.importorskip("llama_cpp")
    files = [export("gguf", demo, tmp_path / f"{q}.gguf", quant=q).path for q in ("q8_0", "q4_k")]
    settings = Settings(repetitions=0, memory=False, greedy_tokens=8, threads=1)
    sheet = smolexport.compare("demo", files, settings=settings)
    near, coarse = (c.accuracy for c in sheet.candidates)
    assert near.kld.mean.value <= 0.001
    assert near.top1_agreement.value >= 0.98
    assert coarse.kld.mean.value <= 0.01
    assert coarse.top1_agreement.value >= 0.92
    assert all(c.tokenizer_equal for c in sheet.candidates)
    # Damage grows with fewer bits, or the measurement measures nothing.
    assert coarse.kld.mean.value > 4 * near.kld.mean.value


def test_it_ends_its_turn(demo: Path, tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")
    from smolexport.plugins import runtime

    done = export("gguf", demo, tmp_path / "demo.gguf", quant="q8_0")
    prompt = "<|im_start|>user\nContinue the story.\nThe old man opened the door.<|im_end|>\n<|im_start|>assistant\n"
    with runtime("llamacpp").open(done.path, threads=1) as session:
        answer = generate(session, prompt, max_tokens=400)
    assert answer.stop_reason is StopReason.STOP_TOKEN
    assert len(answer.text.split()) > 3
