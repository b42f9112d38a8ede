"""The tokenizer's files for a folder that is written, where those of the checkpoint do not say what it is.

Some readers of such a folder know tokenizer.json alone, some `added_tokens_decoder` of tokenizer_config.json too, and
transformers merges all of them.  So tokenizer.json gets the tokens that stand beside it, and no file keeps a token
that the model has no row for, or an id that is not the token's.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from functools import lru_cache
from pathlib import Path
from typing import Any

from smolexport.tokenizer.files import ADDED, CONFIG, ID_FILES, content, read_companions, read_tokenizer_json
from smolexport.tokenizer.merging import EXTRA
from smolexport.tokenizer.spec import AddedToken, TokenizerSpec


def rewritten(folder: Path, spec: TokenizerSpec) -> dict[str, bytes]:
    """The files of the checkpoint in `folder` that cannot be copied, by name; none where nothing stands beside.

    Raises:
        CheckpointError: a file cannot be read any more.
    """
    if not spec.beside and not spec.left_out:
        return {}
    ids = {token.text: token.id for token in spec.added}
    files = {}
    for name, old in read_companions(folder).files.items():
        new = _without(old, spec.left_out)
        if name == ADDED:
            new = {text: ids[text] for text in old if text in ids}
        elif name == CONFIG and old.get("added_tokens_decoder"):
            # no others: a token of this list that has a role too becomes special
            texts = {content(token) for token in old["added_tokens_decoder"].values()}
            own = {str(token.id): _entry(token) for token in spec.added if token.text in texts}
            new |= {"added_tokens_decoder": own}
        if new != old and name not in ID_FILES:
            files[name] = _bytes(new, indent=2)
    if spec.beside:
        path = folder / "tokenizer.json"
        stat = path.stat()
        files[path.name] = _whole(path, spec.added, (stat.st_ino, stat.st_size, stat.st_mtime_ns))
    return files


@lru_cache(maxsize=1)
def _whole(path: Path, added: tuple[AddedToken, ...], _stamp: tuple[int, ...]) -> bytes:
    """tokenizer.json with `added`; kept, since a budget plans the same folder many times and the file may be large."""
    document = read_tokenizer_json(path) | {"added_tokens": [{"id": token.id, **_entry(token)} for token in added]}
    return _bytes(document)


def _entry(token: AddedToken) -> dict[str, Any]:
    return {"content": token.text, **token.flags()}


def _without(config: dict[str, Any], texts: Collection[str]) -> dict[str, Any]:
    """`config` less the special tokens `texts`."""
    kept = {key: value for key, value in config.items() if not key.endswith("_token") or content(value) not in texts}
    for key in EXTRA:
        value = kept.get(key)
        if isinstance(value, list):
            kept[key] = [token for token in value if content(token) not in texts]
        elif isinstance(value, dict):
            kept[key] = {role: token for role, token in value.items() if content(token) not in texts}
    return kept


def _bytes(value: dict[str, Any], indent: int | None = None) -> bytes:
    return (json.dumps(value, indent=indent, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")
