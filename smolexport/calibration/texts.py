"""Texts become windows of token ids; and what windows share with another text.

| a file ending in | holds |
|---|---|
| `.jsonl` | an object per line, with `text`, or with `messages` that go through the checkpoint's chat template |
| `.npy`, `.json` | token ids, whole numbers in one list |
| anything else | UTF-8 text |

Notation: n = windows, w = tokens of a window.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from smolexport.errors import CalibrationError, UsageError
from smolexport.text import reason
from smolexport.tokenizer import FileTokenizer

__all__ = ["Source", "cut", "overlaps", "read_source", "same_texts"]

PIECE = 1 << 14  # characters tokenized at a time
LARGEST_IDS = 1 << 30  # bytes of a file of token ids

Render = Callable[[Sequence[Mapping[str, Any]]], str]


@dataclass(frozen=True)
class Source:
    """A text: its file's name and SHA-256, and how many tokens were taken from it."""

    name: str
    sha256: str
    tokens: int


def read_source(
    path: Path, codec: FileTokenizer, *, limit: int, seed: int, vocab_size: int, render: Render
) -> tuple[str, NDArray[np.int32]]:
    """SHA-256 of a file, and its token ids, without BOS.

    Of a file with more than `limit` tokens, pieces from all over it.

    Args:
        path: the file.
        codec: the checkpoint's tokenizer.
        limit: tokens after which no more of the file is read.
        seed: chooses the pieces.
        vocab_size: ids are below it.
        render: makes a prompt of messages.

    Raises:
        UsageError: the file cannot be read, or is not what its name says.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from error
    mark = hashlib.sha256(data).hexdigest()
    if path.suffix in (".npy", ".json"):
        return mark, _ids(path, data, vocab_size)
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: is not UTF-8 text ({error.reason} at byte {error.start})") from error
    pieces = list(_lines(path, text, render)) if path.suffix == ".jsonl" else _pieces(text.replace("\r\n", "\n"))
    if len(text) > 2 * limit:  # not all of it may be needed
        pieces = [pieces[i] for i in np.random.default_rng(seed).permutation(len(pieces))]
    found: list[list[int]] = []
    tokens = 0
    for piece in pieces:
        found.append(codec.encode(piece, frame=False))
        tokens += len(found[-1])
        if tokens >= limit:
            break
    ids = np.fromiter(chain.from_iterable(found), np.int32, tokens)
    if ids.size and not 0 <= ids.min() <= ids.max() < vocab_size:
        raise UsageError(f"{path}: its tokens reach {ids.max()}, beyond the model's vocabulary of {vocab_size}")
    return mark, ids


def _pieces(text: str) -> list[str]:
    """`text` cut at ends of lines into pieces of about PIECE characters."""
    found, start = [], 0
    while start < len(text):
        end = text.find("\n", start + PIECE)
        end = len(text) if end < 0 else end + 1
        found.append(text[start:end])
        start = end
    return found


def _lines(path: Path, text: str, render: Render) -> Iterator[str]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UsageError(f"{path}: line {number} is not JSON ({reason(error)})") from error
        entry = entry if isinstance(entry, dict) else {}
        messages = entry.get("messages")
        if isinstance(entry.get("text"), str):
            yield entry["text"] + "\n"
        elif isinstance(messages, list) and messages and all(isinstance(m, dict) for m in messages):
            try:
                yield render(messages)
            except Exception as error:  # a template raises whatever it likes
                raise UsageError(
                    f"{path}: line {number}: the chat template refuses these messages: {reason(error)}"
                ) from error
        else:
            raise UsageError(f'{path}: line {number} has neither a "text" nor "messages"')


def _ids(path: Path, data: bytes, vocab_size: int) -> NDArray[np.int32]:
    import io

    if len(data) > LARGEST_IDS:
        raise UsageError(f"{path}: holds more token ids than are ever needed")
    try:
        if path.suffix == ".npy":
            found = np.lib.format.read_array(io.BytesIO(data), allow_pickle=False)
        else:
            found = np.array(json.loads(data))
    except (ValueError, OSError, EOFError, OverflowError, RecursionError, MemoryError) as error:
        raise UsageError(f"{path}: holds no token ids ({reason(error)})") from error
    if found.dtype.kind not in "iu" or found.ndim not in (1, 2) or not found.size:
        raise UsageError(f"{path}: should hold token ids, whole numbers in one list")
    if not 0 <= found.min() <= found.max() < vocab_size:
        worst = found.max() if found.max() >= vocab_size else found.min()
        raise UsageError(f"{path}: the token id {worst} is outside the model's vocabulary of {vocab_size}")
    return found.reshape(-1).astype(np.int32)


def cut(
    texts: Iterable[NDArray[np.int32]], window: int, count: int, *, bos: int | None, seed: int
) -> NDArray[np.int32]:
    """At most `count` windows [n, window] from `texts`, in a random order; incomplete ones are left out.

    Args:
        texts: token ids of each.
        window: tokens of each window, with BOS.
        count: most windows.
        bos: stands first in each window; None: nothing does.
        seed: of the order.

    Raises:
        CalibrationError: no text fills a window.
    """
    body = window - (bos is not None)
    parts = [ids[: len(ids) // body * body].reshape(-1, body) for ids in texts]
    whole = np.concatenate(parts) if parts else np.empty((0, body), np.int32)
    if not len(whole):
        raise CalibrationError(
            f"the text has fewer tokens than one window of {window}; give more text, or a smaller --window"
        )
    chosen = whole[np.random.default_rng(seed).permutation(len(whole))[:count]]
    if bos is None:
        return chosen.astype(np.int32)
    return np.concatenate((np.full((len(chosen), 1), bos, np.int32), chosen), 1)


def overlaps(windows: NDArray[np.integer], text_ids: Sequence[int] | NDArray[np.integer], n: int = 32) -> int:
    """How many of the runs of `n` tokens in `text_ids` stand in a window too, token by token."""
    ids = np.ascontiguousarray(text_ids, np.int32)
    if len(ids) < n or windows.shape[1] < n:
        return 0
    known = {run.tobytes() for window in np.ascontiguousarray(windows, np.int32) for run in _runs(window, n)}
    return sum(run.tobytes() in known for run in _runs(ids, n))


def _runs(ids: NDArray[np.int32], n: int) -> NDArray[np.int32]:
    return np.lib.stride_tricks.sliding_window_view(ids, n)


def same_texts(sources: Iterable[Source], texts: Mapping[str, bytes]) -> list[str]:
    """Names of those of `texts` that are one of `sources`, byte by byte."""
    marks = {source.sha256 for source in sources}
    return [name for name, data in texts.items() if hashlib.sha256(data).hexdigest() in marks]
