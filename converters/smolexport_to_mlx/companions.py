"""The small files beside the weights: tokenizer, chat templates, generation config, licence; copied byte for byte.

What a phone reads differently from Python is put right here, in as few places as possible, and said aloud:
a `tokenizer_class` that swift-transformers does not know or that is missing, a chat template in one of its two
places, a missing generation_config.json.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from smolexport.errors import CheckpointError
from smolexport.model import Model
from smolexport.plan import Companion
from smolexport.tokenizer import TokenizerKind
from smolexport.tokenizer.files import MAX_BYTES, read_json, show
from smolexport_to_mlx.card import front_matter
from smolexport_to_mlx.config import config_eos, eos_ids

__all__ = ["TEMPLATES", "companions", "is_companion", "notes"]

TOKENIZER, SPECIAL = "tokenizer_config.json", "special_tokens_map.json"
GENERATION, TEMPLATE = "generation_config.json", "chat_template.jinja"
TEMPLATES = "additional_chat_templates"
COPIED = (
    "tokenizer.json",
    SPECIAL,
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.json",
    TEMPLATE,
    TOKENIZER,
    GENERATION,
)
PATTERNS = (f"{TEMPLATES}/*.jinja", "LICENSE*")
# Read and checked before anything is written, so these may lie anywhere; of the others nobody knows what they are.
UNDERSTOOD = frozenset({"tokenizer.json", TOKENIZER, SPECIAL, GENERATION, "chat_template.json"})
MAX_SMALL = 64 << 20  # of every file but tokenizer.json; a vocab.json of 250,000 tokens is about 5 MB
KNOWN_CLASS, NEW_CLASS = "PreTrainedTokenizerFast", "TokenizersBackend"


def companions(model: Model) -> tuple[Companion, ...]:
    """The files that go into the folder beside weights, config.json and README.md, sorted by name.

    Args:
        model: the source; a link counts as the file when it stays inside the folder or inside the cache of a hub
            download.  Any other link is followed only to the JSON files of a tokenizer: a folder is published, and
            nothing gets into it that was not in the checkpoint.

    Raises:
        CheckpointError: a file cannot be read or is far larger than such a file ever is.
        TokenizerError: tokenizer_config.json is damaged.
    """
    return _gather(model).files


def notes(model: Model) -> list[str]:
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


def _gather(model: Model) -> Gathered:
    found, lines = _copies(model.folder)
    for made, line in (_tokenizer_config(model, found), _template(model), _generation_config(model, found)):
        if made is not None:
            found[made.name] = made
        lines += [line] if line else []
    lines += _stop_notes(model, found)
    if front_matter(model.folder) is None:
        lines.append("README.md: its head cannot be read; licence and language are not carried over")
    return Gathered(tuple(found[name] for name in sorted(found)), tuple(lines))


def _copies(folder: Path) -> tuple[dict[str, Companion], list[str]]:
    names = {name for name in COPIED if (folder / name).exists()}
    for pattern in PATTERNS:
        names |= {path.relative_to(folder).as_posix() for path in folder.glob(pattern)}
    found, lines = {}, []
    for name in sorted(names):
        path = folder / name
        if not path.is_file():
            lines.append(f"{name} is no regular file and is left out")
            continue
        if name not in UNDERSTOOD and not _stays(path, folder):
            lines.append(f"{name} is a link out of the checkpoint and is left out")
            continue
        _check_size(path, MAX_BYTES if name == "tokenizer.json" else MAX_SMALL)
        found[name] = Companion(name, path)
    return found, lines


def _stays(path: Path, folder: Path) -> bool:
    """Whether `path`, links followed, is in `folder` or among the files of the hub download that `folder` shows."""
    target, home = path.resolve(), folder.resolve()
    homes = [home, home.parent.parent / "blobs"] if home.parent.name == "snapshots" else [home]
    return any(target.is_relative_to(place) for place in homes)


def is_companion(name: str) -> bool:
    """Whether a file at the path `name` in a folder may be one of these."""
    return name in COPIED or any(
        fnmatchcase(name, pattern) and name.count("/") == pattern.count("/") for pattern in PATTERNS
    )


def _check_size(path: Path, limit: int) -> None:
    try:
        size = path.stat().st_size
        with path.open("rb"):
            pass
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror or error}") from error
    if size > limit:
        raise CheckpointError(f"{path}: {size:,} bytes, more than such a file ever needs; is it the right file?")


Made = tuple[Companion | None, str]  # a file in place of or beside the copies, and the line about it


def _tokenizer_config(model: Model, found: dict[str, Companion]) -> Made:
    path = model.folder / TOKENIZER
    config = read_json(path) if TOKENIZER in found else {}
    name = config.get("tokenizer_class")
    if name == NEW_CLASS:
        return (
            Companion(TOKENIZER, _renamed(path, config)),
            f"{TOKENIZER}: tokenizer_class {NEW_CLASS} became {KNOWN_CLASS}, which Swift knows too",
        )
    if isinstance(name, str) and name:
        return None, ""
    if model.tokenizer.kind is not TokenizerKind.BYTES:  # its class depends on the family; none is right for all
        return None, f"{TOKENIZER}: has no tokenizer_class; Python does without, Swift will not load the tokenizer"
    config = {**(config or _special_texts(model)), "tokenizer_class": KNOWN_CLASS}
    line = f"{TOKENIZER}: tokenizer_class {KNOWN_CLASS} was added; Swift does not load a tokenizer without"
    return Companion(TOKENIZER, _json(config)), line


def _renamed(path: Path, config: dict[str, Any]) -> bytes:
    """The text with the one value replaced; written anew only where the text is ambiguous."""
    wanted = {**config, "tokenizer_class": KNOWN_CLASS}
    text = path.read_bytes().decode("utf-8")
    swapped, count = re.subn(rf'("tokenizer_class"\s*:\s*)"{NEW_CLASS}"', rf'\1"{KNOWN_CLASS}"', text)
    return swapped.encode() if count == 1 and json.loads(swapped) == wanted else _json(wanted)


def _special_texts(model: Model) -> dict[str, Any]:
    """The special tokens for a tokenizer_config.json that does not exist."""
    spec = model.tokenizer
    ids = {"bos_token": spec.bos, "eos_token": spec.eos, "pad_token": spec.pad, "unk_token": spec.unk}
    return {key: spec.tokens[index] for key, index in ids.items() if index is not None}


def _template(model: Model) -> Made:
    """chat_template.jinja where the default template stands elsewhere alone; named ones stay where they are."""
    spec = model.tokenizer
    if (model.folder / TEMPLATE).is_file() or spec.chat_template is None or spec.chat_templates:
        return None, ""
    return Companion(TEMPLATE, spec.chat_template.encode("utf-8")), ""


def _generation_config(model: Model, found: dict[str, Companion]) -> Made:
    if GENERATION in found:
        return None, ""
    spec = model.tokenizer
    ids = {"bos_token_id": spec.bos, "eos_token_id": eos_ids(model), "pad_token_id": spec.pad}
    content = {key: value for key, value in ids.items() if value is not None}
    line = f"{GENERATION} is missing; one with the ids of the special tokens was added"
    return Companion(GENERATION, _json(content)), line


def _stop_notes(model: Model, found: dict[str, Companion]) -> Iterator[str]:
    """Tokens that end a text for the checkpoint's tokenizer, and not for MLX.

    Both readers stop at the tokenizer's eos_token and at the ids of one file: generation_config.json, or config.json
    where that has none; mlx-lm takes a lone 0 for none too.
    """
    own, other = _content(found, GENERATION).get("eos_token_id"), config_eos(model)
    named = any(_content(found, name).get("eos_token") for name in (TOKENIZER, SPECIAL))
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


def _content(found: dict[str, Companion], name: str) -> dict[str, Any]:
    content = found[name].content if name in found else b"{}"
    return read_json(content) if isinstance(content, Path) else dict(json.loads(content))


def _json(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")
