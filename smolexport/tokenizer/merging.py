"""Tokens that stand beside tokenizer.json, merged into it as transformers 5 does when it loads the folder.

| file | what counts |
|---|---|
| tokenizer_config.json | `added_tokens_decoder`, the texts of special tokens, the extra special tokens |
| special_tokens_map.json, added_tokens.json | the same, but only where the first has no `added_tokens_decoder` |

transformers hands the library one list: tokens with an id in its order, then special tokens, then extra ones.  A token
that the library knows with the same flags stays, one that it knows otherwise gets these flags, and a new one gets the
next free id, whatever id its file names.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from smolexport.text import show
from smolexport.tokenizer.files import (
    ADDED,
    CONFIG,
    MAP,
    Companions,
    boolean,
    content,
    mapping,
    refuse,
    sequence,
    string,
)
from smolexport.tokenizer.spec import AddedToken

ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
EXTRA = ("extra_special_tokens", "additional_special_tokens")
SHOWN = 3  # tokens that a note names


@dataclass(frozen=True)
class Merged:
    """The added tokens of a folder.

    Attributes:
        added: all of them.
        beside: those that tokenizer.json lacks or has with other flags, in the order in which the library takes them.
        left_out: texts of those for which the model has no row.
        notes: what was merged, left out or not read, a line for each file.
    """

    added: tuple[AddedToken, ...]
    beside: tuple[AddedToken, ...]
    left_out: tuple[str, ...]
    notes: tuple[str, ...]


class Find(NamedTuple):
    """A token that a file names; `token.id` is what that file claims, -1 where it claims none."""

    file: str
    token: AddedToken


def reads_all(companions: Companions) -> bool:
    """Whether transformers also reads special_tokens_map.json and added_tokens.json."""
    return companions.files[CONFIG].get("added_tokens_decoder") is None


def merge(companions: Companions, listed: Mapping[str, int], own: Sequence[AddedToken], vocab_size: int) -> Merged:
    """Merge what stands beside tokenizer.json into its added tokens `own`; `listed` is its model.vocab.

    Raises:
        TokenizerError: a file is not understood, or gives a token another id than tokenizer.json.
    """
    known = {token.text: token for token in own}
    free = max([len(listed), *(token.id + 1 for token in own)])
    beside: dict[str, Find] = {}
    beyond: dict[str, Find] = {}
    doubts: list[str] = []
    for find in _offered(companions, own):
        text = find.token.text
        found = known.get(text)
        index = found.id if found else listed.get(text, free)
        if (found or text in listed) and text not in beside and find.token.id not in (-1, index):
            doubts += _other_id(companions, find, index)
        token = replace(find.token, id=index)
        if not text or token == found:
            continue
        if index >= vocab_size:
            beyond[text] = find
            continue
        free += not (found or text in listed)
        known[text] = token
        beside.setdefault(text, find)
    notes = [
        *(f"{file}: tokens that tokenizer.json lacks, or has with other flags, were added as transformers does: {named}"
          for file, named in _by_file(beside.values(), known)),
        *(f"{file}: tokens that tokenizer.json lacks, and the model has no row for, are left out: {named}"
          for file, named in _by_file(beyond.values())),
        *doubts,
        *_unread(companions, known.keys() | listed.keys() | beyond.keys()),
    ]  # fmt: skip
    return Merged(tuple(known.values()), tuple(known[text] for text in beside), tuple(beyond), tuple(notes))


def _offered(companions: Companions, own: Sequence[AddedToken]) -> Iterator[Find]:
    """What transformers hands to the library, in its order; a text may come twice, with other flags."""
    named = _named(companions)
    special = {find.token.text: find.file for find in named}
    if reads_all(companions):
        by_id = [*_added(companions), *(Find("tokenizer.json", token) for token in own)]
    else:
        by_id = _decoder(companions, special)
    # of two with one id the last counts
    order = [find for _, find in sorted({find.token.id: find for find in by_id}.items())]
    seen = {token.text for token in own} | {find.token.text for find in order}
    for find in (*order, *(find for find in (*named, *_extra(companions, special)) if find.token.text not in seen)):
        forced = not find.token.special and find.token.text in special
        file = special[find.token.text] if forced else find.file
        yield Find(file, replace(find.token, special=find.token.special or forced))


def _read(companions: Companions) -> tuple[dict[str, Any], dict[str, Any]]:
    """tokenizer_config.json, and special_tokens_map.json where it is read."""
    return companions.files[CONFIG], companions.files[MAP] if reads_all(companions) else {}


def _named(companions: Companions) -> list[Find]:
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
            found.append(_find(companions, file, key, value, special=True))
    for file, listed in ((CONFIG, _listed(config)), (MAP, others.get(EXTRA[0]))):
        if isinstance(listed, dict):
            found += [_find(companions, file, show(key), value, special=True) for key, value in listed.items()]
    return found


def _listed(config: Mapping[str, Any]) -> Any:
    return config.get(EXTRA[0]) or config.get(EXTRA[1])


def _extra(companions: Companions, special: Collection[str]) -> list[Find]:
    """Special tokens without a role."""
    config, others = _read(companions)
    lists = [(CONFIG, _listed(config)), (MAP, others.get(EXTRA[0]))]
    if all(isinstance(value, dict) for value in (others.get(EXTRA[0], {}), *(config.get(key, {}) for key in EXTRA))):
        lists.append((MAP, others.get(EXTRA[1])))
    found = []
    for file, listed in lists:
        if listed is not None and not isinstance(listed, dict):
            for value in sequence(companions.folder / file, EXTRA[0], listed):
                forced = file == MAP or content(value) in special
                found.append(_find(companions, file, f"an entry of {EXTRA[0]}", value, special=forced))
    return found


def _decoder(companions: Companions, special: Collection[str]) -> list[Find]:
    path = companions.folder / CONFIG
    found = []
    for key, value in mapping(path, "added_tokens_decoder", companions.files[CONFIG]["added_tokens_decoder"]).items():
        if not key.isdecimal() or len(key) > 9:
            raise refuse(path, f"added_tokens_decoder has the id {show(key)}", "ids are whole numbers from 0 on")
        name = f"added token {show(key)}"
        forced = content(mapping(path, name, value)) in special
        found.append(_find(companions, CONFIG, name, value, special=forced, index=int(key)))
    return found


def _added(companions: Companions) -> list[Find]:
    """What added_tokens.json adds; it knows no flags.

    transformers looks for special tokens here before it makes tokens of the objects in tokenizer_config.json, and so
    finds only texts there.
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
        string(companions.folder / ADDED, "a token", text)
        found.append(Find(ADDED, AddedToken(index, text, text in special, text not in special)))
    return found


def _find(companions: Companions, file: str, name: str, value: Any, *, special: bool, index: int = -1) -> Find:
    """A token from its text or from an object with flags.  `special`: it is, whatever these say."""
    path = companions.folder / file
    if not isinstance(value, dict):
        return Find(file, AddedToken(index, string(path, name, value), special=True, normalized=False))
    text = string(path, name, value.get("content"))
    special = special or boolean(path, f"special of {name}", value.get("special", False))
    defaults = {"normalized": not special, "lstrip": False, "rstrip": False, "single_word": False}
    flags = {key: boolean(path, f"{key} of {name}", value.get(key, usual)) for key, usual in defaults.items()}
    return Find(file, AddedToken(index, text, special, **flags))


def _other_id(companions: Companions, find: Find, index: int) -> Iterator[str]:
    """A file that gives a token of tokenizer.json another id: refused where flags come with it, else noted."""
    found = f"token {show(find.token.text)} has id {find.token.id}, but {index} in tokenizer.json"
    if find.file != ADDED:
        path = companions.folder / find.file
        raise refuse(path, found, "the two files belong to different tokenizers; download them again")
    yield f"{ADDED}: {found}, which counts"


def _unread(companions: Companions, texts: Collection[str]) -> Iterator[str]:
    """Tokens of files that transformers does not read, as far as nothing else names them."""
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


def _by_file(finds: Iterable[Find], known: Mapping[str, AddedToken] | None = None) -> Iterator[tuple[str, str]]:
    """(file, its tokens in words, with the ids in `known`)."""
    files: dict[str, list[str]] = {}
    for file, token in finds:
        words = show(token.text)
        if known is not None:
            index = known[token.text].id
            words += f" ({index})" if token.id in (-1, index) else f" ({index}, not {token.id})"
        files.setdefault(file, []).append(words)
    yield from ((file, few(listed)) for file, listed in files.items())


def few(words: Sequence[str]) -> str:
    """The first of `words`, and how many more."""
    more = f" and {len(words) - SHOWN} more" if len(words) > SHOWN else ""
    return ", ".join(words[:SHOWN]) + more
