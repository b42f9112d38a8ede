"""The same logits by way of llama.cpp's file: its 16 bits a value are all that differs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from smolexport.conversion.pipeline import export
from smolexport.demo import demo_text
from smolexport.parity.metrics import Accumulator, read_predictions
from smolexport.parity.windows import blocks, cut
from tests.parity.llama_logits import read, write

CONTEXT = 128


def test_figures_by_way_of_llama_cpps_file(demo: Path, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    llama = pytest.importorskip("smolexport_on_llamacpp")
    pytest.importorskip("llama_cpp")
    import smolexport_on_torch as torch

    with torch.open(demo, dtype="f32", threads=1) as session:
        windows = cut(session.codec.encode(demo_text()), CONTEXT, limit=6)
        reference = np.concatenate([rows for window in windows for rows in blocks(session, window, CONTEXT)])
    file = export("gguf", demo, tmp_path / "demo.gguf", quant="q4_k").path
    with llama.open(file, threads=1) as session:
        other = np.concatenate([rows for window in windows for rows in blocks(session, window, CONTEXT)])
    path = tmp_path / "base.kld"
    write(path, np.concatenate([window.tokens for window in windows]).astype(np.int32), CONTEXT, reference)
    tokens, context, stored = read(path)
    assert context == CONTEXT
    following = np.concatenate([chunk[context // 2 + 1 :] for chunk in tokens.reshape(-1, context)])
    np.testing.assert_array_equal(following, np.concatenate([window.following for window in windows]))

    ours, theirs = Accumulator(), Accumulator()
    ours.add(read_predictions(reference, following), read_predictions(other, following))
    theirs.add(read_predictions(stored, following), read_predictions(other, following))
    own, by_file = ours.result(), theirs.result()
    assert own.kld.mean.value > 0.004
    assert by_file.kld.mean.value == pytest.approx(own.kld.mean.value, rel=0.01)
    assert by_file.kld.p99 == pytest.approx(own.kld.p99, rel=0.01)
    assert by_file.top1_agreement.value == pytest.approx(own.top1_agreement.value, abs=0.005)  # 16 bits make ties
    assert by_file.reference_perplexity.value == pytest.approx(own.reference_perplexity.value, rel=1e-4)
    assert by_file.ln_perplexity_ratio.value == pytest.approx(own.ln_perplexity_ratio.value, abs=1e-4)
    assert by_file.ln_perplexity_ratio.error == pytest.approx(own.ln_perplexity_ratio.error, rel=0.01)
    assert by_file.delta_p.rms.value == pytest.approx(own.delta_p.rms.value, rel=0.01)
    # what the file's own steps do is far below what is measured
    alone = Accumulator()
    alone.add(read_predictions(reference, following), read_predictions(stored, following))
    assert alone.result().kld.mean.value < 1e-4
