"""`--imatrix`: tensor bytes equal to llama.cpp's quantizer with the same importances; what is refused, what is told.

Axes: all schemes x four architectures, tied and untied heads, the row lengths of 135M (fall-backs) and of no block at
all; the two forms of file; entries of zeros, without a count, missing.  The choice of types at published shapes is in
`test_gguf_schemes.py`.  The oracle gets vectors that are computed here, not by the reader.
"""

from __future__ import annotations

import json
import platform
import re
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from numpy.typing import NDArray

from smolexport.conversion import portable
from smolexport.conversion.pipeline import export
from smolexport.errors import FileFormatError, TensorError, UsageError
from smolexport.model.arch import load_spec
from smolexport.model.spec import ModelSpec
from smolexport.testing.checkpoints import tiny_config
from smolexport_to_gguf.architectures import output_name
from smolexport_to_gguf.container import read_gguf
from smolexport_to_gguf.imatrix import Imatrix, Statistic, write_imatrix
from smolexport_to_gguf.schemes import SCHEMES
from tests.cli.commands import assert_refused, call, tiny_checkpoint
from tests.converters.llama_quantize import oracle
from tests.converters.old_imatrix import write_dat
from tests.converters.test_gguf_bytes import blocks

OWN = (*portable.SCHEMES, portable.AUTO_BITS)
QUANTIZED = [s for s in SCHEMES.values() if s.quantized and s.name not in OWN]
WIDE: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 2, "vocab_size": 320}
HEADED = WIDE | {"num_attention_heads": 4, "head_dim": 64}
CASES: dict[str, tuple[str, str, Literal["gguf", "dat"], dict[str, Any]]] = {
    "llama, 8 layers": ("llama", "bf16", "gguf", HEADED | {"num_hidden_layers": 8, "num_key_value_heads": 1}),
    "llama untied": ("llama", "f32", "dat", HEADED | {"tie_word_embeddings": False, "attention_bias": True}),
    "smollm3": ("smollm3", "bf16", "gguf", WIDE),
    "qwen2": ("qwen2", "bf16", "dat", WIDE),
    "qwen3": ("qwen3", "f16", "gguf", HEADED),
    "rows of 135M": ("llama", "bf16", "gguf", {
        "hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3,
        "num_hidden_layers": 1}),
    "rows of 172": ("llama", "bf16", "dat", {"intermediate_size": 172, "num_hidden_layers": 2}),
}  # fmt: skip
Q, DOWN, EMBED = "blk.0.attn_q.weight", "blk.0.ffn_down.weight", "token_embd.weight"


def statistics(spec: ModelSpec) -> dict[str, Statistic]:
    """Sums as of 3 chunks of 512 tokens, of every matrix in a layer and of an untied head."""
    random, found = np.random.default_rng(3), {}
    for tensor in spec.tensors():
        name, columns = output_name(tensor), tensor.shape[-1]
        if len(tensor.shape) == 2 and name != EMBED:
            sums = (random.lognormal(0, 2, (1, columns)) * 1536).astype(np.float32)
            sums[:, random.random(columns) < 0.1] = 0
            found[name] = Statistic(sums, np.array([1536]))
    found["blk.0.attn_k.weight"].sums[:] = 0
    return found


def divided(entries: dict[str, Statistic], form: str) -> dict[str, NDArray[np.float32]]:
    """The importances as llama.cpp's tools have them, through the arithmetic of each form in float32."""
    found = {}
    for name, entry in entries.items():
        sums, count = entry.sums[0], np.float32(entry.counts[0])
        if form == "dat":
            found[name] = (sums / count * np.float32(3)) / np.float32(3) if count else sums
        else:
            found[name] = sums / count if count else np.ones_like(sums)
    return found


@pytest.mark.skipif(
    platform.machine() not in ("x86_64", "AMD64"), reason="bytes are defined by the x86-64 build of llama.cpp"
)
@pytest.mark.parametrize("case", CASES)
def test_every_tensor_equals_llama_cpps(case: str, tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")
    model_type, dtype, form, overrides = CASES[case]
    folder = tiny_checkpoint(tmp_path, model_type, dtype=dtype, seed=5, **overrides)
    spec = load_spec(json.loads((folder / "config.json").read_text()))
    entries = statistics(spec)
    if form == "gguf":  # without a count: 1 everywhere
        entries["blk.0.attn_v.weight"] = Statistic(entries["blk.0.attn_v.weight"].sums, np.array([0]))
    if case == "qwen2":  # a statistic for a tied embedding is used where it fits
        entries[EMBED] = entries[Q]
    if case == "qwen3":  # and passed over where it does not
        entries[EMBED] = Statistic(np.ones((1, 7), np.float32), np.array([1]))
    file = tmp_path / f"importance.{form}"
    write = write_dat if form == "dat" else write_imatrix
    write(Imatrix(entries, ("text.txt",), 3, 512), file)
    wide = export("gguf", folder, tmp_path / "wide.gguf", quant="bf16" if dtype == "bf16" else "f32").path
    oracle(wide, tmp_path / "theirs.gguf", [s.file_type for s in QUANTIZED], divided(entries, form))
    for scheme in QUANTIZED:
        options = {"imatrix": str(file)}
        done = export("gguf", folder, tmp_path / "ours.gguf", quant=scheme.name, force=True, options=options)
        ours, theirs = read_gguf(done.path), read_gguf(tmp_path / f"theirs.gguf.{scheme.file_type}")
        assert set(ours.tensors) == set(theirs.tensors)
        for name, info in ours.tensors.items():
            assert (info.format, info.shape) == (theirs.tensors[name].format, theirs.tensors[name].shape), scheme.name
            assert blocks(ours, name) == blocks(theirs, name), (scheme.name, name)
        assert str(ours.metadata["general.file_type"]) == str(theirs.metadata["general.file_type"])


@pytest.fixture(scope="module")
def spec() -> ModelSpec:
    return load_spec(tiny_config("llama", **HEADED))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("model"), "llama", **HEADED)


def test_keys_and_notes(folder: Path, spec: ModelSpec, tmp_path: Path) -> None:
    """The four keys of llama.cpp's tool, at the end; the importance changes bytes; notes name what does not fit."""
    file, entries = tmp_path / f"{'x' * 140}.gguf", statistics(spec)
    del entries[Q]
    entries[EMBED] = Statistic(np.ones((1, 7), np.float32), np.array([1]))
    entries["blk.7.\x1battn_q.weight"] = entries[DOWN]
    write_imatrix(Imatrix(entries, ("a.txt", "b.txt"), 3, 512), file)
    outcome = call("gguf", folder, "-q", "q4_k", "--imatrix", file, "-o", tmp_path / "with.gguf")
    assert outcome.code == 0, outcome.err
    metadata = read_gguf(tmp_path / "with.gguf").metadata
    assert list(metadata.items())[-4:] == [
        ("quantize.imatrix.file", ("string", str(file)[:127])),
        ("quantize.imatrix.dataset", ("string", "a.txt")),
        ("quantize.imatrix.entries_count", ("u32", 15)),
        ("quantize.imatrix.chunks_count", ("u32", 3)),
    ]
    assert "weighs the errors of 13 of 15 matrices" in outcome.err
    assert (
        "without a matching entry, quantized without importance: token_embd.weight, blk.0.attn_q.weight\n"
        in outcome.err
    )
    assert r"entries that match nothing in this model: 'blk.7.\x1battn_q.weight'" in outcome.err
    assert call("gguf", folder, "-q", "q4_k", "-o", tmp_path / "without.gguf").code == 0
    ours, plain = read_gguf(tmp_path / "with.gguf"), read_gguf(tmp_path / "without.gguf")
    differ = {name for name in ours.tensors if blocks(ours, name) != blocks(plain, name)}
    assert DOWN in differ
    assert not differ & {Q, EMBED}
    assert "quantize.imatrix.file" in json.loads(call("inspect", "--json", tmp_path / "with.gguf").out)["metadata"]


def test_a_dry_run_shows_it(folder: Path, spec: ModelSpec, tmp_path: Path) -> None:
    write_dat(Imatrix(statistics(spec), ("\x1b[2Jevil",)), tmp_path / "i.dat")
    outcome = call("gguf", folder, "-q", "q2_k_s", "--imatrix", tmp_path / "i.dat", "--dry-run")
    assert outcome.code == 0, outcome.err
    assert "quantize.imatrix.entries_count" in outcome.out
    assert "chunks_count" not in outcome.out
    assert "\x1b" not in outcome.out
    by_settings = call("gguf", folder, "-q", "q2_k_s", "--set", f"imatrix={tmp_path / 'i.dat'}", "--dry-run")
    assert by_settings.out == outcome.out


@pytest.mark.parametrize("quant", ["f16", "q8_0"])
def test_a_format_that_weighs_nothing_says_so(quant: str, folder: Path, spec: ModelSpec, tmp_path: Path) -> None:
    write_imatrix(Imatrix(statistics(spec)), tmp_path / "i.gguf")
    with_it = export("gguf", folder, tmp_path / "a", quant=quant, options={"imatrix": str(tmp_path / "i.gguf")})
    without = export("gguf", folder, tmp_path / "b", quant=quant)
    assert f"{quant} does not weigh errors: the importance matrix has no effect" in with_it.plan.notes
    ours, plain = read_gguf(with_it.path), read_gguf(without.path)
    assert all(blocks(ours, name) == blocks(plain, name) for name in plain.tensors)


REFUSED: dict[str, tuple[str, dict[str, Statistic | None], list[str]]] = {
    "no entry where one is needed": ("q2_k_s", {Q: None}, [f"has no entry for {Q}, which q2_k_s needs"]),
    "another width": (
        "q4_k", {DOWN: Statistic(np.ones((1, 512), np.float32), np.array([1]))},
        [f"{DOWN} has 512 columns, the model's 256; it was made for another model"]),
    "experts": (
        "q4_0", {Q: Statistic(np.ones((2, 256), np.float32), np.array([1, 1]))}, [f"{Q} has 512 columns"]),
}  # fmt: skip


@pytest.mark.parametrize("fault", REFUSED)
def test_a_matrix_of_another_model_is_refused(fault: str, folder: Path, spec: ModelSpec, tmp_path: Path) -> None:
    quant, changes, said = REFUSED[fault]
    entries = {n: e for n, e in {**statistics(spec), **changes}.items() if e is not None}
    write_imatrix(Imatrix(entries), tmp_path / "i.gguf")
    target = tmp_path / "out.gguf"
    assert_refused(
        call("gguf", folder, "-q", quant, "--imatrix", tmp_path / "i.gguf", "-o", target), tmp_path / "i.gguf", *said
    )
    assert not target.exists()


def test_nothing_of_this_model(folder: Path, tmp_path: Path) -> None:
    write_imatrix(Imatrix({"blk.99.x.weight": Statistic(np.ones((1, 4), np.float32), np.array([1]))}), tmp_path / "i")
    with pytest.raises(FileFormatError, match="has no entry for any matrix of the model"):
        export("gguf", folder, tmp_path / "o.gguf", quant="q4_0", options={"imatrix": str(tmp_path / "i")})


def test_missing_entries_are_needed_only_where_q2_k_lands(folder: Path, spec: ModelSpec, tmp_path: Path) -> None:
    """An untied head and the embedding go without, and so do what the mix gives more bits."""
    config = tiny_config("llama", **HEADED, tie_word_embeddings=False)
    untied = tiny_checkpoint(tmp_path, "llama", **HEADED, tie_word_embeddings=False)
    entries = statistics(load_spec(config))
    del entries["output.weight"]
    write_imatrix(Imatrix(entries), tmp_path / "i.gguf")
    done = export("gguf", untied, tmp_path / "o", quant="q2_k_s", options={"imatrix": str(tmp_path / "i.gguf")})
    assert any("token_embd.weight, output.weight" in note for note in done.plan.notes)


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["-q", "q2_k_s"], "--quant q2_k_s: needs an importance matrix; give one with --imatrix"),
        (["-q", "int4", "--imatrix", "x"], "--imatrix: int4 is the same in every format"),
        (["-q", "int8", "--imatrix", "x"], "use q8_0"),
        (["-q", "q4_k", "--imatrix", "nothing.gguf"], "nothing.gguf: No such file"),
        (["-q", "q4_k", "--imatrix", "."], ".: Is a directory"),
        (["-q", "q4_k", "--imatrix", ""], "'--imatrix': is empty"),
        (["-q", "q4_k", "--imatrix", "a", "--set", "imatrix=b"], "--imatrix a: --set imatrix says b; give one of them"),
        (["-q", "q4_k", "--set", "imatrix=7"], "--set imatrix=7: this option of gguf takes text"),
    ],
)
def test_usage(argv: list[str], said: str, folder: Path) -> None:
    assert_refused(call("gguf", folder, *argv), said)


def test_only_gguf_takes_one(folder: Path) -> None:
    assert "--imatrix FILE" in call("gguf", "--help").out
    assert "--imatrix" not in call("mlx", "--help").out
    with pytest.raises(UsageError, match="mlx has no such option"):
        export("mlx", folder, options={"imatrix": "x"})


@pytest.mark.parametrize("size", [1e30, 3e38, 1e-38, 1e-45])
@pytest.mark.parametrize("quant", ["q4_0", "q4_1", "q5_0", "q5_1", "iq4_nl", "q2_k", "q3_k_s", "q4_k_s", "q6_k"])
def test_importances_out_of_range(quant: str, size: float, folder: Path, spec: ModelSpec, tmp_path: Path) -> None:
    """Never a file with an infinity or NaN in it: it is written sound, or refused with the tensor's name."""
    entries = {n: Statistic(np.full_like(e.sums, size), np.array([1])) for n, e in statistics(spec).items()}
    write_imatrix(Imatrix(entries), tmp_path / "i")
    try:
        done = export("gguf", folder, tmp_path / "o.gguf", quant=quant, options={"imatrix": str(tmp_path / "i")})
    except TensorError as error:
        refusal = str(error)
    else:
        refusal = ""
    if refusal:
        assert re.search(rf"tensor model\S+: {quant[:4]}\S* finds no finite scale under its importances", refusal)
        assert size > 1
        return
    assert (quant, size) != ("q4_0", 3e38)
    file = read_gguf(done.path)
    for name, info in file.tensors.items():
        data = np.frombuffer(blocks(file, name), np.uint8).reshape(-1, info.format.row_bytes(info.shape[-1]))
        assert np.isfinite(info.format.decode(data, info.shape[-1])).all()
