"""Texts of all kinds become windows; what they share with other texts is found token by token."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from smolexport.calibration.texts import overlaps, read_source, training_windows
from smolexport.errors import CalibrationError, UsageError
from smolexport.run.chat import Answer
from smolexport.testing.checkpoints import write_tokenizer
from smolexport.tokenizer import FileTokenizer, open_tokenizer, read_tokenizer


@pytest.fixture(scope="module")
def codec(tmp_path_factory: pytest.TempPathFactory) -> FileTokenizer:
    folder = write_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    return open_tokenizer(folder, read_tokenizer(folder, 320))


def no_template(conversation: Mapping[str, Any]) -> Answer:
    return Answer(error=f"no template for {len(conversation['messages'])}")


def read(path: Path, codec: FileTokenizer, limit: int = 1 << 20, **options: Any) -> tuple[str, NDArray[np.int32]]:
    return read_source(path, codec, **{"limit": limit, "seed": 0, "vocab_size": 320, "render": no_template, **options})


def test_plain_text(codec: FileTokenizer, tmp_path: Path) -> None:
    text = "The cat and the dog.\n" * 50
    path = tmp_path / "a.txt"
    path.write_bytes(text.replace("\n", "\r\n").encode())
    mark, ids = read(path, codec)
    assert mark == hashlib.sha256(path.read_bytes()).hexdigest()
    assert ids.dtype == np.int32
    assert codec.decode(ids.tolist()) == text


def test_a_large_file_is_read_here_and_there(codec: FileTokenizer, tmp_path: Path) -> None:
    lines = [f"line {i} of the text\n" for i in range(40_000)]
    path = tmp_path / "a.txt"
    path.write_text("".join(lines))
    _, ids = read(path, codec, limit=20_000)
    assert 20_000 <= len(ids) < 80_000
    seen = codec.decode(ids.tolist()).splitlines(keepends=True)
    assert set(seen) <= set(lines), "training_windows at ends of lines only"
    _, again = read(path, codec, limit=20_000)
    _, other = read(path, codec, limit=20_000, seed=1)
    assert np.array_equal(ids, again)
    assert not np.array_equal(ids[:1000], other[:1000])


def test_lines_of_json(codec: FileTokenizer, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    talk = [{"role": "user", "content": "Hi"}]
    path.write_text(json.dumps({"text": "one\u2028two"}) + "\n\n" + json.dumps({"messages": talk}) + "\n")
    _, ids = read(path, codec, render=lambda asked: Answer(f"<|im_start|>{asked['messages'][0]['content']}<|im_end|>"))
    assert codec.decode(ids.tolist(), special=True) == "one\u2028two\n<|im_start|>Hi<|im_end|>"
    assert codec.encode("<|im_start|>", frame=False)[0] in ids.tolist(), "special tokens are recognised"


@pytest.mark.parametrize(
    ("name", "data", "said"),
    [
        ("a.txt", b"\xff\xfe", "a.txt: is not UTF-8 text"),
        ("a.jsonl", b'{"text": "x"}\n{"text": ', "a.jsonl: line 2: is not JSON"),
        ("a.jsonl", b'{"text": 3}\n', 'line 1: has neither a "text" nor "messages"'),
        ("a.jsonl", b"[]\n", 'line 1: has neither a "text" nor "messages"'),
        ("a.jsonl", b'{"messages": []}\n', 'line 1: has neither a "text" nor "messages"'),
        (
            "a.jsonl",
            b'{"messages": [{"role": "x"}]}\n',
            "line 1: the chat template fails on these messages: no template for 1",
        ),
        ("a.json", b"[1, 2", "a.json: holds no token ids"),
        ("a.json", b"[[1, 2], [3]]", "a.json: holds no token ids"),
        ("a.json", b"[1.5]", "must hold token ids"),
        ("a.json", b"[]", "must hold token ids"),
        ("a.json", b"[true]", "must hold token ids"),
        ("a.json", b"[1, 320]", "the token id 320 is outside the model's vocabulary of 320"),
        ("a.json", b"[1, -1]", "the token id -1 is outside"),
        ("a.npy", b"\x93NUMPY", "a.npy: holds no token ids"),
        ("a.npy", b"PK\x03\x04", "a.npy: holds no token ids"),
        ("a.npy", b"", "a.npy: holds no token ids"),
    ],
)
def test_files_that_are_not_what_they_say(
    name: str, data: bytes, said: str, codec: FileTokenizer, tmp_path: Path
) -> None:
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(UsageError) as caught:
        read(path, codec)
    assert said in str(caught.value)
    assert str(path) in str(caught.value)


TALK = [{"role": "user", "content": "Hi"}]
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "tools of words": ({"messages": TALK, "tools": "get_weather"}, '"tools" is not JSON (Expecting value'),
    "tools of numbers": ({"messages": TALK, "tools": [3]}, '"tools" is [3], not a list of objects'),
    "deep tools": ({"messages": TALK, "tools": "[" * 99999}, '"tools" is not JSON (maximum recursion depth'),
    "switches in a list": ({"messages": TALK, "chat_template_kwargs": [1]}, '"chat_template_kwargs" is [1], not'),
    "long switches": ({"messages": TALK, "chat_template_kwargs": "x" * 99999}, "is 'xxxx"),
    "messages of words": ({"messages": "Hi"}, 'has neither a "text" nor "messages"'),
    "half a character": ({"text": "\ud83d" + "x" * 99999}, "holds half a surrogate pair"),
    "rendered half": ({"messages": [{"content": "\ud83d"}]}, "holds half a surrogate pair"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_the_line_is_named(case: str, codec: FileTokenizer, tmp_path: Path) -> None:
    entry, said = REFUSED[case]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(f"{json.dumps(line)}\n" for line in ({"messages": TALK}, {"text": "x"}, entry)))
    with pytest.raises(UsageError) as caught:
        read(path, codec, render=lambda asked: Answer(asked["messages"][0]["content"]))
    assert str(caught.value).startswith(f"{path}: line 3: ")
    assert said in str(caught.value)
    assert len(str(caught.value)) < 300 + len(str(path))


def test_token_ids(codec: FileTokenizer, tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.arange(12, dtype=np.uint16).reshape(3, 4))
    (tmp_path / "a.json").write_text(json.dumps(list(range(12))))
    for name in ("a.npy", "a.json"):
        assert read(tmp_path / name, codec)[1].tolist() == list(range(12))
    np.save(tmp_path / "b.npy", np.array([{}], object), allow_pickle=True)
    with pytest.raises(UsageError, match=r"b\.npy: holds no token ids"):
        read(tmp_path / "b.npy", codec)


def test_windows_are_cut_and_shuffled() -> None:
    texts = [np.arange(100, dtype=np.int32), np.arange(100, 135, dtype=np.int32)]
    windows = training_windows(texts, 10, 100, bos=None, seed=0)
    assert windows.shape == (13, 10)
    assert sorted(windows[:, 0].tolist()) == list(range(0, 130, 10))
    assert (np.diff(windows) == 1).all(), "each a stretch of one text"
    assert windows[:, 0].tolist() != sorted(windows[:, 0].tolist())
    assert np.array_equal(windows, training_windows(texts, 10, 100, bos=None, seed=0))
    assert np.array_equal(windows[:4], training_windows(texts, 10, 4, bos=None, seed=0))
    framed = training_windows(texts, 10, 100, bos=7, seed=0)
    assert framed.shape == (14, 10)
    assert (framed[:, 0] == 7).all()
    assert (np.diff(framed[:, 1:]) == 1).all()
    with pytest.raises(CalibrationError, match="fewer tokens than one window of 128"):
        training_windows(texts, 128, 1, bos=None, seed=0)


def test_overlaps_by_hand() -> None:
    windows = np.arange(200, dtype=np.int32).reshape(2, 100)
    assert overlaps(windows, np.arange(200), n=32) == 2 * 69, "runs across two windows do not count"
    assert overlaps(windows, np.arange(50, 90), n=32) == 9
    changed = np.arange(50, 90)
    changed[20] = 7
    assert overlaps(windows, changed, n=32) == 0
    assert overlaps(windows, np.arange(50, 81), n=32) == 0, "shorter than a run"
    assert overlaps(windows, [], n=32) == 0


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.integers(0, 2), min_size=12, max_size=12), st.lists(st.integers(0, 2), max_size=30), st.integers(1, 5)
)
def test_overlaps_are_exact(window: list[int], text: list[int], n: int) -> None:
    windows = np.array(window, np.int32).reshape(2, 6)
    known = {tuple(row[i : i + n]) for row in windows.tolist() for i in range(6 - n + 1)}
    wanted = sum(tuple(text[i : i + n]) in known for i in range(len(text) - n + 1))
    assert overlaps(windows, text, n=n) == wanted
