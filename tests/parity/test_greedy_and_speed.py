from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import smolexport_on_table as table

from smolexport.parity import speed
from smolexport.parity.inputs import Settings
from smolexport.parity.results import Divergence, Greedy
from smolexport.parity.speed import lack_of_memory, speeds
from smolexport.parity.windows import agree, continue_greedily

PROMPT = np.array([5, 9, 17])


def own_continuation(session, count):
    session.rewind(0)
    tokens = [int(session.append(PROMPT)[-1].argmax())]
    while len(tokens) < count:
        tokens.append(int(session.append(tokens[-1:])[-1].argmax()))
    return tokens


def test_reference_continuation_and_its_margins(make_model):
    session = table.open(make_model("a.table").path)
    found = continue_greedily(session, PROMPT, 12, frozenset())
    assert list(found.tokens) == own_continuation(session, 12)
    session.rewind(0)
    rows = session.append([*PROMPT, *found.tokens[:-1]])[len(PROMPT) - 1 :]
    ordered = np.sort(rows.astype(float), axis=1)
    assert found.margins == pytest.approx(ordered[:, -1] - ordered[:, -2])


def test_a_stop_token_ends_the_continuation(make_model):
    session = table.open(make_model("a.table").path)
    tokens = own_continuation(session, 12)
    found = continue_greedily(session, PROMPT, 12, frozenset(tokens[4:5]))
    assert list(found.tokens) == tokens[: tokens.index(tokens[4]) + 1]


@pytest.mark.parametrize("noise_seed", range(6))
def test_divergence_is_where_two_free_generations_part(make_model, noise_seed):
    session = table.open(make_model("a.table").path)
    other = table.open(make_model("b.table", noise=0.6, noise_seed=noise_seed).path)
    expected = continue_greedily(session, PROMPT, 24, frozenset())
    ours, theirs = own_continuation(session, 24), own_continuation(other, 24)
    apart = next((i for i in range(24) if ours[i] != theirs[i]), None)
    found = agree(other, expected, session.codec)
    assert found.position == apart
    if apart is None:
        assert found == Divergence(24)
    else:
        assert (found.reference_token, found.candidate_token) == (ours[apart], theirs[apart])
        assert (found.reference_text, found.candidate_text) == (chr(ours[apart]), chr(theirs[apart]))
        assert found.before == "".join(map(chr, [*PROMPT, *ours[:apart]]))[-24:]
        assert found.margin == expected.margins[apart]


def test_a_model_never_leaves_itself(make_model):
    session = table.open(make_model("a.table").path)
    again = table.open(make_model("a.table").path)
    assert agree(again, continue_greedily(session, PROMPT, 30, frozenset()), session.codec) == Divergence(30)


def test_summary_over_prompts():
    greedy = Greedy(20, (Divergence(20, 7, 0.5), Divergence(20), Divergence(11, 3, 0.0), Divergence(20, 12, 1.0)))
    assert (greedy.first_divergence, greedy.margin) == (3, 0.0)
    assert greedy.mean_agreed_tokens == (7 + 20 + 3 + 12) / 4
    assert greedy.median_agreed_tokens == (7 + 12) / 2
    assert greedy.share_never_diverging == 0.25
    assert greedy.near_ties == 1
    equal = Greedy(20, (Divergence(20), Divergence(20)))
    assert (equal.first_divergence, equal.margin, equal.mean_agreed_tokens) == (None, None, 20)
    at_once = Greedy(20, (Divergence(20, 2, 0.5), Divergence(20, 0, 0.1)))
    assert (at_once.first_divergence, at_once.margin) == (0, 0.1)


class Clocked:
    """A session whose calls take a known time on a clock of its own."""

    def __init__(self, session, time, log, name, *, prefill, decode):
        self._session, self._time, self._log, self._name = session, time, log, name
        self._prefill, self._decode = prefill, decode
        self.vocab_size, self.context, self.rewind = session.vocab_size, session.context, session.rewind

    def append(self, tokens, *, last_only=False):
        self._log.append((self._name, len(tokens)))
        self._time[0] += self._decode if len(tokens) == 1 else len(tokens) * self._prefill
        return self._session.append(tokens, last_only=last_only)


def measure(make_model, settings, *, context=4096):
    time, log = [0.0], []
    model = make_model("a.table", context=context)
    rates = [(0.001, 0.05), (0.002, 0.02)]
    sessions = [
        Clocked(table.open(model.path), time, log, name, prefill=prefill, decode=decode)
        for name, (prefill, decode) in enumerate(rates)
    ]
    steps = []
    found = speed.measure(
        lambda place: nullcontext((sessions[place], 0.0)), 2, np.arange(40), context, settings,
        clock=lambda: time[0], advance=lambda: steps.append(len(log)),
    )  # fmt: skip
    return found, log, steps


def test_rates_are_tokens_over_time(make_model):
    settings = Settings(prompt_tokens=32, prefill_tokens=100, decode_tokens=10, repetitions=3)
    found, log, steps = measure(make_model, settings)
    for one, ttft, prefill, decode in zip(found, (32, 64), (1000, 500), (20, 50), strict=True):
        assert one.ttft_ms.value == pytest.approx(ttft)
        assert one.prefill_tok_s.value == pytest.approx(prefill)
        assert one.decode_tok_s.value == pytest.approx(decode)
        assert one.decode_tok_s.error == pytest.approx(0, abs=1e-9)
        assert (one.prompt_tokens, one.prefill_tokens, one.decode_tokens, one.repetitions) == (32, 100, 10, 3)
    assert len(steps) == 6
    # every round takes every model once, and begins with another one each time
    rounds = [name for name, count in log if count == 100]
    assert rounds == [0, 1, 1, 0, 0, 1]


def test_error_of_a_rate_is_the_standard_error(make_model):
    decode = [1.0, 2.0, 1.5, 1.25, 4.0]
    readings = []
    for seconds in decode:
        readings += [10.0, 10.5, 10.5 + seconds, 20.0, 22.0]
    ticks = iter(readings)
    session = table.open(make_model("a.table").path)
    settings = Settings(prefill_tokens=100, decode_tokens=4, repetitions=5)
    opened = nullcontext((session, 0.0))
    (found,) = speed.measure(lambda _: opened, 1, np.arange(40), session.context, settings, clock=lambda: next(ticks))
    rates = [4 / seconds for seconds in decode]
    assert found.decode_tok_s.value == pytest.approx(np.mean(rates))
    assert found.decode_tok_s.error == pytest.approx((np.var(rates, ddof=1) / 5) ** 0.5)
    assert (found.ttft_ms.value, found.ttft_ms.error, found.prefill_tok_s.value) == (500, 0, 50)
    assert next(ticks, None) is None


def test_lengths_keep_to_the_context(make_model):
    settings = Settings(prompt_tokens=32, prefill_tokens=512, decode_tokens=64, repetitions=1)
    (found, _), _, _ = measure(make_model, settings, context=48)
    assert (found.prompt_tokens, found.prefill_tokens, found.decode_tokens) == (32, 48, 16)
    assert np.isnan(found.decode_tok_s.error)


def test_without_room_for_all_at_most_one_is_open(make_model, monkeypatch):
    """The rounds stay interleaved; only who is open changes."""
    open_now, most, opened = [0], [0], []
    plain = table.open

    def counted(path, **options):
        session = plain(path, **options)
        open_now[0] += 1
        most[0] = max(most[0], open_now[0])
        opened.append(path.name)
        closing = session.close

        def close():
            open_now[0] -= 1
            closing()

        session.close = close
        return session

    monkeypatch.setattr(table, "open", counted)
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=5))
    models = [make_model("a.table"), make_model("b.table"), make_model("c.table")]
    settings = Settings(prefill_tokens=20, decode_tokens=4, repetitions=2)
    found, note = speeds(models, np.arange(40), 64, settings, lambda *_: None)
    assert [one.decode_tok_s.value > 0 for one, _ in found] == [True] * 3
    assert "was reopened" in note
    assert (most[0], open_now[0]) == (1, 0)
    # for their contexts, and in turns
    assert "".join(name[0] for name in opened) == "abc" + "abc" + "bca"


def test_one_model_and_small_models_are_kept_open(make_model, monkeypatch):
    models = [make_model("a.table"), make_model("b.table")]
    assert lack_of_memory(models) == ""
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=5))
    assert lack_of_memory(models[:1]) == ""
    assert "GB" in lack_of_memory(models)
