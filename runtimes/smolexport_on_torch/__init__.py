"""The reference: a checkpoint run by transformers, in bf16 by default; and a trainer.

Only safetensors are read and no code from the checkpoint is ever run.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smolexport.errors import importing
from smolexport.run.chat import TokenizerChat, reading_tokenizer

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from smolexport_on_torch._session import TorchSession

NAME = "torch"
READS = "checkpoint"
REQUIRES = ("torch", "transformers")
INSTALL_HINT = "pip install torch transformers"
TRAINER = "smolexport_on_torch.trainer"
importing_libraries = partial(importing, "the runtime torch", REQUIRES, INSTALL_HINT)


def version() -> str:
    """Versions of torch and transformers; raises MissingDependencyError."""
    with importing_libraries():
        return ", ".join(f"{name} {metadata.version(name)}" for name in REQUIRES)


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
        weights: (source name, array) pairs that replace the folder's safetensors, e.g. the decoded weights of an
            exported file; read one at a time, float32, float16 or bfloat16.

    Raises:
        MissingDependencyError: torch or transformers is not installed.
        UsageError: an option out of range.
        CheckpointError: the folder or a tensor is missing, damaged or contradictory.
    """
    with importing_libraries():
        from smolexport_on_torch._session import TorchSession
    return TorchSession(Path(path), threads, context, dtype, weights)


def open_chat(path: Path) -> TokenizerChat:
    """transformers' tokenizer and chat template of the folder `path`, a checkpoint or any other with these files.

    Raises:
        MissingDependencyError: transformers is not installed.
        TokenizerError: transformers cannot read the tokenizer.
    """
    with importing_libraries():
        from transformers import AutoTokenizer
    with reading_tokenizer(path, "transformers"):
        return TokenizerChat(AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False))
