"""Model cards: the head of a source's README.md, read without trust, and the text of a new one."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

from smolexport.model.source_files import file_in

if TYPE_CHECKING:  # the command line prints the version without loading numpy
    from smolexport.conversion.source_model import SourceModel

README = "README.md"
CARRIED = ("license", "license_name", "license_link", "language")
UNREADABLE = "README.md: its head cannot be read; licence and language are not carried over"
MAX_README = 1 << 20  # bytes that are read
MAX_MATTER = 64 << 10  # bytes of YAML; a longer head holds tables of results, and takes seconds to parse
MAX_TEXT, MAX_ITEMS = 200, 200
PLAIN = re.compile(r"[A-Za-z][A-Za-z0-9./_-]*")
WORDS = frozenset(
    "y n yes no on off true false null".split()
)  # unquoted, a YAML 1.1 reader does not read these as strings

Value = str | list[str]


def installed_version() -> str:
    """Of this package."""
    try:
        return version("smolexport")
    except PackageNotFoundError:  # a source tree that was never installed
        return "(uninstalled)"


def card(
    model: SourceModel, library: str, tags: Sequence[str], body: str, lines: Sequence[str], **facts: float | str
) -> bytes:
    """A README.md: what the hub shows, and the licence and language of the source's card.

    `library` and `tags` are for the hub; `body` is a template with the fields `name`, `source`, `version`, `facts` (the
    list of `lines`) and those given.
    """
    matter: dict[str, Value] = {"library_name": library, "pipeline_tag": "text-generation", "tags": list(tags)}
    if model.origin:
        matter["base_model"] = model.origin
    matter |= front_matter(model.folder) or {}
    name, items = inline(model.name), "".join(f"- {inline(line)}\n" for line in lines)
    source = f"[{inline(model.origin)}](https://huggingface.co/{inline(model.origin)})" if model.origin else name
    text = body.format(
        name=name, source=source, version=installed_version(), facts=f"\n{items}" if items else "", **facts
    )
    return f"---\n{yaml_head(matter)}---\n\n{text}".encode("utf-8", "replace")


def inline(text: str) -> str:
    """`text` on one line, without control characters and markup."""
    kept = "".join(c if c.isprintable() and c not in "<>`" else " " for c in text)
    return " ".join(kept.split())


def yaml_head(matter: Mapping[str, Value]) -> str:
    """Block style, two levels; strings in quotes unless they are plain words."""
    lines = []
    for key, value in matter.items():
        if isinstance(value, str):
            lines.append(f"{key}: {_scalar(value)}\n")
        else:
            lines += [f"{key}:\n", *(f"- {_scalar(item)}\n" for item in value)]
    return "".join(lines)


def _scalar(text: str) -> str:
    plain = PLAIN.fullmatch(text) and text.lower() not in WORDS
    return text if plain else json.dumps(text, ensure_ascii=False)


def front_matter(folder: Path) -> dict[str, Value] | None:
    """What is carried over from the head of the source's README.md, as texts; None if it cannot be read.

    The YAML is only composed: no object is constructed, merged or expanded, so a hostile file stays small, and the
    language `no` stays Norwegian.  Raises CheckpointError for a link that leads out of the folder.
    """
    path = file_in(folder, README)
    text = _matter(path) if path else ""
    if not text:
        return None if text is None else {}
    import yaml  # type: ignore[import-untyped]

    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except (yaml.YAMLError, ValueError, RecursionError):
        return None
    pairs = root.value if isinstance(root, yaml.MappingNode) else []
    found: dict[str, Value] = {}
    for key, node in pairs:
        if isinstance(node, yaml.ScalarNode) and _fit(node.value):
            found[str(key.value)] = str(node.value)
        elif isinstance(node, yaml.SequenceNode):
            found[str(key.value)] = [item.value for item in node.value[:MAX_ITEMS] if _fit(item.value)]
    return {key: value for key in CARRIED if (value := found.get(key))}


def _matter(path: Path) -> str | None:
    """The text between the first two lines of dashes; empty if there are none, None if it is too long or not text."""
    try:
        with path.open("rb") as file:
            head = file.read(MAX_README).decode("utf-8-sig", "ignore")
    except OSError:
        return None
    match = re.match(r"\s*---[ \t]*\r?\n(.*?)^---[ \t]*\r?$", head, re.DOTALL | re.MULTILINE)
    if match is None:
        return None if head.lstrip().startswith("---") else ""
    text = match[1]
    return text if len(text.encode()) <= MAX_MATTER else None


def _fit(text: object) -> bool:
    return isinstance(text, str) and 0 < len(text) <= MAX_TEXT and text.isprintable()
