"""Tokenizer, templates, generation config and licence of an ONNX folder, copied byte for byte.

What the readers of such a folder need otherwise is put right here and said aloud.  Facts: Transformers.js 4.3 finds a
chat template in tokenizer_config.json alone; ONNX Runtime GenAI 0.18 refuses a `tokenizer_class` that it does not know.
"""

from __future__ import annotations

from dataclasses import dataclass

from smolexport.conversion.folder_files import (
    NEW_CLASS,
    TOKENIZER,
    content,
    copies,
    generation_config,
    json_bytes,
    renamed_class,
    special_texts,
)
from smolexport.conversion.model_card import front_matter
from smolexport.conversion.plan import Companion
from smolexport.conversion.source_model import SourceModel
from smolexport_to_onnx.tokens import token_notes

__all__ = ["Gathered", "gather"]

KNOWN_CLASS = "PreTrainedTokenizerFast"


@dataclass(frozen=True)
class Gathered:
    """The files by name, and what is to be said about them."""

    files: dict[str, Companion]
    notes: tuple[str, ...]


def gather(model: SourceModel) -> Gathered:
    """The files that go into the folder beside graphs, config.json, genai_config.json and README.md.

    Raises:
        CheckpointError: a file cannot be read or is far larger than such a file ever is.
        TokenizerError: tokenizer_config.json is damaged.
    """
    files, lines = copies(model)
    for made, line in (_tokenizer_config(model, files), generation_config(model, files)):
        if made is not None:
            files[made.name] = made
        lines += [line] if line else []
    lines += token_notes(model.tokenizer, content(files, TOKENIZER))
    if front_matter(model.folder) is None:
        lines.append("README.md: its head cannot be read; licence and language are not carried over")
    return Gathered({name: files[name] for name in sorted(files)}, tuple(lines))


def _tokenizer_config(model: SourceModel, files: dict[str, Companion]) -> tuple[Companion | None, str]:
    """A class and a chat template where readers look for them; None where the file has both."""
    config = content(files, TOKENIZER)
    lines, additions = list[str](), dict[str, object]()
    name, template = config.get("tokenizer_class"), model.tokenizer.chat_template
    if not config:
        additions |= special_texts(model)
    if name == NEW_CLASS or not (isinstance(name, str) and name):
        additions["tokenizer_class"] = KNOWN_CLASS
        lines.append(f"tokenizer_class {KNOWN_CLASS} stands for {name or 'none'}")
    if template is not None and not config.get("chat_template"):
        additions["chat_template"] = template
        lines.append("the chat template was added, which Transformers.js reads nowhere else")
    if not additions:
        return None, ""
    if name == NEW_CLASS and len(additions) == 1:
        return Companion(TOKENIZER, renamed_class(files[TOKENIZER], config, KNOWN_CLASS)), f"{TOKENIZER}: {lines[0]}"
    return Companion(TOKENIZER, json_bytes({**config, **additions})), f"{TOKENIZER}: {'; '.join(lines)}"
