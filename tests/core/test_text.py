"""Text of strangers: what a terminal would obey, reorder or hide is shown as an escape, and what is long is cut."""

from __future__ import annotations

import sys
import unicodedata

import pytest

from smolexport.errors import SmolexportError, TokenizerError
from smolexport.text import failure, first_line, label, one_line, printable, prose, reason, show

CONTROLS = [*range(0x20), *range(0x7F, 0xA0)]
BIDI = [0x61C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A)]
HIDDEN = [0xAD, 0x200B, 0x2028, 0x2029, 0x2060, 0xFEFF, 0xD800, 0xDFFF, 0xE000, 0xE0041, 0x10FFFF]
ORDINARY = "Größe, naïve, 日本語\u3000かな, العربية, 100\u00a0%, 👍🏽, e\u0301, \\n, [red] `x` | <b>"


@pytest.mark.parametrize("code", [*CONTROLS, *BIDI, *HIDDEN], ids=hex)
def test_what_is_not_seen_as_itself_is_escaped(code: int) -> None:
    shown = printable(f"a{chr(code)}b")
    assert shown.isprintable()
    assert shown.startswith("a\\")
    assert shown.endswith("b")
    assert eval(f"'{shown}'") == f"a{chr(code)}b"
    if chr(code) not in "\n\t":
        assert prose(f"a{chr(code)}b") == shown


def test_no_character_of_any_category_gets_through() -> None:
    everything = printable("".join(map(chr, range(sys.maxunicode + 1))))
    assert not {unicodedata.category(c) for c in everything} & {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}


def test_ordinary_unicode_stays() -> None:
    assert printable(ORDINARY) == prose(ORDINARY) == ORDINARY
    family, persian = "👨\u200d👩\u200d👧", "می\u200cروم"
    assert prose(f"{family}\n\t{persian}") == f"{family}\n\t{persian}"
    assert prose("a\r\nb\x1b]52;c;aGk=\x07") == "a\\r\nb\\x1b]52;c;aGk=\\x07"


@pytest.mark.parametrize("limit", [10, 80, 300])
@pytest.mark.parametrize("text", ["x" * 100_000, "\x1b" * 100_000, "ab\n" * 400])
def test_a_limit_keeps_head_and_tail(text: str, limit: int) -> None:
    shown = printable(f"head{text}tail", limit)
    assert len(shown) <= limit
    assert shown[:2] == "he"
    assert shown[-3:] == "ail"
    assert "…" in shown
    assert printable("x" * limit, limit) == "x" * limit


def test_values_on_one_short_line() -> None:
    assert show("a\x1bb") == "'a\\x1bb'"
    assert show("it's") == '"it\'s"'
    assert show([1, "é"]) == "[1, 'é']"
    assert show(10**5000) == "a int too large to print"
    nested: list[object] = []
    for _ in range(100_000):
        nested = [nested]
    assert show(nested) == "a list too large to print"
    for value in ("x" * 10**6, ["x"] * 10**5, {"k" * 1000: "v"}, b"\xff" * 1000):
        assert len(show(value)) <= 80
    assert len(label("x" * 10**6)) <= 120
    assert show("x" * 1000).count("…") == 1


def test_reasons_of_foreign_errors() -> None:
    assert reason(ValueError("two\nlines\x1b")) == "two lines\\x1b"
    assert reason(KeyError()) == "KeyError"
    assert failure(KeyError("x")) == "KeyError: 'x'"
    assert len(reason(ValueError("x" * 10**6))) <= 300
    assert first_line(ValueError("\none\x1b\ntwo")) == "one\\x1b"
    assert first_line(KeyError()) == "KeyError"
    assert len(first_line(ValueError("x" * 10**6))) <= 300


def test_every_error_is_one_line_of_bounded_length() -> None:
    """Whoever prints it: the command line, a caller's traceback, a report."""
    text = str(TokenizerError("a/b.json: the key '\x1b[2J\u202e' is odd\n  and more; repair it"))
    assert text == "a/b.json: the key '\\x1b[2J\\u202e' is odd   and more; repair it"
    long = str(SmolexportError(f"x.gguf: {'k' * 10**6}; the file is damaged"))
    assert len(long) <= 1000
    assert long.startswith("x.gguf: kkk")
    assert long.endswith("kkk; the file is damaged")
    assert one_line("a\r\nb") == "a b"
    assert str(SmolexportError()) == ""
