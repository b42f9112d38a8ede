"""Our GGUF container against gguf-py, an independent reader and writer: both ways, every kind of value."""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import smolexport
from smolexport.conversion.pipeline import export
from smolexport.errors import FileFormatError
from smolexport.model.checkpoint import open_checkpoint
from smolexport.quant import FORMATS
from smolexport_to_gguf import container
from smolexport_to_gguf.container import ALIGNMENT, header_bytes, padding, read_gguf
from tests.cli.commands import tiny_checkpoint

gguf = pytest.importorskip("gguf")

VALUES: list[tuple[str, str, Any]] = [
    ("general.architecture", "string", "llama"),
    ("a.u8", "u8", 255), ("a.i8", "i8", -128), ("a.u16", "u16", 65535), ("a.i16", "i16", -32768),
    ("a.u32", "u32", 2**32 - 1), ("a.i32", "i32", -(2**31)), ("a.u64", "u64", 2**64 - 1), ("a.i64", "i64", -(2**63)),
    ("a.f32", "f32", 0.5), ("a.f64", "f64", 1e300), ("a.true", "bool", True), ("a.false", "bool", False),
    ("a.text", "string", "naïve 😀 \n \x00 end"), ("a.empty", "string", ""), ("schlüssel.ü", "string", "key"),
    ("l.u8", "[u8]", [0, 255]), ("l.i8", "[i8]", [-128, 127]), ("l.u16", "[u16]", [65535]), ("l.i16", "[i16]", [-1]),
    ("l.u32", "[u32]", [2**32 - 1, 0]), ("l.i32", "[i32]", [-(2**31), 5]), ("l.u64", "[u64]", [2**64 - 1]),
    ("l.i64", "[i64]", [-(2**63)]), ("l.f32", "[f32]", [0.5, -0.25]), ("l.f64", "[f64]", [1e300]),
    ("l.bool", "[bool]", [True, False, True]), ("l.text", "[string]", ["", "ä", "ein Wort"]),
]  # fmt: skip
TENSORS: list[tuple[str, tuple[int, ...], str]] = [
    ("vector", (5,), "f32"), ("matrix", (3, 32), "q8_0"), ("half", (7, 3), "f16"), ("brain", (2, 5), "bf16"),
    ("large", (2, 512), "q4_k"), ("last", (1, 64), "q4_0"),
]  # fmt: skip


def plain(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else value


def write(
    path: Path, values: list[tuple[str, str, Any]], tensors: list[tuple[str, tuple[int, ...], str]]
) -> dict[str, bytes]:
    """A file of ours with random tensor bytes, which are returned."""
    random = np.random.default_rng(0)
    content = {name: random.bytes(FORMATS[form].size(shape)) for name, shape, form in tensors}
    with path.open("wb") as file:
        file.write(header_bytes(values, [(name, shape, FORMATS[form]) for name, shape, form in tensors]))
        for raw in content.values():
            file.write(raw + bytes(padding(len(raw))))
    return content


def test_gguf_py_reads_ours(tmp_path: Path) -> None:
    content = write(tmp_path / "x.gguf", VALUES, TENSORS)
    reader = gguf.GGUFReader(tmp_path / "x.gguf")
    for key, kind, value in VALUES:
        field = reader.fields[key]
        assert plain(field.contents()) == value, key
        types = [t.name for t in field.types]
        assert types[0] == ("ARRAY" if kind.startswith("[") else types[-1])
    assert [t.name for t in reader.tensors] == [name for name, _, _ in TENSORS]
    for tensor, (name, shape, form) in zip(reader.tensors, TENSORS, strict=True):
        assert tuple(tensor.shape[::-1]) == shape
        assert tensor.tensor_type.name.lower() == form
        assert tensor.data_offset % ALIGNMENT == 0
        assert tensor.data.tobytes() == content[name]


def test_we_read_ours(tmp_path: Path) -> None:
    content = write(tmp_path / "x.gguf", VALUES, TENSORS)
    file, raw = read_gguf(tmp_path / "x.gguf"), (tmp_path / "x.gguf").read_bytes()
    assert [(key, kind, plain(value)) for key, (kind, value) in file.metadata.items()] == VALUES
    for name, shape, form in TENSORS:
        info = file.tensors[name]
        assert (info.shape, info.format.name, info.nbytes) == (shape, form, len(content[name]))
        assert raw[info.offset : info.offset + info.nbytes] == content[name]


@pytest.mark.parametrize("alignment", [None, 8, 64, 4096])
def test_we_read_gguf_pys(alignment: int | None, tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    if alignment:
        writer.add_custom_alignment(alignment)
    writer.add_string("a.text", "naïve 😀")
    writer.add_uint64("a.u64", 2**64 - 1)
    writer.add_float32("a.f32", 0.5)
    writer.add_bool("a.bool", True)
    writer.add_array("l.text", ["", "ä"])
    writer.add_array("l.int", [1, -2])
    random = np.random.default_rng(0)
    arrays = {"a": random.normal(size=(3, 5)).astype(np.float32), "b": random.normal(size=7).astype(np.float16)}
    for name, array in arrays.items():
        writer.add_tensor(name, array)
    blocks = gguf.quantize(random.normal(size=(4, 64)).astype(np.float32), gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("c", blocks, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file, raw = read_gguf(tmp_path / "x.gguf"), (tmp_path / "x.gguf").read_bytes()
    assert {k: plain(v) for k, (_, v) in file.metadata.items() if k[1] == "."} == {
        "a.text": "naïve 😀", "a.u64": 2**64 - 1, "a.f32": 0.5, "a.bool": True, "l.text": ["", "ä"], "l.int": [1, -2],
    }  # fmt: skip
    for name, array in {**arrays, "c": blocks}.items():
        info = file.tensors[name]
        assert info.offset % (alignment or ALIGNMENT) == 0
        assert raw[info.offset : info.offset + info.nbytes] == array.tobytes()
    assert file.tensors["a"].shape == (3, 5)
    assert file.tensors["c"].shape == (4, 64)


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
VALUE = st.one_of(
    st.tuples(st.just("string"), TEXT),
    st.tuples(st.just("u32"), st.integers(0, 2**32 - 1)),
    st.tuples(st.just("f32"), st.floats(width=32, allow_nan=False)),
    st.tuples(st.just("[string]"), st.lists(TEXT, max_size=5)),
    st.tuples(st.just("[i64]"), st.lists(st.integers(-(2**63), 2**63 - 1), max_size=5)),
)


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(TEXT.filter(lambda k: not k.startswith("general.alignment")), VALUE, max_size=6))
def test_any_metadata_comes_back(tmp_path_factory: pytest.TempPathFactory, values: dict[str, tuple[str, Any]]) -> None:
    path = tmp_path_factory.getbasetemp() / "any.gguf"
    rows = [(key, kind, value) for key, (kind, value) in values.items()]
    write(path, rows, [("t", (1,), "f32")])
    assert [(key, kind, plain(value)) for key, (kind, value) in read_gguf(path).metadata.items()] == rows


@pytest.mark.parametrize("scheme", ["f32", "bf16", "q8_0", "q4_k"])
def test_an_export_read_by_gguf_py_holds_the_weights(scheme: str, tmp_path: Path) -> None:
    """File to file: gguf-py's own decoder on our file gives what our read_back gives, row order included."""
    folder = tiny_checkpoint(tmp_path, hidden_size=256, intermediate_size=256, num_hidden_layers=1)
    path = export("gguf", folder, tmp_path / "x.gguf", quant=scheme).path
    spec = open_checkpoint(folder).spec
    theirs = {t.name: gguf.dequantize(t.data, t.tensor_type) for t in gguf.GGUFReader(path).tensors}
    ours = read_gguf(path)
    for name, info in ours.tensors.items():
        raw = np.fromfile(path, np.uint8, info.nbytes, offset=info.offset)
        decoded = info.format.decode(raw.reshape(-1, info.format.row_bytes(info.shape[-1])), info.shape[-1])
        np.testing.assert_array_equal(decoded.reshape(info.shape), theirs[name].reshape(info.shape))
    stored = open_checkpoint(folder).stored
    for tensor, values in smolexport.read_back(path, spec):
        original = stored[tensor].read_rows().astype(np.float32).reshape(tensor.shape)
        assert values.shape == tensor.shape
        spread = float(np.std(original)) or 1.0
        limit = {"f32": 0, "bf16": 0, "q8_0": 0.02, "q4_k": 0.3}[scheme] * spread
        assert np.abs(values - original).max() <= limit * 2, tensor.stored_name


def test_read_back_of_another_model(tmp_path: Path) -> None:
    path = export("gguf", tiny_checkpoint(tmp_path), tmp_path / "x.gguf", quant="f16").path
    other = open_checkpoint(tiny_checkpoint(tmp_path / "other", num_hidden_layers=3)).spec
    with pytest.raises(
        FileFormatError, match=r"tensor model\.layers\.2\.input_layernorm\.weight is missing; the model asks for \[64\]"
    ):
        list(smolexport.read_back(path, other))


def test_zero_sized_and_header_only_files(tmp_path: Path) -> None:
    write(tmp_path / "x.gguf", [], [])
    assert read_gguf(tmp_path / "x.gguf").tensors == {}
    assert (tmp_path / "x.gguf").read_bytes()[:24] == b"GGUF" + struct.pack("<IQQ", 3, 0, 0)


def test_texts_across_the_blocks_that_are_read_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [("ä" * n)[: n % 97] for n in range(300)]
    for block in (1, 7, 64, 1000):
        monkeypatch.setattr(container, "BLOCK", block)
        write(tmp_path / "x.gguf", [("a", "[string]", texts), ("b", "[string]", []), ("c", "string", "after")], TENSORS)
        file = read_gguf(tmp_path / "x.gguf")
        found = file.get("a")
        assert found == texts
        assert (found[-1], found[1:4], list(file.get("b")), file.get("c")) == (texts[-1], texts[1:4], [], "after")
        with pytest.raises(IndexError):
            found[300]


def test_a_header_is_parsed_once_but_never_taken_for_that_of_a_file_just_written(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    for text in ("one", "two", "six"):  # of one length, faster than the file system's clock may tell
        write(path, [("a", "string", text)], TENSORS)
        assert read_gguf(path).get("a") == text
    os.utime(path, (1, 1))
    assert read_gguf(path) is read_gguf(path)
