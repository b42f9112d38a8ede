"""The books the demo model learns from: pinned by hash, split, tokenized.

The corpus is public-domain prose for young readers and other plain storytelling.  Every book's bytes are
checked against `books.json`, so that a changed file stops the run instead of changing the model.
From each book the last `HELD_OUT_FRACTION` (whole paragraphs) is never trained on; `python corpus.py CORPUS` prints
all of it.
"""

from __future__ import annotations

import hashlib
import json
import random
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

HERE = Path(__file__).parent
HELD_OUT_FRACTION = 0.02
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
REQUESTS = (
    "Continue the story.",
    "What happens next?",
    "Go on with this tale.",
    "Please continue.",
    "Tell me what comes next.",
)


@dataclass(frozen=True)
class Book:
    """One book as lists of paragraphs."""

    name: str
    train: tuple[str, ...]
    held_out: tuple[str, ...]


def read_books(folder: Path) -> list[Book]:
    """Read and verify the pinned books in `folder`; raise SystemExit that names the first file that differs."""
    books = []
    for entry in json.loads((HERE / "books.json").read_text()):
        path = folder / entry["file"]
        raw = path.read_bytes()
        if hashlib.sha256(raw).hexdigest() != entry["sha256"]:
            raise SystemExit(f"{path}: its sha256 is not the one in books.json; fetch the pinned edition")
        paragraphs = [p.strip() for p in raw.decode("utf-8").split("\n") if p.strip()]
        held = max(1, round(len(paragraphs) * HELD_OUT_FRACTION))
        books.append(Book(path.stem, tuple(paragraphs[:-held]), tuple(paragraphs[-held:])))
    return books


def train_tokenizer(books: list[Book], vocab_size: int) -> Tokenizer:
    """Byte-level BPE with SmolLM2's pre-tokenizer: single digits, then the GPT-2 pattern."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(t, special=True, normalized=False) for t in SPECIAL_TOKENS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(("\n".join(b.train) for b in books), trainer)
    return tokenizer


def chat_turn(paragraphs: tuple[str, ...], rng: random.Random) -> str:
    """One ChatML exchange: a passage and a request, answered by the paragraphs that follow it in the book."""
    start = rng.randrange(len(paragraphs) - 4)
    passage, answer = paragraphs[start], paragraphs[start + 1 : start + 2 + rng.randrange(2)]
    request = rng.choice(REQUESTS)
    asked = f"{request}\n{passage}" if rng.random() < 0.7 else f"{passage}\n{request}"
    reply = "\n".join(answer)
    return f"<|im_start|>user\n{asked}<|im_end|>\n<|im_start|>assistant\n{reply}<|im_end|>\n"


def chat_turns(books: list[Book], share: float, rng: random.Random) -> list[str]:
    """Enough exchanges of at most 1,600 characters to make up `share` of the training text."""
    wanted = share * sum(len(p) for b in books for p in b.train)
    turns: list[str] = []
    while wanted > 0:
        turn = chat_turn(rng.choice(books).train, rng)
        if len(turn) <= 1600:
            turns.append(turn)
            wanted -= len(turn)
    return turns


def token_stream(tokenizer: Tokenizer, books: list[Book], chat_share: float, seed: int) -> np.ndarray:
    """All training text as one uint16 stream: books cut into passages, shuffled together with the chat turns."""
    rng = random.Random(seed)
    pieces = [
        "<|endoftext|>" + "\n".join(book.train[at : at + 60]) for book in books for at in range(0, len(book.train), 60)
    ]
    turns = chat_turns(books, chat_share, rng)
    pieces += ["<|endoftext|>" + "".join(turns[at : at + 3]) for at in range(0, len(turns), 3)]
    rng.shuffle(pieces)
    encoded = tokenizer.encode_batch(pieces, add_special_tokens=False)
    return np.concatenate([np.array(e.ids, np.uint16) for e in encoded])


def held_out_text(books: list[Book]) -> str:
    """The paragraphs that no training step sees, book after book."""
    return "\n".join(p for b in books for p in b.held_out)


def held_out_excerpt(books: list[Book], every: int = 4, size: int = 2200) -> str:
    """A sample of the held-out text: from every fourth book the first paragraphs of that part, some `size` bytes."""
    kept = []
    for book in books[::every]:
        left = size
        for paragraph in book.held_out:
            if left <= 0:
                break
            kept.append(paragraph)
            left -= len(paragraph.encode()) + 1
    return "\n".join(kept) + "\n"


if __name__ == "__main__":
    sys.stdout.write(held_out_text(read_books(Path(sys.argv[1]))))
