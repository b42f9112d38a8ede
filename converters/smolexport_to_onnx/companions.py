"""Tokenizer, templates, generation config and licence of an ONNX folder, copied byte for byte.

What the readers of such a folder need otherwise is put right here and said aloud.  Facts: Transformers.js 4.3 finds a
chat template in tokenizer_config.json alone; ONNX Runtime GenAI 0.18 refuses a `tokenizer_class` that it does not know.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from unicodedata import normalize

from smolexport.conversion.folder_files import (
    NEW_CLASS,
    TOKENIZER,
    copies,
    file_object,
    generation_config,
    json_bytes,
    renamed_class,
    special_texts,
)
from smolexport.conversion.model_card import front_matter
from smolexport.conversion.plan import Companion
from smolexport.conversion.source_model import SourceModel
from smolexport.text import few, show
from smolexport.tokenizer import Normalizer, TokenizerSpec
from smolexport.tokenizer.added_tokens import differing, leftmost

JS, GENAI = "Transformers.js", "ONNX Runtime GenAI"
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
    lines += _token_notes(model.tokenizer, file_object(files, TOKENIZER))
    if front_matter(model.folder) is None:
        lines.append("README.md: its head cannot be read; licence and language are not carried over")
    return Gathered({name: files[name] for name in sorted(files)}, tuple(lines))


def _tokenizer_config(model: SourceModel, files: dict[str, Companion]) -> tuple[Companion | None, str]:
    """A class and a chat template where readers look for them; None where the file has both."""
    config = file_object(files, TOKENIZER)
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


def _token_notes(spec: TokenizerSpec, config: Mapping[str, Any]) -> Iterator[str]:
    """What readers find otherwise than tokenizer.json says, one line each; `config` is what is written beside it.

    Facts, tried out: Transformers.js 4.3, ONNX Runtime GenAI 0.18.  Plain ONNX Runtime brings no tokenizer.
    """
    yield from _prompts(spec, config)
    if spec.normalizer is Normalizer.NFC:
        yield f"the tokenizer composes Unicode (NFC) and {GENAI} does not: text with decomposed accents differs there"
        kept = [token.text for token in spec.added if token.normalized and normalize("NFC", token.text) != token.text]
        if kept:
            yield f"{_few(kept)}: the tokenizer finds the composed form too, {GENAI} only this one"
        raw = [token.text for token in spec.added if not token.normalized]
        if more := [text for text in raw if normalize("NFD", text) != text]:
            yield f"{_few(more)}: {JS} finds the decomposed form too, the tokenizer only this one"
    if nul := [token.text for token in spec.added if "\0" in token.text]:
        yield f"{GENAI} reads a text up to NUL: it never finds {_few(nul)}"
    if before := [token.text for token in spec.added if token.lstrip]:
        yield f"the space before {_few(before)} stays a token of its own in {GENAI}, which knows no lstrip"
    if words := [token.text for token in spec.added if token.single_word]:
        yield f"{JS} and {GENAI} find {_few(words)} within words too: they know no single_word"
    if len({token.normalized for token in spec.added}) > 1:
        for text, theirs, ours in differing(spec, leftmost):
            yield f"in {show(text)} {JS} and {GENAI} find {_few(theirs)}, the tokenizer {_few(ours)}"


def _prompts(spec: TokenizerSpec, config: Mapping[str, Any]) -> Iterator[str]:
    """What stands around a prompt where tokenizer.json puts something around a text."""
    before, behind = (spec.bos if spec.add_bos else None), (spec.eos if spec.add_eos else None)
    places = ((before, "before"), (behind, "behind"))
    words = " and ".join(f"{show(spec.tokens[index])} {where}" for index, where in places if index is not None)
    if words:
        asked = config.get("add_bos_token") or config.get("add_eos_token")
        yield (
            f"tokenizer.json puts {words} a text: {JS}'s tokenizer does so, its text-generation pipeline "
            f"{'too' if asked else 'does not'}, {GENAI} only with add_special_tokens"
        )


def _few(texts: Sequence[str]) -> str:
    return few([show(text) for text in texts])
