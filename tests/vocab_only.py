"""llama.cpp's own tokenizer over our metadata: a GGUF without tensors, loaded for its vocabulary alone."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gguf

from smolexport.tokenizer import TokenizerSpec
from smolexport_to_gguf.vocabulary import vocabulary_metadata

__all__ = ["LlamaVocab", "opened", "write_vocabulary"]

SIZES = {
    "context_length": 64,
    "embedding_length": 8,
    "block_count": 1,
    "feed_forward_length": 8,
    "attention.head_count": 1,
}


def write_vocabulary(spec: TokenizerSpec, path: Path) -> Path:
    """Write the metadata of `spec` with gguf-py, in the types that it asks for."""
    writer = gguf.GGUFWriter(path, "llama")
    for name, size in SIZES.items():
        writer.add_uint32(f"llama.{name}", size)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    scalars = {"string": writer.add_string, "u32": writer.add_uint32, "bool": writer.add_bool}
    inner = {"string": gguf.GGUFValueType.STRING, "i32": gguf.GGUFValueType.INT32, "f32": gguf.GGUFValueType.FLOAT32}
    for key, kind, value in vocabulary_metadata(spec):
        if kind.startswith("["):
            writer.add_key_value(key, list(value), gguf.GGUFValueType.ARRAY, inner[kind[1:-1]])
        else:
            scalars[kind](key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


class LlamaVocab:
    """A vocabulary as llama.cpp loaded it."""

    def __init__(self, library: Any, handle: Any) -> None:
        self._lib = library
        self._handle = handle

    def encode(self, text: str, *, add_special: bool = False, parse_special: bool = True) -> list[int]:
        data = text.encode()
        room = 2 * len(data) + 8
        ids = (ctypes.c_int32 * room)()
        count = self._lib.llama_tokenize(self._handle, data, len(data), ids, room, add_special, parse_special)
        assert count >= 0, f"{-count} tokens did not fit into {room}"
        return list(ids[:count])

    def piece(self, token: int, *, special: bool = True) -> bytes:
        buffer = ctypes.create_string_buffer(1 << 14)
        count = self._lib.llama_token_to_piece(self._handle, token, buffer, len(buffer), 0, special)
        assert count >= 0
        return buffer.raw[:count]

    def ends(self) -> set[int]:
        size = self._lib.llama_vocab_n_tokens(self._handle)
        return {token for token in range(size) if self._lib.llama_vocab_is_eog(self._handle, token)}

    def ask(self, name: str) -> Any:
        """The answer of `llama_vocab_<name>`."""
        return getattr(self._lib, f"llama_vocab_{name}")(self._handle)


@contextmanager
def opened(spec: TokenizerSpec, folder: Path) -> Iterator[LlamaVocab]:
    """Write `spec` into `folder` and let llama.cpp load it."""
    from smolexport_on_llamacpp._library import library

    llama_cpp = library()  # with the one log listener that a process can have
    path = write_vocabulary(spec, folder / "vocabulary.gguf")
    parameters = llama_cpp.llama_model_default_params()
    parameters.vocab_only = True
    model = llama_cpp.llama_model_load_from_file(str(path).encode(), parameters)
    assert model, f"llama.cpp does not load {path}"
    try:
        yield LlamaVocab(llama_cpp, llama_cpp.llama_model_get_vocab(model))
    finally:
        llama_cpp.llama_model_free(model)
