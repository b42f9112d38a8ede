"""`read_tokenizer`: a checkpoint's folder to a TokenizerSpec."""

from __future__ import annotations

import ctypes
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

from smolexport.errors import TokenizerError
from smolexport.model.source_files import file_in
from smolexport.text import show
from smolexport.tokenizer.derive import last_ranks
from smolexport.tokenizer.files import Companions, read_companions, read_tokenizer_json, refuse
from smolexport.tokenizer.spec import AddedToken, TokenizerKind, TokenizerSpec, TokenKind
from smolexport.tokenizer.special import read_special, read_templates
from smolexport.tokenizer.structure import Structure, recognise
from smolexport.tokenizer.vocabulary import Vocabulary, read_vocabulary

PROBES = ("a", "A", "0", " ", "的")  # a small vocabulary may lack some of them
PIECES = frozenset("aA0 的▁ĠçļĦ")  # what they are made of, as characters and as bytes


def read_tokenizer(folder: Path, vocab_size: int) -> TokenizerSpec:
    """Read the tokenizer of the checkpoint in `folder` for a model with `vocab_size` rows of embedding.

    Raises TokenizerError, one line naming the file, for everything that is missing, damaged or not understood.
    """
    path = file_in(folder, "tokenizer.json")
    if path is None:
        path = folder / "tokenizer.json"
        raise refuse(path, "the file does not exist", "save the checkpoint's fast tokenizer there (save_pretrained)")
    companions = read_companions(folder)
    structure, vocabulary, excerpt = _read(path, companions, vocab_size)
    _give_back()
    templates = read_templates(companions)
    ids = {
        text: index
        for index, (text, kind) in enumerate(zip(vocabulary.tokens, vocabulary.kinds, strict=True))
        if kind is not TokenKind.UNUSED
    }
    special = read_special(companions, ids, vocab_size, templates.default)
    before, after = _framing(path, excerpt, vocabulary)
    bos, add_bos = _frame(path, "before", before, special.bos)
    eos, add_eos = _frame(path, "after", after, special.eos)
    scores, unbuilt = _scores(vocabulary) if structure.kind is TokenizerKind.CHARACTERS else ((), ())
    return TokenizerSpec(
        kind=structure.kind,
        tokens=vocabulary.tokens,
        kinds=vocabulary.kinds,
        merges=vocabulary.merges,
        pre_tokenizer=structure.pre_tokenizer,
        scores=scores,
        normalizer=structure.normalizer,
        ignore_merges=vocabulary.ignore_merges,
        cuts_words=structure.cuts_words,
        space_prefix=structure.space_prefix,
        unbuilt=unbuilt,
        added=tuple(sorted(vocabulary.merged.added, key=lambda token: token.id)),
        beside=vocabulary.merged.beside,
        left_out=vocabulary.merged.left_out,
        bos=bos,
        eos=eos,
        eot=special.eot,
        pad=special.pad,
        unk=special.unk if special.unk is not None else vocabulary.unknown,
        add_bos=add_bos,
        add_eos=add_eos,
        stop_tokens=special.stop_tokens if eos is None else special.stop_tokens | {eos},
        chat_template=templates.default,
        chat_templates=MappingProxyType(dict(templates.named)),
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


def _give_back() -> None:
    """Have the C library return what is freed to the system, where it has to be told (glibc)."""
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)):
        trim(0)


def _excerpt(document: dict[str, Any], vocabulary: Vocabulary) -> str:
    """tokenizer.json with as much of the vocabulary as encodes PROBES, so that the library needs little memory."""
    listed = document["model"]["vocab"]
    vocab = {text: i for text, i in listed.items() if PIECES.issuperset(text) or text.startswith("<0x")}
    if vocabulary.unknown is not None:
        vocab[document["model"]["unk_token"]] = vocabulary.unknown
    free = len(listed)
    for token in vocabulary.merged.added:  # their ids as the library gives them
        vocab[token.text] = listed.get(token.text, free)
        free = max(free, vocab[token.text] + 1)
    merges = [pair for pair in vocabulary.merges if pair[0] in vocab and pair[1] in vocab and "".join(pair) in vocab]
    return json.dumps(document | {"model": document["model"] | {"vocab": vocab, "merges": merges}})


def load_library(path: Path, beside: Sequence[AddedToken], excerpt: str | None = None) -> Any:
    """The tokenizers library's own object for a tokenizer.json and the tokens beside it; no truncation, no padding.

    `excerpt`: JSON that stands for the file.
    Raises TokenizerError for whatever the library raises: it has no exception types of its own.
    """
    import tokenizers

    with _library_failures(path, "is refused by tokenizers"):
        library = tokenizers.Tokenizer
        tokenizer = library.from_file(str(path)) if excerpt is None else library.from_str(excerpt)
        tokenizer.no_truncation()
        tokenizer.no_padding()
        if beside:  # an empty list would rebuild its index of added tokens too
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
    """Ids that encoding puts before and after a text, and a check that the library agrees with the file's ids.

    Where the excerpt will not do, the whole file decides.
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
    """The special token that stands `where`, and whether it is added.  Raises TokenizerError."""
    if not ids:
        return known, False
    if len(ids) > 1 or known not in (None, ids[0]):
        name = "bos" if where == "before" else "eos"
        found = f"post_processor puts the ids {show(ids)} {where} the text, and {name}_token_id is {known}"
        raise refuse(path, found, f"only the {name} token can stand there")
    return ids[0], True


def _scores(vocabulary: Vocabulary) -> tuple[tuple[float, ...], tuple[int, ...]]:
    """Scores [v] that order the tokens as the merges do, and the ids of normal tokens that no merge builds."""
    ranks = last_ranks(vocabulary.tokens, vocabulary.kinds, vocabulary.merges)
    lowest = len(vocabulary.merges)
    scores: list[float] = []
    unbuilt: list[int] = []
    for index, kind in enumerate(vocabulary.kinds):
        if kind is not TokenKind.NORMAL:
            scores.append(0.0)
            continue
        if index not in ranks:
            unbuilt.append(index)
        rank = ranks.get(index, lowest)
        scores.append(-float(lowest if rank < 0 else rank))
    return tuple(scores), tuple(unbuilt)
