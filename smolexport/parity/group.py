"""Candidates that hold the same weights, scored together: against the reference, against what their weights alone would
give, and against each other.

Memory holds one block of logits of each of them, of the reference and of the decoded weights.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import combinations

from smolexport import weights
from smolexport.errors import UsageError
from smolexport.parity import greedy
from smolexport.parity.base import Base, Tick, reach, reference_blocks
from smolexport.parity.chat import ChatCheck, Expected, check
from smolexport.parity.inputs import Candidate, Settings
from smolexport.parity.results import Accuracy, Attribution, Divergence, Greedy
from smolexport.parity.statistics import Accumulator, Predictions, read_predictions
from smolexport.parity.tensors import own_tensors
from smolexport.parity.windows import block_rows, blocks
from smolexport.runtime import Session
from smolexport.text import reason

__all__ = ["Member", "TooSmall", "decoded_bytes", "play_group"]


class TooSmall(Exception):  # noqa: N818
    """A candidate holds fewer tokens than a window has: everything has to be cut to `context`."""

    def __init__(self, context: int) -> None:
        super().__init__(context)
        self.context = context


@dataclass
class Member:
    """A candidate of a group, and what playing it gave."""

    model: Candidate
    load_seconds: float = 0.0
    accuracy: Accuracy = field(init=False)
    attribution: Attribution | None = None
    greedy: Greedy | None = None
    tokenizer_note: str = ""
    chat: tuple[ChatCheck, ...] = ()
    pairs: dict[int, Accuracy] = field(default_factory=dict)  # by the other's place in the group, which is later


def decoded_bytes(reference: Candidate) -> int:
    """Memory that playing decoded weights takes; 0 where that is not possible."""
    if reference.origin is None:
        return 0
    return sum(4 * tensor.size for tensor in reference.origin.spec.tensors())


def play_group(
    reference: Candidate,
    base: Base,
    models: Sequence[Candidate],
    settings: Settings,
    tick: Tick,
    *,
    attribute: bool = False,
    foreign: Collection[str] = (),
    conversations: Expected | None = None,
) -> list[Member]:
    """Play `models`, all of the same weights, on the reference's windows and prompts.

    Args:
        reference: the checkpoint.
        base: what it gave.
        models: the candidates.
        settings: how much.
        tick: told about each window.
        attribute: also play their decoded weights on the reference's runtime, in float32.
        foreign: tensors that rounding does not explain, by the checkpoint's names; its own are played instead.
        conversations: what the checkpoint makes of hard texts and of its chat template; None leaves that out.

    Raises:
        TooSmall: one of them holds fewer tokens than a window.
        UsageError: another vocabulary than the reference's.
    """
    members = [Member(model) for model in models]
    with ExitStack() as stack:
        sessions = [_open(stack, reference, base, member, settings) for member in members]
        decoded = stack.enter_context(_decoded(reference, base, models[0], foreign, settings)) if attribute else None
        _score(base, members, sessions, decoded, settings, tick)
        for member, session in zip(members, sessions, strict=True):
            member.greedy = _agreement(base, session)
            member.tokenizer_note = _tokenizer_note(base, session)
            if conversations:
                member.chat = check(conversations, member.model, session)
    return members


def _open(stack: ExitStack, reference: Candidate, base: Base, member: Member, settings: Settings) -> Session:
    start = time.perf_counter()
    model = member.model
    open_session: Callable[..., Session] = model.runtime.open
    context = min(base.context, reach(settings))
    session = stack.enter_context(open_session(model.path, threads=settings.threads, context=context, **model.options))
    member.load_seconds = time.perf_counter() - start
    if session.vocab_size != base.store.vocab_size:
        raise UsageError(
            f"{model.path}: vocabulary of {session.vocab_size} words, {reference.path} has {base.store.vocab_size}: "
            "compare a file with the checkpoint that it was exported from"
        )
    if session.context < context:
        raise TooSmall(session.context)
    return session


def _decoded(
    reference: Candidate, base: Base, model: Candidate, foreign: Collection[str], settings: Settings
) -> Session:
    """The reference's runtime in float32 on the weights that `model` holds, but for those that are `foreign`."""
    if model.weights is None or reference.origin is None:
        raise UsageError(f"{model.path}: its weights cannot be read back")
    stored = model.weights()
    if foreign and reference.weights is not None:
        stored = own_tensors(reference.weights(), stored, foreign)
    pairs = weights.read_back(stored, model.path, reference.origin.spec)
    open_session: Callable[..., Session] = reference.runtime.open
    options = {**reference.options, "dtype": "f32", "weights": weights.as_stored(reference.origin.spec, pairs)}
    return open_session(reference.path, threads=settings.threads, context=len(base.windows[0].tokens), **options)


def _score(
    base: Base, members: Sequence[Member], sessions: Sequence[Session], decoded: Session | None, settings: Settings,
    tick: Tick,
) -> None:  # fmt: skip
    """Feed every window to all sessions, block by block."""
    totals = _Totals(len(members))
    rows = block_rows(base.store.vocab_size, settings.block_bytes)
    windows = base.windows
    for done, (window, parts) in enumerate(reference_blocks(base.store, windows, settings.block_bytes)):
        tick("score", done, len(windows))
        feeds = [blocks(session, window, rows) for session in sessions]
        middle = blocks(decoded, window, rows) if decoded else None
        for logits, following in parts:
            mine = read_predictions(logits, following)
            between = read_predictions(next(middle), following) if middle else None
            totals.add(mine, between, (read_predictions(next(feed), following) for feed in feeds))
    tick("score", len(windows), len(windows))
    for number, member in enumerate(members):
        totals.fill(number, member)


class _Totals:
    """Sums over blocks, of a group of `count` members."""

    def __init__(self, count: int) -> None:
        self._direct = [Accumulator() for _ in range(count)]
        self._exporter = [Accumulator() for _ in range(count)]
        self._quantization = Accumulator()
        self._pairs: Mapping[tuple[int, int], Accumulator] = {
            pair: Accumulator() for pair in combinations(range(count), 2)
        }
        self._attributed = False

    def add(self, reference: Predictions, decoded: Predictions | None, members: Iterator[Predictions]) -> None:
        """Take a block.  Members are made one after another, and kept only where there is a pair to compare."""
        if decoded:
            self._attributed = True
            self._quantization.add(reference, decoded)
        kept: list[Predictions] = []
        for number, found in enumerate(members):
            self._direct[number].add(reference, found)
            if decoded:
                self._exporter[number].add(decoded, found)
            for other, before in enumerate(kept):
                self._pairs[other, number].add(before, found)
            if self._pairs:
                kept.append(found)

    def fill(self, number: int, member: Member) -> None:
        """Leave the figures in the member."""
        member.accuracy = self._direct[number].result()
        if self._attributed:
            member.attribution = Attribution(self._quantization.result(), self._exporter[number].result())
        member.pairs = {second: total.result() for (first, second), total in self._pairs.items() if first == number}


def _agreement(base: Base, session: Session) -> Greedy | None:
    """Greedy agreement from all prompts; None without any."""
    found: list[Divergence] = [greedy.agree(session, one, base.codec) for one in base.continuations]
    return Greedy(base.greedy_tokens, tuple(found)) if found else None


def _tokenizer_note(base: Base, session: Session) -> str:
    """Empty where the session's own tokenizer gives the reference's tokens, else what it gives first."""
    ids = base.ids
    try:
        own = session.codec.encode(base.text)
    except Exception as error:
        # whatever a library's tokenizer raises, the figures over the reference's ids still hold
        return f"its own tokenizer fails on the text: {type(error).__name__}: {reason(error)}"
    pairs = enumerate(zip(ids, own, strict=False))
    place = next((index for index, (ours, theirs) in pairs if ours != theirs), min(len(ids), len(own)))
    if place == len(ids) == len(own):
        return ""
    theirs, ours = (str(side[place]) if place < len(side) else "the end" for side in (own, ids))
    return (
        f"its own tokenizer differs from token {place} on: {theirs} instead of {ours} "
        f"({len(own)} tokens instead of {len(ids)})"
    )
