"""The small files of an output that is a folder: config, tokenizer, chat templates, generation config, licence.

They are copied byte for byte, unless there are tokens outside tokenizer.json; a converter changes what its target's
readers need to be different.  A folder gets published, so it contains nothing that was not in the checkpoint.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from smolexport.conversion.model_card import UNREADABLE, front_matter
from smolexport.conversion.plan import OutputFile
from smolexport.conversion.source_model import SCHEME_KEY, SourceModel
from smolexport.errors import CheckpointError, FileFormatError
from smolexport.model.source_files import file_in, files_in
from smolexport.tokenizer.added_tokens import rewritten
from smolexport.tokenizer.files import MAX_BYTES, read_tokenizer_json

TOKENIZER, SPECIAL = "tokenizer_config.json", "special_tokens_map.json"
GENERATION, TEMPLATE = "generation_config.json", "chat_template.jinja"
TEMPLATES = "additional_chat_templates"
COPIED = (
    "tokenizer.json", SPECIAL, "added_tokens.json", "vocab.json", "merges.txt", "chat_template.json", TEMPLATE,
    TOKENIZER, GENERATION,
)  # fmt: skip
PATTERNS = (f"{TEMPLATES}/*.jinja", "LICENSE*")
MAX_SMALL = 64 << 20  # of every file but tokenizer.json; a vocab.json of 250,000 tokens is about 5 MB
NEW_CLASS = "TokenizersBackend"  # what transformers 5 writes; other readers fail or guess

Files = dict[str, OutputFile]
Fixed = tuple[OutputFile | None, str]  # a file to add or replace, and the line about it


def gather_files(
    model: SourceModel,
    fixes: Sequence[Callable[[SourceModel, Files], Fixed]],
    notes: Callable[[SourceModel, Files], Iterator[str]],
) -> tuple[Files, tuple[str, ...]]:
    """The files of a checkpoint that go into an output, sorted by name, and what a person should know about them.

    Each of `fixes` changes what the target's readers need to be different; `notes` adds lines about the result.

    Raises:
        CheckpointError: a file cannot be read, is far larger than such a file ever is, or links out of the folder.
        TokenizerError: tokenizer_config.json is damaged.
    """
    folder, lines = model.folder, list(model.tokenizer.notes)
    paths = [path for name in COPIED if (path := file_in(folder, name))]
    paths += [path for pattern in PATTERNS for path in files_in(folder, pattern)]
    files: Files = {}
    for path in paths:
        name = path.relative_to(folder).as_posix()
        size = _checked_size(path, MAX_BYTES if name == "tokenizer.json" else MAX_SMALL)
        files[name] = OutputFile(name, path, size=size)
    made = rewritten(folder, model.tokenizer)
    if made:
        lines.append(f"rewritten, so that every reader has the same tokens: {', '.join(made)}")
    files |= {name: OutputFile(name, content) for name, content in made.items()}
    for fix in (*fixes, _generation_config):
        file, line = fix(model, files)
        if file is not None:
            files[file.name] = file
        lines += [line] if line else []
    lines += notes(model, files)
    if front_matter(folder) is None:
        lines.append(UNREADABLE)
    return dict(sorted(files.items())), tuple(lines)


def is_own_folder(
    path: Path, own: Callable[[str], bool], headers: Callable[[Path], Sequence[Mapping[str, str]]]
) -> bool:
    """Whether `path` is a folder that smolexport made, every file with weights in it, and that holds nothing else.

    A file with a name that no export writes, a link or a folder of another name makes it somebody's own.  `own` says
    whether the converter writes a name, besides the small files; `headers` are the metadata of the files with weights.
    """
    try:
        if path.is_symlink() or not path.is_dir():
            return False
        for entry in path.rglob("*"):
            name = entry.relative_to(path).as_posix()
            if entry.is_symlink() or not (entry.is_file() or entry.is_dir()):
                return False
            known = own(name) or is_copied(name) if entry.is_file() else name == TEMPLATES or own(f"{name}/")
            if not known:
                return False
        found = headers(path)
        return bool(found) and all(SCHEME_KEY in metadata for metadata in found)
    except (OSError, FileFormatError):
        return False


@contextmanager
def as_format_errors(folder: Path) -> Iterator[None]:
    """Errors of a checkpoint's reader as FileFormatError: the file is one of an output."""
    try:
        yield
    except CheckpointError as error:
        raise FileFormatError(str(error)) from error
    except RecursionError:
        raise FileFormatError(f"{folder}: a configuration is nested too deeply") from None


def is_copied(name: str) -> bool:
    """Whether `gather_files` may put a file at the path `name` in a folder."""
    return name in COPIED or any(
        fnmatchcase(name, pattern) and name.count("/") == pattern.count("/") for pattern in PATTERNS
    )


def _checked_size(path: Path, limit: int) -> int:
    try:
        size = path.stat().st_size
        with path.open("rb"):
            pass
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror or error}") from error
    if size > limit:
        raise CheckpointError(f"{path}: {size:,} bytes, more than such a file ever needs; is it the right file?")
    return size


def renamed_class(file: OutputFile, config: dict[str, Any], name: str) -> bytes:
    """`file`, which holds `config`, with `name` as its tokenizer_class in place of `NEW_CLASS`.

    Serialized again only if the text is ambiguous.
    """
    expected = {**config, "tokenizer_class": name}
    text = file.read().decode("utf-8")
    swapped, count = re.subn(rf'("tokenizer_class"\s*:\s*)"{NEW_CLASS}"', rf'\1"{name}"', text)
    return swapped.encode() if count == 1 and json.loads(swapped) == expected else json_bytes(expected)


def special_texts(model: SourceModel) -> dict[str, Any]:
    """The special tokens for a missing tokenizer_config.json."""
    spec = model.tokenizer
    ids = {"bos_token": spec.bos, "eos_token": spec.eos, "pad_token": spec.pad, "unk_token": spec.unk}
    return {key: spec.tokens[index] for key, index in ids.items() if index is not None}


def _generation_config(model: SourceModel, files: Files) -> Fixed:
    if GENERATION in files:
        return None, ""
    spec = model.tokenizer
    ids = {"bos_token_id": spec.bos, "eos_token_id": eos_ids(model), "pad_token_id": spec.pad}
    content = {key: value for key, value in ids.items() if value is not None}
    line = f"{GENERATION} is missing; one with the ids of the special tokens was added"
    return OutputFile(GENERATION, json_bytes(content)), line


def file_object(files: Files, name: str) -> dict[str, Any]:
    """The JSON object in the file `name`; empty if there is none.  Raises TokenizerError for a damaged one."""
    source = files[name].content if name in files else b"{}"
    return read_tokenizer_json(source) if isinstance(source, Path) else dict(json.loads(source))


def json_bytes(value: Mapping[str, Any], indent: int = 2) -> bytes:
    """`value` as the text of a file."""
    return (json.dumps(value, indent=indent, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")


def config_of(model: SourceModel, dropped: Collection[str]) -> dict[str, Any]:
    """config.json of the source without the keys in `dropped`, with sizes and special tokens spelled out."""
    spec, tokenizer = model.spec, model.tokenizer
    config = {
        key: value
        for key, value in model.config.items()
        if key not in dropped and not key.startswith("quantization") and _is_json(key, value)
    }
    return (
        {"bos_token_id": tokenizer.bos, "pad_token_id": tokenizer.pad}
        | config
        | {
            "model_type": spec.model_type,
            "vocab_size": spec.vocab_size,
            "hidden_size": spec.hidden_size,
            "num_hidden_layers": len(spec.layers),
            "num_attention_heads": spec.attention.num_attention_heads,
            "num_key_value_heads": spec.attention.num_key_value_heads,
            "head_dim": spec.attention.head_dim,
            "tie_word_embeddings": spec.tied,
            "eos_token_id": config_eos(model),
        }
    )


def _is_json(key: str, value: Any) -> bool:
    """Whether every reader can parse them: Python also writes NaN, Infinity and half a surrogate pair."""
    try:
        json.dumps({key: value}, allow_nan=False, ensure_ascii=False).encode("utf-8")
    except (ValueError, RecursionError):
        return False
    return True


def config_eos(model: SourceModel) -> int | list[int] | None:
    """`eos_token_id` of the written config.json: the source's, else every token that ends a generation."""
    own: int | list[int] | None = model.config.get("eos_token_id")
    return eos_ids(model) if own is None or own == [] else own


def eos_ids(model: SourceModel) -> int | list[int] | None:
    """Every token that ends a generation, config.json's first; a number if there is one, None if there is none."""
    own = model.config.get("eos_token_id")
    listed = own if isinstance(own, list) else [own, model.tokenizer.eos]
    ids = [index for index in (*listed, *sorted(model.tokenizer.stop_tokens)) if type(index) is int and index >= 0]
    unique = list(dict.fromkeys(ids))
    return unique if len(unique) > 1 else unique[0] if unique else None
