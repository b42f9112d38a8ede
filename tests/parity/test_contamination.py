"""What a file was calibrated on is no text to judge it by."""

from __future__ import annotations

import dataclasses
import hashlib

import numpy as np
import pytest

from smolexport.calibration.files import write_arrays
from smolexport.calibration.statistics import TOKENS_FILE, Manifest, Statistics, hash_of
from smolexport.calibration.texts import TextSource
from smolexport.errors import UsageError
from smolexport.parity.compare import compare
from smolexport.parity.contamination import MOST, RUN, check_runs, check_texts
from smolexport.parity.inputs import Record, Settings
from smolexport.parity.windows import cut

QUICK = Settings(window=128, repetitions=0, greedy_tokens=0, memory=False)
VOCAB = 96


@pytest.fixture
def words():
    """Text without any repetition of more than a few tokens."""
    return "".join(chr(97 + letter) for letter in np.random.default_rng(3).integers(0, 26, 12_000))


@pytest.fixture
def make_statistics(tmp_path):
    """A folder with these windows."""

    def make(windows):
        windows = np.asarray(windows, np.int32)
        write_arrays(tmp_path / TOKENS_FILE, {"tokens": ("int32", windows.shape)}, [windows])
        count, length = windows.shape
        sources = (TextSource("words.txt", "bb", windows.size),)
        return Statistics(
            tmp_path, Manifest("aa", "text", sources, windows.size, count, length, 0, 2, 16, hash_of(windows))
        )

    return make


def ids_of(text):
    return np.frombuffer(text.encode(), np.uint8).astype(np.int32) % VOCAB


def calibrated(model, statistics, sha256="bb"):
    mark = statistics.manifest.sha256 if statistics else ""
    return dataclasses.replace(model, calibration=Record("gptq", (TextSource("words.txt", sha256, 9),), 9, mark))


def test_the_very_text_is_refused(make_model, words):
    mark = hashlib.sha256(words.encode()).hexdigest()
    model = calibrated(make_model("q4.table", noise=0.1), None, mark)
    with pytest.raises(UsageError, match=r"q4\.table: was calibrated on the text to be scored \(words\.txt\)"):
        compare(make_model("r.table"), [make_model("x.table"), model], text=words, settings=QUICK)
    compare(make_model("r.table"), [model], text=words + " ", settings=QUICK)


def test_any_form_of_the_text_counts(make_model, words):
    """A file with other line ends is scored in one form and was hashed in another."""
    model = calibrated(make_model("q4.table"), None, hashlib.sha256(b"a\r\nb").hexdigest())
    check_texts([model], b"a\nb")
    with pytest.raises(UsageError, match="was calibrated on the text"):
        check_texts([model], b"a\nb", b"a\r\nb")


def test_shared_runs_are_refused_before_anything_is_played(make_model, words, make_statistics):
    statistics = make_statistics(ids_of(words)[:8192].reshape(-1, 512))
    model = calibrated(make_model("q4.table", noise=0.1), statistics)
    from smolexport_on_table import OPENED

    before = len(OPENED)
    with pytest.raises(
        UsageError, match=rf"of the [\d,]+ runs of {RUN} scored tokens also occur in the calibration text"
    ):
        compare(make_model("r.table"), [model], text=words, settings=QUICK, statistics=statistics)
    assert model.path not in [one["path"] for one in OPENED[before:]]


def test_a_small_share_is_a_note_with_the_count(make_model, words, make_statistics):
    ids = ids_of(words)
    windows = np.random.default_rng(5).integers(0, VOCAB, (4, 512))
    # forty tokens of one window's scored half, so nine runs
    windows[2, 7:47] = ids[128 + 70 : 128 + 110]
    statistics = make_statistics(windows)
    model = calibrated(make_model("q4.table", noise=0.1), statistics)
    result = compare(make_model("r.table"), [model], text=words, settings=QUICK, statistics=statistics)
    runs = (12_000 // 128) * (63 - RUN + 1)
    assert f"9 of the {runs:,} runs of {RUN} scored tokens also occur in the calibration text" in result.notes
    assert MOST * runs > 9


def test_what_is_not_scored_may_be_shared(words, make_statistics):
    """The first half of each window is context; and no run goes from one window's scored half into the next one's."""
    ids = ids_of(words)[:1280]
    windows = cut(ids.tolist(), 128)
    contexts = make_statistics(np.stack([ids[start : start + 64] for start in range(0, 1280, 128)]))
    assert check_runs(contexts, windows) == (0, 10 * (63 - RUN + 1))
    joined = np.concatenate([window.following for window in windows]).astype(np.int32)
    across = make_statistics(np.stack([joined[63 * k - 20 : 63 * k + 20] for k in range(1, 10)]))
    assert check_runs(across, windows)[0] == 0


def test_what_the_check_cannot_see_is_told(make_model, words, make_statistics):
    statistics = make_statistics(np.random.default_rng(5).integers(0, VOCAB, (2, 64)))
    other = calibrated(make_model("other.table", noise=0.1), None)
    short = dataclasses.replace(QUICK, window=32)
    result = compare(make_model("r.table"), [other], text=words, settings=short, statistics=statistics)
    assert any("overlap with the calibration text cannot be detected" in note for note in result.notes)
    assert any(note.startswith("other.table: calibrated on text other than") for note in result.notes)


def test_plain_files_have_seen_nothing(make_model, words, make_statistics):
    statistics = make_statistics(ids_of(words)[:8192].reshape(-1, 512))
    plain = make_model("q4.table", noise=0.1)
    result = compare(make_model("r.table"), [plain], text=words, settings=QUICK, statistics=statistics)
    assert not any("calibration" in note for note in result.notes)
