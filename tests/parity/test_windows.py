from __future__ import annotations

import numpy as np
import pytest
import smolexport_on_table as table
from hypothesis import given
from hypothesis import strategies as st

from smolexport.errors import ContextOverflowError, SessionError, UsageError
from smolexport.parity.windows import block_rows, blocks, cut, prompts


def test_the_protocol_of_llama_perplexity():
    ids = list(range(1100))
    windows = cut(ids, 512)
    assert [window.tokens[[0, -1]].tolist() for window in windows] == [[0, 511], [512, 1023]]
    assert [(window.first, window.scored) for window in windows] == [(256, 255)] * 2
    # the prediction made at position 256 is about token 257, the last one, at 510, about 511
    assert windows[0].following[[0, -1]].tolist() == [257, 511]


def test_bos_takes_the_place_of_each_first_token():
    windows = cut(list(range(20, 44)), 8, bos=1)
    assert [window.tokens[:2].tolist() for window in windows] == [[1, 21], [1, 29], [1, 37]]
    assert all(1 not in window.following for window in windows)


@given(count=st.integers(4, 300), length=st.integers(4, 64))
def test_windows_do_not_overlap_and_score_the_second_half(count, length):
    windows = cut(list(range(count)), length)
    size = min(count, length)
    assert np.concatenate([w.tokens for w in windows]).tolist() == list(range(count // size * size))
    for window in windows:
        assert window.scored == size - 1 - size // 2 >= 1
        assert window.following.tolist() == window.tokens[size // 2 + 1 :].tolist()


def test_a_short_text_is_one_short_window():
    (window,) = cut(list(range(9)), 512)
    assert (len(window.tokens), window.first, window.scored) == (9, 4, 4)


def test_limit_and_refusals():
    assert len(cut(list(range(100)), 10, limit=3)) == 3
    assert len(cut(list(range(100)), 10, limit=30)) == 10
    with pytest.raises(UsageError, match="0 windows"):
        cut(list(range(100)), 10, limit=0)
    with pytest.raises(UsageError, match="text has 3 tokens, too few"):
        cut([1, 2, 3], 512)


def test_prompts_are_spread_evenly():
    found = prompts(list(range(100)), 8, 4, bos=3)
    assert [p.tolist() for p in found] == [[3, *range(start + 1, start + 8)] for start in (0, 25, 50, 75)]
    assert [p.tolist() for p in prompts([5, 6, 7], 32, 4)] == [[5, 6, 7]]
    assert [len(p) for p in prompts(list(range(70)), 32, 4)] == [32, 32]
    assert prompts(list(range(70)), 32, 0) == []


def test_rows_keep_to_the_byte_budget():
    assert block_rows(151_936, 64 << 20) == 110
    assert block_rows(2048, 64 << 20) == 8192
    assert block_rows(151_936, 1) == 1


@pytest.mark.parametrize("rows", [1, 2, 7, 15, 16, 100])
def test_blocks_of_any_size_give_the_whole_windows_logits(make_model, rows):
    session = table.open(make_model("a.table").path)
    ids = np.random.default_rng(0).integers(0, 96, 32)
    (window,) = cut(ids.tolist(), 32)
    session.append(ids)  # something to forget
    session.calls.clear()
    found = list(blocks(session, window, rows))
    session.rewind(0)
    assert np.array_equal(np.concatenate(found), session.append(ids)[16:-1])
    assert max(map(len, found)) <= rows
    assert max(map(len, found)) - min(map(len, found)) <= 1
    assert session.calls[0] == 16  # context goes in one piece


def test_errors_of_a_session_come_through(make_model):
    session = table.open(make_model("a.table", context=16).path)
    (window,) = cut(list(range(32)), 32)
    with pytest.raises(ContextOverflowError):
        list(blocks(session, window, 8))


def test_an_adapter_with_too_few_rows_is_named(make_model):
    session = table.open(make_model("a.table").path)
    whole = session.append
    session.append = lambda tokens, last_only=False: whole(tokens, last_only=True)
    with pytest.raises(SessionError, match=r"shape \(1, 96\) for 5 tokens, expected \(5, 96\)"):
        list(blocks(session, cut(list(range(32)), 32)[0], 5))
