"""What a runtime adapter offers: the one interface that the generate loop and the parity metrics know.

Protocols, not base classes: an adapter is a module named `smolexport_on_*`, found by its name, and owes nothing
to this package.  `smolexport.testing.runtimes.RuntimeTests` checks what types cannot.  The three functions at the
end are what every adapter has to decide in the same way; an adapter may use them.

Notation: n = tokens appended in one call, v = vocab_size.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from smolexport.errors import ContextOverflowError, SessionError, UsageError

WATCHED = 0.1  # seconds
HALF_A_CORE = 0.5  # what other programs may use and yet leave the cores to us
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


class Session(Protocol):
    """One sequence with its key/value cache.  Use as a context manager or call `close`."""

    @property
    def vocab_size(self) -> int:
        """Width of a row of logits."""
        ...

    @property
    def context(self) -> int:
        """Most tokens that the session holds."""
        ...

    @property
    def length(self) -> int:
        """Tokens held now."""
        ...

    @property
    def codec(self) -> TextCodec:
        """The file's own tokenizer."""
        ...

    def append(self, tokens: Sequence[int] | NDArray[np.integer], *, last_only: bool = False) -> NDArray[np.float32]:
        """Feed `tokens`, return the logits [n, v] after each, or only the last row [1, v].

        The result is the caller's to keep.  Raises ContextOverflowError before anything is computed,
        SessionClosedError after `close`, SessionError for an empty call or an id outside the vocabulary.
        """
        ...

    def rewind(self, length: int) -> None:
        """Forget all tokens from position `length` on; raises SessionError unless 0 <= length <= self.length."""
        ...

    def close(self) -> None:
        """Free the memory; further calls but `close` raise SessionClosedError."""
        ...

    def __enter__(self) -> Session: ...

    def __exit__(self, *exc: object) -> None: ...


class Chat(Protocol):
    """A file's tokenizer and chat template by the library's own means, without the weights.

    Templates are a stranger's programs: whoever calls this does so in a process that can be ended.
    """

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, special tokens in it recognised, none added."""
        ...

    def prompt(self, text: str) -> list[int]:
        """Ids of `text` as the library's own tools continue it: with the special tokens that they add unasked."""
        ...

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None,
        add_generation_prompt: bool,
        switches: Mapping[str, Any],
    ) -> str:
        """The prompt for a conversation; `switches` are further variables of the template, e.g. enable_thinking.

        Raises UnsupportedError for what the library has no way to ask for, anything for what fails.
        """
        ...


class Runtime(Protocol):
    """A module `smolexport_on_*`.

    One whose library brings a tokenizer or renders chat templates itself may also have `open_chat(path: Path) -> Chat`.
    One that trains names a module as `TRAINER: str`, see `smolexport.calibration.trainer.Trainer`.
    """

    @property
    def NAME(self) -> str:  # noqa: N802
        """Name that people use, e.g. `llama.cpp`."""
        ...

    @property
    def READS(self) -> str:  # noqa: N802
        """The format it runs: `checkpoint`, `gguf`, `onnx`, `mlx`."""
        ...

    @property
    def REQUIRES(self) -> Sequence[str]:  # noqa: N802
        """Modules that must be importable before `open`; the adapter itself imports without them."""
        ...

    @property
    def INSTALL_HINT(self) -> str:  # noqa: N802
        """The line that installs them."""
        ...

    def version(self) -> str:
        """Version of the library behind it."""
        ...

    def open(self, path: Path, *, threads: int | None = None, context: int | None = None) -> Session:
        """Load `path`.  `threads` None: one per physical core; `context` None: the model's own, at most 4096."""
        ...


def choose_threads(asked: int | None) -> int:
    """`asked`, or one thread per physical core that this process may use.

    Not one per logical core: the spinning workers of a second hardware thread slow the first one down.

    Raises:
        UsageError: `asked` is below 1.
    """
    if asked is not None:
        if asked < 1:
            raise UsageError(f"threads = {asked} should be at least 1")
        return asked
    import psutil

    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    return max(1, min(psutil.cpu_count(logical=False) or allowed, allowed))


def cores_to_spare(threads: int) -> bool:
    """Whether `threads` would have cores of their own just now: other programs are watched for a tenth of a second.

    Threads that wait for work busily are faster on cores that are idle, and much slower on cores that are not.
    """
    import psutil

    busy = psutil.cpu_percent(WATCHED) / 100
    return (psutil.cpu_count() or 1) * (1 - busy) > threads - HALF_A_CORE


def choose_context(asked: int | None, trained: int) -> int:
    """`asked`, or the model's own context length `trained`, at most `DEFAULT_CONTEXT`; in tokens.

    Raises:
        UsageError: `asked` is below 1 or beyond what the model was made for.
    """
    if asked is None:
        return min(trained, DEFAULT_CONTEXT)
    if not 1 <= asked <= trained:
        raise UsageError(f"context = {asked} should lie between 1 and the model's own {trained} tokens")
    return asked


def token_array(
    tokens: Sequence[int] | NDArray[np.integer], *, held: int, context: int, vocab_size: int
) -> NDArray[np.int32]:
    """`tokens` as int32 [n], checked against the session that shall append them.

    Args:
        tokens: ids to append, n of them.
        held: tokens that the session holds already.
        context: most tokens that it can hold.
        vocab_size: v; ids lie in 0 … v - 1.

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
        raise SessionError(f"append: {ids.dtype} of shape {ids.shape} should be a flat sequence of integers")
    if ids.min() < 0 or ids.max() >= vocab_size:
        where = int(np.argmax((ids < 0) | (ids >= vocab_size)))
        raise SessionError(f"append: token {ids[where]} at position {where} is outside the vocabulary of {vocab_size}")
    if held + ids.size > context:
        raise ContextOverflowError(
            f"append: {held} tokens held and {ids.size} more exceed the context of {context}; "
            "rewind, or open the session with a larger context"
        )
    return ids.astype(np.int32)
