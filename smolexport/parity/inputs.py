"""What goes into a comparison: the models, and how much is measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from smolexport.errors import UsageError
from smolexport.model.spec import ModelSpec
from smolexport.model.weights import Weights
from smolexport.parity.calibrated import Record, Step
from smolexport.run.session import Runtime, TextCodec

__all__ = ["Candidate", "Origin", "Settings"]


@dataclass(frozen=True)
class Origin:
    """What is known of a checkpoint without playing it; `codec` reads its tokenizer."""

    spec: ModelSpec
    codec: Callable[[], TextCodec]


@dataclass(frozen=True)
class Candidate:
    """A model to be played: an exported file, or the checkpoint as the reference.

    Attributes:
        path: the file or folder that `runtime` opens.
        format: `gguf`, `onnx`, `mlx`, `checkpoint`.
        scheme: the quantization in the format's own words, e.g. `q4_k_m`, `bf16`.
        runtime: the module that plays it.
        bytes: size on disk.
        bits_per_weight: mean over all weights.
        options: further keyword arguments for the runtime's `open`, plain JSON values.
        origin: of the reference; None where only playing it tells.
        weights: reads its tensors back; None where that is not possible.
        calibration: how it was calibrated, as it says itself; None for plain rounding, and where it does not say.
        steps: the errors of its matrices before and after calibration, where a report beside it tells.
        notes: what could not be read of these; of the reference, what was taken where its folder leaves a choice.
        unchanged: raises CheckpointError where the reference's files changed since they were opened.
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
    steps: Sequence[Step] = field(default=(), repr=False)
    notes: tuple[str, ...] = ()
    unchanged: Callable[[], None] = field(default=lambda: None, repr=False, compare=False)

    @property
    def method(self) -> str | None:
        """Of calibration, e.g. `gptq`; None for a plain file."""
        return self.calibration.method if self.calibration else None

    @property
    def kind(self) -> str:
        """Scheme, and method where there is one: `int4 gptq`."""
        return f"{self.scheme} {self.method}" if self.method else self.scheme


@dataclass(frozen=True)
class Settings:
    """How much is measured.  Counts are tokens where nothing else is said.

    Attributes:
        window: tokens per window; the first half is context, predictions of the second half are scored.
        max_windows: stop after so many windows; None takes the whole text.
        greedy_tokens: length of each greedy continuation; 0 leaves that part out.
        greedy_prompts: prompts, cut from the text at even distances.
        prompt_tokens: length of a prompt, for the greedy continuations and for the time to first token.
        prefill_tokens: length of the block whose prefill rate is taken.
        decode_tokens: tokens generated one by one for the decode rate.
        repetitions: speed measurements per model, interleaved; 0 leaves speed out.
        threads: for every session; None lets the runtime choose.
        memory: measure each file's peak memory in a fresh process.
        attribution: part every deviation into the weights' and the runtime's, and find the noise floor; plays every
            file's decoded weights once more, in float32.
        chat: compare tokenizers on hard texts, and chat templates; takes some ten seconds, libraries are loaded anew.
        block_bytes: most float32 logits of one session held at a time.
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
                raise UsageError(f"{name.replace('_', ' ')}: {getattr(self, name)} is too few, at least {least}")


_LEAST = {
    "window": 4,
    "greedy_tokens": 0,
    "greedy_prompts": 0,
    "prompt_tokens": 1,
    "prefill_tokens": 1,
    "decode_tokens": 1,
    "repetitions": 0,
    "block_bytes": 1,
}
