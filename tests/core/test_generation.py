"""The generate loop, on a session whose next token is known."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from smolexport.errors import ContextOverflowError, SessionError, UsageError
from smolexport.run.generate import Generation, Piece, StopReason, generate, stream
from smolexport.run.sampling import Sampling
from smolexport.run.session import token_array

END = 256


class ByteCodec:
    """One token per byte, and 256 for the end."""

    stop_tokens = frozenset({END})

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decoder(self) -> ByteDecoder:
        return ByteDecoder()


class ByteDecoder:
    def __init__(self) -> None:
        self.held = b""

    def push(self, token: int) -> str:
        self.held += bytes([token])
        try:
            text = self.held.decode()
        except UnicodeDecodeError:
            return ""
        self.held = b""
        return text

    def flush(self) -> str:
        return self.held.decode(errors="replace")


class ChunkCodec(ByteCodec):
    """Token i is the i-th chunk; the end is one past the last."""

    def __init__(self, chunks: Sequence[str]) -> None:
        self.chunks = chunks
        self.stop_tokens = frozenset({len(chunks)})

    def decoder(self) -> ChunkDecoder:  # type: ignore[override]
        return ChunkDecoder(self.chunks)


class ChunkDecoder:
    def __init__(self, chunks: Sequence[str]) -> None:
        self.chunks = chunks

    def push(self, token: int) -> str:
        return self.chunks[token]

    def flush(self) -> str:
        return ""


class Script:
    """A runtime session that continues any prompt with `script`, whatever is drawn."""

    def __init__(
        self,
        script: Sequence[int],
        codec: ByteCodec | None = None,
        context: int = 1000,
        pause: float = 0,
        second: int = 0,
    ) -> None:
        self.second = second
        self.script, self.codec, self.context, self.pause = list(script), codec or ByteCodec(), context, pause
        self.vocab_size = 300
        self.held: list[int] = []
        self.calls: list[tuple[int, bool]] = []
        self.step = 0

    @property
    def length(self) -> int:
        return len(self.held)

    def append(self, tokens: Sequence[int] | NDArray[np.integer], *, last_only: bool = False) -> NDArray[np.float32]:
        ids = token_array(tokens, held=self.length, context=self.context, vocab_size=self.vocab_size)
        self.calls.append((len(ids), last_only))
        self.held += ids.tolist()
        logits = np.zeros((1, self.vocab_size), np.float32)
        logits[0, self.second] = 4
        logits[0, self.script[self.step]] = 5
        self.step += 1
        time.sleep(self.pause)
        return logits

    def rewind(self, length: int) -> None:
        del self.held[length:]

    def close(self) -> None: ...

    def __enter__(self) -> Script:
        return self

    def __exit__(self, *exc: object) -> None: ...


def test_greedy_until_the_stop_token() -> None:
    session = Script([*b"fine.", END])
    result = generate(session, "So ")
    assert result.text == "fine."
    assert result.tokens == (*b"fine.", END)
    assert result.stop_reason is StopReason.STOP_TOKEN
    assert session.calls == [(3, True)] + [(1, True)] * 5
    assert session.held == list(b"So fine.")
    assert session.length == 3 + len(result.tokens) - 1


def test_max_tokens() -> None:
    session = Script(b"abcdef")
    result = generate(session, [1, 2], max_tokens=4)
    assert (result.text, result.stop_reason) == ("abcd", StopReason.MAX_TOKENS)
    assert len(session.calls) == 4


def test_the_context_ends_it_without_an_error() -> None:
    session = Script(b"abcdef", context=5)
    result = generate(session, [1, 2, 3])
    assert (result.text, result.stop_reason) == ("abc", StopReason.CONTEXT)
    assert session.length == 5


def test_a_prompt_that_fills_the_context_gives_one_token() -> None:
    assert generate(Script(b"abc", context=3), [1, 2, 3]).text == "a"


def test_a_prompt_that_does_not_fit() -> None:
    session = Script(b"abc", context=3)
    with pytest.raises(ContextOverflowError):
        generate(session, [1, 2, 3, 4])
    assert session.calls == []


def test_it_goes_on_where_the_session_stands() -> None:
    session = Script([*b"ab", END])
    session.append([7, 8])
    assert generate(session, [9]).text == "b"
    assert session.held == [7, 8, 9, *b"b"]


def test_stop_tokens_given() -> None:
    session = Script(b"abcdef")
    assert generate(session, "x", stop_tokens=[ord("c")]).text == "ab"
    assert generate(Script([97, END, 98]), "x", stop_tokens=[], max_tokens=1).text == "a"


def test_stop_string_within_and_across_tokens() -> None:
    result = generate(Script(b"one\n\ntwo"), "x", stop=["\n\n"])
    assert (result.text, result.stop_reason) == ("one", StopReason.STOP_STRING)
    assert result.tokens == tuple(b"one\n\n")


def test_text_is_held_back_until_it_is_certain() -> None:
    session = Script([*b"ab<|x<|end|>", END])
    events = list(stream(session, "x", stop=["<|end|>"]))
    assert [e.text for e in events if isinstance(e, Piece)] == list("ab") + ["", "", "<|x"] + [""] * 7
    last = events[-1]
    assert isinstance(last, Generation)
    assert (last.text, last.tail, last.stop_reason) == ("ab<|x", "", StopReason.STOP_STRING)


def test_what_was_held_back_comes_at_the_end() -> None:
    last = list(stream(Script([*b"ab<|", END]), "x", stop=["<|end|>"]))[-1]
    assert isinstance(last, Generation)
    assert (last.text, last.tail, last.stop_reason) == ("ab<|", "<|", StopReason.STOP_TOKEN)


def test_half_a_character_at_the_end() -> None:
    last = generate(Script([97, 0xC3, END]), "x")
    assert (last.text, last.tail) == ("a\ufffd", "\ufffd")


def test_a_stop_text_that_only_the_flush_completes() -> None:
    last = generate(Script([97, 0xC3, END]), "x", stop=["\ufffd"])
    assert (last.text, last.stop_reason) == ("a", StopReason.STOP_STRING)


def first_completed(text: str, stops: list[str]) -> tuple[str, bool]:
    """The definition: letter by letter, cut where the first stop text is complete; the longest if several are."""
    for end in range(1, len(text) + 1):
        ends = [s for s in stops if text[:end].endswith(s)]
        if ends:
            return text[: end - max(map(len, ends))], True
    return text, False


@given(
    st.lists(st.text("ab|", max_size=4), min_size=1, max_size=12),
    st.lists(st.text("ab|", min_size=1, max_size=5), max_size=3),
)
def test_stop_texts_do_not_depend_on_token_boundaries(chunks: list[str], stops: list[str]) -> None:
    events = list(stream(Script([*range(len(chunks)), len(chunks)], ChunkCodec(chunks)), [0], stop=stops))
    last = events[-1]
    assert isinstance(last, Generation)
    text, stopped = first_completed("".join(chunks), stops)
    assert last.text == text
    assert (last.stop_reason is StopReason.STOP_STRING) == stopped
    assert "".join(e.text for e in events if isinstance(e, Piece)) + last.tail == text


def test_stream_has_a_piece_per_token() -> None:
    events = list(stream(Script([*b"abc", END]), "x"))
    assert [e.token for e in events if isinstance(e, Piece)] == [*b"abc", END]
    assert isinstance(events[-1], Generation)
    assert not any(isinstance(e, Generation) for e in events[:-1])


def test_stream_computes_only_what_is_asked_for() -> None:
    session = Script(b"abcdef")
    events = stream(session, "x")
    assert session.calls == []
    next(events)
    next(events)
    assert len(session.calls) == 2


def test_sampling_is_used() -> None:
    # All logits but one are 0: at a high temperature nearly everything drawn is something else.
    hot = generate(
        Script([5] * 21), [1], sampling=Sampling(temperature=100), max_tokens=20, stop_tokens=[], with_text=False
    )
    assert hot.tokens != (5,) * 20
    cold = generate(
        Script([5] * 21), [1], sampling=Sampling(temperature=0.01), max_tokens=20, stop_tokens=[], with_text=False
    )
    assert cold.tokens == (5,) * 20


def test_the_penalty_sees_prompt_and_output() -> None:
    # 10 has 5 everywhere and 20 has 4: halved once seen, 10 falls behind until 20 was seen too.
    session = Script([10, 10, 10], second=20)
    sampling = Sampling(repetition_penalty=2, penalty_window=None)
    result = generate(session, [10], sampling=sampling, max_tokens=3, stop_tokens=[], with_text=False)
    assert result.tokens == (20, 10, 10)


def test_without_text_no_codec_is_needed() -> None:
    session = Script(b"abc")
    session.codec = None  # type: ignore[assignment]
    result = generate(session, [1], max_tokens=3, stop_tokens=[], with_text=False)
    assert (result.text, result.tokens) == ("", tuple(b"abc"))


def test_timing_leaves_out_what_the_caller_does() -> None:
    events = stream(Script([*b"abcd", END], pause=0.005), "prompt")
    for event in events:
        time.sleep(0.05)
        if isinstance(event, Generation):
            timing = event.timing
    assert timing.prompt_tokens == 6
    assert timing.decode_tokens == 4
    assert timing.prefill_seconds >= 0.005
    assert timing.prefill_seconds * 1e3 <= timing.ttft_ms
    assert 0.02 <= timing.decode_seconds < 0.05 * 4
    assert timing.prefill_tok_s == pytest.approx(6 / timing.prefill_seconds)
    assert timing.decode_tok_s == pytest.approx(4 / timing.decode_seconds)


def test_one_token_has_no_decode_speed() -> None:
    assert generate(Script([END]), "x").timing.decode_tok_s is None


@pytest.mark.parametrize(
    ("prompt", "options", "said"),
    [
        ("", {}, "prompt is empty"),
        ([], {}, "prompt is empty"),
        ("x", {"max_tokens": 0}, "max_tokens"),
        ("x", {"stop": ["a", ""]}, "empty stop text"),
        ("x", {"stop": ["a"], "with_text": False}, "with_text"),
    ],
)
def test_bad_arguments_are_refused_at_the_call(prompt: str, options: dict[str, object], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        stream(Script(b"abc"), prompt, **options)  # type: ignore[arg-type]


def test_a_session_error_comes_through() -> None:
    with pytest.raises(SessionError, match="outside the vocabulary"):
        generate(Script(b"abc"), [999])
