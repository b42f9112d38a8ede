"""The reference, played once or found in the cache: windows, logits, greedy continuations, noise floor.

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
from smolexport.parity.inputs import Candidate, Settings
from smolexport.parity.results import Accuracy
from smolexport.parity.statistics import Accumulator, read_predictions
from smolexport.parity.store import LOGITS, LogitStore, Recorder, Shelf, digest
from smolexport.parity.windows import Window, block_rows, blocks, cut, prompts
from smolexport.run.session import DEFAULT_CONTEXT, Session, TextCodec, choose_context

__all__ = ["Base", "Tick", "play", "reach", "reference_blocks"]

Tick = Callable[[str, int, int], None]
FLOOR = "floor.f64"
FORM = 2  # of entries; one of another form has another key


@dataclass(frozen=True)
class Base:
    """What the candidates are held against.

    Attributes:
        text: what is scored.
        ids: the whole text in the reference's tokens.
        codec: its tokenizer.
        windows: what is scored.
        store: the logits of all scored positions, window after window.
        continuations: of the prompts.
        greedy_tokens: most tokens of each.
        floor: float32 arithmetic against the reference's; None where it was not asked for, or is the same.
        context: most tokens that the reference holds.
        load_seconds: None where it did not have to be opened.
    """

    text: str
    ids: Sequence[int]
    codec: TextCodec
    windows: Sequence[Window]
    store: LogitStore
    continuations: Sequence[Continuation]
    greedy_tokens: int
    floor: Accuracy | None
    context: int
    load_seconds: float | None


def reach(settings: Settings) -> int:
    """Most tokens that a session has to hold for all that is measured."""
    single = max(settings.greedy_tokens, settings.decode_tokens if settings.repetitions else 0)
    return max(settings.window, settings.prompt_tokens + single, settings.prefill_tokens if settings.repetitions else 0)


def play(
    reference: Candidate,
    text: str,
    settings: Settings,
    shelf: Shelf,
    limit: int | None,
    tick: Tick,
    look: Callable[[Sequence[Window]], None] | None = None,
) -> Base:
    """Play the reference on `text`, or find what it gave before on `shelf`.

    Args:
        reference: the checkpoint with its runtime.
        text: what is scored.
        settings: how much.
        shelf: where its logits are kept.
        limit: context of the smallest candidate, where that is below what `settings` ask for.
        tick: told about each step.
        look: shown the windows before anything is played; may refuse them.
    """
    with ExitStack() as stack:
        player = _Player(reference, settings, stack)
        codec = player.codec
        ids = codec.encode(text)
        context, bos = min(player.context, limit or player.context), next(iter(codec.encode("")), None)
        windows = cut(ids, min(settings.window, context), bos=bos, limit=settings.max_windows)
        if look:
            look(windows)
        length = max(1, min(settings.prompt_tokens, context // 2))
        count = min(settings.greedy_tokens, context - length + 1)  # the last chosen token need not be fed
        starts = prompts(ids, length, settings.greedy_prompts, bos=bos) if count else []
        tokens = [*(w.tokens for w in windows), *starts]
        key = digest(reference.path, _facts(reference, count, codec.stop_tokens, settings), tokens)
        measured = settings.attribution and _is_bf16(reference)
        found = _stored(shelf, key, windows, starts, floor=measured)
        if found is None:
            facts: dict[str, Any] = {}
            with shelf.making(key, facts) as folder:
                _record(player.session, windows, settings, folder / LOGITS, tick, bf16=_is_bf16(reference))
                given = _continuations(player.session, starts, count, codec.stop_tokens, tick)
                facts["greedy"] = [_as_json(one) for one in given]
                player.close()
                if measured:
                    _measure_floor(reference, windows, settings, folder, tick)
                reference.unchanged()
            found = _stored(shelf, key, windows, starts, floor=measured)
        if found is None:
            raise OutputError(f"{shelf.path(key)}: what was just written there cannot be read back")
        store, continuations, floor = found
        return Base(text, ids, codec, windows, store, continuations, count, floor, context, player.load_seconds)


def _stored(
    shelf: Shelf, key: str, windows: Sequence[Window], starts: Sequence[NDArray[np.int64]], *, floor: bool
) -> tuple[LogitStore, list[Continuation], Accuracy | None] | None:
    """What the entry `key` holds; None where there is none, or a damaged one, which is removed."""
    found = shelf.find(key)
    if found is None:
        return None
    entry, facts = found
    try:
        store, rows = LogitStore(entry / LOGITS), sum(window.scored for window in windows)
        greedy = zip(starts, facts["greedy"], strict=True)
        continuations = [_from_json(start, one, store.vocab_size) for start, one in greedy]
        apart = Accumulator.load(entry / FLOOR).result() if floor else None
        if store.rows == rows and (apart is None or apart.positions == rows):
            return store, continuations, apart
    except (LookupError, TypeError, ValueError, OverflowError, FileFormatError):
        pass
    shelf.remove(key)
    return None


class _Player:
    """The reference's session, opened when something asks for it."""

    def __init__(self, reference: Candidate, settings: Settings, stack: ExitStack) -> None:
        self._reference, self._settings, self._stack = reference, settings, stack
        self._session: Session | None = None
        self.load_seconds: float | None = None

    @property
    def session(self) -> Session:
        if self._session is None:
            start = time.perf_counter()
            needed = reach(self._settings)
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
        return self.session.codec if origin is None else origin.codec()

    @property
    def context(self) -> int:
        origin, needed = self._reference.origin, reach(self._settings)
        if origin is None:
            return self.session.context
        return choose_context(needed if needed > DEFAULT_CONTEXT else None, origin.spec.context_length)

    def close(self) -> None:
        self._stack.close()
        self._session = None


def _is_bf16(reference: Candidate) -> bool:
    return reference.options.get("dtype") == "bf16"


def _facts(reference: Candidate, count: int, stop: frozenset[int], settings: Settings) -> dict[str, object]:
    """What the entry depends on besides weights and tokens."""
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
    session: Session, windows: Sequence[Window], settings: Settings, path: Path, tick: Tick, *, bf16: bool
) -> None:
    rows = block_rows(session.vocab_size, settings.block_bytes)
    with Recorder(path, sum(w.scored for w in windows), session.vocab_size, bf16=bf16) as recorder:
        for done, window in enumerate(windows):
            tick("reference", done, len(windows))
            for logits in blocks(session, window, rows):
                recorder.add(logits)
    tick("reference", len(windows), len(windows))


def _continuations(
    session: Session, starts: Sequence[NDArray[np.int64]], count: int, stop: frozenset[int], tick: Tick
) -> Iterator[Continuation]:
    for done, prompt in enumerate(starts):
        tick("continue", done, len(starts))
        yield continue_greedily(session, prompt, count, stop)
    tick("continue", len(starts), len(starts))


def _as_json(one: Continuation) -> dict[str, list[float]]:
    return {"tokens": list(one.tokens), "margins": list(one.margins)}


def _from_json(prompt: NDArray[np.int64], one: Mapping[str, Any], vocab_size: int) -> Continuation:
    tokens, margins = tuple(map(operator.index, one["tokens"])), tuple(map(float, one["margins"]))
    if len(tokens) != len(margins) or not all(0 <= token < vocab_size for token in tokens):
        raise ValueError(f"{len(tokens)} tokens with {len(margins)} margins")
    return Continuation(prompt, tokens, margins)


def _measure_floor(
    reference: Candidate, windows: Sequence[Window], settings: Settings, folder: Path, tick: Tick
) -> None:
    """Play the reference in float32 against what is in `folder`, and leave the figures there."""
    open_session: Callable[..., Session] = reference.runtime.open
    options = {**reference.options, "dtype": "f32"}
    total = Accumulator()
    with open_session(reference.path, threads=settings.threads, context=len(windows[0].tokens), **options) as session:
        for done, (window, parts) in enumerate(
            reference_blocks(LogitStore(folder / LOGITS), windows, settings.block_bytes)
        ):
            tick("floor", done, len(windows))
            feed = blocks(session, window, block_rows(session.vocab_size, settings.block_bytes))
            for logits, following in parts:
                total.add(read_predictions(logits, following), read_predictions(next(feed), following))
    tick("floor", len(windows), len(windows))
    total.save(folder / FLOOR)


def reference_blocks(
    store: LogitStore, windows: Sequence[Window], block_bytes: int
) -> Iterator[tuple[Window, Iterator[tuple[NDArray[np.float32], NDArray[np.int64]]]]]:
    """Each window with the stored logits [.., v] of its scored positions and their true next tokens, block by block.

    The blocks are cut as `windows.blocks` cuts a session's.
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
