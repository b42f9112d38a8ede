"""Scoring of candidates with the same weights: against the reference, against their decoded weights, and against each
other.

Memory holds one block of logits per candidate, one of the reference and one of the decoded weights.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import combinations

from smolexport.errors import UsageError
from smolexport.model import weights
from smolexport.parity import greedy
from smolexport.parity.chat import Expected, check
from smolexport.parity.inputs import Candidate, Progress, Settings, no_progress
from smolexport.parity.metrics import Accumulator, Predictions, read_predictions
from smolexport.parity.reference import ReferenceRun, reference_blocks, required_context
from smolexport.parity.results import Accuracy, Attribution, ChatCheck, Greedy
from smolexport.parity.weight_errors import with_original_tensors
from smolexport.parity.windows import block_rows, blocks
from smolexport.run.session import Session
from smolexport.text import reason


class ContextTooSmall(Exception):  # noqa: N818
    """A candidate's context is shorter than a window: windows must be cut to `context` tokens."""

    def __init__(self, context: int) -> None:
        super().__init__(context)
        self.context = context


@dataclass
class ScoredCandidate:
    """A candidate and its figures; `pairs` holds the accuracy against later candidates of the group, by their index."""

    model: Candidate
    load_seconds: float = 0.0
    accuracy: Accuracy = field(init=False)
    attribution: Attribution | None = None
    greedy: Greedy | None = None
    tokenizer_note: str = ""
    chat: tuple[ChatCheck, ...] = ()
    pairs: dict[int, Accuracy] = field(default_factory=dict)


def decoded_bytes(reference: Candidate) -> int:
    """Memory for running decoded weights in float32; 0 if that is not possible."""
    if reference.origin is None:
        return 0
    return sum(4 * tensor.size for tensor in reference.origin.spec.tensors())


def score_group(
    reference: Candidate,
    run: ReferenceRun,
    models: Sequence[Candidate],
    settings: Settings,
    progress: Progress = no_progress,
    *,
    attribute: bool = False,
    mismatched: Collection[str] = (),
    conversations: Expected | None = None,
) -> list[ScoredCandidate]:
    """Run `models`, all with the same weights, on the reference's windows and prompts.

    Args:
        reference: the checkpoint.
        run: its output.
        models: the candidates.
        settings: what to measure.
        progress: called at each window.
        attribute: also run their decoded weights on the reference's runtime, in float32.
        mismatched: checkpoint names of tensors whose error rounding does not explain; among the decoded weights, the
            checkpoint's tensors replace them.
        conversations: the checkpoint's answers on texts and its chat template; None skips these checks.

    Raises:
        ContextTooSmall: the context of a candidate is shorter than a window.
        UsageError: the vocabulary differs from the reference's.
    """
    candidates = [ScoredCandidate(model) for model in models]
    with ExitStack() as stack:
        sessions = [_open(stack, reference, run, candidate, settings) for candidate in candidates]
        decoded = stack.enter_context(_decoded(reference, run, models[0], mismatched, settings)) if attribute else None
        _score(run, candidates, sessions, decoded, settings, progress)
        for candidate, session in zip(candidates, sessions, strict=True):
            candidate.greedy = _agreement(run, session)
            candidate.tokenizer_note = _tokenizer_note(run, session)
            if conversations:
                candidate.chat = check(conversations, candidate.model, session)
    return candidates


def _open(
    stack: ExitStack, reference: Candidate, run: ReferenceRun, candidate: ScoredCandidate, settings: Settings
) -> Session:
    start = time.perf_counter()
    model = candidate.model
    open_session: Callable[..., Session] = model.runtime.open
    context = min(run.context, required_context(settings))
    session = stack.enter_context(open_session(model.path, threads=settings.threads, context=context, **model.options))
    candidate.load_seconds = time.perf_counter() - start
    if session.vocab_size != run.store.vocab_size:
        raise UsageError(
            f"{model.path}: vocabulary of {session.vocab_size} tokens, {reference.path} has {run.store.vocab_size}: "
            "compare a file with the checkpoint that it was exported from"
        )
    if session.context < context:
        raise ContextTooSmall(session.context)
    return session


def _decoded(
    reference: Candidate, run: ReferenceRun, model: Candidate, mismatched: Collection[str], settings: Settings
) -> Session:
    """The reference's runtime in float32 on the weights of `model`, except those that are `mismatched`."""
    if model.weights is None or reference.origin is None:
        raise UsageError(f"{model.path}: weights cannot be read back")
    stored = model.weights()
    if mismatched and reference.weights is not None:
        stored = with_original_tensors(reference.weights(), stored, mismatched)
    pairs = weights.read_back(stored, model.path, reference.origin.spec)
    open_session: Callable[..., Session] = reference.runtime.open
    options = {**reference.options, "dtype": "f32", "weights": weights.as_stored(reference.origin.spec, pairs)}
    return open_session(reference.path, threads=settings.threads, context=len(run.windows[0].tokens), **options)


def _score(
    run: ReferenceRun,
    candidates: Sequence[ScoredCandidate],
    sessions: Sequence[Session],
    decoded: Session | None,
    settings: Settings,
    progress: Progress,
) -> None:
    """Run every window through all sessions, block by block."""
    totals = _Totals(len(candidates))
    rows = block_rows(run.store.vocab_size, settings.block_bytes)
    windows = run.windows
    for done, (window, parts) in enumerate(reference_blocks(run.store, windows, settings.block_bytes)):
        progress("score", done, len(windows))
        feeds = [blocks(session, window, rows) for session in sessions]
        middle = blocks(decoded, window, rows) if decoded else None
        for logits, following in parts:
            mine = read_predictions(logits, following)
            between = read_predictions(next(middle), following) if middle else None
            totals.add(mine, between, (read_predictions(next(feed), following) for feed in feeds))
    progress("score", len(windows), len(windows))
    for number, candidate in enumerate(candidates):
        totals.fill(number, candidate)


class _Totals:
    """Accumulators of a group of `count` candidates."""

    def __init__(self, count: int) -> None:
        self._direct = [Accumulator() for _ in range(count)]
        self._exporter = [Accumulator() for _ in range(count)]
        self._quantization = Accumulator()
        self._pairs: Mapping[tuple[int, int], Accumulator] = {
            pair: Accumulator() for pair in combinations(range(count), 2)
        }
        self._attributed = False

    def add(self, reference: Predictions, decoded: Predictions | None, candidates: Iterator[Predictions]) -> None:
        """Add a block.  Candidates' predictions are made one by one, and kept only if there are pairs to compare."""
        if decoded:
            self._attributed = True
            self._quantization.add(reference, decoded)
        kept: list[Predictions] = []
        for number, found in enumerate(candidates):
            self._direct[number].add(reference, found)
            if decoded:
                self._exporter[number].add(decoded, found)
            for other, before in enumerate(kept):
                self._pairs[other, number].add(before, found)
            if self._pairs:
                kept.append(found)

    def fill(self, number: int, candidate: ScoredCandidate) -> None:
        """Store the figures in `candidate`."""
        candidate.accuracy = self._direct[number].result()
        if self._attributed:
            candidate.attribution = Attribution(self._quantization.result(), self._exporter[number].result())
        candidate.pairs = {second: total.result() for (first, second), total in self._pairs.items() if first == number}


def _agreement(run: ReferenceRun, session: Session) -> Greedy | None:
    """Greedy agreement on all prompts; None without prompts."""
    found = [greedy.agree(session, one, run.codec) for one in run.continuations]
    return Greedy(run.greedy_tokens, tuple(found)) if found else None


def _tokenizer_note(run: ReferenceRun, session: Session) -> str:
    """Empty if the session's own tokenizer gives the reference's tokens, else the first difference."""
    ids = run.ids
    try:
        own = session.codec.encode(run.text)
    except Exception as error:
        # a library's tokenizer may raise anything; the figures use the reference's ids and stay valid
        return f"tokenizer of the runtime fails on the text: {type(error).__name__}: {reason(error)}"
    pairs = enumerate(zip(ids, own, strict=False))
    place = next((index for index, (ours, theirs) in pairs if ours != theirs), min(len(ids), len(own)))
    if place == len(ids) == len(own):
        return ""
    theirs, ours = (str(side[place]) if place < len(side) else "the end" for side in (own, ids))
    return (
        f"tokenizer of the runtime differs from token {place} on: {theirs} instead of {ours} "
        f"({len(own)} tokens instead of {len(ids)})"
    )
