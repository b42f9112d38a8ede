"""A small complete runtime: logits from seeded tables of the last two tokens.

A file is JSON: {"vocab", "seed", "context", "bos", "noise", "noise_seed", "shift", "stop", "split", "poison"}.  `noise`
disturbs the tables as quantization would; `split` is a tokenizer of another making; `poison` turns one word's
logits into NaN.  It keeps every promise of `smolexport.run.session.Session`.
"""

from __future__ import annotations

import json

import numpy as np

from smolexport.errors import ContextOverflowError, FileFormatError, SessionClosedError, SessionError

NAME = "table"
READS = "table"
REQUIRES = ()
INSTALL_HINT = ""
OPENED: list[dict[str, object]] = []


def version():
    return "1"


def open(path, *, threads=None, context=None, scale=1.0):  # noqa: A001 - the protocol's name
    try:
        facts = json.loads(path.read_text())
    except ValueError as error:
        raise FileFormatError(f"{path}: not a table file: {error}") from None
    OPENED.append({"path": path, "threads": threads, "context": context, "scale": scale})
    own = facts.get("context", 4096)
    return TableSession(facts, min(context or 4096, own), scale)


class TableCodec:
    def __init__(self, facts):
        self._facts = facts
        self.stop_tokens = frozenset(facts.get("stop", []))

    def encode(self, text):
        bos = self._facts.get("bos")
        data = text.encode()
        if self._facts.get("split") == "broken":
            raise KeyError("no such merge")
        step = 2 if self._facts.get("split") == "pairs" else 1
        ids = [sum(data[i : i + step]) % self._facts["vocab"] for i in range(0, len(data), step)]
        return ids if bos is None else [bos, *ids]

    def decoder(self):
        return TableDecoder()


class TableDecoder:
    def push(self, token):
        return chr(token)

    def flush(self):
        return ""


class TableSession:
    def __init__(self, facts, context, scale):
        v = facts["vocab"]
        tables = np.random.default_rng(facts["seed"]).normal(size=(2, v, v))
        damage = np.random.default_rng(facts.get("noise_seed", 1)).normal(size=tables.shape)
        self._tables = (scale * (tables * 2 + facts.get("noise", 0.0) * damage)).astype(np.float32)
        self._tables[0] += np.float32(facts.get("shift", 0.0))
        if "poison" in facts:
            self._tables[0, :, facts["poison"]] = np.nan
        self.vocab_size, self.context = v, context
        self.codec = TableCodec(facts)
        self._held: list[int] = []
        self._closed = False
        self.calls: list[int] = []

    @property
    def length(self):
        return len(self._held)

    def append(self, tokens, *, last_only=False):
        self._check()
        ids = [int(token) for token in tokens]
        if not ids or min(ids) < 0 or max(ids) >= self.vocab_size:
            raise SessionError(f"bad ids {ids[:4]}")
        if len(self._held) + len(ids) > self.context:
            raise ContextOverflowError(f"{len(self._held)} + {len(ids)} tokens in a context of {self.context}")
        self.calls.append(len(ids))
        before = [self._held[-1] if self._held else 0, *ids[:-1]]
        self._held += ids
        logits = self._tables[0, ids] + self._tables[1, before]
        return logits[-1:] if last_only else logits

    def rewind(self, length):
        self._check()
        if not 0 <= length <= len(self._held):
            raise SessionError(f"rewind to {length} of {len(self._held)}")
        del self._held[length:]

    def close(self):
        self._closed = True

    def _check(self):
        if self._closed:
            raise SessionClosedError("closed")

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.close()
