"""Reading the tokenizer's files: they come from strangers, so every size and type is checked before use.

Every finding is a TokenizerError of one line: the file, what was found, what to do.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from smolexport.errors import TokenizerError
from smolexport.files import open_regular
from smolexport.model.source_files import file_in
from smolexport.text import reason, show

CONFIG, MAP, ADDED = "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"
ID_FILES = ("generation_config.json", "config.json")

MAX_BYTES = 256 << 20  # the largest tokenizer.json on the hub is about 35 MB


@dataclass(frozen=True)
class Companions:
    """The optional JSON files beside tokenizer.json, {} where one is absent."""

    folder: Path
    files: Mapping[str, dict[str, Any]]


def read_companions(folder: Path) -> Companions:
    """Read the JSON files that may stand beside tokenizer.json.  Raises TokenizerError, CheckpointError."""
    paths = {name: file_in(folder, name) for name in (CONFIG, MAP, ADDED, *ID_FILES)}
    return Companions(folder, {name: read_tokenizer_json(path) if path else {} for name, path in paths.items()})


def refuse(path: Path, found: str, remedy: str) -> TokenizerError:
    """The error for one finding in one file; for `raise`."""
    return TokenizerError(f"{path}: {found}; {remedy}")


def read_text(path: Path) -> str:
    """The UTF-8 text of a file of at most MAX_BYTES.  Raises TokenizerError."""
    try:
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise refuse(path, f"{size:,} bytes, more than any tokenizer needs", "is it the right file?")
        with open_regular(path) as file:
            return file.read().decode("utf-8")
    except OSError as error:
        raise refuse(path, f"cannot be read ({error.strerror or error})", "check its permissions") from None
    except UnicodeDecodeError as error:
        raise refuse(path, f"is not UTF-8 at byte {error.start}", "download the file again") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {show(twice)} appears twice in one object")
    return result


def content(token: object) -> str | None:
    """The text of a token, which stands in these files alone or in an object with flags; None for anything else."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None


def read_tokenizer_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.  Raises TokenizerError for anything else, duplicate keys included."""
    text = read_text(path)
    try:
        value = json.loads(text, object_pairs_hook=_unique)
    except RecursionError:
        raise refuse(path, "is nested too deeply", "this is not a tokenizer file; download it again") from None
    except ValueError as error:
        raise refuse(path, f"is not valid JSON ({reason(error)})", "download the file again") from None
    return mapping(path, "the top level", value)


def mapping(path: Path, name: str, value: object) -> dict[str, Any]:
    """`value` if it is a JSON object.  Raises TokenizerError."""
    if not isinstance(value, dict):
        raise refuse(path, f"{name} is {show(value)}, not an object", "repair or download the file again")
    return value


def sequence(path: Path, name: str, value: object) -> list[Any]:
    """`value` if it is a JSON array.  Raises TokenizerError."""
    if not isinstance(value, list):
        raise refuse(path, f"{name} is {show(value)}, not a list", "repair or download the file again")
    return value


def string(path: Path, name: str, value: object) -> str:
    """`value` if it is a text that UTF-8 can hold.  Raises TokenizerError."""
    if not isinstance(value, str):
        raise refuse(path, f"{name} is {show(value)}, not a string", "repair or download the file again")
    if not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError:
            raise refuse(path, f"{name} holds half a surrogate pair: {show(value)}", "repair the text") from None
    return value


def boolean(path: Path, name: str, value: object) -> bool:
    """`value` if it is true or false.  Raises TokenizerError."""
    if not isinstance(value, bool):
        raise refuse(path, f"{name} is {show(value)}, not true or false", "repair or download the file again")
    return value
