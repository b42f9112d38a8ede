"""Inputs of a comparison: the models and the settings."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from smolexport.errors import UsageError
from smolexport.model.spec import ModelSpec
from smolexport.model.weights import Weights
from smolexport.parity.results import CalibrationEffect, ModelInfo
from smolexport.run.session import Runtime, Session, TextCodec

if TYPE_CHECKING:
    from smolexport.calibration.texts import TextSource

Progress = Callable[[str, int, int], None]
"""Called with the name of the stage, the steps done and the steps in total."""


def no_progress(stage: str, done: int, total: int) -> None:
    """Ignore progress."""


@dataclass(frozen=True)
class Record:
    """How a file was calibrated.

    Attributes:
        method: `imatrix`, `gptq`, `distil`.
        sources: the calibration texts.
        tokens: total number of tokens in their windows.
        windows_sha256: hash of the windows' token ids.
    """

    method: str
    sources: tuple[TextSource, ...] = field(default=(), repr=False)
    tokens: int = 0
    windows_sha256: str = field(default="", repr=False)


@dataclass(frozen=True)
class Origin:
    """What is known of a checkpoint without running it; `codec` reads its tokenizer."""

    spec: ModelSpec
    codec: Callable[[], TextCodec]


@dataclass(frozen=True)
class Candidate:
    """A model to run: an exported file, or the checkpoint as the reference.

    Attributes:
        path: the file or folder that `runtime` opens.
        format: `gguf`, `onnx`, `mlx`, `checkpoint`.
        scheme: the quantization in the format's own words, e.g. `q4_k_m`, `bf16`.
        runtime: the module that runs it.
        bytes: size on disk.
        bits_per_weight: mean over all weights.
        options: further keyword arguments for the runtime's `open`, plain JSON values.
        origin: model spec and tokenizer of the reference; None if only running it tells.
        weights: reads its tensors back; None if that is not possible.
        calibration: the calibration record in the file; None for plain rounding or without a record.
        calibration_errors: errors of its matrices before and after calibration, from the report beside it.
        notes: what could not be read of these; for the reference, which file was used where its folder leaves a choice.
        unchanged: raises CheckpointError if the reference's files changed since they were opened.
    """

    path: Path
    format: str
    scheme: str
    runtime: Runtime
    bytes: int
    bits_per_weight: float
    options: Mapping[str, object] = field(default_factory=dict)
    origin: Origin | None = field(default=None, repr=False, compare=False)
    weights: Callable[[], Weights] | None = field(default=None, repr=False, compare=False)
    calibration: Record | None = None
    calibration_errors: Sequence[CalibrationEffect] = field(default=(), repr=False)
    notes: tuple[str, ...] = ()
    unchanged: Callable[[], None] = field(default=lambda: None, repr=False, compare=False)

    def open(self, threads: int | None, context: int | None, **more: object) -> Session:
        """A session of the model with its own options and `more`; raises what the runtime raises."""
        open_session: Callable[..., Session] = self.runtime.open
        return open_session(self.path, threads=threads, context=context, **{**self.options, **more})

    def info(self, name: str) -> ModelInfo:
        """The plain facts, under the `name` that reports use."""
        method = self.calibration.method if self.calibration else None
        facts = self.path, self.format, self.scheme, method, self.runtime.NAME, dict(self.options), self.bytes
        return ModelInfo(name, *facts, self.bits_per_weight)


@dataclass(frozen=True)
class Settings:
    """What is measured.  Counts are tokens unless stated otherwise.

    Attributes:
        window: tokens per window; the first half is context, the predictions of the second half are scored.
        max_windows: most windows to score; None scores the whole text.
        greedy_tokens: length of each greedy continuation; 0 skips greedy decoding.
        greedy_prompts: number of prompts, cut from the text at even distances.
        prompt_tokens: length of a prompt, for greedy continuations and time to first token.
        prefill_tokens: length of the block for the prefill rate.
        decode_tokens: tokens generated one by one for the decode rate.
        repetitions: speed measurements per model, interleaved; 0 skips speed.
        threads: for every session; None lets the runtime choose.
        memory: measure each file's peak memory in a fresh process.
        attribution: split each deviation into quantization error and runtime error, and measure the noise floor; runs
            every file's decoded weights in float32 as well.
        chat: compare tokenizers on difficult texts, and chat templates; takes about ten seconds.
        block_bytes: most bytes of float32 logits of one session held at a time.
    """

    window: int = 512
    max_windows: int | None = None
    greedy_tokens: int = 64
    greedy_prompts: int = 4
    prompt_tokens: int = 32
    prefill_tokens: int = 512
    decode_tokens: int = 128
    repetitions: int = 3
    threads: int | None = None
    memory: bool = True
    attribution: bool = True
    chat: bool = False
    block_bytes: int = 64 << 20

    def __post_init__(self) -> None:
        for name, least in _LEAST.items():
            if getattr(self, name) < least:
                raise UsageError(f"{name.replace('_', ' ')}: {getattr(self, name)} is too few, use at least {least}")

    @property
    def context(self) -> int:
        """Context length that a session needs for everything that is measured."""
        decode, prefill = (self.decode_tokens, self.prefill_tokens) if self.repetitions else (0, 0)
        return max(self.window, self.prompt_tokens + max(self.greedy_tokens, decode), prefill)


_LEAST = {
    "window": 4, "greedy_tokens": 0, "greedy_prompts": 0, "prompt_tokens": 1, "prefill_tokens": 1, "decode_tokens": 1,
    "repetitions": 0, "block_bytes": 1,
}  # fmt: skip
