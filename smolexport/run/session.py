"""What a runtime adapter offers: the one interface that the generate loop and the parity metrics use.

An adapter is a module named `smolexport_on_*`, found by its name.  Its sessions derive from `Session`, which holds what
all runtimes do alike; `smolexport.testing.runtimes.RuntimeTests` checks what types cannot.

Notation: n = tokens appended in one call, v = vocab_size.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import ClassVar, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from smolexport.errors import ContextOverflowError, SessionClosedError, SessionError, SmolexportError, UsageError
from smolexport.text import failure

DEFAULT_CONTEXT = 4096
"""Most tokens that a session holds unless asked for more: a cache for the full context of a small model is large."""


class TextDecoder(Protocol):
    """Turns tokens into text one at a time, holding back incomplete UTF-8 sequences."""

    def push(self, token: int) -> str:
        """Text that `token` completes; may be empty."""
        ...

    def flush(self) -> str:
        """What is still held back, with U+FFFD for bytes that are not UTF-8."""
        ...


class TextCodec(Protocol):
    """A file's own tokenizer."""

    @property
    def stop_tokens(self) -> frozenset[int]:
        """Tokens that end a generation."""
        ...

    def encode(self, text: str) -> list[int]:
        """Ids of `text` with the special tokens in it recognised; BOS is added where the model wants it."""
        ...

    def decoder(self) -> TextDecoder:
        """A fresh incremental decoder."""
        ...


class Session(ABC):
    """One sequence with its key/value cache.  Use as a context manager or call `close`.

    An adapter sets LIBRARY and implements `_forward`, `_truncate` and `_release`.

    Attributes:
        LIBRARY: name of the library, for messages.
        vocab_size: width of a row of logits.
        context: most tokens that the session holds.
        length: tokens held now.
    """

    LIBRARY: ClassVar[str]

    def __init__(self, path: Path, vocab_size: int, context: int) -> None:
        self.vocab_size, self.context, self.length = vocab_size, context, 0
        self._path, self._closed = path, False

    @cached_property
    def codec(self) -> TextCodec:
        """The model's own tokenizer, read from the folder's tokenizer.json when first used.

        Raises:
            TokenizerError: the folder has none, or one that is not understood.
        """
        from smolexport.tokenizer import open_tokenizer, read_tokenizer

        return open_tokenizer(self._path, read_tokenizer(self._path, self.vocab_size))

    def append(self, tokens: Sequence[int] | NDArray[np.integer], *, last_only: bool = False) -> NDArray[np.float32]:
        """Feed `tokens`, return the logits [n, v] after each, or only the last row [1, v].

        The result is the caller's to keep.  Logits that a model computes in bf16 or f16 are widened, not recomputed.

        Raises:
            SessionClosedError: after `close`.
            SessionError: no tokens, an id outside the vocabulary, or the library failed; nothing is appended then.
            ContextOverflowError: before anything is computed.
        """
        self._check_open()
        ids = token_array(tokens, held=self.length, context=self.context, vocab_size=self.vocab_size)
        try:
            logits = self._forward(ids, last_only)
        except BaseException as error:  # also Ctrl-C between two blocks
            self._truncate(self.length)
            if isinstance(error, SmolexportError) or not isinstance(error, Exception):
                raise
            raise SessionError(f"{self._path}: {self.LIBRARY} failed: {failure(error)}") from error
        self.length += len(ids)
        return logits

    def rewind(self, length: int) -> None:
        """Forget all tokens from position `length` on; raises SessionError unless 0 <= length <= self.length."""
        self._check_open()
        if not 0 <= length <= self.length:
            raise SessionError(f"rewind: {length} must be between 0 and the {self.length} tokens held")
        self._truncate(length)
        self.length = length

    def close(self) -> None:
        """Free the memory; further calls but `close` raise SessionClosedError."""
        if not self._closed:
            self._closed = True
            self._release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _check_open(self) -> None:
        if self._closed:
            raise SessionClosedError(f"{self._path}: the session is closed; open it again")

    @abstractmethod
    def _forward(self, ids: NDArray[np.int32], last_only: bool) -> NDArray[np.float32]:
        """The logits that `append` returns; may raise anything."""

    @abstractmethod
    def _truncate(self, length: int) -> None:
        """Shorten the cache to `length` tokens, also after a `_forward` that was interrupted anywhere."""

    @abstractmethod
    def _release(self) -> None:
        """Free the model and the cache."""

    def _in_blocks(
        self,
        ids: NDArray[np.int32],
        last_only: bool,
        block: int,
        step: Callable[[NDArray[np.int32], int, NDArray[np.float32]], None],
    ) -> NDArray[np.float32]:
        """The logits that `append` returns, computed `block` tokens at a time.

        `step(ids, held, rows)` computes `ids` after `held` tokens and writes their last logits into `rows`: of all of
        them, or with `last_only` of one in the last block and of none in those before.
        """
        n = len(ids)
        logits = np.empty((1 if last_only else n, self.vocab_size), np.float32)
        for start in range(0, n, block):
            part = ids[start : start + block]
            rows = logits[: start + block >= n] if last_only else logits[start : start + block]
            step(part, self.length + start, rows)
        return logits


class Runtime(Protocol):
    """A module `smolexport_on_*`.

    One whose library brings a tokenizer or renders chat templates itself may also have `open_chat(path: Path) -> Chat`,
    see `smolexport.run.chat.Chat`.  One that trains names a module as `TRAINER: str`, see
    `smolexport.calibration.trainer.Trainer`.

    Attributes:
        NAME: name that people use, e.g. `llama.cpp`.
        READS: the format it runs: `checkpoint`, `gguf`, `onnx`, `mlx`.
        INSTALL_HINT: the line that installs what it requires.
    """

    NAME: str
    READS: str
    INSTALL_HINT: str

    @property
    def REQUIRES(self) -> Sequence[str]:  # noqa: N802
        """Modules that must be importable before `open`; the adapter itself imports without them."""
        ...

    def version(self) -> str:
        """Versions of the libraries behind it, e.g. `torch 2.13.0, transformers 5.23.0`."""
        ...

    def open(self, path: Path, *, threads: int | None = None, context: int | None = None) -> Session:
        """Load `path`.  `threads` None: one per physical core; `context` None: the model's own, at most 4096."""
        ...


def choose_threads(requested: int | None) -> int:
    """`requested`, or one thread per physical core that this process may use.

    Not one per logical core: the spinning workers of a second hardware thread slow the first one down.

    Raises:
        UsageError: `requested` is below 1.
    """
    if requested is not None:
        if requested < 1:
            raise UsageError(f"threads = {requested} must be at least 1")
        return requested
    import psutil

    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    return max(1, min(psutil.cpu_count(logical=False) or allowed, allowed))


def choose_context(requested: int | None, trained: int) -> int:
    """`requested`, or the model's own context length `trained`, at most `DEFAULT_CONTEXT`; in tokens.

    Raises:
        UsageError: `requested` is below 1 or above `trained`.
    """
    if requested is None:
        return min(trained, DEFAULT_CONTEXT)
    if not 1 <= requested <= trained:
        raise UsageError(f"context = {requested} must be between 1 and the model's own {trained} tokens")
    return requested


def token_array(
    tokens: Sequence[int] | NDArray[np.integer], *, held: int, context: int, vocab_size: int
) -> NDArray[np.int32]:
    """`tokens` as a new int32 array [n], checked against a session that holds `held` tokens.

    Raises:
        SessionError: no tokens, not a flat sequence of integers, or an id outside the vocabulary.
        ContextOverflowError: held + n exceeds the context.
    """
    one = tokens[0] if isinstance(tokens, list) and len(tokens) == 1 else None
    if type(one) is int and 0 <= one < vocab_size and held < context:  # a step of decoding: quick
        return np.array(tokens, np.int32)
    ids = np.asarray(tokens)
    if ids.size == 0:
        raise SessionError("append: no tokens; give at least one")
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        raise SessionError(f"append: expected a flat sequence of integers, found {ids.dtype} of shape {ids.shape}")
    if ids.min() < 0 or ids.max() >= vocab_size:
        where = int(np.argmax((ids < 0) | (ids >= vocab_size)))
        raise SessionError(f"append: token {ids[where]} at position {where} is outside the vocabulary of {vocab_size}")
    if held + ids.size > context:
        raise ContextOverflowError(
            f"append: {held} tokens held and {ids.size} more exceed the context of {context}; "
            "rewind, or open the session with a larger context"
        )
    return ids.astype(np.int32)
