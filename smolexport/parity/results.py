"""What a comparison measured, as plain frozen data.

These classes are also the JSON: `report.schema` turns them into JSON values and generates the JSON Schema from their
type hints and docstrings.  Fields and properties are members of the JSON object, except fields marked `HIDDEN`;
fields marked `INLINE` add their members to the object around them.

Units: nats per token, tokens per second, milliseconds, seconds, bytes; shares are 0 to 1.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from numpy.typing import NDArray

from smolexport.parity.thresholds import Thresholds

INLINE: Mapping[str, bool] = {"inline": True}
HIDDEN: Mapping[str, bool] = {"hidden": True}

Count = Annotated[int, ("minimum", 0)]
NonNegative = Annotated[float, ("minimum", 0)]
Share = Annotated[float, ("minimum", 0), ("maximum", 1)]

NEAR_TIE = 0.1
"""Margin, in nats, below which a divergence is a near tie: the second token is nine tenths as likely as the first."""

PLAIN = "rtn"
"""Method of files that name none: plain rounding to nearest."""

KLD_EDGES: tuple[float, ...] = tuple(float(f"{10 ** (exponent / 4):.4g}") for exponent in range(-36, 9))
"""Bin edges of the histograms, nats per token, four bins a decade: from the difference between two float32 runtimes to
a completely wrong prediction."""


@dataclass(frozen=True)
class Estimate:
    """A value with its standard error, NaN if there is only one observation.  A member `x` of a JSON object becomes
    `x` and `x_error`."""

    value: float
    error: float


@dataclass(frozen=True)
class Spread:
    """Distribution of the KL divergence per position, nats per token; a value slightly below zero is possible.
    Percentiles interpolate linearly at p (n - 1)."""

    mean: Estimate
    median: float
    p90: float
    p95: float
    p99: float
    p99_9: float
    max: float


@dataclass(frozen=True)
class DeltaP:
    """Change of the true token's probability."""

    mean: Estimate
    rms: Annotated[Estimate, ("minimum", 0)]


@dataclass(frozen=True)
class Histogram:
    """Number of positions per range of divergence.

    Attributes:
        below: positions below the first edge.
        counts: counts[i] positions lie from kld_edges[i] up to, not including, kld_edges[i + 1].
        above: positions at or above the last edge.
        not_finite: positions where a damaged file gave NaN or infinity.
    """

    below: Count
    counts: tuple[Count, ...]
    above: Count
    not_finite: Count


@dataclass(frozen=True)
class ByPosition:
    """Means over runs of neighbouring positions, over all windows.

    Attributes:
        tokens_before: number of the window's tokens before the first position of each run.
        kld: mean divergence of each run.
        top1_agreement: share of each run's positions with the same most likely token.
    """

    tokens_before: tuple[Count, ...]
    kld: tuple[float, ...]
    top1_agreement: tuple[Share, ...]


@dataclass(frozen=True)
class Accuracy:
    """One side against the other over all scored positions; `metrics` defines the figures.

    Attributes:
        positions: number of scored predictions.
        kld: divergence per position, nats per token.
        top1_agreement: share of positions with the same most likely token.
        top5_overlap: mean share of the reference's five most likely tokens that are among the candidate's five.
        reference_perplexity: perplexity of the reference.
        perplexity: perplexity of the candidate.
        perplexity_ratio: perplexity / reference_perplexity.
        ln_perplexity_ratio: its logarithm; the error accounts for the covariance of the two.
        delta_p: change of the true token's probability.
        kld_histogram: the positions by divergence.
        divergences: [positions] float64.
        same_top: [positions] bool, whether both have the same most likely token.
    """

    positions: Count
    kld: Spread
    top1_agreement: Annotated[Estimate, ("minimum", 0), ("maximum", 1)]
    top5_overlap: Share
    reference_perplexity: Annotated[Estimate, ("minimum", 0)]
    perplexity: Annotated[Estimate, ("minimum", 0)]
    perplexity_ratio: Annotated[Estimate, ("minimum", 0)]
    ln_perplexity_ratio: Estimate
    delta_p: DeltaP
    kld_histogram: Histogram
    divergences: NDArray[np.float64] = field(repr=False, compare=False, metadata=HIDDEN)
    same_top: NDArray[np.bool_] = field(repr=False, compare=False, metadata=HIDDEN)


@dataclass(frozen=True)
class Attribution:
    """A candidate's deviation split into quantization error and exporter or runtime error.

    The split runs the file's decoded weights on the reference's runtime in float32.  A wrong rope, a lost bias or a
    wrong norm shows in `exporter` even where 4 bits make `quantization` large.  So does a tensor that is not a rounded
    copy of the checkpoint's: the checkpoint's own tensor replaces it among the decoded weights.

    Attributes:
        quantization: the decoded weights against the reference: the effect of rounding the weights.
        exporter: the file on its own runtime against its decoded weights: the effect of graph, metadata and runtime.
    """

    quantization: Accuracy
    exporter: Accuracy


@dataclass(frozen=True)
class WeightError:
    """Deviation of one decoded tensor from the checkpoint's.

    Attributes:
        source: the tensor's name in the checkpoint.
        layer: its layer; null outside the layers.
        weights: number of elements.
        relative: root of the summed squared differences over that of the weights; 0 is equal.
        rounded: whether rounding can explain the error; if not, the file holds a different tensor.
    """

    source: str
    layer: Count | None
    weights: Count
    relative: NonNegative
    rounded: bool = True


@dataclass(frozen=True)
class CalibrationEffect:
    """Squared error of a matrix's outputs on the calibration text, relative to the outputs.

    Attributes:
        source: the tensor's name in the checkpoint.
        layer: its layer; null outside the layers.
        kind: last part of its name, e.g. q_proj.
        before: error of rounding to nearest on the same scales.
        after: error of the file's method.
    """

    source: str
    layer: int | None
    kind: str
    before: float
    after: float


@dataclass(frozen=True)
class Divergence:
    """Greedy continuation of one prompt, up to the first token that differs.

    Attributes:
        tokens: length of the reference's continuation, which ends early at a stop token.
        position: index of the first token that differs; null if none does.
        margin: gap between the reference's two largest logits there; near 0 it is a tie, not damage.
        reference_token: the reference's token there.
        candidate_token: the candidate's token there.
        before: the text up to there, or the end of a long one.
        reference_text: the reference's token as text.
        candidate_text: the candidate's token as text.
    """

    tokens: Count
    position: Count | None = None
    margin: NonNegative | None = None
    reference_token: Count | None = None
    candidate_token: Count | None = None
    before: str = ""
    reference_text: str = ""
    candidate_text: str = ""

    @property
    def agreed_tokens(self) -> Count:
        """Number of leading tokens in common; all of them if none differs."""
        return self.tokens if self.position is None else self.position


@dataclass(frozen=True)
class Greedy:
    """Greedy continuations of all prompts.

    Attributes:
        tokens: most tokens per continuation.
        prompts: one entry per prompt.
    """

    tokens: Count
    prompts: tuple[Divergence, ...]

    @property
    def first_divergence(self) -> Count | None:
        """The earliest position at which a prompt diverges; null if none does."""
        return self._first.position if self._first else None

    @property
    def margin(self) -> NonNegative | None:
        """Margin at the earliest divergence."""
        return self._first.margin if self._first else None

    @property
    def near_ties(self) -> Count:
        """Number of prompts that diverge at a near tie of the reference's two most likely tokens."""
        return sum(prompt.margin is not None and prompt.margin < NEAR_TIE for prompt in self.prompts)

    @property
    def mean_agreed_tokens(self) -> NonNegative:
        """Mean number of leading tokens in common."""
        return statistics.fmean(prompt.agreed_tokens for prompt in self.prompts)

    @property
    def median_agreed_tokens(self) -> NonNegative:
        """Median number of leading tokens in common."""
        return float(statistics.median(prompt.agreed_tokens for prompt in self.prompts))

    @property
    def share_never_diverging(self) -> Share:
        """Share of prompts that never diverge."""
        return sum(prompt.position is None for prompt in self.prompts) / len(self.prompts)

    @property
    def _first(self) -> Divergence | None:
        diverging = [prompt for prompt in self.prompts if prompt.position is not None]
        return min(diverging, key=lambda prompt: prompt.agreed_tokens, default=None)


@dataclass(frozen=True)
class Speed:
    """Rates over `repetitions` rounds.

    Attributes:
        ttft_ms: time from a prompt of `prompt_tokens` to the first chosen token, milliseconds.
        prefill_tok_s: tokens per second for a block of `prefill_tokens` in an empty context.
        decode_tok_s: tokens per second for `decode_tokens` single steps after the prompt.
        prompt_tokens: length of the prompt.
        prefill_tokens: length of the block.
        decode_tokens: number of single steps.
        repetitions: number of rounds.
    """

    ttft_ms: Annotated[Estimate, ("minimum", 0)]
    prefill_tok_s: Annotated[Estimate, ("minimum", 0)]
    decode_tok_s: Annotated[Estimate, ("minimum", 0)]
    prompt_tokens: Count
    prefill_tokens: Count
    decode_tokens: Count
    repetitions: Count


@dataclass(frozen=True)
class ChatCheck:
    """One text or conversation on the file's runtime, compared with the checkpoint.

    Attributes:
        name: `text …`, `chat …`, or `prompt` for the tokens that the runtime adds around a text to be continued.
        equal: whether text and ids equal the checkpoint's; null if the runtime cannot be asked.
        difference: a short unified diff, the first ids that differ, or why nothing was compared; empty if equal.
        means: what answered, if not the runtime itself.
    """

    name: str
    equal: bool | None
    difference: str = ""
    means: str = ""


@dataclass(frozen=True)
class ModelInfo:
    """The model that was run.

    Attributes:
        name: short name, unique within a report.
        path: the file or folder.
        format: gguf, onnx, mlx, checkpoint or another converter's format.
        scheme: quantization scheme in the format's own words.
        method: calibration method named in the file; null for plain rounding.
        runtime: name of the runtime that ran it.
        options: further options of the runtime.
        bytes: size on disk.
        bits_per_weight: mean over all weights.
    """

    name: str
    path: Path
    format: str
    scheme: str
    method: str | None
    runtime: str
    options: Mapping[str, object]
    bytes: Count
    bits_per_weight: NonNegative


@dataclass(frozen=True)
class TextInfo:
    """The text that was scored.

    Attributes:
        tokens: tokens of the whole text.
        window: tokens per window.
        windows: number of windows.
        scored_per_window: scored predictions per window.
    """

    tokens: Count
    window: Count
    windows: Count
    scored_per_window: Count

    @property
    def scored_positions(self) -> Count:
        """Scored predictions in total."""
        return self.windows * self.scored_per_window


@dataclass(frozen=True)
class ModelResult:
    """Speed and memory of a model.

    Attributes:
        model: the model and its runtime.
        speed: null if not measured.
        bandwidth_share: decode rate over the rate at which memory bandwidth allows all weights to be read per token.
        load_seconds: time to open the model, including the import of the runtime's library at its first use; null if
            the cache of the reference's logits made opening unnecessary.
        peak_rss_bytes: peak resident memory of a fresh process that runs it; null if not measured.
    """

    model: ModelInfo = field(metadata=INLINE)
    speed: Speed | None
    bandwidth_share: NonNegative | None
    load_seconds: NonNegative | None
    peak_rss_bytes: Count | None


@dataclass(frozen=True)
class ReferenceResult(ModelResult):
    """Figures of the reference.

    Attributes:
        perplexity: perplexity on the text.
        noise_floor: the same weights in float32 against the reference: the error of the reference's own arithmetic.
            Smaller figures of a file are not meaningful.  Null if the reference is float32 or it was not measured.
    """

    perplexity: Annotated[Estimate, ("minimum", 0)]
    noise_floor: Accuracy | None = None


@dataclass(frozen=True)
class CandidateResult(ModelResult):
    """Figures of one exported file.

    Attributes:
        accuracy: the file against the reference.
        greedy: greedy continuations; null if not measured.
        tokenizer_equal: whether the runtime's own tokenizer gives the reference's tokens for the text.
        notes: what a reader of the figures should know.
        missed: one sentence per threshold that was missed.
        thresholds: the thresholds that applied to this file; null is not set.
        fingerprint: fingerprint of the decoded weights, equal for files with equal weights; null if unknown.
        attribution: the deviation in two parts; null if not measured.
        tensor_errors: error of each tensor, in the order of the forward pass; empty if not measured.
        calibration_errors: output errors from the report beside a calibrated file; empty without one.
        by_position: accuracy by position in the window; null if the positions do not form whole windows.
        chat: tokenizer and chat template checks; empty if not run.
    """

    accuracy: Accuracy = field(metadata=INLINE)
    greedy: Greedy | None
    tokenizer_equal: bool
    notes: tuple[str, ...]
    missed: tuple[str, ...]
    thresholds: Thresholds
    fingerprint: str | None = None
    attribution: Attribution | None = None
    tensor_errors: tuple[WeightError, ...] = ()
    calibration_errors: tuple[CalibrationEffect, ...] = ()
    by_position: ByPosition | None = None
    chat: tuple[ChatCheck, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether every threshold was met."""
        return not self.missed


@dataclass(frozen=True)
class Pair:
    """Two candidates that hold the same weights, compared with each other: the difference between their runtimes.

    Attributes:
        first: index in candidates.
        second: index in candidates.
        accuracy: the second against the first.
    """

    first: Count
    second: Count
    accuracy: Accuracy = field(metadata=INLINE)


@dataclass(frozen=True)
class MethodFile:
    """One file of a row.

    Attributes:
        method: calibration method; rtn for a file that names none.
        candidate: index in candidates.
        kld: mean divergence.
        ratio: mean divergence over that of the plainly rounded file; null without one.
    """

    method: str
    candidate: Count
    kld: Estimate
    ratio: float | None


@dataclass(frozen=True)
class MethodRow:
    """Files that differ only in their calibration method."""

    format: str
    scheme: str
    runtime: str
    bits_per_weight: NonNegative
    files: tuple[MethodFile, ...]


@dataclass(frozen=True)
class Comparison:
    """Exported files compared with their checkpoint.  Units: nats per token, tokens per second, milliseconds, seconds,
    bytes; shares are 0 to 1; null is absent or not finite.

    Attributes:
        text: what was scored.
        thresholds: the thresholds of every file without a more specific rule; null is not set.
        reference: figures of the checkpoint.
        candidates: one entry per file and runtime.
        notes: what a reader of the figures should know.
        pairs: candidates of equal weights compared with each other.
        methods: files that differ only in their calibration method, side by side.
        environment: system, processor, cores, threads, versions of the libraries.
        bandwidth_bytes_per_s: memory read bandwidth of the threads; null if not measured.
    """

    text: TextInfo
    thresholds: Thresholds
    reference: ReferenceResult
    candidates: Annotated[Sequence[CandidateResult], ("minItems", 1)]
    notes: tuple[str, ...]
    pairs: tuple[Pair, ...] = ()
    methods: tuple[MethodRow, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    bandwidth_bytes_per_s: NonNegative | None = None

    @property
    def schema(self) -> Literal[2]:
        """Version of this format; it changes when a member changes its meaning or goes away."""
        return 2

    @property
    def passed(self) -> bool:
        """Whether every candidate passed."""
        return all(candidate.passed for candidate in self.candidates)

    @property
    def kld_edges(self) -> tuple[NonNegative, ...]:
        """Bin edges of the histograms, nats per token, ascending."""
        return KLD_EDGES
