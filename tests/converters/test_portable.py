"""One lattice in every format: the same integers, the same scales, the same fingerprint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import smolexport
from smolexport import plugins
from smolexport.conversion import portable
from smolexport.conversion.pipeline import export_all
from smolexport.conversion.prepare import prepare_all
from smolexport.errors import OutputError, UsageError
from smolexport.model.checkpoint import open_checkpoint
from smolexport.model.spec import Role
from smolexport.quant import FORMATS
from smolexport.testing.checkpoints import write_checkpoint, write_tokenizer
from smolexport_to_gguf.container import read_gguf
from smolexport_to_mlx.container import read_arrays

CASES: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    "llama untied": {"tie_word_embeddings": False},
    "llama, rows of 172": {"intermediate_size": 172},
    "smollm3": {},
    "qwen2": {},
    "qwen3": {"tie_word_embeddings": False},
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def outputs(folder: Path, out: Path, quant: str) -> dict[str, Path]:
    return {done.plan.target: done.path for done in export_all(folder, out, quant=quant)}


@pytest.mark.parametrize("quant", list(portable.SCHEMES))
@pytest.mark.parametrize("dtype", ["bf16", "f32"])
@pytest.mark.parametrize("case", CASES)
def test_all_formats_hold_the_same_weights(case: str, dtype: str, quant: str, tokenizer: Path, tmp_path: Path) -> None:
    model_type = case.split(",", maxsplit=1)[0].split(maxsplit=1)[0]
    folder = write_checkpoint(tmp_path / "model", model_type, dtype=dtype, seed=4, tokenizer=tokenizer, **CASES[case])
    made = outputs(folder, tmp_path, quant)
    assert set(made) == set(plugins.converters())
    assert len({smolexport.fingerprint(path) for path in made.values()}) == 1
    spec = open_checkpoint(folder).spec
    reads = [dict(smolexport.read_back(path, spec)) for path in made.values()]
    for tensor in spec.tensors():
        for other in reads[1:]:
            np.testing.assert_array_equal(reads[0][tensor], other[tensor])


def test_the_integers_and_scales_are_the_same(tokenizer: Path, tmp_path: Path) -> None:
    """Not only their products: code by code, scale by scale, in a matrix whose rows neither format moves."""
    folder = write_checkpoint(tmp_path / "model", "llama", seed=4, tokenizer=tokenizer)
    made = outputs(folder, tmp_path, "int4")
    gguf, (arrays, _) = read_gguf(made["gguf"]), read_arrays(made["mlx"])
    info, module = gguf.tensors["blk.1.ffn_up.weight"], "model.layers.1.mlp.up_proj"
    assert info.format is FORMATS["q4_0"]
    blocks = np.fromfile(made["gguf"], np.uint8, info.nbytes, offset=info.offset).reshape(-1, 18)
    low, high = blocks[:, 2:] & 15, blocks[:, 2:] >> 4
    scales = blocks[:, :2].copy().view(np.float16).reshape(-1)

    def stored(name: str, kind: Any) -> Any:
        array = arrays[f"{module}.{name}"]
        return np.fromfile(array.path, kind, array.nbytes // np.dtype(kind).itemsize, offset=array.offset)

    words = stored("weight", np.uint8)
    codes = np.stack([words & 15, words >> 4], 1).reshape(-1, 32)
    np.testing.assert_array_equal(codes, np.concatenate([low, high], 1))
    np.testing.assert_array_equal(stored("scales", np.float16), scales)
    np.testing.assert_array_equal(stored("biases", np.float16), -8 * scales)


def test_one_weight_more_or_less_changes_the_fingerprint(tokenizer: Path, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model", "llama", seed=4, tokenizer=tokenizer)
    path = outputs(folder, tmp_path, "int8")["mlx"]
    before = smolexport.fingerprint(path)
    array = read_arrays(path)[0]["model.layers.0.self_attn.q_proj.weight"]
    with array.path.open("r+b") as file:
        file.seek(array.offset)
        first = file.read(1)[0]
        file.seek(array.offset)
        file.write(bytes([first ^ 1]))
    assert smolexport.fingerprint(path) != before


def test_floats_have_the_fingerprint_of_the_checkpoint(tokenizer: Path, tmp_path: Path) -> None:
    from smolexport.model.weights import fingerprint

    folder = write_checkpoint(tmp_path / "model", "smollm3", seed=4, tokenizer=tokenizer)
    own = fingerprint(open_checkpoint(folder).stored, threads=2)
    for target in plugins.converters():
        quant = "bf16" if "bf16" in plugins.converter(target).SCHEMES else "f32"
        done = smolexport.export(target, folder, tmp_path / target, quant=quant)
        assert smolexport.fingerprint(done.path) == own


def test_embedding_and_head_keep_eight_bits(tokenizer: Path, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model", "llama", tokenizer=tokenizer, tie_word_embeddings=False)
    for job in prepare_all(folder, tmp_path, quant="int4"):
        sizes = {e.tensor.role: e.format.row_bytes(64) for e in job.plan.entries if e.tensor and e.shape[-1] == 64}
        assert sizes[Role.EMBED] == sizes[Role.HEAD] > sizes[Role.Q]
        assert portable.NOTE in job.plan.notes
    config = json.loads((outputs(folder, tmp_path, "int4")["mlx"] / "config.json").read_text())
    assert config["quantization"] == {
        "group_size": 32, "bits": 4, "mode": "affine",
        "model.embed_tokens": {"group_size": 32, "bits": 8, "mode": "affine"},
        "lm_head": {"group_size": 32, "bits": 8, "mode": "affine"},
    }  # fmt: skip


def test_each_tensor_is_read_once_and_each_lattice_encoded_once(
    tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from smolexport.model.tensor_file import StoredTensor
    from smolexport.quant import BlockFormat

    reads: list[tuple[str, int]] = []
    encodes: list[str] = []
    read, encode = StoredTensor.read_rows, BlockFormat.encode

    def counted_read(self: StoredTensor, start: int = 0, stop: int | None = None) -> Any:
        reads.append((self.name, start))
        return read(self, start, stop)

    def counted_encode(self: BlockFormat, *arguments: Any) -> Any:
        encodes.append(self.name)
        return encode(self, *arguments)

    folder = write_checkpoint(tmp_path / "model", "llama", tokenizer=tokenizer, num_hidden_layers=2)
    jobs = prepare_all(folder, tmp_path, quant="int4")
    monkeypatch.setattr(StoredTensor, "read_rows", counted_read)
    monkeypatch.setattr(BlockFormat, "encode", counted_encode)
    from smolexport.conversion.pipeline import write_all

    write_all(jobs)
    matrices = 2 * 7
    assert len(reads) == len(set(reads)) == matrices + 1 + 2 * 2 + 1
    assert encodes.count("q4_0") == matrices
    assert encodes.count("q8_0") == 1  # the embedding


def test_a_scheme_that_one_format_lacks(tokenizer: Path, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model", "llama", tokenizer=tokenizer)
    with pytest.raises(UsageError, match="MLX has no such scheme"):
        export_all(folder, tmp_path / "out", quant="q4_k_m")
    assert not (tmp_path / "out").exists()
    [done] = export_all(folder, tmp_path, quant="q4_k_s", targets=["gguf"])
    assert done.path.suffix == ".gguf"


@pytest.mark.parametrize("targets", [[], ["gguf", "gguf"], ["mlx", "gguf", "mlx"]])
def test_each_format_is_named_once(targets: list[str], tokenizer: Path, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model", "llama", tokenizer=tokenizer)
    with pytest.raises(UsageError, match="name each format once"):
        export_all(folder, tmp_path / "out", targets=targets)
    assert not (tmp_path / "out").exists()


def test_nothing_appears_when_one_output_cannot_reach_the_disk(
    tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All outputs are flushed before the first one gets its name."""
    from smolexport.conversion.writer import Sink

    flush = Sink.flush
    flushed: list[Path] = []

    def failing(self: Sink) -> None:
        flush(self)
        flushed.append(self.paths[0])
        if len(flushed) == 2:
            raise OutputError(f"{self.paths[0]}: No space left on device; nothing was written")

    folder = write_checkpoint(tmp_path / "model", "llama", tokenizer=tokenizer)
    monkeypatch.setattr(Sink, "flush", failing)
    with pytest.raises(OutputError, match="No space left"):
        export_all(folder, tmp_path / "out")
    assert len(flushed) == 2
    assert not (tmp_path / "out").exists()


def test_the_space_for_all_outputs_is_summed(tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil

    folder = write_checkpoint(tmp_path / "model", "llama", tokenizer=tokenizer)
    jobs = prepare_all(folder, tmp_path)
    sizes = [job.plan.size for job in jobs]

    class Usage:
        free = sum(sizes) - 1

    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage)
    from smolexport.conversion.pipeline import write_all

    with pytest.raises(OutputError, match="MB are needed"):
        write_all(jobs)
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_a_small_file_that_vanishes_meanwhile(tokenizer: Path, tmp_path: Path) -> None:
    from smolexport.conversion.pipeline import write
    from smolexport.conversion.prepare import prepare
    from smolexport.errors import CheckpointError

    folder = write_checkpoint(tmp_path / "model", "llama", tokenizer=tokenizer)
    job = prepare("mlx", folder, tmp_path / "x")
    (folder / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: No such file .*; it existed when the export began"):
        write(job)
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
