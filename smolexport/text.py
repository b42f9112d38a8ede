"""Untrusted text made safe to show, for the terminal, for messages and for reports.

A name from a file may contain what a terminal obeys (ESC, U+009B), what reorders a line (U+202E) or is invisible in it
(U+200B), and may be a megabyte long.  Such characters become Python's escapes, and long text loses its middle.
"""

from __future__ import annotations

from collections.abc import Sequence
from unicodedata import category

VALUE, NAME, REASON = 80, 120, 160  # most characters of a part of a message
MESSAGE = 1000  # of a whole one: the last resort, parts are shortened where the message is made
JOINERS = "\u200c\u200d"  # letters of Persian and Indic words, and parts of emoji


def printable(text: str, limit: int | None = None) -> str:
    r"""`text` on one line of at most `limit` characters, with escapes (`\x1b`, `\u202e`) for what is not visible.

    Those are line ends, control and format characters, surrogates, private and unassigned characters.
    """
    return _cut(_escaped(_cut(text, limit), ""), limit)


def prose(text: str) -> str:
    """`text` of several lines, `printable` except for line ends, tabs and joiners, which are kept."""
    return _escaped(text, "\n\t" + JOINERS)


def one_line(message: str) -> str:
    """A whole message, `printable` and of bounded length; line ends become spaces."""
    return printable(" ".join(message.splitlines()), MESSAGE)


def label(name: str) -> str:
    """An untrusted name for a message: `printable` and short."""
    return printable(name, NAME)


def show(value: object, limit: int = VALUE) -> str:
    """`value` for a message: on one short line, text in quotes."""
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
    """The message of a third-party error on one short line; its class if it has none."""
    return printable(" ".join(str(error).split()) or type(error).__name__, REASON)


def failure(error: BaseException) -> str:
    """`reason`, after the error's class: some libraries raise IndexError with the message `index`."""
    return f"{type(error).__name__}: {reason(error)}"


def first_line(error: BaseException) -> str:
    """Like `reason`, of the first line only: libraries add addresses, advice and tracebacks."""
    return printable((str(error).strip().splitlines() or [type(error).__name__])[0], REASON)


def _escaped(text: str, kept: str) -> str:
    if text.isprintable():
        return text
    visible = (c in kept or c.isprintable() or category(c) == "Zs" for c in text)  # Zs: spaces, as in French, Japanese
    return "".join(
        c if seen else c.encode("unicode_escape").decode("ascii") for c, seen in zip(text, visible, strict=True)
    )


def _cut(text: str, limit: int | None) -> str:
    """Head and tail of a `text` beyond the limit: the tail of a message says what to do."""
    if limit is None or len(text) <= limit:
        return text
    tail = limit // 3
    return f"{text[: limit - tail - 1]}…{text[len(text) - tail :]}"
