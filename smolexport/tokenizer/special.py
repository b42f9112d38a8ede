"""Special tokens, stop tokens and chat templates, gathered from the files around tokenizer.json.

| what | where, first found wins |
|---|---|
| bos, eos, unk, pad | text in tokenizer_config, special_tokens_map (that first where transformers reads it); |
| | id in generation_config, config (all .json) |
| stop tokens | every eos id of generation_config.json and config.json, the tokenizer's eos, the chat's end token |
| templates | chat_template.jinja with additional_chat_templates/, chat_template.json, tokenizer_config.json |
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from smolexport.model.source_files import file_in, files_in
from smolexport.text import show
from smolexport.tokenizer.files import (
    CONFIG,
    ID_FILES,
    MAP,
    Companions,
    mapping,
    read_text,
    read_tokenizer_json,
    refuse,
    sequence,
    string,
)
from smolexport.tokenizer.merging import reads_all

# Texts by which the families end a turn; only one that the template writes, or that a config stops at, is taken.
TURN_ENDS = ("<|im_end|>", "<|eot_id|>", "<|end|>", "<end_of_turn>", "<|eot|>", "<|endofturn|>", "<end_of_utterance>")


@dataclass(frozen=True)
class Special:
    """Ids of the special tokens."""

    bos: int | None
    eos: int | None
    eot: int | None
    pad: int | None
    unk: int | None
    stop_tokens: frozenset[int]


@dataclass(frozen=True)
class Templates:
    """The chat templates of a checkpoint."""

    default: str | None
    named: Mapping[str, str]


def read_special(companions: Companions, ids: Mapping[str, int], vocab_size: int, template: str | None) -> Special:
    """Find the special tokens; `ids` maps the tokenizer's texts.  Raises TokenizerError."""
    found: dict[str, int | None] = {}
    for role in ("bos", "eos", "unk", "pad"):
        found[role] = _by_text(companions, role, ids)
        if found[role] is None:
            listed = [index for name in ID_FILES for index in _ids(companions, name, role, vocab_size)]
            found[role] = listed[0] if listed else None
    stops = {index for name in ID_FILES for index in _ids(companions, name, "eos", vocab_size)}
    ends = [ids[text] for text in TURN_ENDS if text in ids and (text in (template or "") or ids[text] in stops)]
    eot = ends[0] if ends else None
    stops |= {index for index in (found["eos"], eot) if index is not None}
    return Special(found["bos"], found["eos"], eot, found["pad"], found["unk"], frozenset(stops))


def _by_text(companions: Companions, role: str, ids: Mapping[str, int]) -> int | None:
    key = f"{role}_token"
    for name in (MAP, CONFIG) if reads_all(companions) else (CONFIG, MAP):
        value = companions.files[name].get(key)
        if value is not None:
            text = string(companions.folder / name, key, value.get("content") if isinstance(value, dict) else value)
            if text in ids:
                return ids[text]
    return None


def _ids(companions: Companions, name: str, role: str, vocab_size: int) -> list[int]:
    """The ids under one key, a number or a list; negative ones mean none."""
    key = f"{role}_token_id"
    value = companions.files[name].get(key)
    path = companions.folder / name
    listed = value if isinstance(value, list) else [] if value is None else [value]
    for index in listed:
        if type(index) is not int:
            raise refuse(path, f"{key} is {show(value)}", "it must be an id, a list of ids, or null")
        if index >= vocab_size:
            raise refuse(path, f"{key} {show(index)} is outside the vocabulary of {vocab_size}", "correct the id")
    return [index for index in listed if index >= 0]


def read_templates(companions: Companions) -> Templates:
    """Read the default and the named chat templates.  Raises TokenizerError."""
    folder = companions.folder
    if jinja := file_in(folder, "chat_template.jinja"):
        extra = files_in(folder, "additional_chat_templates/*.jinja")
        return Templates(read_text(jinja), {file.stem: read_text(file) for file in extra})
    if path := file_in(folder, "chat_template.json"):
        return _templates(path, read_tokenizer_json(path).get("chat_template"))
    return _templates(folder / CONFIG, companions.files[CONFIG].get("chat_template"))


def _templates(path: Path, value: object) -> Templates:
    """A template, or a list of {name, template}."""
    if value is None:
        return Templates(None, {})
    if isinstance(value, str):
        return Templates(string(path, "chat_template", value), {})
    named: dict[str, str] = {}
    for entry in sequence(path, "chat_template", value):
        item = mapping(path, "an entry of chat_template", entry)
        name = string(path, "the name of a chat template", item.get("name"))
        named[name] = string(path, f"chat template {show(name)}", item.get("template"))
    return Templates(named.pop("default", None), named)
