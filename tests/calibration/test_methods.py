"""Methods at work: the same bytes, nearer to the model, and in every format the same weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

import smolexport
from smolexport.api import fingerprint, read_back
from smolexport.calibration.calibrator import Calibration
from smolexport.cli.options import calibration_of
from smolexport.conversion.pipeline import export, export_all
from smolexport.conversion.source_model import CALIBRATION_KEY
from smolexport.demo import demo_text
from smolexport.errors import CalibrationError, UsageError
from smolexport.parity.inputs import Settings
from smolexport.quant import FORMATS, BlockFormat
from smolexport.recipe import sidecar_of
from smolexport_to_gguf.container import TensorInfo
from tests.core.test_gptq import relative_error
from tests.mlx_for_tests import mlx_lm

SETTINGS = Settings(repetitions=0, memory=False, greedy_tokens=0, threads=1, max_windows=8)


def made_files(
    demo: Path, statistics: Path, folder: Path, methods: tuple[str, ...], quant: str
) -> dict[str, list[Path]]:
    """Files of all formats by method."""
    found = {}
    for method in methods:
        calibration = Calibration(method, None if method == "rtn" else statistics)
        done = export_all(demo, folder / method, quant=quant, calibration=calibration)
        found[method] = [one.path for one in done]
    return found


def kld_of(demo: Path, paths: list[Path]) -> Mapping[Path, float]:
    results = smolexport.compare(demo, paths, text=demo_text(), settings=SETTINGS).candidates
    return {path: result.accuracy.kld.mean.value for path, result in zip(paths, results, strict=True)}


def test_portable_int4_comes_closer_at_the_same_bytes(demo: Path, demo_statistics: Path, tmp_path: Path) -> None:
    """In all three formats, on their runtimes; and all hold the very same weights."""
    for library in ("torch", "llama_cpp", "onnxruntime"):
        pytest.importorskip(library)
    mlx_lm()
    files = made_files(demo, demo_statistics, tmp_path, ("rtn", "imatrix", "gptq"), "int4")
    kld = {method: kld_of(demo, paths) for method, paths in files.items()}
    for plain, searched, solved in zip(*files.values(), strict=True):
        assert kld["imatrix"][searched] < 0.95 * kld["rtn"][plain]
        assert kld["gptq"][solved] <= 0.5 * kld["rtn"][plain]
    for paths in files.values():
        assert len({fingerprint(path) for path in paths}) == 1
    sizes = [
        [sum(tensor.nbytes for tensor in smolexport.inspect(p).tensors) for p in paths] for paths in files.values()
    ]
    assert sizes[0] == sizes[1] == sizes[2]


@pytest.mark.parametrize(
    ("target", "quant"),
    [("gguf", "q4_1"), ("gguf", "q4_k_m"), ("gguf", "q3_k_s"), ("mlx", "q4"), ("mlx", "q3_g32"), ("onnx", "int4-asym")],
)
def test_every_lattice_comes_closer(target: str, quant: str, demo: Path, demo_statistics: Path, tmp_path: Path) -> None:
    """By what the matrices put out: the mean over them of the error that the report beside the file tells."""
    done = export(target, demo, tmp_path, quant=quant, calibration=Calibration("gptq", demo_statistics))
    tensors = json.loads(sidecar_of(done.path).read_bytes())["tensors"]
    assert len(tensors) == (28 if target == "onnx" else 29)  # an embedding of 8 bits is left alone
    before, after = (np.array([errors[when] for errors in tensors.values()]) for when in ("before", "after"))
    assert (after < before).all()
    assert after.mean() < 0.6 * before.mean()


def test_the_report_is_right(demo: Path, demo_statistics: Path, tmp_path: Path) -> None:
    """What it says of a matrix is what its decoded weights do to the Hessian."""
    from smolexport.calibration.statistics import open_statistics
    from smolexport.model.checkpoint import open_checkpoint

    done = export("gguf", demo, tmp_path, quant="q4_0", calibration=Calibration("gptq", demo_statistics))
    errors = json.loads(sidecar_of(done.path).read_bytes())["tensors"]
    checkpoint, statistics = open_checkpoint(demo), open_statistics(demo_statistics)
    seen = 0
    for tensor, decoded in read_back(done.path, checkpoint.spec):
        if tensor.stored_name in errors and tensor.shape[0] <= 256:
            rows = checkpoint.stored[tensor].read_rows().astype(np.float32)
            exact = relative_error(rows, decoded, statistics.hessian(tensor))
            assert errors[tensor.stored_name]["after"] == pytest.approx(exact, rel=0.05)
            seen += 1
    assert seen >= 12


def test_files_say_how_they_were_made(demo: Path, demo_statistics: Path, tmp_path: Path) -> None:
    for done in export_all(demo, tmp_path, quant="int4", calibration=Calibration("gptq", demo_statistics)):
        found = json.loads(str(smolexport.inspect(done.path).metadata[CALIBRATION_KEY]))
        assert found["method"] == "gptq"
        assert found["damping"] == 0.01
        assert found["tokens"] > 0
        assert all(len(text["sha256"]) == 64 for text in found["texts"])
        report = json.loads(sidecar_of(done.path).read_bytes())
        assert {key: report[key] for key in found} == found
        assert sidecar_of(done.path) in done.files
        assert "-gptq" in done.path.name


def test_plain_rounding_is_untouched(demo: Path, tmp_path: Path) -> None:
    plain = export("gguf", demo, tmp_path / "a.gguf", quant="q4_k_m")
    asked = export("gguf", demo, tmp_path / "b.gguf", quant="q4_k_m", calibration=Calibration())
    assert plain.path.read_bytes() == asked.path.read_bytes()
    assert not sidecar_of(plain.path).exists()


def test_what_cannot_be_is_refused(demo: Path, demo_statistics: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="smolexport calibrate"):
        Calibration("gptq")
    with pytest.raises(UsageError, match="rtn uses no statistics"):
        Calibration("rtn", demo_statistics)
    with pytest.raises(UsageError, match="must be one of"):
        Calibration("magic", demo_statistics)
    with pytest.raises(UsageError, match="gptq has none; give --method distil"):
        calibration_of("gptq", demo_statistics, 5, None, None, measure=False)
    with pytest.raises(UsageError, match="int8 has no matrix of less than 8 bits"):
        export("gguf", demo, tmp_path, quant="int8", calibration=Calibration("gptq", demo_statistics))
    assert list(tmp_path.iterdir()) == []


def test_a_missing_statistic_is_named(demo: Path, demo_statistics: Path, tmp_path: Path) -> None:
    import shutil

    statistics = Path(shutil.copytree(demo_statistics, tmp_path / "stats"))
    (statistics / "layer-002.safetensors").unlink()
    with pytest.raises(CalibrationError, match=r"layer-002\.safetensors.*model\.layers\.2\.self_attn\.q_proj"):
        export("gguf", demo, tmp_path, quant="int4", calibration=Calibration("gptq", statistics))
    assert not list(tmp_path.glob("*.gguf*"))


def test_trained_scales_are_the_same_in_every_format(demo: Path, demo_statistics: Path, tmp_path: Path) -> None:
    """A few steps: nearer on windows that were held out, one training for all formats, and codes as gptq left them."""
    from smolexport.calibration.trainer import DistilSettings
    from smolexport.quant.affine_view import codes_of
    from smolexport_to_gguf.container import read_gguf

    training = DistilSettings(steps=6, batch=4, threads=1)
    files = {}
    for method in ("gptq", "distil"):
        calibration = Calibration(method, demo_statistics, training=training)
        files[method] = [
            done.path for done in export_all(demo, tmp_path / method, quant="int4", calibration=calibration)
        ]
    assert len({fingerprint(path) for path in files["distil"]}) == 1
    reports = [json.loads(sidecar_of(path).read_bytes()) for path in files["distil"]]
    assert all(report["trainings"] == reports[0]["trainings"] and report["steps"] == 6 for report in reports)
    [told] = reports[0]["trainings"]
    before, after = (float(word) for word in told.split("windows ")[1].split(" at ")[0].split(" -> "))
    assert after < before
    solved, trained = (read_gguf(next(p for p in files[m] if p.suffix == ".gguf")) for m in ("gptq", "distil"))
    form, changed = FORMATS["q4_0"], 0
    for name, info in solved.tensors.items():
        if info.format is form:
            rows = [_rows(file.path, file.tensors[name], form) for file in (solved, trained)]
            first, second = (codes_of(form, found, info.shape[-1]) for found in rows)
            assert (first == second).all()
            changed += not np.array_equal(*rows)
    assert changed == 28


def _rows(path: Path, info: TensorInfo, form: BlockFormat) -> NDArray[np.uint8]:
    with path.open("rb") as file:
        file.seek(info.offset)
        return np.frombuffer(file.read(info.nbytes), np.uint8).reshape(-1, form.row_bytes(info.shape[-1])).copy()
