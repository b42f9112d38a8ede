"""A method that nobody knew: found by its file's name, and free to change weights across tensors."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from textwrap import dedent

import numpy as np
import pytest

from smolexport.api import read_back
from smolexport.calibration import methods
from smolexport.calibration.calibrator import Calibration
from smolexport.conversion.pipeline import export
from smolexport.conversion.plan import Plan
from smolexport.errors import UsageError
from smolexport.model.checkpoint import open_checkpoint
from smolexport.model.spec import Role
from smolexport.quant import FORMATS
from smolexport.recipe import sidecar_of
from smolexport.testing.checkpoints import model_of

# What AWQ does to a layer, with factors that lose nothing: powers of two.
SMOOTHING = """
    from dataclasses import dataclass, replace
    import numpy as np
    from smolexport.calibration.methods import Method
    from smolexport.model.spec import Role
    from smolexport.model.tensor_file import StoredTensor

    @dataclass(frozen=True)
    class Scaled(StoredTensor):
        factors: np.ndarray = None
        def read_rows(self, start=0, stop=None):
            return super().read_rows(start, stop).astype(np.float32) * self.factors

    class Smoothing(Method):
        about, rank = "norms scaled, and the matrices after them inversely", 9
        rewrites = True

        def prepare(self, source):
            stored = {}
            for tensor, place in source.stored.items():
                scale = {Role.NORM_BEFORE_MLP: 1, Role.GATE: -1, Role.UP: -1}.get(tensor.role)
                if scale is None:
                    stored[tensor] = place
                    continue
                gate = next(t for t in source.stored if (t.role, t.layer) == (Role.GATE, tensor.layer))
                exponents = np.round(np.log2(self.statistics.mean_squares(gate))).clip(-3, 3) * scale
                stored[tensor] = Scaled(**vars(place), factors=np.exp2(exponents).astype(np.float32))
            return replace(source, stored=stored)

    METHOD = Smoothing
"""


@pytest.fixture
def smoothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    (tmp_path / "smoothing.py").write_text(dedent(SMOOTHING))
    monkeypatch.setattr(methods, "__path__", [*methods.__path__, str(tmp_path)])
    yield "smoothing"
    sys.modules.pop("smolexport.calibration.methods.smoothing", None)


def test_methods_are_found_by_the_names_of_their_files(smoothing: str) -> None:
    assert list(methods.methods()) == ["rtn", "imatrix", "gptq", "distil", smoothing]
    with pytest.raises(UsageError, match="must be one of rtn, imatrix, gptq, distil, smoothing"):
        Calibration("awq")


@pytest.mark.parametrize("target", ["gguf", "mlx", "onnx"])
def test_a_method_rewrites_weights_across_tensors(
    target: str, smoothing: str, demo: Path, demo_statistics: Path, tmp_path: Path
) -> None:
    """Through the pipeline as it is: the file holds other weights, and they predict what the checkpoint's do."""
    from smolexport_on_torch import open as play

    spec = open_checkpoint(demo).spec
    calibration = Calibration(smoothing, demo_statistics)
    done = export(target, demo, tmp_path, quant="f32", calibration=calibration)
    assert "-f32-smoothing" in done.path.name
    assert json.loads(sidecar_of(done.path).read_bytes())["method"] == smoothing
    weights = {tensor: values.copy() for tensor, values in read_back(done.path, spec)}
    stored = open_checkpoint(demo).stored
    changed = {t.role for t, values in weights.items() if (values != stored[t].read_rows().reshape(t.shape)).any()}
    assert changed == {Role.NORM_BEFORE_MLP, Role.GATE, Role.UP}
    with play(demo, threads=1, dtype="f32") as session:
        expected = session.append(list(range(40, 72)))
    with play(demo, threads=1, dtype="f32", weights=[(t.stored_name, w) for t, w in weights.items()]) as session:
        np.testing.assert_allclose(session.append(list(range(40, 72))), expected, atol=1e-4)


def test_rounding_sees_the_rewritten_weights(smoothing: str, demo: Path, demo_statistics: Path, tmp_path: Path) -> None:
    calibration = Calibration(smoothing, demo_statistics)
    checkpoint = open_checkpoint(demo)
    quantizer, _ = calibration.open(model_of(checkpoint), checkpoint, (), lambda *_: Plan("", "", "", ()))
    assert quantizer is not None
    assert quantizer.source is not None
    done = export("gguf", demo, tmp_path, quant="q4_0", calibration=calibration)
    form = FORMATS["q4_0"]
    for tensor, values in read_back(done.path, checkpoint.spec):
        if tensor.role is Role.GATE:
            rows = quantizer.source.stored[tensor].read_rows()
            np.testing.assert_array_equal(values, form.decode(form.encode(rows), rows.shape[1]))
