"""Sensitivities against what really happens when outputs are disturbed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from smolexport.testing.checkpoints import write_checkpoint, write_tokenizer

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    return write_checkpoint(folder / "model", "llama", seed=4, tokenizer=write_tokenizer(folder / "tokenizer"))


def divergence_of(model: object, windows: object, name: str, column: int, size: float) -> float:
    """Nats per token when one output moves by +-`size` at random at each position but the first."""
    from torch import nn

    assert isinstance(model, nn.Module)
    with torch.no_grad():
        before = model(input_ids=windows).logits.double().log_softmax(-1)

    def moved(module: object, given: object, output: torch.Tensor) -> torch.Tensor:
        signs = torch.randint(0, 2, output.shape[:2], generator=torch.Generator().manual_seed(1)) * 2.0 - 1
        signs[:, 0] = 0
        changed = output.clone()
        changed[..., column] += size * signs
        return changed

    handle = model.get_submodule(name.removesuffix(".weight")).register_forward_hook(moved)
    with torch.no_grad():
        after = model(input_ids=windows).logits.double().log_softmax(-1)
    handle.remove()
    divergence = (before.exp() * (before - after)).sum(-1)
    return float(divergence.sum() / (windows.shape[0] * (windows.shape[1] - 1)))  # type: ignore[attr-defined]


@pytest.mark.parametrize("part", ["self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj"])
def test_finite_differences(tiny: Path, part: str) -> None:
    """A disturbance of size e at every position costs 1/2 e^2 F."""
    from smolexport_on_torch import trainer as engine
    from smolexport_on_torch._load import load_model

    windows = np.random.default_rng(0).integers(0, 300, (64, 32)).astype(np.int32)
    found = engine.sensitivity(tiny, np.concatenate([windows] * 4))
    model = load_model(tiny, "f32", None)
    name, size = f"model.layers.1.{part}.weight", 0.02
    columns = np.argsort(-found[name])[:3]
    measured = [divergence_of(model, torch.from_numpy(windows).long(), name, c, size) for c in map(int, columns)]
    predicted = 0.5 * size**2 * found[name][columns]
    assert sum(measured) == pytest.approx(predicted.sum(), rel=0.2)


def test_the_head_and_all_names(tiny: Path) -> None:
    from smolexport.model.checkpoint import open_checkpoint
    from smolexport_on_torch import trainer as engine
    from smolexport_on_torch._load import load_model

    windows = np.random.default_rng(0).integers(0, 300, (3, 16)).astype(np.int32)
    found = engine.sensitivity(tiny, windows, seed=1)
    matrices = {t.stored_name for t in open_checkpoint(tiny).spec.tensors() if len(t.shape) == 2}
    assert set(found) == matrices | {"lm_head.weight"}
    with torch.no_grad():
        p = load_model(tiny, "f32", None)(input_ids=torch.from_numpy(windows).long()).logits[:, 1:].softmax(-1)
    np.testing.assert_allclose(found["lm_head.weight"], (p * (1 - p)).mean((0, 1)), rtol=1e-4)
    again = engine.sensitivity(tiny, windows, seed=1)
    assert all((again[name] == values).all() for name, values in found.items())


def test_the_original_does_not_diverge_from_itself(demo: Path, demo_statistics: Path) -> None:
    from smolexport.calibration.statistics import open_statistics
    from smolexport.model.checkpoint import open_checkpoint
    from smolexport_on_torch import trainer as engine

    checkpoint, statistics = open_checkpoint(demo), open_statistics(demo_statistics)
    weights = {t.stored_name: s.read_rows().astype(np.float32).reshape(t.shape) for t, s in checkpoint.stored.items()}
    windows, teacher = statistics.windows()[-1:], statistics.teacher(statistics.manifest.windows - 1)
    assert engine.divergence(demo, weights.items(), windows, teacher) < 1e-6
    weights["model.norm.weight"] = weights["model.norm.weight"] * np.float32(1.1)
    assert engine.divergence(demo, weights.items(), windows, teacher) > 1e-3
