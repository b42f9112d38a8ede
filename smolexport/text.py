"""Text of strangers made safe to show: the one place for the terminal, for messages and for reports.

A name from somebody's file can hold what a terminal obeys (ESC, U+009B), what reorders a line (U+202E), what hides in
it (U+200B), and a megabyte of it.  Such characters are shown as Python's escapes, and what is long loses its middle.
"""

from __future__ import annotations

from collections.abc import Sequence
from unicodedata import category

VALUE, NAME, REASON = 80, 120, 160  # most characters of a part of a message
MESSAGE = 1000  # of a whole one: the last defence, parts are shortened where the message is made
JOINERS = "\u200c\u200d"  # letters of Persian and Indic words, and parts of emoji


def printable(text: str, limit: int | None = None) -> str:
    r"""`text` on one line, with escapes (`\x1b`, `\u202e`) for line ends and for all that is not seen as itself.

    Those are control and format characters, halves of surrogate pairs, private and unassigned characters.

    Args:
        text: whatever a stranger wrote.
        limit: most characters; None = all.
    """
    return _cut(_escaped(_cut(text, limit), ""), limit)


def prose(text: str) -> str:
    """`text` of several lines, or a piece of one, as `printable` makes it but for line ends, tabs and joiners."""
    return _escaped(text, "\n\t" + JOINERS)


def one_line(message: str) -> str:
    """A whole message, `printable` and not too long for a terminal; line ends become spaces."""
    return printable(" ".join(message.splitlines()), MESSAGE)


def label(name: str) -> str:
    """A stranger's name for a message: `printable` and short."""
    return printable(name, NAME)


def show(value: object, limit: int = VALUE) -> str:
    """`value` for a message: in quotes where it is text, on one short line."""
    try:
        text = repr(_cut(value, limit - 2) if isinstance(value, str) else value)
    except (RecursionError, ValueError):  # too deep, or an integer of thousands of digits
        text = f"a {type(value).__name__} too large to print"
    return printable(text, limit)


def few(words: Sequence[object], most: int = 3, between: str = ", ") -> str:
    """The first of `words`, and how many more there are."""
    more = f" and {len(words) - most} more" if len(words) > most else ""
    return between.join(map(str, words[:most])) + more


def reason(error: BaseException) -> str:
    """What a foreign error says, on one short line; its class where it says nothing."""
    return printable(" ".join(str(error).split()) or type(error).__name__, REASON)


def failure(error: BaseException) -> str:
    """`reason`, after the error's class: some libraries say `index` and mean an IndexError."""
    return f"{type(error).__name__}: {reason(error)}"


def first_line(error: BaseException) -> str:
    """As `reason`, of the first line alone: what libraries add is addresses, advice and tracebacks."""
    return printable((str(error).strip().splitlines() or [type(error).__name__])[0], REASON)


def _escaped(text: str, kept: str) -> str:
    return text if text.isprintable() else "".join(c if c in kept or _is_seen(c) else _escape(c) for c in text)


def _is_seen(character: str) -> bool:
    return character.isprintable() or category(character) == "Zs"  # the spaces of French and Japanese


def _escape(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")


def _cut(text: str, limit: int | None) -> str:
    """Head and tail of a `text` beyond the limit: a message's tail says what to do."""
    if limit is None or len(text) <= limit:
        return text
    tail = limit // 3
    return f"{text[: limit - tail - 1]}…{text[len(text) - tail :]}"
