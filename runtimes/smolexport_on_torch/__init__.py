"""The reference: a checkpoint run by transformers, in bf16 unless asked otherwise; and a trainer.

Only safetensors are read and no code from the checkpoint is ever run.
"""

from __future__ import annotations

from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from smolexport.errors import MissingDependencyError

if TYPE_CHECKING:
    from smolexport_on_torch._chat import TransformersChat
    from smolexport_on_torch._session import TorchSession

NAME = "torch"
READS = "checkpoint"
REQUIRES = ("torch", "transformers")
INSTALL_HINT = "pip install torch transformers"
TRAINER = "smolexport_on_torch.trainer"


def version() -> str:
    """Versions of torch and transformers, e.g. `torch 2.13.0, transformers 5.23.0`.

    Raises:
        MissingDependencyError: one of them is not installed.
    """
    try:
        return ", ".join(f"{name} {metadata.version(name)}" for name in REQUIRES)
    except metadata.PackageNotFoundError as error:
        raise missing(error) from error


def open(  # noqa: A001
    path: Path,
    *,
    threads: int | None = None,
    context: int | None = None,
    dtype: str = "bf16",
    weights: Iterable[tuple[str, NDArray[Any]]] | None = None,
) -> TorchSession:
    """Load the checkpoint in the folder `path`.

    Args:
        path: folder with config.json and safetensors.
        threads: torch's intra-op threads while this session computes; None: one per physical core.
        context: most tokens held; None: the model's own, at most 4096.
        dtype: `bf16` or `f32`, of the weights and of the arithmetic.
        weights: (source name, array) pairs that take the place of the folder's safetensors, e.g. the decoded
            weights of an exported file; taken one at a time, float32, float16 or bfloat16.

    Raises:
        MissingDependencyError: torch or transformers is not installed.
        UsageError: an option out of range.
        CheckpointError: the folder or a tensor is missing, damaged or contradictory.
    """
    try:
        from smolexport_on_torch._session import TorchSession
    except ImportError as error:
        raise missing(error) from error
    return TorchSession(Path(path), threads=threads, context=context, dtype=dtype, weights=weights)


def open_chat(path: Path) -> TransformersChat:
    """transformers' tokenizer and chat template of the folder `path`: of a checkpoint, or of any with such files.

    Raises:
        MissingDependencyError: transformers is not installed.
        TokenizerError: transformers cannot read the tokenizer.
    """
    try:
        from smolexport_on_torch._chat import TransformersChat
    except ImportError as error:
        raise missing(error) from error
    return TransformersChat(Path(path))


def missing(error: Exception) -> MissingDependencyError:
    """What is raised in place of an ImportError."""
    return MissingDependencyError(f"the torch runtime needs torch and transformers ({error}): {INSTALL_HINT}")
