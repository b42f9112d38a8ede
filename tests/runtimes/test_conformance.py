"""The conformance suite itself: a sound adapter passes, and each fault is caught by the test that is about it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar, cast

import numpy as np
import pytest
from numpy.typing import NDArray

from smolexport.errors import (
    ContextOverflowError,
    FileFormatError,
    SessionClosedError,
    SessionError,
    UnsupportedError,
    UsageError,
)
from smolexport.run.session import Runtime, Session, choose_context, choose_threads, token_array
from smolexport.testing.runtimes import RuntimeTests

V, H = 20, 8


class Toy:
    """A recurrent network: the state after each token depends on all before it.  `fault` breaks one promise."""

    def __init__(self, path: Path, *, context: int | None = None, threads: int | None = None, fault: str = "") -> None:
        if not path.exists():
            raise FileFormatError(f"{path}: no such file")
        random = np.random.default_rng(0)
        self.embed = random.normal(0, 1, (V, H)).astype(np.float32)
        self.mix = (random.normal(0, 1, (H, H)) / 2).astype(np.float32)
        self.head = random.normal(0, 1, (V, H)).astype(np.float32)
        self.context = (context or 64) if fault == "any context" else choose_context(context, 64)
        self.fault, self.vocab_size, self.open = fault, V, True
        self.states = [np.zeros(H, np.float32)]
        self.buffer = np.zeros((64, V), np.float32)

    shared: ClassVar[list[NDArray[np.float32]]] = [np.zeros(H, np.float32)]

    @property
    def length(self) -> int:
        return len(self.states) - 1

    @property
    def codec(self) -> Any:
        raise NotImplementedError

    def append(self, tokens: Sequence[int] | NDArray[np.integer], *, last_only: bool = False) -> NDArray[np.float32]:
        if not self.open and self.fault != "works closed":
            raise SessionClosedError("closed")
        if self.fault == "wraps ids":
            tokens = np.asarray(tokens) % V
        if self.fault != "late overflow":
            tokens = token_array(tokens, held=self.length, context=self.context, vocab_size=V)
        if self.fault == "shared state":
            self.states[-1] = Toy.shared[0]
        rows = []
        for token in tokens:
            if self.length >= self.context:
                raise ContextOverflowError("full")
            before = self.states[-1]
            if self.fault == "forgets":
                before = np.zeros(H, np.float32)
            if self.fault == "block sees itself":
                before = before + 0.1 * self.embed[tokens[-1]]
            self.states.append(np.tanh(self.mix @ before + self.embed[token]))
            rows.append(np.asarray(self.head @ self.states[-1]))
        Toy.shared[0] = self.states[-1]
        logits: NDArray[np.float32] = np.stack(rows)
        if self.fault == "noise":
            logits += np.random.default_rng().normal(0, 1e-6, logits.shape).astype(np.float32)
        if self.fault == "first row":
            return logits[:1] if last_only else logits
        if self.fault == "reuses memory":
            self.buffer[: len(logits)] = logits
            logits = self.buffer[: len(logits)]
        if self.fault == "float64":
            return logits.astype(np.float64)
        return logits[-1:] if last_only else logits

    def rewind(self, length: int) -> None:
        if not self.open and self.fault != "works closed":
            raise SessionClosedError("closed")
        if not 0 <= length <= self.length and self.fault != "rewinds anywhere":
            raise SessionError("nowhere")
        if self.fault == "keeps state":
            self.states = self.states[:length] + self.states[-1:]
        else:
            del self.states[length + 1 :]

    def close(self) -> None:
        if not self.open and self.fault == "closes once":
            raise SessionClosedError("closed")
        self.open = False

    def __enter__(self) -> Toy:
        return self

    def __exit__(self, *exc: object) -> None:
        if self.fault != "stays open":
            self.close()


def toy_runtime(fault: str = "") -> Runtime:
    def open_toy(path: Path, **options: Any) -> Toy:
        return Toy(path, fault=fault, **options)

    named = {"NAME": "toy", "READS": "toy", "REQUIRES": (), "INSTALL_HINT": "pip install toy", "version": lambda: "1"}
    return cast(Runtime, SimpleNamespace(open=open_toy, **named))


class TestToy(RuntimeTests):
    """A sound adapter that owes nothing to this package but the errors."""

    runtime: ClassVar[Runtime] = toy_runtime()
    tolerance = 1e-5
    text = None

    @pytest.fixture
    def model_path(self, tmp_path: Path) -> Path:
        return tmp_path


class Derived(Session):
    """The same network on `Session`, three tokens at a time; `failures` are raised after the second block."""

    LIBRARY = "toylib"

    def __init__(self, path: Path, *, context: int | None = None, threads: int | None = None) -> None:
        self.toy = Toy(path, context=context)
        self.failures: list[BaseException] = []
        super().__init__(path, V, self.toy.context)

    def _forward(self, ids: NDArray[np.int32], last_only: bool) -> NDArray[np.float32]:
        return self._in_blocks(ids, last_only, 3, self._step)

    def _step(self, ids: NDArray[np.int32], held: int, rows: NDArray[np.float32]) -> None:
        assert held == self.toy.length
        logits = self.toy.append(ids)
        rows[:] = logits[len(logits) - len(rows) :]
        if self.failures and held >= 3:
            raise self.failures.pop(0)

    def _truncate(self, length: int) -> None:
        self.toy.rewind(length)

    def _release(self) -> None:
        self.toy.close()


class TestDerived(TestToy):
    """What `Session` does alike for all runtimes."""

    runtime: ClassVar[Runtime] = cast(Runtime, SimpleNamespace(**{**vars(toy_runtime()), "open": Derived}))

    def test_an_interrupted_append_leaves_it_whole(self, session: Session) -> None:
        assert isinstance(session, Derived)
        expected = session.append(range(1, 9))
        session.rewind(1)
        own = UnsupportedError("mine")
        session.failures = [RuntimeError("no\nmemory"), KeyboardInterrupt(), own]
        with pytest.raises(SessionError, match=r"toylib failed: RuntimeError: no memory$"):
            session.append(range(2, 9))
        with pytest.raises(KeyboardInterrupt):
            session.append(range(2, 9))
        with pytest.raises(UnsupportedError) as caught:
            session.append(range(2, 9))
        assert caught.value is own
        assert session.length == session.toy.length == 1
        self.assert_close(session.append(range(2, 9)), expected[1:])


Suite = RuntimeTests
CATCHES: list[tuple[str, Callable[..., None], dict[str, Any]]] = [
    ("block sees itself", Suite.test_block_equals_token_by_token, {}),
    ("block sees itself", Suite.test_uneven_blocks, {}),
    ("forgets", Suite.test_order_matters, {}),
    ("first row", Suite.test_last_only, {}),
    ("keeps state", Suite.test_rewind, {}),
    ("keeps state", Suite.test_rewind_to_start_and_nowhere, {}),
    ("rewinds anywhere", Suite.test_rewind_outside, {"length": -1}),
    ("reuses memory", Suite.test_results_are_the_callers, {}),
    ("noise", Suite.test_deterministic, {}),
    ("shared state", Suite.test_sessions_are_independent, {}),
    ("late overflow", Suite.test_overflow, {}),
    ("wraps ids", Suite.test_bad_tokens, {"bad": "vocab_size"}),
    ("works closed", Suite.test_closed, {}),
    ("closes once", Suite.test_closed, {}),
    ("stays open", Suite.test_context_manager, {}),
    ("any context", Suite.test_bad_context, {"context": 10**9}),
    ("float64", Suite.test_shape_and_dtype, {}),
]


@pytest.mark.parametrize(
    ("fault", "test", "arguments"), CATCHES, ids=lambda value: getattr(value, "__name__", str(value))
)
def test_each_fault_is_caught(fault: str, test: Callable[..., None], arguments: dict[str, Any], tmp_path: Path) -> None:
    def run(fault: str) -> None:
        suite = RuntimeTests()
        suite.runtime = toy_runtime(fault)  # type: ignore[misc]
        suite.tolerance = 1e-5  # type: ignore[misc]
        wants = test.__code__.co_varnames[: test.__code__.co_argcount]
        given = {**arguments, "model_path": tmp_path, "session": suite.open(tmp_path)}
        test(suite, **{name: given[name] for name in wants if name != "self"})

    run("")
    # pytest.raises fails with an exception of its own, which is no Exception.
    with pytest.raises((Exception, pytest.fail.Exception)):
        run(fault)


@pytest.mark.parametrize("tokens", [[1, 2], (1, 2), np.array([1, 2], np.uint8), np.array([1, 2], np.int64)])
def test_token_array_takes_any_integers(tokens: Any) -> None:
    ids = token_array(tokens, held=0, context=2, vocab_size=3)
    assert ids.dtype == np.int32
    assert ids.tolist() == [1, 2]


def test_token_array_gives_a_copy() -> None:
    tokens = np.array([1, 2], np.int32)
    token_array(tokens, held=0, context=2, vocab_size=3)[:] = 0
    assert tokens.tolist() == [1, 2]


@pytest.mark.parametrize(
    ("tokens", "error", "said"),
    [
        ([], SessionError, "no tokens"),
        ([[1]], SessionError, "flat"),
        ([1.0], SessionError, "flat sequence of integers"),
        ([True], SessionError, "flat sequence of integers"),
        (["a"], SessionError, "flat sequence of integers"),
        ([1, 3], SessionError, "token 3 at position 1"),
        ([-1], SessionError, "token -1"),
        ([2**40], SessionError, "1099511627776"),
        ([2**70], SessionError, "flat"),
        ([1] * 5, ContextOverflowError, "4 tokens held and 5 more exceed the context of 8"),
    ],
)
def test_token_array_refuses(tokens: Any, error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        token_array(tokens, held=4, context=8, vocab_size=3)


def test_choose_context() -> None:
    assert choose_context(None, 512) == 512
    assert choose_context(None, 131072) == 4096
    assert choose_context(131072, 131072) == 131072
    for asked in (0, -5, 513):
        with pytest.raises(UsageError, match=str(asked)):
            choose_context(asked, 512)


def test_choose_threads() -> None:
    assert choose_threads(3) == 3
    assert choose_threads(None) >= 1
    with pytest.raises(UsageError, match="threads"):
        choose_threads(0)
