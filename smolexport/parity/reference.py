"""The reference, run once or read from the cache: windows, logits, greedy continuations, noise floor."""

from __future__ import annotations

import operator
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from smolexport.errors import FileFormatError, OutputError
from smolexport.parity.inputs import Candidate, Progress, Settings, no_progress
from smolexport.parity.logit_cache import LOGITS, LogitCache, LogitStore, digest, write_logits
from smolexport.parity.metrics import Accumulator, Predictions, read_predictions
from smolexport.parity.results import Accuracy
from smolexport.parity.windows import Continuation, Window, block_rows, blocks, continue_greedily, cut, prompts
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
        limit: context length of the smallest candidate, if shorter than `settings` need.
        progress: called at each step.
        check: called with the windows before anything is run; may raise.

    Raises:
        OutputError: the disk has no room for the logits, or what was written cannot be read back.
    """
    with ExitStack() as stack:
        model = _Reference(reference, settings, stack)
        codec, with_floor = model.codec, settings.attribution and model.bf16
        ids, bos = codec.encode(text), next(iter(codec.encode("")), None)
        context = min(model.context, limit or model.context)
        windows = cut(ids, min(settings.window, context), bos=bos, limit=settings.max_windows)
        if check:
            check(windows)
        length = max(1, min(settings.prompt_tokens, context // 2))
        count = min(settings.greedy_tokens, context - length + 1)  # the last chosen token need not be fed
        starts = prompts(ids, length, settings.greedy_prompts, bos=bos) if count else []
        key = digest(reference.path, model.facts(count), [*(window.tokens for window in windows), *starts])
        found = _stored(cache, key, windows, starts, with_floor=with_floor)
        if found is None:
            with cache.making(key) as (folder, content):
                content["greedy"] = model.run(windows, starts, count, folder, progress)
                stack.close()  # the noise floor needs the memory
                if with_floor:
                    _measure_floor(reference, windows, settings, folder, progress)
                reference.unchanged()
            found = _stored(cache, key, windows, starts, with_floor=with_floor)
        if found is None:
            raise OutputError(f"{cache.folder / key}: the entry just written cannot be read back; check the disk")
        return ReferenceRun(text, ids, codec, windows, *found, count, context, model.load_seconds)


class _Reference:
    """The reference with a session that is opened on first use and closed by `stack`."""

    def __init__(self, model: Candidate, settings: Settings, stack: ExitStack) -> None:
        self._model, self._settings, self._stack = model, settings, stack
        self._asked = settings.context if settings.context > DEFAULT_CONTEXT else None
        self.bf16 = model.options.get("dtype") == "bf16"
        self.load_seconds: float | None = None

    @cached_property
    def session(self) -> Session:
        start = time.perf_counter()
        session = self._stack.enter_context(self._model.open(self._settings.threads, self._asked))
        self.load_seconds = time.perf_counter() - start
        return session

    @cached_property
    def codec(self) -> TextCodec:
        return self._model.origin.codec() if self._model.origin else self.session.codec

    @property
    def context(self) -> int:
        origin = self._model.origin
        return choose_context(self._asked, origin.spec.context_length) if origin else self.session.context

    def facts(self, count: int) -> dict[str, object]:
        """What the output depends on besides weights and tokens; `count` is the length of continuations."""
        runtime, stop = self._model.runtime, sorted(self.codec.stop_tokens)
        facts = {"runtime": [runtime.NAME, runtime.version()], "options": dict(self._model.options)}
        return {**facts, "greedy": count, "stop": stop, "floor": self._settings.attribution, "form": FORM}

    def run(
        self, windows: Sequence[Window], starts: Sequence[NDArray[np.int64]], count: int, folder: Path, step: Progress
    ) -> list[dict[str, object]]:
        """Write the logits of all windows to `folder`; returns the continuations of `starts` as JSON values."""
        session, total = self.session, len(windows)

        def every() -> Iterator[NDArray[np.float32]]:
            for done, window in enumerate(windows):
                step("reference", done, total)
                yield from blocks(session, window, block_rows(session.vocab_size, self._settings.block_bytes))
            step("reference", total, total)

        scored = sum(window.scored for window in windows)
        write_logits(folder / LOGITS, scored, session.vocab_size, every(), bf16=self.bf16)
        found: list[dict[str, object]] = []
        for done, prompt in enumerate(starts):
            step("continue", done, len(starts))
            one = continue_greedily(session, prompt, count, self.codec.stop_tokens)
            found.append({"tokens": list(one.tokens), "margins": list(one.margins)})
        step("continue", len(starts), len(starts))
        return found


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


def _from_json(prompt: NDArray[np.int64], one: Mapping[str, Any], vocab_size: int) -> Continuation:
    tokens, margins = tuple(map(operator.index, one["tokens"])), tuple(map(float, one["margins"]))
    if len(tokens) != len(margins) or not all(0 <= token < vocab_size for token in tokens):
        raise ValueError(f"{len(tokens)} tokens with {len(margins)} margins")
    return Continuation(prompt, tokens, margins)


def _measure_floor(
    reference: Candidate, windows: Sequence[Window], settings: Settings, folder: Path, progress: Progress
) -> None:
    """Run the reference in float32, compare it with the logits in `folder`, and write the figures there."""
    total, store = Accumulator(), LogitStore(folder / LOGITS)
    with reference.open(settings.threads, len(windows[0].tokens), dtype="f32") as session:
        for own, [found] in predictions(store, windows, [session], settings, progress, "floor"):
            total.add(own, found)
    total.save(folder / FLOOR)


def predictions(
    store: LogitStore,
    windows: Sequence[Window],
    sessions: Sequence[Session],
    settings: Settings,
    progress: Progress,
    stage: str,
) -> Iterator[tuple[Predictions, Iterator[Predictions]]]:
    """For each block of scored positions the stored predictions and those of all `sessions`, made one by one."""
    rows, first = block_rows(store.vocab_size, settings.block_bytes), 0
    for done, window in enumerate(windows):
        progress(stage, done, len(windows))
        feeds, place = [blocks(session, window, rows) for session in sessions], 0
        for logits in store.blocks(first, window.scored, rows):
            following = window.following[place : place + len(logits)]
            yield read_predictions(logits, following), _each(feeds, following)
            place += len(logits)
        first += window.scored
    progress(stage, len(windows), len(windows))


def _each(feeds: Sequence[Iterator[NDArray[np.float32]]], following: NDArray[np.int64]) -> Iterator[Predictions]:
    return (read_predictions(next(feed), following) for feed in feeds)
