"""Bounded, checked reading of the tokenizer's files: they come from strangers.

Every error is a TokenizerError of one line: the file, what was found, what to do.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from smolexport.errors import TokenizerError
from smolexport.files import open_regular
from smolexport.model.source_files import file_in
from smolexport.text import reason, show

CONFIG, MAP, ADDED = "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"
ID_FILES = ("generation_config.json", "config.json")
MAX_BYTES = 256 << 20  # the largest tokenizer.json on the hub is about 35 MB
KINDS: Mapping[type, str] = {dict: "an object", list: "a list", str: "a string", bool: "true or false"}

T = TypeVar("T", dict[str, Any], list[Any], str, bool)


@dataclass(frozen=True)
class Companions:
    """The optional JSON files beside tokenizer.json, {} for each that is absent."""

    folder: Path
    files: Mapping[str, dict[str, Any]]


def read_companions(folder: Path) -> Companions:
    """Read the JSON files beside tokenizer.json.  Raises TokenizerError, CheckpointError."""
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


def read_tokenizer_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.  Raises TokenizerError for anything else, duplicate keys included."""
    text = read_text(path)
    try:
        value = json.loads(text, object_pairs_hook=_unique)
    except RecursionError:
        raise refuse(path, "is nested too deeply", "this is not a tokenizer file; download it again") from None
    except ValueError as error:
        raise refuse(path, f"is not valid JSON ({reason(error)})", "download the file again") from None
    return typed(path, "the top level", value, dict)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {show(twice)} appears twice in one object")
    return result


def typed(path: Path, name: str, value: object, kind: type[T]) -> T:
    """`value` if it is of the JSON type `kind`; a string must also be valid Unicode.  Raises TokenizerError."""
    if not isinstance(value, kind):
        raise refuse(path, f"{name} is {show(value)}, not {KINDS[kind]}", "repair or download the file again")
    if isinstance(value, str) and not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError:
            raise refuse(path, f"{name} holds half a surrogate pair: {show(value)}", "repair the text") from None
    return value


def content(token: object) -> str | None:
    """The text of a token, given as a string or as an object with flags; None for anything else."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None
