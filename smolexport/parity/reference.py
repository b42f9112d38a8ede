"""The reference, run once or read from the cache: windows, logits, greedy continuations, noise floor.

Notation: v = vocab_size.
"""

from __future__ import annotations

import operator
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from smolexport.errors import FileFormatError, OutputError
from smolexport.parity.greedy import Continuation, continue_greedily
from smolexport.parity.inputs import Candidate, Progress, Settings, no_progress
from smolexport.parity.logit_cache import LOGITS, LogitCache, LogitStore, Recorder, digest
from smolexport.parity.metrics import Accumulator, read_predictions
from smolexport.parity.results import Accuracy
from smolexport.parity.windows import Window, block_rows, blocks, cut, prompts
from smolexport.run.session import DEFAULT_CONTEXT, Session, TextCodec, choose_context

FLOOR = "floor.f64"
FORM = 2  # version of the entries' contents; it is part of their keys


@dataclass(frozen=True)
class ReferenceRun:
    """Output of the reference that the candidates are compared with.

    Attributes:
        text: the scored text.
        ids: the whole text in the reference's tokens.
        codec: the reference's tokenizer.
        windows: the scored windows.
        store: the logits of all scored positions, window after window.
        continuations: greedy continuations of the prompts.
        noise_floor: float32 arithmetic against the reference's; None if not measured or if the reference is float32.
        greedy_tokens: most tokens per continuation.
        context: context length of the reference in tokens.
        load_seconds: None if the reference did not have to be opened.
    """

    text: str
    ids: Sequence[int]
    codec: TextCodec
    windows: Sequence[Window]
    store: LogitStore
    continuations: Sequence[Continuation]
    noise_floor: Accuracy | None
    greedy_tokens: int
    context: int
    load_seconds: float | None


def required_context(settings: Settings) -> int:
    """Context length that a session needs for everything that `settings` measure."""
    single = max(settings.greedy_tokens, settings.decode_tokens if settings.repetitions else 0)
    return max(settings.window, settings.prompt_tokens + single, settings.prefill_tokens if settings.repetitions else 0)


def run_reference(
    reference: Candidate,
    text: str,
    settings: Settings,
    cache: LogitCache,
    limit: int | None = None,
    progress: Progress = no_progress,
    check: Callable[[Sequence[Window]], None] | None = None,
) -> ReferenceRun:
    """Run the reference on `text`, or read its output from `cache`.

    Args:
        reference: the checkpoint with its runtime.
        text: the text to score.
        settings: what to measure.
        cache: where its logits are kept.
        limit: context length of the smallest candidate, if that is less than `settings` ask for.
        progress: called at each step.
        check: called with the windows before anything is run; may raise.

    Raises:
        OutputError: the disk has no room for the logits, or what was written cannot be read back.
    """
    with ExitStack() as stack:
        session = _LazySession(reference, settings, stack)
        codec = session.codec
        ids = codec.encode(text)
        context, bos = min(session.context, limit or session.context), next(iter(codec.encode("")), None)
        windows = cut(ids, min(settings.window, context), bos=bos, limit=settings.max_windows)
        if check:
            check(windows)
        starts, count = _starts(ids, context, settings, bos)
        tokens = [*(w.tokens for w in windows), *starts]
        key = digest(reference.path, _facts(reference, count, codec.stop_tokens, settings), tokens)
        measured = settings.attribution and _is_bf16(reference)
        found = _stored(cache, key, windows, starts, with_floor=measured)
        if found is None:
            facts: dict[str, Any] = {}
            with cache.making(key, facts) as folder:
                _record(session.opened, windows, settings, folder / LOGITS, progress, bf16=_is_bf16(reference))
                given = _continuations(session.opened, starts, count, codec.stop_tokens, progress)
                facts["greedy"] = [_as_json(one) for one in given]
                session.close()
                if measured:
                    _measure_floor(reference, windows, settings, folder, progress)
                reference.unchanged()
            found = _stored(cache, key, windows, starts, with_floor=measured)
        if found is None:
            raise OutputError(f"{cache.path(key)}: the entry just written cannot be read back; check the disk")
        return ReferenceRun(text, ids, codec, windows, *found, count, context, session.load_seconds)


def _starts(
    ids: Sequence[int], context: int, settings: Settings, bos: int | None
) -> tuple[list[NDArray[np.int64]], int]:
    """The prompts, and the number of tokens to continue each of them by."""
    length = max(1, min(settings.prompt_tokens, context // 2))
    count = min(settings.greedy_tokens, context - length + 1)  # the last chosen token need not be fed
    return (prompts(ids, length, settings.greedy_prompts, bos=bos) if count else []), count


def _stored(
    cache: LogitCache, key: str, windows: Sequence[Window], starts: Sequence[NDArray[np.int64]], *, with_floor: bool
) -> tuple[LogitStore, list[Continuation], Accuracy | None] | None:
    """The content of the entry `key`; None if it is missing, or damaged and therefore removed."""
    found = cache.find(key)
    if found is None:
        return None
    entry, facts = found
    try:
        store, rows = LogitStore(entry / LOGITS), sum(window.scored for window in windows)
        greedy = zip(starts, facts["greedy"], strict=True)
        continuations = [_from_json(start, one, store.vocab_size) for start, one in greedy]
        floor = Accumulator.load(entry / FLOOR).result() if with_floor else None
        if store.rows == rows and (floor is None or floor.positions == rows):
            return store, continuations, floor
    except (LookupError, TypeError, ValueError, OverflowError, FileFormatError):
        pass
    cache.remove(key)
    return None


class _LazySession:
    """The reference's session, opened on first use."""

    def __init__(self, reference: Candidate, settings: Settings, stack: ExitStack) -> None:
        self._reference, self._settings, self._stack = reference, settings, stack
        self._session: Session | None = None
        self.load_seconds: float | None = None

    @property
    def opened(self) -> Session:
        if self._session is None:
            start = time.perf_counter()
            needed = required_context(self._settings)
            context = needed if needed > DEFAULT_CONTEXT else None
            model = self._reference
            open_session: Callable[..., Session] = model.runtime.open
            opened = open_session(model.path, threads=self._settings.threads, context=context, **model.options)
            self._session = self._stack.enter_context(opened)
            self.load_seconds = time.perf_counter() - start
        return self._session

    @property
    def codec(self) -> TextCodec:
        origin = self._reference.origin
        return self.opened.codec if origin is None else origin.codec()

    @property
    def context(self) -> int:
        origin, needed = self._reference.origin, required_context(self._settings)
        if origin is None:
            return self.opened.context
        return choose_context(needed if needed > DEFAULT_CONTEXT else None, origin.spec.context_length)

    def close(self) -> None:
        self._stack.close()
        self._session = None


def _is_bf16(reference: Candidate) -> bool:
    return reference.options.get("dtype") == "bf16"


def _facts(reference: Candidate, count: int, stop: frozenset[int], settings: Settings) -> dict[str, object]:
    """What the entry depends on, besides weights and tokens."""
    runtime = reference.runtime
    return {
        "runtime": [runtime.NAME, runtime.version()],
        "options": dict(reference.options),
        "greedy": count,
        "stop": sorted(stop),
        "floor": settings.attribution,
        "form": FORM,
    }


def _record(
    session: Session, windows: Sequence[Window], settings: Settings, path: Path, progress: Progress, *, bf16: bool
) -> None:
    rows = block_rows(session.vocab_size, settings.block_bytes)
    with Recorder(path, sum(w.scored for w in windows), session.vocab_size, bf16=bf16) as recorder:
        for done, window in enumerate(windows):
            progress("reference", done, len(windows))
            for logits in blocks(session, window, rows):
                recorder.add(logits)
    progress("reference", len(windows), len(windows))


def _continuations(
    session: Session, starts: Sequence[NDArray[np.int64]], count: int, stop: frozenset[int], progress: Progress
) -> Iterator[Continuation]:
    for done, prompt in enumerate(starts):
        progress("continue", done, len(starts))
        yield continue_greedily(session, prompt, count, stop)
    progress("continue", len(starts), len(starts))


def _as_json(one: Continuation) -> dict[str, list[float]]:
    return {"tokens": list(one.tokens), "margins": list(one.margins)}


def _from_json(prompt: NDArray[np.int64], one: Mapping[str, Any], vocab_size: int) -> Continuation:
    tokens, margins = tuple(map(operator.index, one["tokens"])), tuple(map(float, one["margins"]))
    if len(tokens) != len(margins) or not all(0 <= token < vocab_size for token in tokens):
        raise ValueError(f"{len(tokens)} tokens with {len(margins)} margins")
    return Continuation(prompt, tokens, margins)


def _measure_floor(
    reference: Candidate, windows: Sequence[Window], settings: Settings, folder: Path, progress: Progress
) -> None:
    """Run the reference in float32, compare it with the logits in `folder`, and write the figures there."""
    open_session: Callable[..., Session] = reference.runtime.open
    options = {**reference.options, "dtype": "f32"}
    total = Accumulator()
    with open_session(reference.path, threads=settings.threads, context=len(windows[0].tokens), **options) as session:
        for done, (window, parts) in enumerate(
            reference_blocks(LogitStore(folder / LOGITS), windows, settings.block_bytes)
        ):
            progress("floor", done, len(windows))
            feed = blocks(session, window, block_rows(session.vocab_size, settings.block_bytes))
            for logits, following in parts:
                total.add(read_predictions(logits, following), read_predictions(next(feed), following))
    progress("floor", len(windows), len(windows))
    total.save(folder / FLOOR)


def reference_blocks(
    store: LogitStore, windows: Sequence[Window], block_bytes: int
) -> Iterator[tuple[Window, Iterator[tuple[NDArray[np.float32], NDArray[np.int64]]]]]:
    """Each window with the stored logits [.., v] of its scored positions and their true next tokens, block by block.

    The blocks have the sizes of those that `windows.blocks` yields.
    """
    rows, first = block_rows(store.vocab_size, block_bytes), 0
    for window in windows:
        yield window, _of_window(store, window, first, rows)
        first += window.scored


def _of_window(
    store: LogitStore, window: Window, first: int, rows: int
) -> Iterator[tuple[NDArray[np.float32], NDArray[np.int64]]]:
    place = 0
    for logits in store.blocks(first, window.scored, rows):
        following = window.following[place : place + len(logits)]
        place += len(logits)
        yield logits, following
