"""The small files beside the weights: tokenizer, chat templates, generation config, licence; copied byte for byte.

What a phone reads differently from Python is put right here, in as few places as possible, and said aloud:
a `tokenizer_class` that swift-transformers does not know or that is missing, a chat template in one of its two
places, a missing generation_config.json.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from smolexport.conversion.folder_files import (
    GENERATION,
    NEW_CLASS,
    SPECIAL,
    TEMPLATE,
    TOKENIZER,
    config_eos,
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
from smolexport.text import show
from smolexport.tokenizer import TokenizerKind

KNOWN_CLASS = "PreTrainedTokenizerFast"


def companions(model: SourceModel) -> tuple[Companion, ...]:
    """The files that go into the folder beside weights, config.json and README.md, sorted by name.

    Args:
        model: the source.

    Raises:
        CheckpointError: a file cannot be read or is far larger than such a file ever is.
        TokenizerError: tokenizer_config.json is damaged.
    """
    return _gather(model).files


def notes(model: SourceModel) -> list[str]:
    """What a person should know about these files: what was changed, added or left out, and stop tokens.

    Raises:
        CheckpointError: as `companions`.
        TokenizerError: as `companions`.
    """
    return list(_gather(model).notes)


@dataclass(frozen=True)
class Gathered:
    """The files and what is to be said about them."""

    files: tuple[Companion, ...]
    notes: tuple[str, ...]


def _gather(model: SourceModel) -> Gathered:
    found, lines = copies(model)
    for made, line in (_tokenizer_config(model, found), _template(model), generation_config(model, found)):
        if made is not None:
            found[made.name] = made
        lines += [line] if line else []
    lines += _stop_notes(model, found)
    spec = model.tokenizer
    if spec.add_eos and spec.eos is not None:
        end = show(spec.tokens[spec.eos])
        lines.append(
            f"tokenizer.json puts {end} behind a text: mlx_lm.generate and transformers do so with plain prompts"
        )
    if front_matter(model.folder) is None:
        lines.append("README.md: its head cannot be read; licence and language are not carried over")
    return Gathered(tuple(found[name] for name in sorted(found)), tuple(lines))


Made = tuple[Companion | None, str]  # a file in place of or beside the copies, and the line about it


def _tokenizer_config(model: SourceModel, found: dict[str, Companion]) -> Made:
    config = file_object(found, TOKENIZER)
    name = config.get("tokenizer_class")
    if name == NEW_CLASS:
        return (
            Companion(TOKENIZER, renamed_class(found[TOKENIZER], config, KNOWN_CLASS)),
            f"{TOKENIZER}: tokenizer_class {NEW_CLASS} became {KNOWN_CLASS}, which Swift knows too",
        )
    if isinstance(name, str) and name:
        return None, ""
    if model.tokenizer.kind is not TokenizerKind.BYTES:  # its class depends on the family; none is right for all
        return None, f"{TOKENIZER}: has no tokenizer_class; Python does without, Swift will not load the tokenizer"
    config = {**(config or special_texts(model)), "tokenizer_class": KNOWN_CLASS}
    line = f"{TOKENIZER}: tokenizer_class {KNOWN_CLASS} was added; Swift does not load a tokenizer without"
    return Companion(TOKENIZER, json_bytes(config)), line


def _template(model: SourceModel) -> Made:
    """chat_template.jinja where the default template stands elsewhere alone; named ones stay where they are."""
    spec = model.tokenizer
    if (model.folder / TEMPLATE).is_file() or spec.chat_template is None or spec.chat_templates:
        return None, ""
    return Companion(TEMPLATE, spec.chat_template.encode("utf-8")), ""


def _stop_notes(model: SourceModel, found: dict[str, Companion]) -> Iterator[str]:
    """Tokens that end a text for the checkpoint's tokenizer, and not for MLX.

    Both readers stop at the tokenizer's eos_token and at the ids of one file: generation_config.json, or config.json
    where that has none; mlx-lm takes a lone 0 for none too.
    """
    own, other = file_object(found, GENERATION).get("eos_token_id"), config_eos(model)
    named = any(file_object(found, name).get("eos_token") for name in (TOKENIZER, SPECIAL))
    misses: dict[tuple[int, ...], list[str]] = {}
    for reader, value in (("mlx-lm", own or other), ("mlx-swift", other if own is None else own)):
        stops = {*(value if isinstance(value, list) else [value]), *([model.tokenizer.eos] if named else [])}
        misses.setdefault(tuple(sorted(model.tokenizer.stop_tokens - stops)), []).append(reader)
    for missing, readers in misses.items():
        if missing:
            listed = ", ".join(f"{index} ({show(model.tokenizer.tokens[index])})" for index in missing)
            yield (
                f"{' and '.join(readers)} will not stop at {listed}: eos_token_id is {show(own)} in {GENERATION}, "
                f"{show(other)} in config.json"
            )
