"""What comes out of a comparison, as plain frozen data.

Units: nats per token, tokens per second, milliseconds, seconds, bytes; shares are 0 to 1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from smolexport.parity.gate import Thresholds
from smolexport.parity.inputs import Candidate

if TYPE_CHECKING:
    from smolexport.parity.chat import ChatCheck

__all__ = [
    "NEAR_TIE",
    "Accuracy",
    "Attribution",
    "CandidateResult",
    "Comparison",
    "Divergence",
    "Estimate",
    "Greedy",
    "Pair",
    "ReferenceResult",
    "Speed",
    "Spread",
    "TensorError",
    "TextFacts",
    "Thresholds",
]

NEAR_TIE = 0.1
"""Margin, in nats, below which a divergence tells nothing: the second token is nine tenths as likely as the first."""


@dataclass(frozen=True)
class Estimate:
    """A value with its standard error, NaN where there is only one observation."""

    value: float
    error: float


@dataclass(frozen=True)
class Spread:
    """Distribution of a per-position figure; percentiles interpolate linearly at p (n - 1)."""

    mean: Estimate
    median: float
    p90: float
    p95: float
    p99: float
    p999: float
    maximum: float


@dataclass(frozen=True)
class Accuracy:
    """Figures of one candidate against the reference over all scored positions; see `statistics`.

    Attributes:
        positions: scored predictions.
        kld: divergence per position, nats per token.
        top1: share of positions with the same likeliest word.
        top5: mean share of the reference's five likeliest words among the candidate's five.
        reference: perplexity of the reference.
        candidate: perplexity of the candidate.
        ln_ratio: ln(candidate / reference), its error with the covariance of the two.
        ratio: candidate / reference.
        delta_p: mean change of the true token's probability.
        delta_p_rms: root mean square of that change.
        divergences: [positions] float64, kept for distributions.
        same_top: [positions] bool, whether both have the same likeliest word.
    """

    positions: int
    kld: Spread
    top1: Estimate
    top5: float
    reference: Estimate
    candidate: Estimate
    ln_ratio: Estimate
    ratio: Estimate
    delta_p: Estimate
    delta_p_rms: Estimate
    divergences: NDArray[np.float64] = field(repr=False, compare=False)
    same_top: NDArray[np.bool_] = field(repr=False, compare=False)


@dataclass(frozen=True)
class Attribution:
    """A candidate's deviation in two parts, by way of the reference's runtime in float32 on the file's decoded weights.

    A wrong rope, a lost bias or a wrong norm shows in `exporter` even where 4 bits make `quantization` large.  So does
    a tensor that no rounding makes of the checkpoint's: the checkpoint's own takes its place among the decoded weights.

    Attributes:
        quantization: decoded weights against the reference: what rounding the weights did.
        exporter: the file on its own runtime against its decoded weights: what graph, metadata and runtime do.
    """

    quantization: Accuracy
    exporter: Accuracy


@dataclass(frozen=True)
class TensorError:
    """How far a file's decoded tensor is from the checkpoint's.

    Attributes:
        source: the tensor's name in the checkpoint.
        layer: number of its layer, None outside of them.
        weights: number of elements.
        relative: root of the summed squared differences over that of the weights; 0 is equal.
        rounded: whether rounding to few bits can have made it; else another tensor stands in its place.
    """

    source: str
    layer: int | None
    weights: int
    relative: float
    rounded: bool = True


@dataclass(frozen=True)
class Divergence:
    """One prompt's greedy continuation.

    Attributes:
        tokens: length of the reference's continuation (it ends early on a stop token).
        position: index of the first token that differs, None where none does.
        margin: gap between the reference's two largest logits there; near 0 is a tie, not damage.
        reference_token: what the reference chose there.
        candidate_token: what the candidate chose there.
        before: the text up to there, its end alone where it is long.
        reference_text: what the reference chose, as text.
        candidate_text: what the candidate chose.
    """

    tokens: int
    position: int | None = None
    margin: float | None = None
    reference_token: int | None = None
    candidate_token: int | None = None
    before: str = ""
    reference_text: str = ""
    candidate_text: str = ""


@dataclass(frozen=True)
class Greedy:
    """Greedy continuations of all prompts."""

    tokens: int
    prompts: tuple[Divergence, ...]

    @property
    def first(self) -> Divergence | None:
        """The earliest divergence of all prompts, None where no prompt diverges."""
        apart = [prompt for prompt in self.prompts if prompt.position is not None]
        return min(apart, key=lambda prompt: prompt.position or 0, default=None)

    @property
    def near_ties(self) -> int:
        """Number of prompts that diverge where the reference itself all but chose otherwise."""
        return sum(prompt.margin is not None and prompt.margin < NEAR_TIE for prompt in self.prompts)

    @property
    def mean_agreed(self) -> float:
        """Mean number of leading tokens in common; a continuation that never diverges counts in full."""
        agreed = [prompt.tokens if prompt.position is None else prompt.position for prompt in self.prompts]
        return sum(agreed) / len(agreed)

    @property
    def never(self) -> float:
        """Share of prompts that never diverge."""
        return sum(prompt.position is None for prompt in self.prompts) / len(self.prompts)


@dataclass(frozen=True)
class Speed:
    """Rates over `repetitions` rounds: mean and standard error.

    Attributes:
        ttft_ms: from handing over a prompt of `prompt_tokens` to the first chosen token.
        prefill_tok_s: tokens per second in a block of `prefill_tokens` on an empty context.
        decode_tok_s: tokens per second over `decode_tokens` single steps after the prompt.
    """

    ttft_ms: Estimate
    prefill_tok_s: Estimate
    decode_tok_s: Estimate
    prompt_tokens: int
    prefill_tokens: int
    decode_tokens: int
    repetitions: int


@dataclass(frozen=True)
class TextFacts:
    """What was scored: tokens of the whole text, window length, windows, scored positions of each."""

    tokens: int
    window: int
    windows: int
    scored: int


@dataclass(frozen=True)
class ReferenceResult:
    """The reference's own figures.  The first load of a runtime includes importing its library.

    `floor` is the same weights in float32 against the reference: what its own arithmetic does, below which no figure
    of a file means anything.  None where the reference is float32, or it was not asked for.
    """

    model: Candidate
    perplexity: Estimate
    speed: Speed | None
    load_seconds: float | None
    peak_rss_bytes: int | None
    floor: Accuracy | None = None
    bandwidth_share: float | None = None


@dataclass(frozen=True)
class CandidateResult:
    """One file's figures, and in `misses` what it was asked for and did not reach.

    Attributes:
        fingerprint: of the decoded weights; equal for files that hold the same ones.
        attribution: the deviation in two parts, None where it was not asked for.
        tensor_errors: in the order of the forward pass; empty likewise.
        bandwidth_share: decode rate over what reading all weights once per token allows at this machine's memory
            bandwidth; None without speed.
        chat: texts and conversations against the checkpoint's; empty where it was not asked for.
    """

    model: Candidate
    accuracy: Accuracy
    greedy: Greedy | None
    speed: Speed | None
    load_seconds: float
    peak_rss_bytes: int | None
    tokenizer_equal: bool
    notes: tuple[str, ...]
    misses: tuple[str, ...]
    fingerprint: str = ""
    attribution: Attribution | None = None
    tensor_errors: tuple[TensorError, ...] = ()
    bandwidth_share: float | None = None
    chat: tuple[ChatCheck, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether every threshold was reached."""
        return not self.misses


@dataclass(frozen=True)
class Pair:
    """Two candidates that hold the same weights, by their places in `Comparison.candidates`: their runtimes' part."""

    first: int
    second: int
    accuracy: Accuracy


@dataclass(frozen=True)
class Comparison:
    """The whole sheet.

    Attributes:
        text: what was scored.
        thresholds: what was asked for, of each candidate through `thresholds_for`.
        reference: the checkpoint's own figures.
        candidates: a file each, or a file on a runtime.
        notes: what a reader of the figures should know.
        pairs: candidates of one fingerprint against each other.
        environment: what the figures were taken on: system, processor, cores, threads, versions of the libraries.
        bandwidth: bytes per second that the threads read from memory; None without speed.
    """

    text: TextFacts
    thresholds: Thresholds
    reference: ReferenceResult
    candidates: Sequence[CandidateResult]
    notes: tuple[str, ...]
    pairs: tuple[Pair, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    bandwidth: float | None = None

    @property
    def passed(self) -> bool:
        """Whether every candidate passed."""
        return all(candidate.passed for candidate in self.candidates)
