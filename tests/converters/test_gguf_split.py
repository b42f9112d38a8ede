"""The error of a file split in two: torch on the decoded weights stands between the checkpoint and the runtime.

checkpoint in torch --quantization--> decoded weights in torch --exporter, runtime--> the file in llama.cpp
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

import smolexport
from smolexport.checkpoint import open_checkpoint
from smolexport.convert import export
from smolexport.demo import demo_text
from smolexport.parity.statistics import Accumulator, read_predictions
from smolexport.runtime import Session

TOKENS = 512


def divergence(reference: NDArray[np.float32], other: NDArray[np.float32], ids: list[int]) -> float:
    following = np.array(ids[1:])
    sums = Accumulator()
    sums.add(read_predictions(reference[:-1], following), read_predictions(other[:-1], following))
    return sums.result().kld.mean.value


@pytest.fixture
def texts(demo: Path) -> Iterator[tuple[list[int], NDArray[np.float32]]]:
    pytest.importorskip("torch")
    pytest.importorskip("llama_cpp")
    import smolexport_on_torch as torch

    with torch.open(demo, dtype="f32", threads=1) as session:
        ids = session.codec.encode(demo_text())[:TOKENS]
        yield ids, session.append(ids)


def play(session: Session, ids: list[int]) -> NDArray[np.float32]:
    with session:
        return session.append(ids)


def test_quantization_and_runtime_are_told_apart(
    demo: Path, texts: tuple[list[int], NDArray[np.float32]], tmp_path: Path
) -> None:
    import smolexport_on_llamacpp as llamacpp
    import smolexport_on_torch as torch

    ids, original = texts
    file = export("gguf", demo, tmp_path / "demo.gguf", quant="q4_k").path
    back = ((t.source, values) for t, values in smolexport.read_back(file, open_checkpoint(demo).spec))
    decoded = play(torch.open(demo, dtype="f32", threads=1, weights=back), ids)
    played = play(llamacpp.open(file, threads=1, kv_type="f32", flash_attention=False), ids)
    quantization, runtime = divergence(original, decoded, ids), divergence(decoded, played, ids)
    assert 0.001 < quantization < 0.02
    assert runtime < quantization / 5


def test_a_fault_of_the_exporter_shows_on_its_own_side(
    demo: Path, texts: tuple[list[int], NDArray[np.float32]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same file with a wrong theta: the weights decode as before, and only the second part grows."""
    import smolexport_on_llamacpp as llamacpp
    import smolexport_on_torch as torch
    from smolexport_to_gguf import metadata

    ids, original = texts
    true = metadata._rope_metadata
    monkeypatch.setattr(
        metadata, "_rope_metadata", lambda a, r: [(k, t, v / 10 if "base" in k else v) for k, t, v in true(a, r)]
    )
    file = export("gguf", demo, tmp_path / "wrong.gguf", quant="q4_k").path
    back = ((t.source, values) for t, values in smolexport.read_back(file, open_checkpoint(demo).spec))
    decoded = play(torch.open(demo, dtype="f32", threads=1, weights=back), ids)
    played = play(llamacpp.open(file, threads=1, kv_type="f32", flash_attention=False), ids)
    assert divergence(original, decoded, ids) < 0.02
    assert divergence(decoded, played, ids) > 0.1
