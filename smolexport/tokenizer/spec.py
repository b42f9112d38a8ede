"""What a tokenizer is, as frozen data without any format's names or numbers.

Notation: v = the model's vocab_size.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from functools import cached_property
from types import MappingProxyType
from typing import overload

LONGEST = 512  # characters; a longer token counts as not built, so that a hostile file cannot make us work forever


class TokenizerKind(Enum):
    """How text becomes the first symbols that the merges work on."""

    BYTES = "bpe"  # each UTF-8 byte stands for one printable character (GPT-2)
    CHARACTERS = "spm"  # characters with "▁" for a space; unknown ones fall back to <0xXX> tokens (SentencePiece)


class TokenKind(Enum):
    """What a token is for."""

    NORMAL = "normal"
    UNKNOWN = "unknown"
    CONTROL = "control"  # an added token marked special
    USER = "user"  # an added token that is ordinary text
    UNUSED = "unused"  # an id of the model that the tokenizer does not know
    BYTE = "byte"


class PreTokenizer(Enum):
    """How text is cut before merging, recognised from the structure in tokenizer.json."""

    NONE = "no cutting"
    GPT2 = "the GPT-2 pattern"
    DIGITS_GPT2 = "single digits, then the GPT-2 pattern"
    LLAMA3 = "the Llama-3 pattern (up to three digits together)"
    QWEN2 = "the Qwen-2 pattern (single digits)"
    QWEN35 = "the Qwen-3.5 pattern (letters together with their marks)"


class Normalizer(Enum):
    """What happens to the text before it is cut, apart from the handling of spaces."""

    NONE = "none"
    NFC = "NFC"


class SpacePrefix(Enum):
    """Where a tokenizer of kind CHARACTERS puts a space of its own."""

    NEVER = "never"
    FIRST = "before the text, unless a space or a special token opens it"
    MISSING = "before each stretch between special tokens, unless a space opens it"
    ALWAYS = "before each stretch between special tokens"


@dataclass(frozen=True)
class AddedToken:
    """A token that is looked for in the text itself, before normal tokenization."""

    id: int
    text: str
    special: bool
    normalized: bool
    lstrip: bool = False  # takes the white space before it
    rstrip: bool = False  # takes the white space behind it
    single_word: bool = False  # is not found within a word

    def flags(self) -> dict[str, bool]:
        """How it is looked for, under the names of tokenizer.json."""
        return {
            "single_word": self.single_word,
            "lstrip": self.lstrip,
            "rstrip": self.rstrip,
            "normalized": self.normalized,
            "special": self.special,
        }


class Pairs(Sequence[tuple[str, str]]):
    """Pairs of tokens, held as their ids: as tuples they would be most of a tokenizer's memory."""

    def __init__(self, tokens: Sequence[str], left: array[int], right: array[int]) -> None:
        self._tokens, self._left, self._right = tokens, left, right

    def __len__(self) -> int:
        return len(self._left)

    def __iter__(self) -> Iterator[tuple[str, str]]:
        text = self._tokens.__getitem__
        return zip(map(text, self._left), map(text, self._right), strict=True)

    @overload
    def __getitem__(self, index: int) -> tuple[str, str]: ...
    @overload
    def __getitem__(self, index: slice) -> Pairs: ...
    def __getitem__(self, index: int | slice) -> tuple[str, str] | Pairs:
        if isinstance(index, slice):
            return Pairs(self._tokens, self._left[index], self._right[index])
        return self._tokens[self._left[index]], self._tokens[self._right[index]]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and tuple(self) == tuple(other)

    def __hash__(self) -> int:
        return hash(tuple(self))


@dataclass(frozen=True)
class TokenizerSpec:
    """A tokenizer as its checkpoint defines it.

    Attributes:
        kind: Byte-level or character-level.
        tokens: [v] texts by id, in the form of tokenizer.json ("Ġ" or "▁" for a space); all different, none empty.
        kinds: [v] what each is for.
        merges: Pairs in order of precedence, without duplicates.
        pre_tokenizer: How the text is cut.
        normalizer: What precedes the cutting.
        ignore_merges: A piece that is a token is taken whole, without looking at the merges.
        cuts_words: For CHARACTERS: pieces end before each space, so that no merge crosses one.
        space_prefix: For CHARACTERS: where a space is added.
        added: Tokens looked for in the text, by id.
        beside: Those of them that tokenizer.json lacks or has with other flags, in the order in which the library is
            to take them.
        left_out: Texts of tokens that other files name and for which the model has no row.
        bos, eos, eot, pad, unk: Ids of the special tokens, None where the checkpoint names none; `eot` is the
            token that ends a turn of the chat template.
        add_bos, add_eos: What encoding a text really does.
        stop_tokens: Ids that end a generation.
        chat_template: Jinja text of the default template.
        chat_templates: The other templates by name.
        notes: Things a person should know, one line each.
    """

    kind: TokenizerKind
    tokens: tuple[str, ...]
    kinds: tuple[TokenKind, ...]
    merges: Sequence[tuple[str, str]]
    pre_tokenizer: PreTokenizer
    normalizer: Normalizer = Normalizer.NONE
    ignore_merges: bool = False
    cuts_words: bool = False
    space_prefix: SpacePrefix = SpacePrefix.NEVER
    added: tuple[AddedToken, ...] = ()
    beside: tuple[AddedToken, ...] = ()
    left_out: tuple[str, ...] = ()
    bos: int | None = None
    eos: int | None = None
    eot: int | None = None
    pad: int | None = None
    unk: int | None = None
    add_bos: bool = False
    add_eos: bool = False
    stop_tokens: frozenset[int] = frozenset()
    chat_template: str | None = None
    chat_templates: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    notes: tuple[str, ...] = ()

    @property
    def add_space_prefix(self) -> bool:
        """Whether the tokenizer ever adds a space in front of a text."""
        return self.space_prefix is not SpacePrefix.NEVER

    @cached_property
    def unbuilt(self) -> tuple[int, ...]:
        """Ids of the normal tokens that the merges do not build from the token's own text."""
        ranks = last_ranks(self.tokens, self.kinds, self.merges)
        return tuple(i for i, kind in enumerate(self.kinds) if kind is TokenKind.NORMAL and i not in ranks)

    @cached_property
    def scores(self) -> tuple[float, ...]:
        """[v] for CHARACTERS: SentencePiece's scores that order the tokens as the merges do, higher first."""
        ranks, lowest = last_ranks(self.tokens, self.kinds, self.merges), len(self.merges)

        def score(index: int) -> float:
            rank = ranks.get(index, lowest)
            return -float(lowest if rank < 0 else rank)

        return tuple(score(i) if kind is TokenKind.NORMAL else 0.0 for i, kind in enumerate(self.kinds))


def last_ranks(tokens: Sequence[str], kinds: Sequence[TokenKind], merges: Sequence[tuple[str, str]]) -> dict[int, int]:
    """For each normal token that the merges build from its own text: the rank of the last one, -1 for a character.

    A trained or converted tokenizer builds all its normal tokens this way.  Only then do these rules give the same
    tokens for every text:

    * taking a piece whole because it is a token (`ignore_merges`), and merging it;
    * merging any two neighbours whose join is a token, best score first (SentencePiece, llama.cpp), and merging only
      the listed pairs, first listed first (tokenizers).  Proof: let t = a + b be built by the merges.  If t could also
      appear as neighbours a' + b' with another border, then the merge across that border in t's own history would have
      been possible earlier, and better than all others inside t; nothing outside t can have prevented it, since no
      merge crossed t's edges.  So each token has one history, and the rank of its last merge orders the tokens as the
      list orders the pairs.
    """
    ranks = {pair: rank for rank, pair in enumerate(merges)}
    alphabet = {text for text, kind in zip(tokens, kinds, strict=True) if kind is TokenKind.NORMAL and len(text) == 1}
    found: dict[int, int] = {}
    for index, (text, kind) in enumerate(zip(tokens, kinds, strict=True)):
        if kind is TokenKind.NORMAL and (rank := _last_rank(text, ranks, alphabet)) is not None:
            found[index] = rank
    return found


def _last_rank(text: str, ranks: Mapping[tuple[str, str], int], alphabet: set[str]) -> int | None:
    """The rank of the merge that completes `text`, -1 if there is nothing to merge, None if it stays in parts."""
    if len(text) > LONGEST or not alphabet.issuperset(text):
        return None
    parts = list(text)
    last = -1
    absent = len(ranks)
    while len(parts) > 1:
        best, where = absent, 0
        for at in range(len(parts) - 1):
            rank = ranks.get((parts[at], parts[at + 1]), absent)
            if rank < best:
                best, where = rank, at
        if best == absent:
            return None
        parts[where : where + 2] = [parts[where] + parts[where + 1]]
        last = best
    return last
