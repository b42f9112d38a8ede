"""README.md of an MLX folder: what the hub shows, and what the source's card says about licence and language."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from smolexport.model import Model

__all__ = ["card", "front_matter"]

README = "README.md"
CARRIED = ("license", "license_name", "license_link", "language")
MAX_README = 1 << 20  # bytes that are looked at
MAX_MATTER = 64 << 10  # bytes of YAML; what is longer holds tables of results, and takes seconds to parse
MAX_TEXT, MAX_ITEMS = 200, 200
PLAIN = re.compile(r"[A-Za-z][A-Za-z0-9./_-]*")
WORDS = frozenset("y n yes no on off true false null".split())  # plain, these are no strings to a YAML 1.1 reader

Value = str | list[str]


def card(model: Model, scheme_name: str, bits_per_weight: float, lines: Sequence[str]) -> bytes:
    """The content of README.md; the same input gives the same bytes.

    Args:
        model: the source.
        scheme_name: the quantization scheme.
        bits_per_weight: over all tensors.
        lines: further facts, one list item each.
    """
    matter: dict[str, Value] = {"library_name": "mlx", "pipeline_tag": "text-generation", "tags": ["mlx"]}
    if model.origin:
        matter["base_model"] = model.origin
    matter |= front_matter(model.folder) or {}
    name = _inline(model.name)
    source = f"[{_inline(model.origin)}](https://huggingface.co/{_inline(model.origin)})" if model.origin else name
    facts = "\n".join(f"- {_inline(line)}" for line in lines)
    body = BODY.format(
        name=name,
        source=source,
        scheme=_inline(scheme_name),
        bits=bits_per_weight,
        version=_version(),
        facts=f"\n{facts}\n" if facts else "",
    )
    return f"---\n{_yaml(matter)}---\n\n{body}".encode("utf-8", "replace")


BODY = """\
# {name}, {scheme} for MLX

{source}, converted to MLX by smolexport {version} with the scheme `{scheme}` ({bits:.2f} bits per weight).
{facts}
## Python

```sh
pip install mlx-lm
mlx_lm.generate --model PATH_TO_THIS_FOLDER --prompt "Once upon a time"
```

## Swift

With [mlx-swift-lm](https://github.com/ml-explore/mlx-swift-lm) 3, on a device or a Mac with Apple silicon:

```swift
import Foundation
import HuggingFace
import MLXHuggingFace
import MLXLLM
import MLXLMCommon
import Tokenizers

let folder = URL(filePath: "PATH_TO_THIS_FOLDER")
let model = try await loadModelContainer(from: folder, using: #huggingFaceTokenizerLoader())
print(try await ChatSession(model).respond(to: "Tell me a story."))
```
"""


def _version() -> str:
    try:
        return version("smolexport")
    except PackageNotFoundError:  # a source tree that was never installed
        return "(uninstalled)"


def _inline(text: str) -> str:
    """`text` on one line, without anything that a terminal or a browser would act upon."""
    kept = "".join(c if c.isprintable() and c not in "<>`" else " " for c in text)
    return " ".join(kept.split())


def _yaml(matter: Mapping[str, Value]) -> str:
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
    """What is carried over from the head of the source's README.md, as texts; None when it cannot be read.

    The YAML is only taken apart: nothing is constructed, merged or expanded, so a hostile file stays small, and the
    language `no` stays Norwegian.
    """
    text = _matter(folder / README)
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
    """The text between the first two lines of dashes; empty without, None when it is too long or no text."""
    try:
        if not path.is_file():
            return ""
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
