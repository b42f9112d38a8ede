"""Train the demo model on a CPU: `python train.py CORPUS_FOLDER OUTPUT_FOLDER`.

Writes a Hugging Face checkpoint (config, tokenizer, bf16 safetensors), `held_out.txt` and `log.jsonl`.
Needs torch, tokenizers and safetensors.  `--nope-every 4 --rope-theta 5e6` trains the SmolLM3-type twin.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from checkpoint import write_checkpoint
from corpus import held_out_excerpt, held_out_text, read_books, token_stream, train_tokenizer
from model import Decoder, Shape
from muon import Muon
from safetensors.torch import load_file
from tokenizers import Tokenizer

TOKENS_PER_STEP = 4096


def arguments() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", type=Path, help="folder with the books named in books.json")
    parser.add_argument("out", type=Path, help="folder for the checkpoint")
    parser.add_argument("--steps", type=int, default=4000, help=f"steps of {TOKENS_PER_STEP} tokens")
    parser.add_argument("--vocab-size", type=int, default=4096)
    parser.add_argument("--nope-every", type=int, default=0, help="every n-th layer without rotary (SmolLM3: 4)")
    parser.add_argument("--rope-theta", type=float, default=100_000.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--resume", type=Path, help="start from the weights and the tokenizer of this checkpoint")
    parser.add_argument("--peak", type=float, default=1.0, help="peak of the learning rates, times their base")
    parser.add_argument(
        "--z-loss", type=float, default=0.0, help="weight of log(Z)^2: keeps logits near 0, where bf16 is fine"
    )
    parser.add_argument("--outlier-loss", type=float, default=0.0, help="weight of the last hidden state's 4th power")
    return parser.parse_args()


def batches(stream: np.ndarray, steps: int, seed: int):
    """Yield [b, s + 1] int64 batches: windows of 256 tokens at first, 512 in the last 30 % of the steps."""
    rng = np.random.default_rng(seed)
    starts: list[int] = []
    for step in range(steps):
        length = 256 if step < 0.7 * steps else 512
        rows = []
        while len(rows) < TOKENS_PER_STEP // length:
            if not starts or starts[-1] + length + 1 > len(stream):
                offset = int(rng.integers(length))
                starts = list(rng.permutation(np.arange(offset, len(stream) - length - 1, length)))
            start = int(starts.pop())
            rows.append(stream[start : start + length + 1])
        yield torch.from_numpy(np.stack(rows).astype(np.int64))


def rate(step: int, steps: int) -> float:
    """Share of the base learning rate: warm up over 100 steps, hold, then fall to zero over the last 60 %."""
    return min((step + 1) / 100, 1.0, (steps - step) / (0.6 * steps))


@torch.no_grad()
def bits_per_byte(model: Decoder, tokenizer: Tokenizer, text: str, window: int = 512) -> float:
    """Bits per UTF-8 byte of `text`, windows of `window` tokens, each started by <|endoftext|> and fully scored."""
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    nats = 0.0
    for at in range(0, len(ids), window - 1):
        part = torch.tensor([[0, *ids[at : at + window - 1]]])
        logits = model(part[:, :-1]).float()
        nats += float(F.cross_entropy(logits[0], part[0, 1:], reduction="sum"))
    return nats / math.log(2) / len(text.encode())


def train(args: argparse.Namespace, shape: Shape, stream: np.ndarray, report) -> Decoder:
    """Run all steps; `report(step, loss, model)` is called every 100."""
    model = Decoder(shape)
    if args.resume:
        state = load_file(args.resume / "model.safetensors")
        model.load_state_dict({name.removeprefix("model."): value.float() for name, value in state.items()})
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    muon = Muon(matrices, lr=0.02)
    adam = torch.optim.Adam(others, lr=3e-3, betas=(0.9, 0.95), fused=True)

    @torch.compile(dynamic=False)
    def loss_of(batch: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            hidden = model.hidden(batch[:, :-1])
            logits = model.head(hidden).float().flatten(0, 1)
        loss = F.cross_entropy(logits, batch[:, 1:].flatten())
        near_zero, flat = logits.logsumexp(-1).square().mean(), hidden.float().pow(4).mean()
        return loss + args.z_loss * near_zero + args.outlier_loss * flat

    recent = 0.0
    for step, batch in enumerate(batches(stream, args.steps, args.seed)):
        loss = loss_of(batch)
        loss.backward()
        scale = args.peak * rate(step, args.steps)
        muon.step(scale)
        adam.param_groups[0]["lr"] = 3e-3 * scale
        adam.step()
        adam.zero_grad(set_to_none=True)
        recent = float(loss.detach()) if step == 0 else 0.98 * recent + 0.02 * float(loss.detach())
        if (step + 1) % 100 == 0 or step + 1 == args.steps:
            report(step + 1, recent, model)
    return model


def main() -> None:
    """Train and write everything."""
    args = arguments()
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    books = read_books(args.corpus)
    if args.resume:
        tokenizer = Tokenizer.from_file(str(args.resume / "tokenizer.json"))
    else:
        tokenizer = train_tokenizer(books, args.vocab_size)
    stream = token_stream(tokenizer, books, chat_share=0.06, seed=args.seed)
    held = held_out_text(books)
    shape = Shape(vocab_size=args.vocab_size, nope_every=args.nope_every, rope_theta=args.rope_theta)
    args.out.mkdir(parents=True, exist_ok=True)
    started, log = time.process_time(), (args.out / "log.jsonl").open("w")

    def report(step: int, loss: float, model: Decoder) -> None:
        row = {"step": step, "tokens": step * TOKENS_PER_STEP, "loss": round(loss, 4)}
        if step % 1000 == 0 and step < args.steps:
            row["held_out_bits_per_byte"] = round(bits_per_byte(model, tokenizer, held), 4)
        row["cpu_seconds"] = round(time.process_time() - started)
        print(json.dumps(row), file=log, flush=True)

    options = {k: v if isinstance(v, (int, float)) else v and v.name for k, v in vars(args).items()}
    print(json.dumps({"options": options}), file=log, flush=True)
    print(json.dumps({"stream_tokens": len(stream), "held_out_bytes": len(held.encode())}), file=log, flush=True)
    model = train(args, shape, stream, report).bfloat16().float()
    final = bits_per_byte(model, tokenizer, held)
    print(json.dumps({"final": "bf16 weights", "held_out_bits_per_byte": round(final, 4)}), file=log, flush=True)
    write_checkpoint(args.out, model, tokenizer, held_out_excerpt(books))


if __name__ == "__main__":
    main()
