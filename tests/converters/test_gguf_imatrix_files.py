"""Importance matrices as files: both forms there and back, gguf-py as the second opinion, and files from strangers."""

from __future__ import annotations

import os
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smolexport.errors import FileFormatError, OutputError, UsageError
from smolexport.quant import FORMATS
from smolexport_to_gguf import recognises
from smolexport_to_gguf.container import header_bytes, padding, read_gguf
from smolexport_to_gguf.imatrix import Imatrix, Statistic, read_imatrix, write_imatrix
from tests.converters.old_imatrix import write_dat
from tests.mutations import changed_bytes, read_or_refused

MEMORY = 50 << 20
KEYS = [
    ("general.type", "string", "imatrix"), ("imatrix.datasets", "[string]", ["a.txt"]),
    ("imatrix.chunk_count", "u32", 2), ("imatrix.chunk_size", "u32", 512),
]  # fmt: skip
NAME = "blk.0.attn_q.weight"
GOOD = {f"{NAME}.in_sum2": np.arange(4, dtype="<f4"), f"{NAME}.counts": np.array([1024], "<f4")}


def gguf(arrays: dict[str, Any], keys: list[tuple[str, str, Any]] | None = None) -> bytes:
    """A file with `arrays`, those of two bytes an element as f16."""
    found = {n: np.asarray(a) for n, a in arrays.items()}
    forms = {n: FORMATS["f16" if a.dtype.itemsize == 2 else "f32"] for n, a in found.items()}
    header = header_bytes(KEYS if keys is None else keys, ((n, a.shape, forms[n]) for n, a in found.items()))
    return header + b"".join(a.tobytes() + bytes(padding(a.nbytes)) for a in found.values())


def entry(name: bytes = NAME.encode(), calls: int = 2, values: Any = (1.0, 4.0), columns: int | None = None) -> bytes:
    """An entry of the old form."""
    data = np.asarray(values, "<f4")
    count = data.size if columns is None else columns
    return struct.pack("<i", len(name)) + name + struct.pack("<ii", calls, count) + data.tobytes()


def dat(*entries: bytes, count: int | None = None, tail: bytes = struct.pack("<ii", 2, 5) + b"a.txt") -> bytes:
    return struct.pack("<i", len(entries) if count is None else count) + b"".join(entries) + tail


def read(content: bytes, folder: Path) -> Imatrix:
    path = folder / "x"
    path.write_bytes(content)
    return read_imatrix(path)


def test_gguf(tmp_path: Path) -> None:
    found = read(gguf(GOOD | {"something.else": np.zeros(3, "<f4")}), tmp_path)
    assert (found.datasets, found.chunks, found.chunk_size) == (("a.txt",), 2, 512)
    assert list(found.entries) == [NAME]
    np.testing.assert_array_equal(found.entries[NAME].importance(), np.arange(4, dtype=np.float32) / np.float32(1024))


def test_experts_are_divided_one_by_one_and_uncounted_ones_weigh_1(tmp_path: Path) -> None:
    sums = np.array([[2, 4], [3, 9], [5, 7]], "<f4")
    found = read(gguf({"e.in_sum2": sums, "e.counts": np.array([[2], [0.4], [2.5]], "<f4")}), tmp_path)
    thirds = np.array([5, 7], np.float32) / np.float32(3)  # half a token counts as one
    np.testing.assert_array_equal(found.entries["e"].importance(), [1, 2, 1, 1, *thirds])


def test_dat(tmp_path: Path) -> None:
    whole = dat(entry(calls=3), entry(b"output.weight", 0, [7.0]))
    found = read(whole, tmp_path)
    assert (found.datasets, found.chunks, found.chunk_size) == (("a.txt",), 2, 0)
    np.testing.assert_array_equal(found.entries[NAME].importance(), np.array([1, 4], np.float32) / np.float32(3))
    np.testing.assert_array_equal(found.entries["output.weight"].importance(), [7])
    older = read(dat(entry(), tail=b""), tmp_path)
    assert (older.datasets, older.chunks) == ((), 0)


STATISTICS = st.integers(1, 3).flatmap(
    lambda matrices: st.tuples(
        st.lists(
            st.lists(st.floats(0, 2.0**99, width=32), min_size=5, max_size=5), min_size=matrices, max_size=matrices
        ),
        st.lists(st.integers(0, 1 << 20), min_size=matrices, max_size=matrices),
    )
)
IMATRICES = st.builds(
    Imatrix,
    st.dictionaries(
        st.from_regex(r"blk\.[0-9]{1,2}\.[a-z_]{1,20}", fullmatch=True),
        STATISTICS.map(lambda pair: Statistic(np.asarray(pair[0], np.float32), np.asarray(pair[1], np.int64))),
        min_size=1, max_size=4,
    ),
    st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=9), max_size=3).map(tuple),
    st.integers(0, 999),
    st.integers(1, 4096),
)  # fmt: skip


@settings(max_examples=20, deadline=None)
@given(IMATRICES)
def test_there_and_back(imatrix: Imatrix) -> None:
    from tempfile import TemporaryDirectory

    with TemporaryDirectory() as folder:
        write_imatrix(imatrix, Path(folder) / "a.gguf")
        back = read_imatrix(Path(folder) / "a.gguf")
        assert (back.datasets, back.chunks, back.chunk_size) == (imatrix.datasets, imatrix.chunks, imatrix.chunk_size)
        assert list(back.entries) == sorted(imatrix.entries)
        for name, statistic in imatrix.entries.items():
            np.testing.assert_array_equal(back.entries[name].sums, statistic.sums)
            np.testing.assert_array_equal(back.entries[name].counts, statistic.counts)
        counted = {n: s for n, s in imatrix.entries.items() if s.counts.any()}
        if counted:
            write_dat(imatrix, Path(folder) / "a.dat")
            old = read_imatrix(Path(folder) / "a.dat")
            assert (old.datasets, old.chunks) == (imatrix.datasets[-1:], imatrix.chunks)
            assert list(old.entries) == sorted(counted)
            for name, statistic in counted.items():
                np.testing.assert_allclose(
                    old.entries[name].importance(), statistic.importance(), rtol=3e-7, atol=1e-37
                )


def test_gguf_py_reads_ours_and_we_read_its(tmp_path: Path) -> None:
    gguf_py = pytest.importorskip("gguf")
    sums = np.array([[1, 2, 3], [4, 5, 6]], np.float32)
    two = Statistic(sums, np.array([512, 256]))
    one = Statistic(sums[:1], np.array([1024]))
    write_imatrix(Imatrix({"b": two, "a": one}, ("x.txt", "y.txt"), 7, 512), tmp_path / "ours.gguf")
    reader = gguf_py.GGUFReader(tmp_path / "ours.gguf")
    assert reader.get_field("general.type").contents() == "imatrix"
    assert reader.get_field("imatrix.datasets").contents() == ["x.txt", "y.txt"]
    assert reader.get_field("imatrix.chunk_count").contents() == 7
    tensors = {t.name: (t.shape.tolist(), t.data.reshape(-1).tolist()) for t in reader.tensors}
    assert tensors == {
        "a.in_sum2": ([3], [1, 2, 3]), "a.counts": ([1], [1024]),
        "b.in_sum2": ([3, 2], [1, 2, 3, 4, 5, 6]), "b.counts": ([1, 2], [512, 256]),
    }  # fmt: skip
    writer = gguf_py.GGUFWriter(tmp_path / "theirs.gguf", "")
    writer.kv_data[0].clear()  # it would name an architecture
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", ["x.txt"])
    writer.add_uint32("imatrix.chunk_count", 7)
    writer.add_uint32("imatrix.chunk_size", 512)
    writer.add_tensor("b.in_sum2", sums)
    writer.add_tensor("b.counts", np.array([[512], [256]], np.float32))
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        step()
    writer.close()
    theirs = read_imatrix(tmp_path / "theirs.gguf")
    assert theirs.datasets == ("x.txt",)
    np.testing.assert_array_equal(theirs.entries["b"].importance(), two.importance())


def changed(**arrays: Any) -> bytes:
    """The good file with other sums or counts."""
    names = {"sums": f"{NAME}.in_sum2", "counts": f"{NAME}.counts"}
    return gguf(GOOD | {names[key]: np.asarray(value, getattr(value, "dtype", "<f4")) for key, value in arrays.items()})


def without(key: str) -> bytes:
    return gguf(GOOD, [row for row in KEYS if row[0] != key])


OLD = "is neither a GGUF file nor an importance matrix of the old form"
HOSTILE: dict[str, tuple[bytes, str]] = {
    "empty": (b"", OLD),
    "three bytes": (b"GGU", OLD),
    "text": (b"It was a bright cold day in April", OLD),
    "no entries": (dat(count=0), OLD),
    "negative entries": (dat(entry(), count=-1), OLD),
    "2^31 entries": (dat(entry(), count=2**31 - 1), OLD),
    "one entry promised too many": (
        dat(entry(), count=2, tail=struct.pack("<i", 99)), "entry 2 of 2 has a name of 99 bytes"),
    "nameless": (dat(entry(b"")), "entry 1 of 1 has a name of 0 bytes"),
    "name of -1": (dat(b"\xff" * 40), "has a name of -1 bytes"),
    "name of 2^30": (dat(struct.pack("<i", 1 << 30) + bytes(40)), "has a name of 1073741824 bytes"),
    "negative calls": (dat(entry(calls=-1)), f"{NAME} counts -1 calls"),
    "no values": (dat(entry(values=[])), f"{NAME} has 0 values"),
    "2^31 values": (dat(entry(columns=2**31 - 1)), "8,589,934,588 bytes are promised"),
    "nan in dat": (dat(entry(values=[1, np.nan])), f"{NAME} has nan at [1], not a sum of squares"),
    "negative in dat": (dat(entry(values=[-1, 1])), f"{NAME} has -1.0 at [0], not a sum of squares"),
    "twice": (dat(entry(), entry()), f"{NAME} appears twice"),
    "negative chunks": (dat(entry(), tail=struct.pack("<ii", -3, 0)), "it counts -3 chunks"),
    "negative text": (dat(entry(), tail=struct.pack("<ii", 2, -3)), "the name of its text has -3 bytes"),
    "half a tail": (dat(entry(), tail=struct.pack("<ii", 2, 5) + b"a"), "5 bytes are promised where 1 are left"),
    "bytes behind the tail": (dat(entry(), tail=struct.pack("<iii", 2, 0, 0)), "4 bytes follow after its end"),
    "a model": (gguf({}, [("general.type", "string", "model")]), "is a GGUF file of type 'model'"),
    "any GGUF": (gguf(GOOD, []), "imatrix.datasets is missing or not [string]"),
    "no datasets": (without("imatrix.datasets"), "imatrix.datasets is missing"),
    "no chunk count": (without("imatrix.chunk_count"), "imatrix.chunk_count is missing"),
    "no chunk size": (without("imatrix.chunk_size"), "imatrix.chunk_size is missing"),
    "datasets of numbers": (
        gguf(GOOD, [("imatrix.datasets", "[u32]", [1]), *KEYS[2:]]), "imatrix.datasets is missing or not [string]"),
    "no tensors": (gguf({}), "has no tensor NAME.in_sum2"),
    "sums alone": (gguf({"x.in_sum2": np.ones(3, "<f4")}), "x has no tensor x.counts"),
    "counts alone": (gguf({"x.counts": np.ones(3, "<f4")}), "x has no tensor x.in_sum2"),
    "f16 sums": (changed(sums=np.ones(4, "<f2")), f"the tensor {NAME}.in_sum2 is f16, not f32"),
    "f16 counts": (changed(counts=np.ones(1, "<f2")), f"the tensor {NAME}.counts is f16, not f32"),
    "counts that do not divide": (changed(counts=[1, 1, 1]), "has 4 numbers for 3 counts"),
    "more counts than sums": (changed(counts=[1] * 8), "has 4 numbers for 8 counts"),
    "nan": (changed(sums=[0, np.nan, 1, 1]), f"{NAME} has nan at [1], not a sum of squares"),
    "infinity": (changed(sums=[0, 1, np.inf, 1]), f"{NAME} has inf at [2], not a sum of squares"),
    "negative": (changed(sums=[[0, 1], [1, -2]], counts=[1, 1]), f"{NAME} has -2.0 at [1, 1], not a sum of squares"),
    "nan count": (changed(counts=[np.nan]), f"the tensor {NAME}.counts has nan at [0], not a count"),
    "negative count": (changed(counts=[-1]), f"the tensor {NAME}.counts has -1.0 at [0], not a count"),
    "count of 1e30": (changed(counts=[1e30]), "counts has 1.0000000150474662e+30 at [0], not a count"),
    "cut": (gguf(GOOD)[:-32], f"the tensor {NAME}.counts reaches beyond the end"),
}  # fmt: skip


@pytest.mark.parametrize("fault", HOSTILE)
def test_refused(fault: str, tmp_path: Path) -> None:
    content, said = HOSTILE[fault]
    tracemalloc.start()
    try:
        with pytest.raises(FileFormatError) as caught:
            read(content, tmp_path)
        assert tracemalloc.get_traced_memory()[1] < MEMORY
    finally:
        tracemalloc.stop()
    assert str(caught.value).startswith(f"{tmp_path / 'x'}: ")
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_tensors_that_share_their_bytes(tmp_path: Path) -> None:
    """A small file must not unfold in memory: thousands of tensors over the same megabyte."""
    one = np.ones(1 << 18, "<f4")
    header = header_bytes(KEYS, ((f"{i}.in_sum2", one.shape, FORMATS["f32"]) for i in range(3000)))
    for i in range(1, 3000):  # each offset stands behind name, count of axes, axis and type
        at = header.index(f"{i}.in_sum2".encode()) + len(f"{i}.in_sum2") + 16
        header = header[:at] + bytes(8) + header[at + 8 :]
    with pytest.raises(FileFormatError, match=r"the tensors 0\.in_sum2 and 1\.in_sum2 share their bytes"):
        read(header + one.tobytes(), tmp_path)


@pytest.mark.parametrize("make", [lambda: gguf(GOOD), lambda: dat(entry(), entry(b"b", 1, [3.0]))])
def test_every_prefix_and_any_byte(make: Callable[[], bytes], tmp_path: Path) -> None:
    """Cut or changed anywhere it is read or refused with the one kind of error."""
    whole, random = make(), np.random.default_rng(1)
    full = read(whole, tmp_path).entries
    for size in range(len(whole)):
        try:
            assert read(whole[:size], tmp_path).entries.keys() == full.keys(), size
        except FileFormatError:
            continue
    for _ in range(300):
        broken = bytearray(whole)
        broken[random.integers(0, len(whole))] = random.integers(0, 256)
        try:
            found = read(bytes(broken), tmp_path)
        except FileFormatError:
            continue
        assert all(np.isfinite(s.importance()).all() for s in found.entries.values())


LONG = "\x1b[31m\n" + "x" * 100_000
LONG_NAMES: dict[str, bytes] = {
    "lacks": gguf({f"{LONG}.in_sum2": np.ones(3, "<f4")}),
    "half": gguf({f"{LONG}.in_sum2": np.ones(4, "<f2"), f"{LONG}.counts": np.ones(1, "<f4")}),
    "nan": gguf({f"{LONG}.in_sum2": np.array([np.nan], "<f4"), f"{LONG}.counts": np.ones(1, "<f4")}),
    "counts": gguf({f"{LONG}.in_sum2": np.ones(3, "<f4"), f"{LONG}.counts": np.ones(2, "<f4")}),
    "type": gguf({}, [("general.type", "string", LONG)]),
    "key": gguf(GOOD, [*KEYS, (LONG, "u32", 1), (LONG, "u32", 1)]),
    "tensor type": gguf({LONG: np.ones(3, "<f4")}).replace(
        b"x" * 100 + struct.pack("<IQI", 1, 3, 0), b"x" * 100 + struct.pack("<IQI", 1, 3, 99)
    ),
    "axes": gguf({LONG: np.ones(3, "<f4")}).replace(b"x" * 100 + b"\x01\0\0\0", b"x" * 100 + b"\x09\0\0\0"),
}


@pytest.mark.parametrize("case", LONG_NAMES)
def test_long_names_are_cut(case: str, tmp_path: Path) -> None:
    assert read_or_refused(lambda: read(LONG_NAMES[case], tmp_path), tmp_path / "x")


@pytest.mark.parametrize("make", [lambda: gguf(GOOD), lambda: dat(entry(), entry(b"b", 1, [3.0]))])
def test_numbers_where_it_hurts(make: Callable[[], bytes], tmp_path: Path) -> None:
    random, whole = Random(0), make()
    refused = [
        read_or_refused(lambda: read(changed_bytes(random, whole), tmp_path), tmp_path / "x") for _ in range(400)
    ]
    assert sum(refused) > 200


def test_what_is_no_regular_file(tmp_path: Path) -> None:
    """A pipe that nobody writes to is not waited for."""
    os.mkfifo(tmp_path / "x")
    for path in (tmp_path / "x", tmp_path, Path("/dev/zero")):
        for reader in (read_imatrix, read_gguf):
            assert read_or_refused(lambda reader=reader, path=path: reader(path), path)
        assert not recognises(path)


def test_writing_refuses(tmp_path: Path) -> None:
    good, path = Statistic(np.ones((1, 2), np.float32), np.array([1])), tmp_path / "x"
    for name, statistic, said in (
        ("n" * 56, good, "is too long a name"),
        ("n", Statistic(np.array([[1, np.nan]], np.float32), np.array([1])), "n has nan at"),
        ("n", Statistic(good.sums, np.array([-1])), "n counts"),
    ):
        with pytest.raises(UsageError, match=said):
            write_imatrix(Imatrix({name: statistic}), path)
    write_imatrix(Imatrix({"n": good}), path)
    with pytest.raises(OutputError, match="exists already"):
        write_imatrix(Imatrix({"n": good}), path)
    write_imatrix(Imatrix({"n": good, "o": good}), path, force=True)
    assert list(read_imatrix(path).entries) == ["n", "o"]
    assert list(tmp_path.iterdir()) == [path]
