"""Tests of what every runtime adapter must do, to be subclassed.

    class TestMyRuntime(RuntimeTests):
        runtime: ClassVar[Runtime] = smolexport_on_mine
        options: ClassVar = {"threads": 1}

        @pytest.fixture
        def model_path(self) -> Path: ...

The model must have a context of at least 48 tokens.  Needs pytest.

Notation: n = tokens, v = vocab_size.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from numpy.typing import NDArray

from smolexport.errors import ContextOverflowError, SessionClosedError, SessionError, SmolexportError, UsageError
from smolexport.run.session import Runtime, Session

CONTEXT = 48


class RuntimeTests:
    """Conformance of one runtime on one model.

    Attributes:
        runtime: the adapter's module.
        options: further arguments of its `open`, e.g. for exact arithmetic.
        tolerance: largest difference of two logits computed in blocks of different sizes.
        text: a text that survives encoding and decoding; None skips the tests of the codec.
    """

    runtime: ClassVar[Runtime]
    options: ClassVar[Mapping[str, Any]] = {}
    tolerance: ClassVar[float] = 1e-3
    text: ClassVar[str | None] = "Where is the café? 12 o'clock 🕛\n"

    @pytest.fixture
    def model_path(self) -> Path:
        """The model to run; override it."""
        pytest.fail("override the fixture model_path")

    @pytest.fixture
    def session(self, model_path: Path) -> Iterator[Session]:
        """A fresh session of 48 tokens."""
        with self.open(model_path) as session:
            yield session

    def open(self, path: Path, context: int | None = CONTEXT) -> Session:
        """Open `path` with the class's options."""
        return self.runtime.open(path, context=context, **self.options)

    def tokens(self, session: Session, count: int, seed: int = 0) -> NDArray[np.int64]:
        """Random ids [count] of the session's vocabulary."""
        return np.random.default_rng(seed).integers(0, session.vocab_size, count)

    def assert_close(self, left: NDArray[np.float32], right: NDArray[np.float32]) -> None:
        """Assert that logits are equal within the tolerance, and not trivially so."""
        assert left.shape == right.shape
        assert float(np.std(left)) > 10 * self.tolerance, "logits that hardly vary prove nothing"
        np.testing.assert_allclose(left, right, rtol=0, atol=self.tolerance)

    def test_names_itself(self) -> None:
        """NAME, READS, INSTALL_HINT and version() are short texts; REQUIRES lists modules."""
        for text in (self.runtime.NAME, self.runtime.READS, self.runtime.INSTALL_HINT, self.runtime.version()):
            assert isinstance(text, str)
            assert text
            assert "\n" not in text
        assert all(isinstance(module, str) for module in self.runtime.REQUIRES)

    def test_shape_and_dtype(self, session: Session) -> None:
        """A row of v float32 per token; the length counts them."""
        assert session.context == CONTEXT
        assert session.length == 0
        logits = session.append(self.tokens(session, 5))
        assert logits.shape == (5, session.vocab_size)
        assert logits.dtype == np.float32
        assert np.isfinite(logits).all()
        assert session.length == 5

    def test_takes_lists_and_arrays(self, model_path: Path) -> None:
        """A list of int, int32 and int64 arrays are equivalent."""
        results = []
        for kind in (list, np.int32, np.int64):
            with self.open(model_path) as session:
                ids = self.tokens(session, 4)
                results.append(session.append([int(i) for i in ids] if kind is list else ids.astype(kind)))
        np.testing.assert_array_equal(results[0], results[1])
        np.testing.assert_array_equal(results[0], results[2])

    def test_block_equals_token_by_token(self, model_path: Path) -> None:
        """One append of n equals n appends of one."""
        with self.open(model_path) as block, self.open(model_path) as single:
            ids = self.tokens(block, 24)
            self.assert_close(block.append(ids), np.concatenate([single.append([int(i)]) for i in ids]))

    def test_uneven_blocks(self, model_path: Path) -> None:
        """How the tokens are split into blocks does not matter."""
        with self.open(model_path) as block, self.open(model_path) as parts:
            ids = self.tokens(block, 24)
            rows = [parts.append(part) for part in np.split(ids, [7, 8, 19])]
            self.assert_close(block.append(ids), np.concatenate(rows))

    def test_fills_the_context(self, session: Session) -> None:
        """Exactly `context` tokens fit, and a rewind makes room again."""
        ids = self.tokens(session, CONTEXT)
        assert session.append(ids).shape[0] == CONTEXT
        session.rewind(CONTEXT - 1)
        assert session.append(ids[-1:]).shape[0] == 1

    def test_last_only(self, model_path: Path) -> None:
        """`last_only` returns the last row, and what follows is the same."""
        with self.open(model_path) as every, self.open(model_path) as last:
            ids = self.tokens(every, 20)
            row = last.append(ids[:16], last_only=True)
            assert row.shape == (1, last.vocab_size)
            assert last.length == 16
            rows = every.append(ids[:16])
            self.assert_close(row, rows[-1:])
            self.assert_close(last.append(ids[16:]), every.append(ids[16:]))

    def test_order_matters(self, model_path: Path) -> None:
        """The cache and the positions are used: other tokens before give other logits after."""
        with self.open(model_path) as one, self.open(model_path) as other:
            ids = self.tokens(one, 12)
            other.append(ids[:11][::-1])
            one.append(ids[:11])
            difference = np.abs(one.append(ids[11:]) - other.append(ids[11:])).max()
            assert difference > 10 * self.tolerance

    def test_rewind(self, session: Session) -> None:
        """After a rewind the same tokens give the same logits, whatever was there in between."""
        ids = self.tokens(session, 20)
        first = session.append(ids)
        session.rewind(8)
        assert session.length == 8
        session.append(self.tokens(session, 12, seed=1))
        session.rewind(8)
        self.assert_close(session.append(ids[8:]), first[8:])

    def test_rewind_to_start_and_nowhere(self, session: Session) -> None:
        """Rewinding to 0 gives a fresh session; to the current length it does nothing."""
        ids = self.tokens(session, 10)
        first = session.append(ids)
        session.rewind(10)
        assert session.length == 10
        session.rewind(0)
        assert session.length == 0
        self.assert_close(session.append(ids), first)

    @pytest.mark.parametrize("length", [-1, 6])
    def test_rewind_outside(self, session: Session, length: int) -> None:
        """Positions that do not exist are refused."""
        session.append(self.tokens(session, 5))
        with pytest.raises(SessionError):
            session.rewind(length)
        assert session.length == 5

    def test_results_are_the_callers(self, session: Session) -> None:
        """A later append, a rewind or a write by the caller changes no other result."""
        first = session.append(self.tokens(session, 6))
        kept = first.copy()
        second = session.append(self.tokens(session, 6, seed=1))
        session.rewind(0)
        session.append(self.tokens(session, 6, seed=2))
        np.testing.assert_array_equal(first, kept)
        second[:] = 0
        np.testing.assert_array_equal(first, kept)

    def test_results_outlive_the_session(self, model_path: Path) -> None:
        """Logits stay valid after close."""
        with self.open(model_path) as session:
            logits = session.append(self.tokens(session, 6))
            kept = logits.copy()
        np.testing.assert_array_equal(logits, kept)

    def test_deterministic(self, model_path: Path) -> None:
        """Two sessions of the same model give bit-equal logits for the same calls."""
        with self.open(model_path) as one, self.open(model_path) as other:
            ids = self.tokens(one, 16)
            np.testing.assert_array_equal(one.append(ids), other.append(ids))

    def test_sessions_are_independent(self, model_path: Path) -> None:
        """Interleaved sessions do not see each other's tokens; closing one leaves the other alive."""
        with self.open(model_path) as one, self.open(model_path) as other:
            ids, noise = self.tokens(one, 12), self.tokens(one, 12, seed=1)
            whole = one.append(ids)
            one.rewind(6)
            other.append(noise)
            self.assert_close(one.append(ids[6:]), whole[6:])
            other.close()
            one.rewind(6)
            self.assert_close(one.append(ids[6:]), whole[6:])

    def test_overflow(self, session: Session) -> None:
        """Too many tokens are refused before anything is computed."""
        ids = self.tokens(session, CONTEXT + 1)
        with pytest.raises(ContextOverflowError):
            session.append(ids)
        assert session.length == 0
        session.append(ids[:40])
        with pytest.raises(ContextOverflowError):
            session.append(ids[:9])
        assert session.length == 40
        session.append(ids[40:48])

    @pytest.mark.parametrize("bad", ["empty", "negative", "vocab_size", "huge", "matrix", "real"])
    def test_bad_tokens(self, session: Session, bad: str) -> None:
        """Invalid tokens are refused, and the session continues unharmed."""
        ids = self.tokens(session, 6)
        expected = session.append(ids)
        session.rewind(3)
        tokens = {
            "empty": np.zeros(0, np.int64),
            "negative": np.array([1, -1]),
            "vocab_size": np.array([1, session.vocab_size]),
            "huge": np.array([1, 2**40]),
            "matrix": np.ones((1, 2), np.int64),
            "real": np.ones(2, np.float32),
        }[bad]
        with pytest.raises(SessionError):
            session.append(tokens)
        assert session.length == 3
        self.assert_close(session.append(ids[3:]), expected[3:])

    def test_closed(self, model_path: Path) -> None:
        """After close everything but close is refused."""
        session = self.open(model_path)
        session.append([1, 2])
        session.close()
        session.close()
        with pytest.raises(SessionClosedError):
            session.append([1])
        with pytest.raises(SessionClosedError):
            session.rewind(0)

    def test_context_manager(self, model_path: Path) -> None:
        """`with` yields the session itself and closes it, also after an error."""

        def fail_inside(session: Session) -> None:
            with session as entered:
                assert entered is session
                entered.append([])

        session = self.open(model_path)
        with pytest.raises(SessionError, match="no tokens"):
            fail_inside(session)
        with pytest.raises(SessionClosedError):
            session.append([1])

    def test_default_context(self, model_path: Path) -> None:
        """By default a session holds the model's context, at most 4096."""
        with self.open(model_path, context=None) as session:
            assert CONTEXT <= session.context <= 4096

    @pytest.mark.parametrize("context", [0, -1, 10**9])
    def test_bad_context(self, model_path: Path, context: int) -> None:
        """A context out of range is refused."""
        with pytest.raises(UsageError):
            self.open(model_path, context=context)

    def test_missing_file(self, tmp_path: Path) -> None:
        """A path without a model raises one of smolexport's errors, which names the path."""
        with pytest.raises(SmolexportError, match="nothing-here"):
            self.open(tmp_path / "nothing-here")

    def test_codec(self, session: Session) -> None:
        """Text survives encoding and decoding token by token; ids and stop tokens are in the vocabulary."""
        if self.text is None:
            pytest.skip("this model has no tokenizer")
        ids = session.codec.encode(self.text)
        assert all(0 <= i < session.vocab_size for i in (*ids, *session.codec.stop_tokens))
        decoder = session.codec.decoder()
        pieces = [decoder.push(i) for i in ids]
        assert ("".join(pieces) + decoder.flush()).strip(" ") == self.text
        assert not any("\ufffd" in piece for piece in pieces)

    def test_codec_flush(self, session: Session) -> None:
        """`flush` returns an incomplete character as U+FFFD; a new decoder starts empty."""
        if self.text is None:
            pytest.skip("this model has no tokenizer")
        ids = session.codec.encode("🕛")
        if len(ids) == 1:
            pytest.skip("one token holds the whole character")
        decoder = session.codec.decoder()
        text = "".join(decoder.push(i) for i in ids[:-1])
        assert "\ufffd" not in text
        assert "\ufffd" in decoder.flush()
        assert session.codec.decoder().flush() == ""
