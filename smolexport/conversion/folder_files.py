"""The small files beside an output that is a folder: tokenizer, chat templates, generation config, licence.

They are copied byte for byte, unless tokens stand beside tokenizer.json; what a target's readers need otherwise is its
converter's to put right.  A folder is published, so nothing gets into it that was not in the checkpoint.
"""

from __future__ import annotations

import json
import re
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from smolexport.conversion.plan import Companion
from smolexport.conversion.source_model import SourceModel
from smolexport.errors import CheckpointError
from smolexport.model.source_files import file_in, files_in
from smolexport.tokenizer.added_tokens import rewritten
from smolexport.tokenizer.files import MAX_BYTES, read_tokenizer_json

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
MAX_SMALL = 64 << 20  # of every file but tokenizer.json; a vocab.json of 250,000 tokens is about 5 MB
NEW_CLASS = "TokenizersBackend"  # what transformers 5 writes; readers that do not know it fail or guess


def copies(model: SourceModel) -> tuple[dict[str, Companion], list[str]]:
    """The files of a checkpoint that go into an output, by name, and what is to be said about its tokenizer.

    Raises:
        CheckpointError: a file cannot be read, is far larger than such a file ever is, or a link out of the folder.
    """
    folder, notes = model.folder, list(model.tokenizer.notes)
    paths = [path for name in COPIED if (path := file_in(folder, name))]
    paths += [path for pattern in PATTERNS for path in files_in(folder, pattern)]
    found = {}
    for path in paths:
        name = path.relative_to(folder).as_posix()
        _check_size(path, MAX_BYTES if name == "tokenizer.json" else MAX_SMALL)
        found[name] = Companion(name, path)
    made = rewritten(folder, model.tokenizer)
    if made:
        notes.append(f"written anew, so that every reader has the same tokens: {', '.join(made)}")
    found |= {name: Companion(name, content) for name, content in made.items()}
    return dict(sorted(found.items())), notes


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


def renamed_class(file: Companion, config: dict[str, Any], name: str) -> bytes:
    """`file`, which holds `config`, with `name` as its tokenizer_class in place of `NEW_CLASS`.

    Written anew only where the text is ambiguous.
    """
    wanted = {**config, "tokenizer_class": name}
    text = file.read().decode("utf-8")
    swapped, count = re.subn(rf'("tokenizer_class"\s*:\s*)"{NEW_CLASS}"', rf'\1"{name}"', text)
    return swapped.encode() if count == 1 and json.loads(swapped) == wanted else json_bytes(wanted)


def special_texts(model: SourceModel) -> dict[str, Any]:
    """The special tokens for a tokenizer_config.json that does not exist."""
    spec = model.tokenizer
    ids = {"bos_token": spec.bos, "eos_token": spec.eos, "pad_token": spec.pad, "unk_token": spec.unk}
    return {key: spec.tokens[index] for key, index in ids.items() if index is not None}


def generation_config(model: SourceModel, found: dict[str, Companion]) -> tuple[Companion | None, str]:
    """A generation_config.json where `found` has none, and the line about it."""
    if GENERATION in found:
        return None, ""
    spec = model.tokenizer
    ids = {"bos_token_id": spec.bos, "eos_token_id": eos_ids(model), "pad_token_id": spec.pad}
    content = {key: value for key, value in ids.items() if value is not None}
    line = f"{GENERATION} is missing; one with the ids of the special tokens was added"
    return Companion(GENERATION, json_bytes(content)), line


def file_object(found: dict[str, Companion], name: str) -> dict[str, Any]:
    """The JSON object in the file `name`; empty when there is none.  Raises TokenizerError for a damaged one."""
    source = found[name].content if name in found else b"{}"
    return read_tokenizer_json(source) if isinstance(source, Path) else dict(json.loads(source))


def json_bytes(value: dict[str, Any]) -> bytes:
    """`value` as the text of a file."""
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")


def writable(key: str, value: Any) -> bool:
    """Whether they are JSON for every reader: Python's own also takes NaN, Infinity and half a surrogate pair."""
    try:
        json.dumps({key: value}, allow_nan=False, ensure_ascii=False).encode("utf-8")
    except (ValueError, RecursionError):
        return False
    return True


def config_eos(model: SourceModel) -> int | list[int] | None:
    """`eos_token_id` of the config.json that is written: the source's, else every token that ends a generation."""
    own: int | list[int] | None = model.config.get("eos_token_id")
    return eos_ids(model) if own is None or own == [] else own


def eos_ids(model: SourceModel) -> int | list[int] | None:
    """Every token that ends a generation, config.json's first; a number when it is one, None when there is none."""
    own = model.config.get("eos_token_id")
    listed = own if isinstance(own, list) else [own, model.tokenizer.eos]
    ids = [index for index in (*listed, *sorted(model.tokenizer.stop_tokens)) if type(index) is int and index >= 0]
    unique = list(dict.fromkeys(ids))
    return unique if len(unique) > 1 else unique[0] if unique else None
