"""Scoring of candidates with the same weights: against the reference, against their decoded weights, and against each
other.

Memory holds one block of logits per candidate, one of the reference and one of the decoded weights.

`tensor_errors` compares the weights themselves.  Rounding to two bits leaves a relative error of about 0.5; a zero
matrix has 1, an unrelated matrix 1.4.  Norms and biases are floats of at least 16 bits in every format.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path

import numpy as np

from smolexport.errors import FileFormatError, UsageError
from smolexport.model import weights
from smolexport.model.spec import Tensor
from smolexport.model.weights import ReadableTensor, Weights
from smolexport.parity.chat import Expected, check, first_difference
from smolexport.parity.inputs import Candidate, Progress, Settings, no_progress
from smolexport.parity.metrics import Accumulator, Predictions
from smolexport.parity.reference import ReferenceRun, predictions
from smolexport.parity.results import Accuracy, Attribution, ChatCheck, Greedy, WeightError
from smolexport.parity.windows import agree
from smolexport.run.session import Session
from smolexport.text import failure

PIECE = 1 << 20  # elements
MATRIX, VECTOR = 0.9, 0.02  # largest relative errors that rounding explains


class ContextTooSmall(Exception):  # noqa: N818
    """A candidate's context is shorter than a window: windows must be cut to the number of tokens in `args`."""


@dataclass
class ScoredCandidate:
    """A candidate's figures; `pairs` holds the accuracy against later candidates of the group, by their index."""

    load_seconds: float
    accuracy: Accuracy = field(init=False)
    attribution: Attribution | None = None
    greedy: Greedy | None = None
    tokenizer_note: str = ""
    chat: tuple[ChatCheck, ...] = ()
    pairs: dict[int, Accuracy] = field(default_factory=dict)


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
    found, sessions = [], []
    with ExitStack() as stack:
        for model in models:
            start = time.perf_counter()
            sessions.append(stack.enter_context(model.open(settings.threads, min(run.context, settings.context))))
            found.append(ScoredCandidate(time.perf_counter() - start))
            _check_size(reference, run, model, sessions[-1], settings)
        decoded = stack.enter_context(_decoded(reference, run, models[0], mismatched, settings)) if attribute else None
        _score(run, found, sessions, decoded, settings, progress)
        for model, session, candidate in zip(models, sessions, found, strict=True):
            agreed = tuple(agree(session, one, run.codec) for one in run.continuations)
            candidate.greedy = Greedy(run.greedy_tokens, agreed) if agreed else None
            candidate.tokenizer_note = _tokenizer_note(run, session)
            if conversations:
                candidate.chat = check(conversations, model, session)
    return found


def _check_size(
    reference: Candidate, run: ReferenceRun, model: Candidate, session: Session, settings: Settings
) -> None:
    if session.vocab_size != run.store.vocab_size:
        raise UsageError(
            f"{model.path}: vocabulary of {session.vocab_size} tokens, {reference.path} has {run.store.vocab_size}: "
            "compare a file with the checkpoint that it was exported from"
        )
    if session.context < min(run.context, settings.context):
        raise ContextTooSmall(session.context)


def _decoded(
    reference: Candidate, run: ReferenceRun, model: Candidate, mismatched: Collection[str], settings: Settings
) -> Session:
    """The reference's runtime in float32 on the weights of `model`; the checkpoint's replace the `mismatched` ones."""
    if model.weights is None or reference.origin is None:
        raise UsageError(f"{model.path}: weights cannot be read back")
    stored = model.weights()
    if mismatched and reference.weights is not None:
        own = {tensor.key: values for tensor, values in reference.weights().items() if tensor.name in mismatched}
        stored = {tensor: own.get(tensor.key, values) for tensor, values in stored.items()}
    spec = reference.origin.spec
    decoded = weights.as_stored(spec, weights.read_back(stored, model.path, spec))
    return reference.open(settings.threads, len(run.windows[0].tokens), dtype="f32", weights=decoded)


def _score(
    run: ReferenceRun,
    candidates: Sequence[ScoredCandidate],
    sessions: Sequence[Session],
    decoded: Session | None,
    settings: Settings,
    progress: Progress,
) -> None:
    """Run every window through all sessions, block by block, and store the figures in `candidates`."""
    direct = [Accumulator() for _ in candidates]
    quantization, exporter = Accumulator(), [Accumulator() for _ in candidates]
    pairs = {pair: Accumulator() for pair in combinations(range(len(candidates)), 2)}
    every = [*([decoded] if decoded else []), *sessions]
    for own, others in predictions(run.store, run.windows, every, settings, progress, "score"):
        between = next(others) if decoded else None
        if between:
            quantization.add(own, between)
        kept: list[Predictions] = []
        for number, found in enumerate(others):
            direct[number].add(own, found)
            if between:
                exporter[number].add(between, found)
            for other, before in enumerate(kept):
                pairs[other, number].add(before, found)
            if pairs:  # one block at a time unless they are compared with each other
                kept.append(found)
    for number, candidate in enumerate(candidates):
        candidate.accuracy = direct[number].result()
        if decoded:
            candidate.attribution = Attribution(quantization.result(), exporter[number].result())
        candidate.pairs = {second: total.result() for (first, second), total in pairs.items() if first == number}


def _tokenizer_note(run: ReferenceRun, session: Session) -> str:
    """Empty if the session's own tokenizer gives the reference's tokens, else the first difference."""
    ids = run.ids
    try:
        own = session.codec.encode(run.text)
    except Exception as error:
        # a library's tokenizer may raise anything; the figures use the reference's ids and stay valid
        return f"tokenizer of the runtime fails on the text: {failure(error)}"
    place = first_difference(ids, own)
    if place == len(ids) == len(own):
        return ""
    theirs, ours = (str(side[place]) if place < len(side) else "the end" for side in (own, ids))
    return (
        f"tokenizer of the runtime differs from token {place} on: {theirs} instead of {ours} "
        f"({len(own)} tokens instead of {len(ids)})"
    )


def tensor_errors(original: Weights, stored: Weights, path: Path) -> tuple[WeightError, ...]:
    """The relative error of every tensor, in the order of the forward pass, read in pieces.

    Args:
        original: the checkpoint's weights.
        stored: the exported file's weights.
        path: the file, for messages.

    Raises:
        FileFormatError: a tensor is missing from the file or has another shape.
    """
    there = {tensor.key: tensor for tensor in stored}
    found = []
    for tensor in weights.canonical(original):
        other = there.get(tensor.key)
        if other is None or other.shape != tensor.shape:
            raise FileFormatError(f"{path}: tensor {tensor.name} is missing or has another shape than the checkpoint's")
        relative = _relative(original[tensor], stored[other], tensor)
        rounded = relative <= (MATRIX if tensor.is_matrix else VECTOR)  # NaN compares false
        found.append(WeightError(tensor.name, tensor.layer, tensor.size, relative, rounded))
    return tuple(found)


def _relative(a: ReadableTensor, b: ReadableTensor, tensor: Tensor) -> float:
    """Root of the summed squared differences over that of `a`; 0 if both are 0."""
    rows, step = tensor.rows, max(1, PIECE // tensor.columns)
    apart = whole = 0.0
    for start in range(0, rows, step):
        x = a.read_rows(start, min(start + step, rows)).astype(np.float64)
        apart += float(np.square(b.read_rows(start, min(start + step, rows)) - x).sum())
        whole += float(np.square(x).sum())
    return float(np.sqrt(apart / whole)) if whole else float(apart > 0)
