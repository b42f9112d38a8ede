"""Plays a checkpoint and its exported files on the same text and lays the figures side by side.

All models are open at once: the reference's logits of a block are computed once and every candidate is scored
against them at once, so that memory holds one block of the reference and one of a candidate whatever the length
of the text.  Peak memory is taken last, when the models are closed again, in a fresh process for each file.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from smolexport.errors import UsageError
from smolexport.parity import greedy, memory, speed
from smolexport.parity.results import (
    Accuracy,
    Candidate,
    CandidateResult,
    Comparison,
    Divergence,
    Greedy,
    ReferenceResult,
    Settings,
    Speed,
    TextFacts,
    Thresholds,
)
from smolexport.parity.statistics import Accumulator, read_predictions
from smolexport.parity.windows import Window, block_rows, blocks, cut, prompts
from smolexport.runtime import Session, TextCodec

__all__ = ["Progress", "compare"]

Progress = Callable[[str, int, int], None]
"""Called with the stage's name, the steps done and the steps in all."""

# what `Runtime.open` gives where no context is asked for, if the model has that much
_USUAL_CONTEXT = 4096


@dataclass(frozen=True)
class _Player:
    """A model with its open session."""

    model: Candidate
    session: Session
    load_seconds: float


@dataclass(frozen=True)
class _Sheet:
    """What the open sessions gave.  Lists are in the order of the candidates, `speeds` begins with the reference."""

    tokens: int
    context: int
    windows: Sequence[Window]
    accuracies: Sequence[Accuracy]
    agreements: Sequence[Greedy | None]
    speeds: Sequence[Speed | None]
    tokenizer_notes: Sequence[str]


def compare(
    reference: Candidate,
    candidates: Sequence[Candidate],
    *,
    text: str,
    settings: Settings | None = None,
    thresholds: Thresholds | None = None,
    progress: Progress | None = None,
) -> Comparison:
    """Hold `candidates` against `reference` on `text`.

    The ids are the reference's tokenizer's; a candidate whose own tokenizer disagrees gets a note and is scored
    on the reference's ids all the same.

    Args:
        reference: the checkpoint with the runtime that plays it.
        candidates: exported files of it with their runtimes.
        text: what is scored; prompts are cut from it too.
        settings: how much is measured.
        thresholds: what every candidate must reach.
        progress: told about each step.

    Raises:
        UsageError: no candidate, another vocabulary than the reference's, too short a text.
        SmolexportError: whatever a runtime raises while it opens or plays a file.
    """
    settings = settings or Settings()
    tick = progress or _silent
    if not candidates:
        raise UsageError("no file to compare with the checkpoint: name at least one")
    with ExitStack() as stack:
        players = _open_all(stack, reference, candidates, settings, tick)
        sheet = _play(players, text, settings, tick)
    # each peak is a file's alone: the models here are closed by now
    peaks = _peaks([player.model for player in players], sheet.context, settings, tick)
    return _assemble(players, sheet, peaks, settings, thresholds or Thresholds())


def _silent(stage: str, done: int, total: int) -> None:
    """Progress that nobody asked for."""


def _open_all(
    stack: ExitStack, reference: Candidate, candidates: Sequence[Candidate], settings: Settings, tick: Progress
) -> list[_Player]:
    """Open every model, the reference first, and see that all have the same vocabulary."""
    needed = max(
        settings.window,
        settings.prompt_tokens + max(settings.greedy_tokens, settings.decode_tokens if settings.repetitions else 0),
        settings.prefill_tokens if settings.repetitions else 0,
    )
    players: list[_Player] = []
    context = needed if needed > _USUAL_CONTEXT else None
    for done, model in enumerate([reference, *candidates]):
        tick("open", done, 1 + len(candidates))
        start = time.perf_counter()
        open_session: Callable[..., Session] = model.runtime.open
        session = stack.enter_context(
            open_session(model.path, threads=settings.threads, context=context, **model.options)
        )
        players.append(_Player(model, session, time.perf_counter() - start))
        expected = players[0].session
        if session.vocab_size != expected.vocab_size:
            raise UsageError(
                f"{model.path}: vocabulary of {session.vocab_size} words, {reference.path} has {expected.vocab_size}: "
                "compare a file with the checkpoint that it was exported from"
            )
        context = min(expected.context, needed)
    tick("open", len(players), len(players))
    return players


def _play(players: Sequence[_Player], text: str, settings: Settings, tick: Progress) -> _Sheet:
    """Take every figure that needs the sessions."""
    sessions = [player.session for player in players]
    codec, context = sessions[0].codec, min(session.context for session in sessions)
    ids = codec.encode(text)
    bos = _bos(codec)
    windows = cut(ids, min(settings.window, context), bos=bos, limit=settings.max_windows)
    accuracies = _score(sessions, windows, settings, tick)
    length = max(1, min(settings.prompt_tokens, context // 2))
    # the last chosen token need not be fed
    count = min(settings.greedy_tokens, context - length + 1)
    starts = prompts(ids, length, settings.greedy_prompts, bos=bos) if count else []
    return _Sheet(
        tokens=len(ids),
        context=context,
        windows=windows,
        accuracies=accuracies,
        agreements=_greedy(sessions, starts, count, tick),
        speeds=_speeds(sessions, ids, settings, tick),
        tokenizer_notes=[_tokenizer_note(session, text, ids) for session in sessions[1:]],
    )


def _score(
    sessions: Sequence[Session], windows: Sequence[Window], settings: Settings, tick: Progress
) -> list[Accuracy]:
    """Feed the windows to all sessions, block by block, the first one being the reference."""
    rows = block_rows(sessions[0].vocab_size, settings.block_bytes)
    accumulators = [Accumulator() for _ in sessions[1:]]
    for done, window in enumerate(windows):
        tick("score", done, len(windows))
        feeds = [blocks(session, window, rows) for session in sessions[1:]]
        place = 0
        for logits in blocks(sessions[0], window, rows):
            following = window.following[place : place + len(logits)]
            base = read_predictions(logits, following)
            for accumulator, feed in zip(accumulators, feeds, strict=True):
                accumulator.add(base, read_predictions(next(feed), following))
            place += len(logits)
            del base, logits  # before the reference computes its next block
    tick("score", len(windows), len(windows))
    return [accumulator.result() for accumulator in accumulators]


def _greedy(
    sessions: Sequence[Session], starts: Sequence[NDArray[np.int64]], count: int, tick: Progress
) -> list[Greedy | None]:
    """Greedy agreement of every candidate from the prompts `starts`; None without any."""
    found: list[list[Divergence]] = [[] for _ in sessions[1:]]
    for done, prompt in enumerate(starts):
        tick("greedy", done, len(starts))
        expected = greedy.continue_greedily(sessions[0], prompt, count, sessions[0].codec.stop_tokens)
        for one, session in zip(found, sessions[1:], strict=True):
            one.append(greedy.agree(session, expected))
    tick("greedy", len(starts), len(starts))
    return [Greedy(count, tuple(one)) if one else None for one in found]


def _speeds(sessions: Sequence[Session], ids: Sequence[int], settings: Settings, tick: Progress) -> list[Speed | None]:
    """Speed of every session; None where it is not asked for."""
    if settings.repetitions < 1:
        return [None] * len(sessions)
    total = settings.repetitions * len(sessions)
    steps = iter(range(1, total + 1))
    tick("speed", 0, total)
    return [
        *speed.measure(
            sessions, np.array(ids, dtype=np.int64), settings, advance=lambda: tick("speed", next(steps), total)
        )
    ]


def _peaks(
    models: Sequence[Candidate], context: int, settings: Settings, tick: Progress
) -> list[tuple[int | None, str]]:
    """Peak bytes of each model in a process of its own, or None and why."""
    if not settings.memory:
        return [(None, "")] * len(models)
    peaks = []
    for done, model in enumerate(models):
        tick("memory", done, len(models))
        peaks.append(memory.measure(model, threads=settings.threads, context=context))
    tick("memory", len(models), len(models))
    return peaks


def _bos(codec: TextCodec) -> int | None:
    """The token that the model wants at the start: what its tokenizer makes of nothing."""
    return next(iter(codec.encode("")), None)


def _tokenizer_note(session: Session, text: str, ids: Sequence[int]) -> str:
    """Empty where the session's own tokenizer gives `ids`, else what it gives first."""
    try:
        own = session.codec.encode(text)
    except Exception as error:
        # whatever a library's tokenizer raises, the figures over the reference's ids still hold
        return f"its own tokenizer fails on the text: {type(error).__name__}: {error}"
    pairs = enumerate(zip(ids, own, strict=False))
    place = next((index for index, (ours, theirs) in pairs if ours != theirs), min(len(ids), len(own)))
    if place == len(ids) == len(own):
        return ""
    theirs, ours = (str(side[place]) if place < len(side) else "the end" for side in (own, ids))
    return (
        f"its own tokenizer differs from token {place} on: {theirs} instead of {ours} "
        f"({len(own)} tokens instead of {len(ids)})"
    )


def _assemble(
    players: Sequence[_Player],
    sheet: _Sheet,
    peaks: Sequence[tuple[int | None, str]],
    settings: Settings,
    thresholds: Thresholds,
) -> Comparison:
    results = []
    for index, (player, accuracy) in enumerate(zip(players[1:], sheet.accuracies, strict=True)):
        peak, peak_note = peaks[index + 1]
        tokenizer_note = sheet.tokenizer_notes[index]
        results.append(
            CandidateResult(
                model=player.model,
                accuracy=accuracy,
                greedy=sheet.agreements[index],
                speed=sheet.speeds[index + 1],
                load_seconds=player.load_seconds,
                peak_rss_bytes=peak,
                tokenizer_equal=not tokenizer_note,
                notes=tuple(filter(None, (tokenizer_note, peak_note))),
                misses=thresholds.misses(accuracy),
            )
        )
    reference = ReferenceResult(
        model=players[0].model,
        perplexity=sheet.accuracies[0].reference,
        speed=sheet.speeds[0],
        load_seconds=players[0].load_seconds,
        peak_rss_bytes=peaks[0][0],
    )
    window = sheet.windows[0]
    facts = TextFacts(sheet.tokens, len(window.tokens), len(sheet.windows), window.scored)
    return Comparison(facts, thresholds, reference, tuple(results), _notes(facts, settings, sheet.context, peaks[0][1]))


def _notes(facts: TextFacts, settings: Settings, context: int, peak_note: str) -> tuple[str, ...]:
    """What a reader of the figures should know about how they were taken."""
    notes = [f"reference: {peak_note}"] if peak_note else []
    if facts.window < settings.window:
        cause = "the whole text" if facts.window == facts.tokens else f"the context of {context} tokens"
        notes.append(f"windows of {facts.window} tokens instead of {settings.window}: that is {cause}")
    if facts.windows * facts.scored < 100:
        notes.append(f"only {facts.windows * facts.scored} positions were scored: the far percentiles mean little")
    return tuple(notes)
