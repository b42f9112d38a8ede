"""Added tokens: merged from all files of a folder, written into a new folder, and where they compete for characters.

The merge does what transformers 5 does when it loads the folder:

| file | what counts |
|---|---|
| tokenizer_config.json | `added_tokens_decoder`, the texts of special tokens, the extra special tokens |
| special_tokens_map.json, added_tokens.json | the same, but only where the first has no `added_tokens_decoder` |

transformers passes one list to the library: tokens with an id in its order, then special tokens, then extra ones.  A
token that the library has with the same flags stays, one with other flags gets the new flags, and a new one gets the
next free id, whatever id its file names.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from smolexport.text import few, show
from smolexport.tokenizer.files import (
    ADDED,
    CONFIG,
    ID_FILES,
    MAP,
    Companions,
    content,
    read_companions,
    read_tokenizer_json,
    refuse,
    typed,
)
from smolexport.tokenizer.spec import AddedToken, TokenizerSpec

ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
EXTRA = ("extra_special_tokens", "additional_special_tokens")
MOST_TEXTS = 200  # with overlapping tokens, that are compared; real tokenizers have none
LONGEST_OVERLAP = 64  # characters
MOST_WORK = 10_000_000  # positions compared for tokens within others
MOST_FOUND = 3

Find = Callable[[str, Sequence[str]], list[str]]
"""(text, added tokens) -> the tokens found in it."""


@dataclass(frozen=True)
class Merged:
    """The added tokens of a folder.

    Attributes:
        added: all of them.
        beside: those that tokenizer.json lacks or has with other flags, in the order for the library.
        left_out: texts of those whose id is outside the model's vocabulary.
        notes: what was merged, left out or not read, one line per file.
    """

    added: tuple[AddedToken, ...]
    beside: tuple[AddedToken, ...]
    left_out: tuple[str, ...]
    notes: tuple[str, ...]


class Mention(NamedTuple):
    """A token in a file; `token.id` is the file's id for it, -1 without one."""

    file: str
    token: AddedToken


def reads_all(companions: Companions) -> bool:
    """Whether transformers also reads special_tokens_map.json and added_tokens.json."""
    return companions.files[CONFIG].get("added_tokens_decoder") is None


def merge(companions: Companions, listed: Mapping[str, int], own: Sequence[AddedToken], vocab_size: int) -> Merged:
    """Merge the tokens of the other files into `own`, those of tokenizer.json, whose model.vocab is `listed`.

    Raises:
        TokenizerError: a file is not understood, or gives a token another id than tokenizer.json.
    """
    known = {token.text: token for token in own}
    free = max([len(listed), *(token.id + 1 for token in own)])
    beside: dict[str, Mention] = {}
    beyond: dict[str, Mention] = {}
    doubts: list[str] = []
    for mention in _offered(companions, own):
        text = mention.token.text
        found = known.get(text)
        index = found.id if found else listed.get(text, free)
        if (found or text in listed) and text not in beside and mention.token.id not in (-1, index):
            doubts += _other_id(companions, mention, index)
        token = replace(mention.token, id=index)
        if not text or token == found:
            continue
        if index >= vocab_size:
            beyond[text] = mention
            continue
        free += not (found or text in listed)
        known[text] = token
        beside.setdefault(text, mention)
    notes = [
        *(f"{file}: tokens that tokenizer.json lacks, or has with other flags, were added as transformers does: {named}"
          for file, named in _by_file(beside.values(), known)),
        *(f"{file}: tokens that tokenizer.json lacks, and the model has no row for, are left out: {named}"
          for file, named in _by_file(beyond.values())),
        *doubts,
        *_unread(companions, known.keys() | listed.keys() | beyond.keys()),
    ]  # fmt: skip
    return Merged(tuple(known.values()), tuple(known[text] for text in beside), tuple(beyond), tuple(notes))


def _offered(companions: Companions, own: Sequence[AddedToken]) -> Iterator[Mention]:
    """What transformers passes to the library, in its order; a text may occur twice, with different flags."""
    named = _named(companions)
    special = {mention.token.text: mention.file for mention in named}
    if reads_all(companions):
        by_id = [*_added(companions), *(Mention("tokenizer.json", token) for token in own)]
    else:
        by_id = _decoder(companions, special)
    # of two with the same id the last one counts
    order = [mention for _, mention in sorted({mention.token.id: mention for mention in by_id}.items())]
    seen = {token.text for token in own} | {mention.token.text for mention in order}
    for mention in (
        *order,
        *(mention for mention in (*named, *_extra(companions, special)) if mention.token.text not in seen),
    ):
        forced = not mention.token.special and mention.token.text in special
        file = special[mention.token.text] if forced else mention.file
        yield Mention(file, replace(mention.token, special=mention.token.special or forced))


def _read(companions: Companions) -> tuple[dict[str, Any], dict[str, Any]]:
    """tokenizer_config.json, and special_tokens_map.json if transformers reads it."""
    return companions.files[CONFIG], companions.files[MAP] if reads_all(companions) else {}


def _named(companions: Companions) -> list[Mention]:
    """Tokens with a role."""
    config, others = _read(companions)
    settings = {key: (CONFIG, value) for key, value in config.items()}
    for key, value in others.items():
        if key in ROLES or not isinstance(config.get(key), str):
            settings[key] = MAP, value
    found = []
    for key in (*ROLES, *(key for key in settings if key.endswith("_token") and key not in ROLES)):
        file, value = settings.get(key, (CONFIG, None))
        if value is not None and (key in ROLES or content(value) is not None):
            found.append(_mention(companions, file, key, value, special=True))
    for file, listed in ((CONFIG, _listed(config)), (MAP, others.get(EXTRA[0]))):
        if isinstance(listed, dict):
            found += [_mention(companions, file, show(key), value, special=True) for key, value in listed.items()]
    return found


def _listed(config: Mapping[str, Any]) -> Any:
    return config.get(EXTRA[0]) or config.get(EXTRA[1])


def _extra(companions: Companions, special: Collection[str]) -> list[Mention]:
    """Special tokens without a role."""
    config, others = _read(companions)
    lists = [(CONFIG, _listed(config)), (MAP, others.get(EXTRA[0]))]
    if all(isinstance(value, dict) for value in (others.get(EXTRA[0], {}), *(config.get(key, {}) for key in EXTRA))):
        lists.append((MAP, others.get(EXTRA[1])))
    found = []
    for file, listed in lists:
        if listed is not None and not isinstance(listed, dict):
            for value in typed(companions.folder / file, EXTRA[0], listed, list):
                forced = file == MAP or content(value) in special
                found.append(_mention(companions, file, f"an entry of {EXTRA[0]}", value, special=forced))
    return found


def _decoder(companions: Companions, special: Collection[str]) -> list[Mention]:
    path = companions.folder / CONFIG
    found = []
    for key, value in typed(
        path, "added_tokens_decoder", companions.files[CONFIG]["added_tokens_decoder"], dict
    ).items():
        if not key.isdecimal() or len(key) > 9:
            raise refuse(path, f"added_tokens_decoder has the id {show(key)}", "ids are whole numbers from 0 on")
        name = f"added token {show(key)}"
        forced = content(typed(path, name, value, dict)) in special
        found.append(_mention(companions, CONFIG, name, value, special=forced, index=int(key)))
    return found


def _added(companions: Companions) -> list[Mention]:
    """The tokens of added_tokens.json, which has no flags.

    transformers looks up special tokens for it before it turns the objects in tokenizer_config.json into tokens, so of
    that file only plain strings count here.
    """
    config, others = companions.files[CONFIG], companions.files[MAP]
    extra, more = (value if isinstance(value, list) else [] for value in (_listed(config), others.get(EXTRA[0])))
    texts = [config.get(key) for key in ROLES if key not in others] + extra
    texts += [content(value) for value in (*(others.get(key) for key in ROLES), *more)]
    special = {text for text in texts if isinstance(text, str)}
    found = []
    for text, index in companions.files[ADDED].items():
        if type(index) is not int or index < 0:
            raise refuse(companions.folder / ADDED, f"the id of token {show(text)} is {show(index)}", "correct the id")
        typed(companions.folder / ADDED, "a token", text, str)
        found.append(Mention(ADDED, AddedToken(index, text, text in special, text not in special)))
    return found


def _mention(companions: Companions, file: str, name: str, value: Any, *, special: bool, index: int = -1) -> Mention:
    """A token given as text or as an object with flags.  `special` overrides the flag of that name."""
    path = companions.folder / file
    if not isinstance(value, dict):
        return Mention(file, AddedToken(index, typed(path, name, value, str), special=True, normalized=False))
    text = typed(path, name, value.get("content"), str)
    special = special or typed(path, f"special of {name}", value.get("special", False), bool)
    defaults = {"normalized": not special, "lstrip": False, "rstrip": False, "single_word": False}
    flags = {key: typed(path, f"{key} of {name}", value.get(key, usual), bool) for key, usual in defaults.items()}
    return Mention(file, AddedToken(index, text, special, **flags))


def _other_id(companions: Companions, mention: Mention, index: int) -> Iterator[str]:
    """A file contradicts an id of tokenizer.json: an error, but only a note for added_tokens.json."""
    found = f"token {show(mention.token.text)} has id {mention.token.id}, but {index} in tokenizer.json"
    if mention.file != ADDED:
        path = companions.folder / mention.file
        raise refuse(path, found, "the two files belong to different tokenizers; download them again")
    yield f"{ADDED}: {found}, which counts"


def _unread(companions: Companions, texts: Collection[str]) -> Iterator[str]:
    """A note per file that transformers does not read, on its tokens that occur nowhere else."""
    if reads_all(companions):
        return
    others = companions.files[MAP]
    values = [value for key, value in others.items() if key.endswith("_token")]
    for key in EXTRA:
        values += listed if isinstance(listed := others.get(key), list) else []
    for file, found in ((MAP, [*map(content, values)]), (ADDED, [*companions.files[ADDED]])):
        absent = [text for text in found if text and text not in texts]
        if absent:
            yield (
                f"{file}: tokens that tokenizer.json lacks are left out, as transformers reads added_tokens_decoder of "
                f"{CONFIG} instead: {few([show(text) for text in absent])}"
            )


def _by_file(mentions: Iterable[Mention], known: Mapping[str, AddedToken] | None = None) -> Iterator[tuple[str, str]]:
    """(file, its tokens in words, with the ids in `known`)."""
    files: dict[str, list[str]] = {}
    for file, token in mentions:
        words = show(token.text)
        if known is not None:
            index = known[token.text].id
            words += f" ({index})" if token.id in (-1, index) else f" ({index}, not {token.id})"
        files.setdefault(file, []).append(words)
    yield from ((file, few(listed)) for file, listed in files.items())


def rewritten(folder: Path, spec: TokenizerSpec) -> dict[str, bytes]:
    """New contents of the tokenizer's files that a converted folder cannot copy from `folder`, by name.

    Some readers know tokenizer.json alone, others `added_tokens_decoder` of tokenizer_config.json too, and transformers
    merges everything.  So tokenizer.json gets all added tokens, and no file keeps a token outside the model's
    vocabulary or a wrong id.  Empty where tokenizer.json is complete already.

    Raises:
        CheckpointError: a file can no longer be read.
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
            # only those listed before: a token with a role that is added to this list would become special
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
    """tokenizer.json with `added`; cached, since a budget plans the same folder often and the file may be large."""
    document = read_tokenizer_json(path) | {"added_tokens": [{"id": token.id, **_entry(token)} for token in added]}
    return _bytes(document)


def _entry(token: AddedToken) -> dict[str, Any]:
    return {"content": token.text, **token.flags()}


def _without(config: dict[str, Any], texts: Collection[str]) -> dict[str, Any]:
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


def differing(spec: TokenizerSpec, find: Find) -> list[tuple[str, list[str], list[str]]]:
    """Up to MOST_FOUND texts on which `find` differs from the tokenizer: (text, tokens by `find`, by the tokenizer).

    The texts are made of overlapping added tokens.  The tokenizer first looks for the tokens that are not normalized,
    then for the others; each time from left to right, and for the longest at each place.
    """
    passes = [[token.text for token in spec.added if token.normalized is state] for state in (False, True)]
    every = [*passes[0], *passes[1]]
    tried = ((text, find(text, every), _in_passes(text, passes)) for text in islice(_texts(passes), MOST_TEXTS))
    return list(islice((one for one in tried if one[1] != one[2]), MOST_FOUND))


def _texts(passes: Sequence[Sequence[str]]) -> Iterator[str]:
    normalized = set(passes[1]) if passes[0] else set[str]()
    for first, later, size in _overlaps([*passes[0], *passes[1]]):
        if len(first.encode()) <= len(later.encode()) or (first in normalized and later not in normalized):
            yield first + later[size:]
    lengths = sorted({len(text) for text in passes[0]})
    if len(lengths) * sum(map(len, normalized)) <= MOST_WORK:
        raw = set(passes[0])
        for text in passes[1]:
            for size in lengths:
                places = range(len(text) - size + 1)
                yield from (text for at in places if text[at : at + size] in raw)


def _overlaps(texts: Sequence[str]) -> Iterator[tuple[str, str, int]]:
    """(first, later, size): the last `size` characters of `first` are the first ones of `later`."""
    ends: dict[str, list[str]] = {}
    for text in texts:
        for size in range(1, min(len(text), LONGEST_OVERLAP + 1)):
            ends.setdefault(text[-size:], []).append(text)
    for later in texts:
        for size in range(1, min(len(later), LONGEST_OVERLAP + 1)):
            yield from ((first, later, size) for first in ends.get(later[:size], ()))


def _in_passes(text: str, passes: Sequence[Sequence[str]]) -> list[str]:
    parts: list[tuple[str, bool]] = [(text, False)]
    for tokens in passes:
        parts = [cut for part in parts for cut in ([part] if part[1] else _cut(part[0], tokens))]
    return [part for part, found in parts if found]


def leftmost(text: str, tokens: Sequence[str]) -> list[str]:
    """A `Find` that goes from left to right and takes the longest token at each place."""
    return [part for part, found in _cut(text, tokens) if found]


def _cut(text: str, tokens: Sequence[str]) -> list[tuple[str, bool]]:
    parts, start, at = list[tuple[str, bool]](), 0, 0
    while at < len(text):
        match = max((token for token in tokens if text.startswith(token, at)), key=len, default="")
        if match:
            parts += [(text[start:at], False), (match, True)]
            start = at + len(match)
        at += len(match) or 1
    return [*parts, (text[start:], False)]
