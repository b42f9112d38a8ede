"""Layer by layer from the spec gives the logits of transformers: all architectures, with and without a cache."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from smolexport.model.checkpoint import Checkpoint
from tests.calibration.models import CASES, made, random_ids

torch = pytest.importorskip("torch")

POSITIONS = 80


def logits(checkpoint: Checkpoint, ids: object, step: int) -> object:
    """[n, v] with a cache and `step` positions at a time; without one where the step is all of them."""
    from smolexport_on_torch import _decoder as d

    spec, n = checkpoint.spec, len(ids)
    caches = [d.Cache(layer.mixer, 1, n) if step < n else None for layer in spec.layers]
    table, (weight, head) = d.load_embedding(checkpoint), d.load_head(checkpoint)
    found = []
    with torch.inference_mode():
        for part in torch.from_numpy(ids.astype(np.int64)).split(step):
            x = torch.nn.functional.embedding(part[None], table)
            for index, cache in enumerate(caches):
                x = d.layer_forward(x, d.load_layer(checkpoint, index), spec, index, cache=cache)
            found.append(d.norm(x, weight, spec.norm_eps)[0] @ head.T)
    return torch.cat(found).numpy()


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_transformers(case: str, tmp_path: Path) -> None:
    import smolexport_on_torch

    checkpoint = made(tmp_path, case)
    ids = random_ids(POSITIONS)
    with smolexport_on_torch.open(checkpoint.folder, dtype="f32") as session:
        wanted = session.append(ids)
    assert wanted.std() > 1
    for step in (POSITIONS, 7, 1):
        found = logits(checkpoint, ids, step)
        assert np.abs(found - wanted).max() < 1e-4, step


def test_a_layer_tells_what_its_matrices_read(tmp_path: Path) -> None:
    from smolexport_on_torch import _decoder as d

    checkpoint = made(tmp_path, "qwen3, normed heads")
    seen: dict[str, tuple[int, ...]] = {}
    x = torch.randn(2, 5, checkpoint.spec.hidden_size)
    d.layer_forward(
        x, d.load_layer(checkpoint, 1), checkpoint.spec, 1, tap=lambda kind, y: seen.update({kind: tuple(y.shape)})
    )
    assert seen == {"attn": (2, 5, 64), "o": (2, 5, 128), "mlp": (2, 5, 64), "down": (2, 5, 160)}


def test_a_window_hides_what_lies_before_it(tmp_path: Path) -> None:
    """No published config of these architectures has one; the spec can say it, so it is computed."""
    checkpoint = made(tmp_path, "llama")
    layers = tuple(replace(layer, mixer=replace(layer.mixer, window=8)) for layer in checkpoint.spec.layers)
    windowed = replace(checkpoint, spec=replace(checkpoint.spec, layers=layers))
    ids = random_ids(40)
    found, plain = logits(windowed, ids, 40), logits(checkpoint, ids, 40)
    for step in (7, 1):
        assert np.abs(logits(windowed, ids, step) - found).max() < 1e-4
    assert np.abs(found[:8] - plain[:8]).max() < 1e-4
    assert np.abs(found[8:] - plain[8:]).max(1).min() > 1e-2
    seen = 2 * 7  # positions back through two layers
    other = ids.copy()
    other[20] = ids[20] % 300 + 5
    changed = np.abs(logits(windowed, other, 40) - found).max(1)
    assert (changed[:20] < 1e-5).all()
    assert changed[20] > 1e-2
    assert (changed[20 + seen + 1 :] < 1e-5).all()
    assert changed[20 + 1 : 20 + seen + 1].max() > 1e-3
