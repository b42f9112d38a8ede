"""`read_tokenizer`: a checkpoint's folder to a TokenizerSpec.

| what | where, first found wins |
|---|---|
| bos, eos, unk, pad | text in tokenizer_config, special_tokens_map (that first where transformers reads it); |
| | id in generation_config, config (all .json) |
| stop tokens | every eos id of generation_config.json and config.json, the tokenizer's eos, the chat's end token |
| templates | chat_template.jinja with additional_chat_templates/, chat_template.json, tokenizer_config.json |
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

from smolexport.errors import TokenizerError
from smolexport.heap import give_back_heap
from smolexport.model.source_files import file_in, files_in
from smolexport.text import show
from smolexport.tokenizer.added_tokens import reads_all
from smolexport.tokenizer.files import (
    CONFIG,
    ID_FILES,
    MAP,
    Companions,
    read_companions,
    read_text,
    read_tokenizer_json,
    refuse,
    typed,
)
from smolexport.tokenizer.spec import AddedToken, TokenizerSpec, TokenKind
from smolexport.tokenizer.structure import Structure, recognise
from smolexport.tokenizer.vocabulary import Vocabulary, read_vocabulary

PROBES = ("a", "A", "0", " ", "的")  # a small vocabulary may lack some of them
PIECES = frozenset("aA0 的▁ĠçļĦ")  # what they are made of, as characters and as bytes
# Texts by which the families end a turn; only one that the template writes, or that a config stops at, is taken.
TURN_ENDS = ("<|im_end|>", "<|eot_id|>", "<|end|>", "<end_of_turn>", "<|eot|>", "<|endofturn|>", "<end_of_utterance>")


def read_tokenizer(folder: Path, vocab_size: int) -> TokenizerSpec:
    """Read the tokenizer of the checkpoint in `folder` for a model whose embedding has `vocab_size` rows.

    Raises TokenizerError, one line naming the file, for everything that is missing, damaged or not understood.
    """
    path = file_in(folder, "tokenizer.json")
    if path is None:
        path = folder / "tokenizer.json"
        raise refuse(path, "the file does not exist", "save the checkpoint's fast tokenizer there (save_pretrained)")
    companions = read_companions(folder)
    structure, vocabulary, excerpt = _read(path, companions, vocab_size)
    give_back_heap()
    template, templates = _read_templates(companions)
    ids = {
        text: index
        for index, (text, kind) in enumerate(zip(vocabulary.tokens, vocabulary.kinds, strict=True))
        if kind is not TokenKind.UNUSED
    }
    roles = {role: _special_id(companions, role, ids, vocab_size) for role in ("bos", "eos", "unk", "pad")}
    eot, stops = _stop_tokens(companions, ids, vocab_size, template)
    before, after = _framing(path, excerpt, vocabulary)
    bos, add_bos = _frame(path, "before", before, roles["bos"])
    eos, add_eos = _frame(path, "after", after, roles["eos"])
    return TokenizerSpec(
        **vars(structure),
        tokens=vocabulary.tokens,
        kinds=vocabulary.kinds,
        merges=vocabulary.merges,
        ignore_merges=vocabulary.ignore_merges,
        added=tuple(sorted(vocabulary.merged.added, key=lambda token: token.id)),
        beside=vocabulary.merged.beside,
        left_out=vocabulary.merged.left_out,
        bos=bos,
        eos=eos,
        eot=eot,
        pad=roles["pad"],
        unk=roles["unk"] if roles["unk"] is not None else vocabulary.unknown,
        add_bos=add_bos,
        add_eos=add_eos,
        stop_tokens=frozenset(stops | {index for index in (eos, eot) if index is not None}),
        chat_template=template,
        chat_templates=MappingProxyType(templates),
        notes=vocabulary.merged.notes,
    )


def _read(path: Path, companions: Companions, vocab_size: int) -> tuple[Structure, Vocabulary, str | None]:
    """What tokenizer.json says, and an excerpt of it; the parsed file, several times its size, is dropped here."""
    document = read_tokenizer_json(path)
    structure = recognise(path, document)
    model = document.get("model")
    merges = model.get("merges") if isinstance(model, dict) else None
    mixed = isinstance(merges, list) and len(set(map(type, merges))) > 1  # which the library refuses
    vocabulary = read_vocabulary(path, document, structure.kind, companions, vocab_size)
    return structure, vocabulary, None if mixed else _excerpt(document, vocabulary)


def _excerpt(document: dict[str, Any], vocabulary: Vocabulary) -> str:
    """tokenizer.json with only the tokens that PROBES need, so that the library needs little memory."""
    listed = document["model"]["vocab"]
    vocab = {text: i for text, i in listed.items() if PIECES.issuperset(text) or text.startswith("<0x")}
    if vocabulary.unknown is not None:
        vocab[document["model"]["unk_token"]] = vocabulary.unknown
    free = len(listed)
    for token in vocabulary.merged.added:  # with the ids that the library gives them
        vocab[token.text] = listed.get(token.text, free)
        free = max(free, vocab[token.text] + 1)
    merges = [pair for pair in vocabulary.merges if pair[0] in vocab and pair[1] in vocab and "".join(pair) in vocab]
    return json.dumps(document | {"model": document["model"] | {"vocab": vocab, "merges": merges}})


def load_library(path: Path, beside: Sequence[AddedToken], excerpt: str | None = None) -> Any:
    """The tokenizers library's own object for a tokenizer.json and the tokens beside it; no truncation, no padding.

    `excerpt`: JSON that replaces the file's.
    Raises TokenizerError for whatever the library raises: it has no exception types of its own.
    """
    import tokenizers

    with _library_failures(path, "is refused by tokenizers"):
        library = tokenizers.Tokenizer
        tokenizer = library.from_file(str(path)) if excerpt is None else library.from_str(excerpt)
        tokenizer.no_truncation()
        tokenizer.no_padding()
        if beside:  # even an empty list would make it rebuild its index of added tokens
            tokenizer.add_tokens([tokenizers.AddedToken(token.text, **token.flags()) for token in beside])
    return tokenizer


@contextmanager
def _library_failures(path: Path, found: str) -> Iterator[None]:
    """Whatever the tokenizers library raises within becomes a TokenizerError; interruptions pass."""
    try:
        yield
    except BaseException as error:
        # A panic inside the library derives from BaseException and its class cannot be imported.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise refuse(path, f"{found} ({show(str(error), 160)})", "download the file again") from None


def _framing(path: Path, excerpt: str | None, vocabulary: Vocabulary) -> tuple[list[int], list[int]]:
    """Ids that encoding adds before and after a text, and a check that the library agrees with the file's ids.

    If the excerpt fails, the whole file decides.
    """
    try:
        return _probe(path, load_library(path, vocabulary.merged.beside, excerpt), vocabulary)
    except TokenizerError:
        if excerpt is None:
            raise
    return _framing(path, None, vocabulary)


def _probe(path: Path, tokenizer: Any, vocabulary: Vocabulary) -> tuple[list[int], list[int]]:
    with _library_failures(path, "cannot encode"):
        encoded = [tokenizer.encode(probe, add_special_tokens=False).ids for probe in PROBES]
        bare, probe = next(((ids, text) for ids, text in zip(encoded, PROBES, strict=True) if ids), ([], ""))
        framed: list[int] = tokenizer.encode(probe).ids
        wrong = [token for token in vocabulary.merged.added if tokenizer.token_to_id(token.text) != token.id]
    if wrong:
        found = f"tokenizers gives the added token {show(wrong[0].text)} another id than the file's {wrong[0].id}"
        raise refuse(path, found, "list the added tokens in the order of their ids, without gaps after model.vocab")
    if max(framed, default=0) >= (size := len(vocabulary.tokens)):
        raise refuse(path, f"post_processor adds the id {max(framed)}, but vocab_size is {size}", "correct the id")
    if framed and not bare:
        raise refuse(path, f"encodes none of {show(PROBES)}", "is it the vocabulary of a language model?")
    for start in range(len(framed) - len(bare) + 1):
        if framed[start : start + len(bare)] == bare:
            return framed[:start], framed[start + len(bare) :]
    found = f"post_processor turns the ids {show(bare)} into {show(framed)}"
    raise refuse(path, found, "only BOS and EOS can be added")


def _frame(path: Path, where: str, ids: list[int], known: int | None) -> tuple[int | None, bool]:
    """The special token before or after a text, and whether encoding adds it."""
    if not ids:
        return known, False
    if len(ids) > 1 or known not in (None, ids[0]):
        name = "bos" if where == "before" else "eos"
        found = f"post_processor puts the ids {show(ids)} {where} the text, and {name}_token_id is {known}"
        raise refuse(path, found, f"only the {name} token can stand there")
    return ids[0], True


def _special_id(companions: Companions, role: str, ids: Mapping[str, int], vocab_size: int) -> int | None:
    """Id of the token with a role; `ids` maps the tokenizer's texts."""
    key = f"{role}_token"
    for name in (MAP, CONFIG) if reads_all(companions) else (CONFIG, MAP):
        value = companions.files[name].get(key)
        if value is not None:
            value = value.get("content") if isinstance(value, dict) else value
            text = typed(companions.folder / name, key, value, str)
            if text in ids:
                return ids[text]
    listed = [index for name in ID_FILES for index in _config_ids(companions, name, role, vocab_size)]
    return listed[0] if listed else None


def _stop_tokens(
    companions: Companions, ids: Mapping[str, int], vocab_size: int, template: str | None
) -> tuple[int | None, set[int]]:
    """The token that ends a turn of the chat, and the end tokens of the configs."""
    stops = {index for name in ID_FILES for index in _config_ids(companions, name, "eos", vocab_size)}
    ends = [ids[text] for text in TURN_ENDS if text in ids and (text in (template or "") or ids[text] in stops)]
    return ends[0] if ends else None, stops


def _config_ids(companions: Companions, name: str, role: str, vocab_size: int) -> list[int]:
    """The ids under one key, a number or a list; negative ones mean none."""
    key, path = f"{role}_token_id", companions.folder / name
    value = companions.files[name].get(key)
    listed = value if isinstance(value, list) else [] if value is None else [value]
    for index in listed:
        if type(index) is not int:
            raise refuse(path, f"{key} is {show(value)}", "it must be an id, a list of ids, or null")
        if index >= vocab_size:
            raise refuse(path, f"{key} {show(index)} is outside the vocabulary of {vocab_size}", "correct the id")
    return [index for index in listed if index >= 0]


def _read_templates(companions: Companions) -> tuple[str | None, dict[str, str]]:
    """The default chat template, and the others by name."""
    folder = companions.folder
    if jinja := file_in(folder, "chat_template.jinja"):
        extra = files_in(folder, "additional_chat_templates/*.jinja")
        return read_text(jinja), {file.stem: read_text(file) for file in extra}
    path = file_in(folder, "chat_template.json")
    document = read_tokenizer_json(path) if path else companions.files[CONFIG]
    path, value = path or folder / CONFIG, document.get("chat_template")
    if value is None or isinstance(value, str):
        return value and typed(path, "chat_template", value, str), {}
    named: dict[str, str] = {}
    for entry in typed(path, "chat_template", value, list):
        item = typed(path, "an entry of chat_template", entry, dict)
        name = typed(path, "the name of a chat template", item.get("name"), str)
        named[name] = typed(path, f"chat template {show(name)}", item.get("template"), str)
    return named.pop("default", None), named
