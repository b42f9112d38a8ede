"""What llama.cpp would refuse in a GGUF file that can otherwise be read, from its header alone.

Facts: llama.cpp `ggml/src/gguf.cpp`, `src/llama-model-loader.cpp`, `src/llama-model.cpp`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from smolexport.text import label
from smolexport_to_gguf.container import GgufFile, read_gguf

MAX_NAME = 63  # bytes; ggml keeps names in 64 with the zero behind them
EMBEDDING = "token_embd.weight"
TOKENS = "tokenizer.ggml.tokens"


def lint(path: Path) -> list[str]:
    """Everything about the file `path` that llama.cpp is known to refuse; empty when nothing is.

    Checked: the architecture is named, tensor names fit, the embedding has a row for every token.

    Raises:
        FileFormatError: not GGUF, or damaged.
    """
    return list(_findings(read_gguf(path)))


def _findings(file: GgufFile) -> Iterator[str]:
    if file.text("general.architecture") is None:
        yield "general.architecture is missing or no text; llama.cpp loads no such file"
    for name in file.tensors:
        if len(name.encode("utf-8", "replace")) > MAX_NAME:
            yield f"the tensor name {label(name)} has more than {MAX_NAME} bytes; llama.cpp loads no such file"
    embedding, (kind, tokens) = file.tensors.get(EMBEDDING), file.metadata.get(TOKENS, ("", ()))
    listed = kind == "[string]" and file.text("tokenizer.ggml.model") != "none"
    if embedding is not None and listed and len(tokens) != embedding.shape[0]:
        yield f"{TOKENS} holds {len(tokens)} tokens, {EMBEDDING} has {embedding.shape[0]} rows; llama.cpp refuses that"
