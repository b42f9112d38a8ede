"""What a comparison measured, as plain frozen data.

These classes are also the JSON: `report.schema` turns them into JSON values and generates the JSON Schema from them.
Fields, with limits and descriptions in `Annotated`, and properties are members of the JSON object, except fields marked
`HIDDEN`; fields marked `INLINE` add their members to the object around them.

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


PositiveEstimate = Annotated[Estimate, ("minimum", 0)]
ShareEstimate = Annotated[Estimate, ("minimum", 0), ("maximum", 1)]


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
    rms: PositiveEstimate


@dataclass(frozen=True)
class Histogram:
    """Number of positions per range of divergence."""

    below: Annotated[Count, "positions below the first edge."]
    counts: Annotated[
        tuple[Count, ...], "counts[i] positions lie from kld_edges[i] up to, not including, kld_edges[i + 1]."
    ]
    above: Annotated[Count, "positions at or above the last edge."]
    not_finite: Annotated[Count, "positions where a damaged file gave NaN or infinity."]


@dataclass(frozen=True)
class ByPosition:
    """Means over runs of neighbouring positions, over all windows."""

    tokens_before: Annotated[tuple[Count, ...], "number of the window's tokens before the first position of each run."]
    kld: Annotated[tuple[float, ...], "mean divergence of each run."]
    top1_agreement: Annotated[tuple[Share, ...], "share of each run's positions with the same most likely token."]


@dataclass(frozen=True)
class Accuracy:
    """One side against the other over all scored positions; `metrics` defines the figures."""

    positions: Annotated[Count, "number of scored predictions."]
    kld: Annotated[Spread, "divergence per position, nats per token."]
    top1_agreement: Annotated[ShareEstimate, "share of positions with the same most likely token."]
    top5_overlap: Annotated[
        Share, "mean share of the reference's five most likely tokens that are among the candidate's five."
    ]
    reference_perplexity: Annotated[PositiveEstimate, "perplexity of the reference."]
    perplexity: Annotated[PositiveEstimate, "perplexity of the candidate."]
    perplexity_ratio: Annotated[PositiveEstimate, "perplexity / reference_perplexity."]
    ln_perplexity_ratio: Annotated[Estimate, "its logarithm; the error accounts for the covariance of the two."]
    delta_p: Annotated[DeltaP, "change of the true token's probability."]
    kld_histogram: Annotated[Histogram, "the positions by divergence."]
    divergences: NDArray[np.float64] = field(repr=False, compare=False, metadata=HIDDEN)  # [positions]
    same_top: NDArray[np.bool_] = field(repr=False, compare=False, metadata=HIDDEN)  # [positions]


@dataclass(frozen=True)
class Attribution:
    """A candidate's deviation split into quantization error and exporter or runtime error.

    The split runs the file's decoded weights on the reference's runtime in float32.  A wrong rope, a lost bias or a
    wrong norm shows in `exporter` even where 4 bits make `quantization` large.  So does a tensor that is not a rounded
    copy of the checkpoint's: the checkpoint's own tensor replaces it among the decoded weights.
    """

    quantization: Annotated[Accuracy, "the decoded weights against the reference: the effect of rounding the weights."]
    exporter: Annotated[
        Accuracy, "the file on its own runtime against its decoded weights: the effect of graph, metadata and runtime."
    ]


@dataclass(frozen=True)
class WeightError:
    """Deviation of one decoded tensor from the checkpoint's."""

    source: Annotated[str, "the tensor's name in the checkpoint."]
    layer: Annotated[Count | None, "its layer; null outside the layers."]
    weights: Annotated[Count, "number of elements."]
    relative: Annotated[NonNegative, "root of the summed squared differences over that of the weights; 0 is equal."]
    rounded: Annotated[bool, "whether rounding can explain the error; if not, the file holds a different tensor."] = (
        True
    )


@dataclass(frozen=True)
class CalibrationEffect:
    """Squared error of a matrix's outputs on the calibration text, relative to the outputs."""

    source: Annotated[str, "the tensor's name in the checkpoint."]
    layer: Annotated[int | None, "its layer; null outside the layers."]
    kind: Annotated[str, "last part of its name, e.g. q_proj."]
    before: Annotated[float, "error of rounding to nearest on the same scales."]
    after: Annotated[float, "error of the file's method."]


@dataclass(frozen=True)
class Divergence:
    """Greedy continuation of one prompt, up to the first token that differs."""

    tokens: Annotated[Count, "length of the reference's continuation, which ends early at a stop token."]
    position: Annotated[Count | None, "index of the first token that differs; null if none does."] = None
    margin: Annotated[
        NonNegative | None, "gap between the reference's two largest logits there; near 0 it is a tie, not damage."
    ] = None
    reference_token: Annotated[Count | None, "the reference's token there."] = None
    candidate_token: Annotated[Count | None, "the candidate's token there."] = None
    before: Annotated[str, "the text up to there, or the end of a long one."] = ""
    reference_text: Annotated[str, "the reference's token as text."] = ""
    candidate_text: Annotated[str, "the candidate's token as text."] = ""

    @property
    def agreed_tokens(self) -> Count:
        """Number of leading tokens in common; all of them if none differs."""
        return self.tokens if self.position is None else self.position


@dataclass(frozen=True)
class Greedy:
    """Greedy continuations of all prompts."""

    tokens: Annotated[Count, "most tokens per continuation."]
    prompts: Annotated[tuple[Divergence, ...], "one entry per prompt."]

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
    """Rates over `repetitions` rounds."""

    ttft_ms: Annotated[
        PositiveEstimate, "time from a prompt of `prompt_tokens` to the first chosen token, milliseconds."
    ]
    prefill_tok_s: Annotated[PositiveEstimate, "tokens per second for a block of `prefill_tokens` in an empty context."]
    decode_tok_s: Annotated[PositiveEstimate, "tokens per second for `decode_tokens` single steps after the prompt."]
    prompt_tokens: Annotated[Count, "length of the prompt."]
    prefill_tokens: Annotated[Count, "length of the block."]
    decode_tokens: Annotated[Count, "number of single steps."]
    repetitions: Annotated[Count, "number of rounds."]


@dataclass(frozen=True)
class ChatCheck:
    """One text or conversation on the file's runtime, compared with the checkpoint."""

    name: Annotated[
        str, "`text …`, `chat …`, or `prompt` for the tokens that the runtime adds around a text to be continued."
    ]
    equal: Annotated[bool | None, "whether text and ids equal the checkpoint's; null if the runtime cannot be asked."]
    difference: Annotated[
        str, "a short unified diff, the first ids that differ, or why nothing was compared; empty if equal."
    ] = ""
    means: Annotated[str, "what answered, if not the runtime itself."] = ""


@dataclass(frozen=True)
class ModelInfo:
    """The model that was run."""

    name: Annotated[str, "short name, unique within a report."]
    path: Annotated[Path, "the file or folder."]
    format: Annotated[str, "gguf, onnx, mlx, checkpoint or another converter's format."]
    scheme: Annotated[str, "quantization scheme in the format's own words."]
    method: Annotated[str | None, "calibration method named in the file; null for plain rounding."]
    runtime: Annotated[str, "name of the runtime that ran it."]
    options: Annotated[Mapping[str, object], "further options of the runtime."]
    bytes: Annotated[Count, "size on disk."]
    bits_per_weight: Annotated[NonNegative, "mean over all weights."]


@dataclass(frozen=True)
class TextInfo:
    """The text that was scored."""

    tokens: Annotated[Count, "tokens of the whole text."]
    window: Annotated[Count, "tokens per window."]
    windows: Annotated[Count, "number of windows."]
    scored_per_window: Annotated[Count, "scored predictions per window."]

    @property
    def scored_positions(self) -> Count:
        """Scored predictions in total."""
        return self.windows * self.scored_per_window


@dataclass(frozen=True)
class ModelResult:
    """Speed and memory of a model."""

    model: Annotated[ModelInfo, "the model and its runtime."] = field(metadata=INLINE)
    speed: Annotated[Speed | None, "null if not measured."]
    bandwidth_share: Annotated[
        NonNegative | None,
        "decode rate over the rate at which memory bandwidth allows all weights to be read per token.",
    ]
    load_seconds: Annotated[
        NonNegative | None,
        "time to open the model, including the import of the runtime's library at its first use; null if the cache"
        " of the reference's logits made opening unnecessary.",
    ]
    peak_rss_bytes: Annotated[
        Count | None, "peak resident memory of a fresh process that runs it; null if not measured."
    ]


@dataclass(frozen=True)
class ReferenceResult(ModelResult):
    """Figures of the reference."""

    perplexity: Annotated[PositiveEstimate, "perplexity on the text."]
    noise_floor: Annotated[
        Accuracy | None,
        "the same weights in float32 against the reference: the error of the reference's own arithmetic. Smaller "
        "figures of a file are not meaningful. Null if the reference is float32 or it was not measured.",
    ] = None


@dataclass(frozen=True)
class CandidateResult(ModelResult):
    """Figures of one exported file."""

    accuracy: Annotated[Accuracy, "the file against the reference."] = field(metadata=INLINE)
    greedy: Annotated[Greedy | None, "greedy continuations; null if not measured."]
    tokenizer_equal: Annotated[bool, "whether the runtime's own tokenizer gives the reference's tokens for the text."]
    notes: Annotated[tuple[str, ...], "what a reader of the figures should know."]
    missed: Annotated[tuple[str, ...], "one sentence per threshold that was missed."]
    thresholds: Annotated[Thresholds, "the thresholds that applied to this file; null is not set."]
    fingerprint: Annotated[
        str | None, "fingerprint of the decoded weights, equal for files with equal weights; null if unknown."
    ] = None
    attribution: Annotated[Attribution | None, "the deviation in two parts; null if not measured."] = None
    tensor_errors: Annotated[
        tuple[WeightError, ...], "error of each tensor, in the order of the forward pass; empty if not measured."
    ] = ()
    calibration_errors: Annotated[
        tuple[CalibrationEffect, ...], "output errors from the report beside a calibrated file; empty without one."
    ] = ()
    by_position: Annotated[
        ByPosition | None, "accuracy by position in the window; null if the positions do not form whole windows."
    ] = None
    chat: Annotated[tuple[ChatCheck, ...], "tokenizer and chat template checks; empty if not run."] = ()

    @property
    def passed(self) -> bool:
        """Whether every threshold was met."""
        return not self.missed


@dataclass(frozen=True)
class Pair:
    """Two candidates that hold the same weights, compared with each other: the difference between their runtimes."""

    first: Annotated[Count, "index in candidates."]
    second: Annotated[Count, "index in candidates."]
    accuracy: Annotated[Accuracy, "the second against the first."] = field(metadata=INLINE)


@dataclass(frozen=True)
class MethodFile:
    """One file of a row."""

    method: Annotated[str, "calibration method; rtn for a file that names none."]
    candidate: Annotated[Count, "index in candidates."]
    kld: Annotated[Estimate, "mean divergence."]
    ratio: Annotated[float | None, "mean divergence over that of the plainly rounded file; null without one."]


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
    """

    text: Annotated[TextInfo, "what was scored."]
    thresholds: Annotated[Thresholds, "the thresholds of every file without a more specific rule; null is not set."]
    reference: Annotated[ReferenceResult, "figures of the checkpoint."]
    candidates: Annotated[Sequence[CandidateResult], ("minItems", 1), "one entry per file and runtime."]
    notes: Annotated[tuple[str, ...], "what a reader of the figures should know."]
    pairs: Annotated[tuple[Pair, ...], "candidates of equal weights compared with each other."] = ()
    methods: Annotated[tuple[MethodRow, ...], "files that differ only in their calibration method, side by side."] = ()
    environment: Annotated[Mapping[str, str], "system, processor, cores, threads, versions of the libraries."] = field(
        default_factory=dict
    )
    bandwidth_bytes_per_s: Annotated[
        NonNegative | None, "memory read bandwidth of the threads; null if not measured."
    ] = None

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
