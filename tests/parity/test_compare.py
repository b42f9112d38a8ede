"""`compare` end to end on a complete runtime whose logits come from seeded tables."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import smolexport_on_table as table

from smolexport.errors import FileFormatError, UsageError
from smolexport.parity import peak_memory
from smolexport.parity.compare import compare
from smolexport.parity.inputs import Settings
from smolexport.parity.logit_cache import LogitCache
from smolexport.parity.metrics import Accumulator, read_predictions
from smolexport.parity.reference import run_reference
from smolexport.parity.scoring import score_group
from smolexport.parity.thresholds import Thresholds

ROOT = Path(__file__).resolve().parents[2]
QUICK = Settings(window=64, repetitions=2, prefill_tokens=32, decode_tokens=4, memory=False)


def direct(reference, candidate, text, window):
    """The figures from whole windows at once, without blocks and seams."""
    sessions = [table.open(model.path) for model in (reference, candidate)]
    ids = sessions[0].codec.encode(text)
    bos = sessions[0].codec.encode("")
    total = Accumulator()
    for start in range(0, len(ids) // window * window, window):
        tokens = [*bos, *ids[start + len(bos) : start + window]]
        following = np.array(tokens[window // 2 + 1 :])
        rows = []
        for session in sessions:
            session.rewind(0)
            rows.append(read_predictions(session.append(tokens)[window // 2 : -1], following))
        total.add(*rows)
    return total.result()


@pytest.mark.parametrize("facts", [{}, {"bos": 3}])
@pytest.mark.parametrize("block_bytes", [1, 96 * 4 * 10, 1 << 20])
def test_figures_are_those_of_whole_windows(make_model, text, facts, block_bytes):
    reference, candidate = make_model("bf16.table", **facts), make_model("q4.table", noise=0.3, **facts)
    settings = Settings(window=64, repetitions=0, greedy_tokens=0, memory=False, block_bytes=block_bytes)
    result = compare(reference, [candidate], text=text, settings=settings)
    expected = direct(reference, candidate, text, 64)
    accuracy = result.candidates[0].accuracy
    assert accuracy.positions == expected.positions == result.text.windows * 31
    assert accuracy.divergences == pytest.approx(expected.divergences, rel=1e-12)
    assert (accuracy.top1_agreement, accuracy.perplexity.value) == pytest.approx(
        (expected.top1_agreement, expected.perplexity.value)
    )
    assert result.reference.perplexity.value == pytest.approx(expected.reference_perplexity.value)
    assert (result.candidates[0].greedy, result.candidates[0].speed) == (None, None)


def test_more_damage_shows_in_every_figure(make_model, text):
    models = [make_model(f"n{n}.table", noise=n / 100) for n in (0, 5, 20, 60)]
    result = compare(make_model("bf16.table"), models, text=text, settings=QUICK)
    zero, *rest = [candidate.accuracy for candidate in result.candidates]
    assert (zero.kld.max, zero.top1_agreement.value, zero.top5_overlap, zero.perplexity_ratio.value) == (0, 1, 1, 1)
    assert result.candidates[0].greedy.first_divergence is None
    for one, two in zip([zero, *rest], rest, strict=False):
        assert one.kld.mean.value < two.kld.mean.value
        assert one.kld.p99 < two.kld.p99
        assert one.top1_agreement.value > two.top1_agreement.value
        assert one.top5_overlap > two.top5_overlap
        assert one.delta_p.rms.value < two.delta_p.rms.value
    agreed = [candidate.greedy.mean_agreed_tokens for candidate in result.candidates]
    assert agreed[0] == 64 > agreed[-1]
    assert result.candidates[-1].greedy.margin >= 0


def test_an_offset_of_all_logits_changes_nothing(make_model, text):
    result = compare(make_model("bf16.table"), [make_model("b.table", shift=5.0)], text=text, settings=QUICK)
    accuracy = result.candidates[0].accuracy
    assert accuracy.kld.max < 1e-11
    assert accuracy.top1_agreement.value == 1


def test_thresholds_decide_per_candidate(make_model, text):
    models = [make_model("good.table", noise=0.02), make_model("bad.table", noise=0.8)]

    def judged(**limits):
        found = compare(make_model("r.table"), models, text=text, settings=QUICK, thresholds=Thresholds(**limits))
        return found.passed, [candidate.passed for candidate in found.candidates], found.candidates[1].missed

    assert judged() == (True, [True, True], ())
    passed, each, misses = judged(max_kld=0.01, min_top1=0.9, max_ppl_ratio=1.02)
    assert (passed, each) == (False, [True, False])
    assert [m.split()[:2] for m in misses] == [["mean", "KLD"], ["top-1", "agreement"], ["perplexity", "ratio"]]
    assert judged(max_kld=0.0)[1] == [False, False]
    assert judged(min_top1=0.0, max_kld=50.0)[0]


def test_logits_that_are_not_finite_never_pass(make_model, text):
    result = compare(make_model("r.table"), [make_model("x.table", poison=4)], text=text, settings=QUICK)
    assert not result.passed
    assert "not all finite" in result.candidates[0].missed[0]
    assert np.isnan(result.candidates[0].accuracy.kld.mean.value)


def test_a_threshold_met_exactly_is_met(make_model, text):
    model = make_model("x.table", noise=0.1)
    accuracy = compare(make_model("r.table"), [model], text=text, settings=QUICK).candidates[0].accuracy
    exact = Thresholds(accuracy.kld.mean.value, accuracy.top1_agreement.value, accuracy.perplexity_ratio.value)
    assert exact.misses(accuracy) == ()


def test_another_tokenizer_is_told_and_does_not_disturb(make_model, text):
    models = [make_model(f"{split}.table", split=split) for split in ("pairs", "broken")]
    models.append(make_model("longer.table", bos=3))
    pairs, broken, longer = compare(make_model("r.table"), models, text=text, settings=QUICK).candidates
    for candidate in (pairs, broken, longer):
        assert not candidate.tokenizer_equal
        assert candidate.accuracy.kld.max == 0
    first, second = (ord(c) for c in text[:2])
    assert f"from token 0 on: {(first + second) % 96} instead of {first % 96}" in pairs.notes[0]
    assert "KeyError" in broken.notes[0]
    assert "no such merge" in broken.notes[0]
    assert f"3 instead of {first % 96}" in longer.notes[0]


def test_another_vocabulary_is_refused(make_model, text):
    with pytest.raises(UsageError, match=r"other\.table: vocabulary of 97 tokens, .*bf16\.table has 96"):
        compare(make_model("bf16.table"), [make_model("other.table", vocab=97)], text=text, settings=QUICK)


def test_bad_requests_are_one_clear_error(make_model, text):
    reference = make_model("r.table")
    with pytest.raises(UsageError, match="no file"):
        compare(reference, [], text=text)
    with pytest.raises(UsageError, match="at least 4 tokens"):
        compare(reference, [reference], text="abc", settings=QUICK)
    with pytest.raises(UsageError, match="window: 2 is too few"):
        Settings(window=2)
    broken = make_model("b.table")
    broken.path.write_text("no json")
    with pytest.raises(FileFormatError, match="not a table file"):
        compare(reference, [broken], text=text, settings=QUICK)


def test_sessions_are_closed_whatever_happens(make_model, text, monkeypatch):
    made = []
    plain = table.TableSession

    def keep(*arguments):
        made.append(plain(*arguments))
        return made[-1]

    monkeypatch.setattr(table, "TableSession", keep)
    compare(make_model("r.table"), [make_model("a.table")], text=text, settings=QUICK)
    with pytest.raises(UsageError):
        compare(make_model("r.table"), [make_model("a.table"), make_model("b.table", vocab=50)], text=text)
    # twice: for accuracy and for speed; then the reference, and candidates up to the one that is refused
    assert len(made) == 4 + 3
    assert all(session._closed for session in made)


def test_open_is_asked_for_what_is_needed(make_model, text):
    table.OPENED.clear()
    reference = make_model("r.table", options={"scale": 1.0}, context=1000)
    settings = Settings(window=64, threads=3, repetitions=1, prefill_tokens=200, greedy_tokens=70, memory=False)
    compare(reference, [make_model("a.table")], text=text, settings=settings)
    asked = [(call["path"].name, call["threads"], call["context"]) for call in table.OPENED]
    assert asked[:2] == [("r.table", 3, None), ("a.table", 3, 200)]
    assert asked[2:] == [("r.table", 3, 200), ("a.table", 3, 200)]  # for speed
    result = compare(
        reference, [make_model("half.table", options={"scale": 0.5})], text=text, settings=Settings(memory=False)
    )
    assert table.OPENED[-1]["scale"] == 0.5
    assert result.candidates[0].accuracy.kld.mean.value > 0.1


def test_a_short_text_and_a_small_context_are_noted(make_model, text):
    reference, same = make_model("r.table"), make_model("a.table")
    short = compare(reference, [same], text=text[:50], settings=Settings(repetitions=0, memory=False))
    assert (short.text.tokens, short.text.window, short.text.windows, short.text.scored_per_window) == (50, 50, 1, 24)
    assert short.notes[0] == "windows of 50 tokens instead of 512: that is the whole text"
    assert "only 24 positions" in short.notes[1]
    small = make_model("s.table", context=40)
    bounded = compare(reference, [small], text=text, settings=Settings(repetitions=1, memory=False))
    assert bounded.text.window == 40
    assert bounded.notes == ("windows of 40 tokens instead of 512: that is the context of 40 tokens",)
    assert bounded.candidates[0].greedy.tokens == 21
    assert bounded.candidates[0].speed.prefill_tokens == 40


def test_max_windows_limits_the_work(make_model, text):
    settings = Settings(window=64, max_windows=2, repetitions=0, memory=False)
    result = compare(make_model("r.table"), [make_model("a.table")], text=text, settings=settings)
    assert result.candidates[0].accuracy.positions == 62


class Wide:
    """151,936 words: rows made from the token's id, nothing kept."""

    vocab_size, context, codec = 151_936, 512, table.TableCodec({"vocab": 96})

    def __init__(self, noise):
        self._noise = noise

    def rewind(self, length):
        pass

    def append(self, tokens, *, last_only=False):
        tokens = tokens[-1:] if last_only else tokens
        logits = np.empty((len(tokens), self.vocab_size), np.float32)
        for row, token in zip(logits, tokens, strict=True):
            rng = np.random.default_rng(int(token))
            rng.standard_normal(out=row, dtype=np.float32)
            row[int(token)] += self._noise
        return logits

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        pass


@pytest.mark.parametrize("together", [1, 3])
def test_memory_is_bounded_by_the_block_not_by_the_text(make_model, text, monkeypatch, together):
    settings = Settings(window=65, max_windows=2, block_bytes=4 << 20, greedy_tokens=0, repetitions=0, prefill_tokens=1)
    monkeypatch.setattr(table, "open", lambda path, **_: Wide(int(path.stem)))
    reference, *models = (make_model(f"{number}.table") for number in range(together + 1))
    quiet = lambda *step: None  # noqa: E731
    tracemalloc.start()
    try:
        with LogitCache(None) as cache:
            base = run_reference(reference, text, settings, cache, None, quiet)
            members = score_group(reference, base, models, settings, quiet)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert [member.accuracy.positions for member in members] == [64] * together
    assert [len(member.pairs) for member in members] == list(range(together))[::-1]
    whole = 64 * Wide.vocab_size * 4
    # a block of each side, a copy of a slice of it, a few rows of float64
    assert peak < (4 + together) * settings.block_bytes < whole


def test_the_largest_vocabulary_takes_less_than_a_gigabyte():
    """Of 4,096 tokens and three files that hold the same weights; the models themselves aside."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.parity.scale"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert 100 < int(done.stdout) < 1000


def test_progress_runs_through_every_stage(make_model, text):
    seen = []
    compare(
        make_model("r.table"),
        [make_model("a.table")],
        text=text,
        settings=QUICK,
        progress=lambda *step: seen.append(step),
    )
    stages = list(dict.fromkeys(stage for stage, _, _ in seen))
    assert stages == ["fingerprint", "reference", "continue", "score", "speed"]
    for stage in stages:
        done = [(d, total) for s, d, total in seen if s == stage]
        assert [d for d, _ in done] == list(range(done[-1][1] + 1))


def test_peak_memory_is_the_fresh_processes_own(make_model):
    # more than the child can need: a counter that it inherits would show it
    ballast = np.ones(60_000_000)
    model = make_model("a.table", options={"scale": 2.0})
    peak, note = peak_memory.measure_peak(model, threads=1, context=128)
    assert note == ""
    assert 10e6 < peak < ballast.nbytes * 0.6
    large = make_model("b.table", vocab=2000)  # tables of 2 x 32 MB float64 while they are made
    assert peak_memory.measure_peak(large)[0] > peak + 60e6


def test_peak_memory_that_cannot_be_taken_is_told(make_model):
    broken = make_model("b.table")
    broken.path.write_text("no json")
    peak, note = peak_memory.measure_peak(broken)
    assert peak is None
    assert "not a table file" in note
    peak, note = peak_memory.measure_peak(make_model("c.table", options={"colour": 1}))
    assert peak is None
    assert "colour" in note


def test_footprint_is_a_command(make_model):
    path = make_model("a.table").path
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-m", "smolexport.parity.peak_memory", "smolexport_on_table", str(path), "--tokens", "9"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    facts = json.loads(done.stdout)
    assert (facts["runtime"], facts["path"], facts["tokens"]) == ("smolexport_on_table", str(path), 10)
    assert facts["peak_rss_bytes"] > 10e6
    assert facts["load_seconds"] >= 0


def test_peaks_stand_in_the_result(make_model, text):
    settings = Settings(window=64, repetitions=0, greedy_tokens=0)
    result = compare(make_model("r.table"), [make_model("a.table")], text=text, settings=settings)
    assert result.reference.peak_rss_bytes > 10e6
    assert result.candidates[0].peak_rss_bytes > 10e6
