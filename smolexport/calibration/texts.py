"""Texts as windows of token ids, and the overlap of windows with another text.

| a file ending in | holds |
|---|---|
| `.jsonl` | an object per line, with `text`, or with `messages` for the checkpoint's chat template |
| `.npy`, `.json` | token ids, whole numbers in one list |
| anything else | UTF-8 text |

Optional beside `messages`: `tools`, a list or JSON of one; `chat_template_kwargs`, further variables of the template;
`enable_thinking`, the most frequent of these.  null counts as absent.  Templates render elsewhere, see `Render`.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from smolexport.errors import CalibrationError, UsageError
from smolexport.files import open_regular
from smolexport.run.chat import Answer
from smolexport.text import show
from smolexport.tokenizer import FileTokenizer

PIECE = 1 << 14  # characters tokenized at a time
IDS, LINES = (".npy", ".json"), ".jsonl"
LARGEST_IDS = 1 << 30  # bytes of a file of token ids
REASON = 120  # characters of a foreign error

Render = Callable[[Mapping[str, Any]], Answer]
"""Renders a conversation, `{"messages", "tools", "add_generation_prompt", "switches"}`."""


@dataclass(frozen=True)
class TextSource:
    """A text: its file's name and SHA-256, and the number of tokens taken from it."""

    name: str
    sha256: str
    tokens: int


def source_name(path: Path) -> str:
    """The name of a text for a `TextSource`; characters that are not printable UTF-8 are replaced."""
    return "".join(c if c.isprintable() else "?" for c in path.name)


def read_source(
    path: Path,
    codec: FileTokenizer,
    *,
    limit: int,
    seed: int,
    vocab_size: int,
    render: Render,
    progress: Callable[[int], None] = lambda _: None,
) -> tuple[str, NDArray[np.int32]]:
    """SHA-256 of a file, and its token ids, without BOS.

    Args:
        path: the file.
        codec: the checkpoint's tokenizer.
        limit: tokens to stop after; a longer file contributes pieces from all over it.
        seed: chooses the pieces.
        vocab_size: ids must be below it.
        render: makes a prompt of a conversation.
        progress: called with numbers of tokens that were read.

    Raises:
        UsageError: the file cannot be read, or is not what its name says; names the line.
    """
    data = _read(path)
    mark = hashlib.sha256(data).hexdigest()
    if path.suffix in IDS:
        ids = _ids(path, data, vocab_size)
        progress(len(ids))
        return mark, ids
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: is not UTF-8 text ({error.reason} at byte {error.start})") from error
    pieces = _pieces(path, text)
    if len(text) > 2 * limit:  # not all of it may be needed
        pieces = [pieces[i] for i in np.random.default_rng(seed).permutation(len(pieces))]
    found: list[list[int]] = []
    tokens = 0
    for place, piece in pieces:
        try:
            found.append(codec.encode(_text_of(piece, render) if path.suffix == LINES else piece, frame=False))
        except UsageError as error:
            raise UsageError(f"{place}: {error}") from error
        tokens += len(found[-1])
        progress(len(found[-1]))
        if tokens >= limit:
            break
    return mark, _checked(path, np.fromiter(chain.from_iterable(found), np.int64, tokens), vocab_size)


def _read(path: Path) -> bytes:
    try:
        with open_regular(path) as file:
            if path.suffix in IDS and os.fstat(file.fileno()).st_size > LARGEST_IDS:
                raise UsageError(f"{path}: holds more token ids than are ever needed")
            return file.read()
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from error


def _checked(path: Path, ids: NDArray[np.integer], vocab_size: int) -> NDArray[np.int32]:
    if ids.size and not 0 <= ids.min() <= ids.max() < vocab_size:
        worst = ids.max() if ids.max() >= vocab_size else ids.min()
        raise UsageError(f"{path}: the token id {worst} is outside the model's vocabulary of {vocab_size}")
    return ids.astype(np.int32)


def _pieces(path: Path, text: str) -> list[tuple[str, str]]:
    """(place for messages, piece): lines of JSON, or pieces of about PIECE characters that end with a line."""
    if path.suffix == LINES:  # in JSON only a line feed ends a line
        return [(f"{path}: line {i}", line) for i, line in enumerate(text.split("\n"), 1) if line.strip()]
    text, found, start = text.replace("\r\n", "\n"), [], 0
    while start < len(text):
        end = text.find("\n", start + PIECE)
        end = len(text) if end < 0 else end + 1
        found.append((str(path), text[start:end]))
        start = end
    return found


def _text_of(line: str, render: Render) -> str:
    entry = _parsed(line)
    entry = entry if isinstance(entry, dict) else {}
    if isinstance(entry.get("text"), str):
        return f"{entry['text']}\n"
    if not entry.get("messages") or not _objects(entry["messages"]):
        raise UsageError('has neither a "text" nor "messages"')
    answer = render(_conversation(entry))
    if answer.error:
        raise UsageError(f"the chat template fails on these messages: {answer.error}")
    return answer.text


def _conversation(entry: Mapping[str, Any]) -> dict[str, Any]:
    tools, switches = entry.get("tools"), entry.get("chat_template_kwargs")
    if isinstance(tools, str):
        tools = _parsed(tools, '"tools" ')
    if tools is not None and not _objects(tools):
        raise UsageError(f'"tools" is {show(tools)}, not a list of objects')
    if switches is not None and not isinstance(switches, dict):
        raise UsageError(f'"chat_template_kwargs" is {show(switches)}, not an object')
    thinking = entry.get("enable_thinking")
    named = {} if thinking is None else {"enable_thinking": thinking}
    return {
        "messages": entry["messages"],
        "tools": tools,
        "add_generation_prompt": False,
        "switches": named | (switches or {}),
    }


def _parsed(text: str, what: str = "") -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{what}is not JSON ({str(error)[:REASON]})") from error


def _objects(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(one, dict) for one in value)


def _ids(path: Path, data: bytes, vocab_size: int) -> NDArray[np.int32]:
    try:
        found = _npy_array(data) if path.suffix == ".npy" else _json_array(data)
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:
        raise UsageError(f"{path}: holds no token ids ({show(str(error), REASON)})") from error
    if found.dtype.kind not in "iu" or found.ndim not in (1, 2) or not found.size:
        raise UsageError(f"{path}: must hold token ids, whole numbers in one list")
    return _checked(path, found.reshape(-1), vocab_size)


def _npy_array(data: bytes) -> NDArray[Any]:
    """The array in a NumPy file; raises ValueError, before memory is allocated, for anything else.

    The header is a piece of Python, and NumPy passes on whatever parsing a damaged one raises: SyntaxError, TypeError,
    tokenize.TokenError and more.
    """
    file = io.BytesIO(data)
    readers = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}
    try:
        with warnings.catch_warnings(action="ignore"):  # of the parser, about odd syntax
            version = npy.read_magic(file)
            shape, by_columns, dtype = readers[version](file)
    except Exception as error:
        raise ValueError(f"{type(error).__name__}: {error}") from error
    count, left = math.prod(shape), len(data) - file.tell()
    if dtype.kind not in "biufc" or min(shape, default=0) < 0 or count * dtype.itemsize > left:
        raise ValueError(f"{dtype} of shape {shape} in {left} bytes")
    flat: NDArray[Any] = np.frombuffer(data, dtype, count, file.tell()) if count else np.empty(0, dtype)
    return flat.reshape(shape, order="F" if by_columns else "C")


def _json_array(data: bytes) -> NDArray[Any]:
    """The numbers in JSON; empty if it holds anything else."""
    found = json.loads(data)
    rows = found if found and isinstance(found[0], list) else [found]
    return np.array(found) if {type(i) for row in rows for i in row} == {int} else np.array([])


def training_windows(
    texts: Iterable[NDArray[np.int32]], window: int, count: int, *, bos: int | None, seed: int
) -> NDArray[np.int32]:
    """At most `count` windows [n, window] from the ids of `texts`, in random order, each with `bos` (if any) in front.

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
    """How many of the runs of `n` tokens in `text_ids` also occur in a window."""
    ids = np.ascontiguousarray(text_ids, np.int32)
    if len(ids) < n or windows.shape[1] < n:
        return 0
    runs = np.lib.stride_tricks.sliding_window_view
    known = {run.tobytes() for window in np.ascontiguousarray(windows, np.int32) for run in runs(window, n)}
    return sum(run.tobytes() in known for run in runs(ids, n))
