"""Streaming: the bytes do not depend on chunks or threads, and no weight slips through that should not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smolexport.conversion import encode
from smolexport.conversion.encode import encoded_chunks
from smolexport.conversion.plan import Entry, InterleaveHeads
from smolexport.errors import SmolexportError, TensorError
from smolexport.model.checkpoint import Checkpoint, open_checkpoint
from smolexport.model.spec import ModelSpec, Role, Tensor
from smolexport.model.tensor_file import StoredTensor
from smolexport.processes import thread_count
from smolexport.quant import FORMATS
from smolexport.quant.arrays import largest
from smolexport.testing.checkpoints import write_checkpoint
from tests.damage import poke

UP, Q = "model.layers.0.mlp.up_proj.weight", "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("checkpoint")
    return open_checkpoint(write_checkpoint(folder, "llama", num_hidden_layers=2, attention_bias=True))


def entries_of(spec: ModelSpec, form: str = "q8_0") -> tuple[Entry, ...]:
    """An entry for each tensor: matrices in `form`, vectors in f32, q and k reordered."""
    return tuple(
        Entry(
            tensor.stored_name,
            FORMATS[form if len(tensor.shape) == 2 else "f32"],
            tensor.shape,
            tensor,
            transform=InterleaveHeads(spec.attention.head_dim) if tensor.role in (Role.Q, Role.K) else None,
        )
        for tensor in spec.tensors()
    )


def collect(checkpoint: Checkpoint, entries: tuple[Entry, ...], threads: int) -> dict[str, bytes]:
    """Bytes per entry; the chunks of one entry follow each other, in the order of the entries."""
    parts: dict[str, bytes] = {}
    for piece in encoded_chunks(checkpoint, [entries], threads):
        name = piece.entry.name
        assert name not in parts or list(parts)[-1] == name
        assert piece.start * piece.rows.shape[1] == len(parts.get(name, b""))
        parts[name] = parts.get(name, b"") + piece.rows.tobytes()
    assert list(parts) == [e.name for e in entries]
    assert [len(p) for p in parts.values()] == [e.nbytes for e in entries]
    return parts


@pytest.mark.parametrize("chunk", [4 * 64 * 3, 4 * 64 * 40, 8 << 20])
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_chunks_and_threads_change_nothing(
    chunk: int, threads: int, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    entries = entries_of(checkpoint.spec)
    whole = {}
    for entry in entries:
        assert entry.tensor is not None
        rows = checkpoint.stored[entry.tensor].read_rows()
        if entry.transform:
            rows = entry.transform(rows) if len(entry.shape) == 2 else entry.transform(rows.T).T
        whole[entry.name] = entry.format.encode(np.ascontiguousarray(rows)).tobytes()
    monkeypatch.setattr(encode, "CHUNK_BYTES", chunk)
    assert collect(checkpoint, entries, threads) == whole


def test_what_differs_in_importance_is_not_shared(checkpoint: Checkpoint) -> None:
    """Outputs that want one tensor in one format under different importances each get their own search."""
    tensor = next(t for t in checkpoint.spec.tensors() if t.stored_name == UP)
    rows, random = checkpoint.stored[tensor].read_rows(), np.random.default_rng(2)
    importances = [None, *(random.lognormal(0, 3, rows.shape[1]).astype(np.float32) for _ in range(2))]
    form = FORMATS["q4_0"]
    outputs = [[Entry(UP, form, tensor.shape, tensor, importance=importance)] for importance in importances]
    wanted = [form.encode(rows, importance) for importance in importances]
    assert len({w.tobytes() for w in wanted}) == 3
    for piece in encoded_chunks(checkpoint, outputs, 2):
        end = piece.start + len(piece.rows)
        np.testing.assert_array_equal(piece.rows, wanted[piece.output][piece.start : end])


def test_generated_values(checkpoint: Checkpoint) -> None:
    entry = Entry("rope_freqs.weight", FORMATS["f32"], (3,), values=(1.0, 2.5, 32.0))
    [piece] = encoded_chunks(checkpoint, [(entry,)], 1)
    assert piece.rows.view(np.float32).reshape(-1).tolist() == [1.0, 2.5, 32.0]


@given(heads=st.integers(1, 5), half=st.integers(1, 8), columns=st.integers(1, 4))
def test_interleaving_and_back(heads: int, half: int, columns: int) -> None:
    rows = np.arange(heads * 2 * half * columns).reshape(-1, columns)
    reorder = InterleaveHeads(2 * half)
    moved = reorder(rows)
    for head, i in np.ndindex(heads, half):
        base = head * 2 * half
        np.testing.assert_array_equal(moved[base + 2 * i], rows[base + i])
        np.testing.assert_array_equal(moved[base + 2 * i + 1], rows[base + half + i])
    np.testing.assert_array_equal(reorder.undo(moved), rows)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(("name", "place"), [(UP, (151, 63)), (Q, (46, 0)), ("model.norm.weight", (63,))])
def test_position_in_a_later_chunk(
    name: str, place: tuple[int, ...], threads: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_checkpoint(tmp_path, "llama", num_hidden_layers=1)
    poke(folder / "model.safetensors", name, place, np.nan)
    checkpoint = open_checkpoint(folder)
    monkeypatch.setattr(encode, "CHUNK_BYTES", 4 * 64 * 16)
    with pytest.raises(TensorError) as caught:
        collect(checkpoint, entries_of(checkpoint.spec), threads)
    assert str(caught.value).endswith(f"tensor {name} has nan at {list(place)}; weights must be finite")


def store(path: Path, rows: np.ndarray) -> tuple[Checkpoint, Tensor]:
    """`rows` as the only tensor of a checkpoint."""
    rows.tofile(path)
    tensor = Tensor(Role.UP, (0,), "weight", rows.shape)
    place = StoredTensor(tensor.stored_name, path, rows.dtype, rows.shape, 0)
    spec = ModelSpec("llama", 1, 1, (), True, 1e-5, 1)
    return Checkpoint(path.parent, {}, spec, {tensor: place}), tensor


@pytest.mark.parametrize("form", FORMATS)
@settings(max_examples=25, deadline=None)
@given(exponent=st.floats(3, 38.5), sign=st.sampled_from([-1, 1]), seed=st.integers(0, 99))
def test_large_weights_survive_or_are_refused(
    form: str, exponent: float, sign: int, seed: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Never an infinity, never another number: what is written decodes near to what was read."""
    random = np.random.default_rng(seed)
    rows = random.normal(0, 1, (2, 256)).astype(np.float32)
    where = tuple(random.integers(0, rows.shape))
    value = sign * min(10.0**exponent, 3.4e38)
    rows[where] = value
    path = tmp_path_factory.getbasetemp() / "weights"
    checkpoint, tensor = store(path, rows)
    entry = Entry("x", FORMATS[form], rows.shape, tensor)
    try:
        [piece] = encoded_chunks(checkpoint, [(entry,)], 1)
    except TensorError as error:
        refusal = str(error)
    else:
        refusal = ""
        decoded = FORMATS[form].decode(piece.rows, 256)
        assert np.isfinite(decoded).all()
        assert abs(decoded[where] / value - 1) < 0.3
    if refusal:
        assert abs(value) > 65504
        assert f"at [{where[0]}, {where[1]}], which {form} cannot hold" in refusal


@pytest.mark.parametrize("form", FORMATS)
def test_the_largest_half_fits_everywhere(form: str, tmp_path: Path) -> None:
    """The limit below which nothing is checked again: every format takes a block of the largest float16."""
    for value in (65504.0, -65504.0):
        checkpoint, tensor = store(tmp_path / "weights", np.full((1, 256), value, np.float32))
        [piece] = encoded_chunks(checkpoint, [(Entry("x", FORMATS[form], (1, 256), tensor),)], 1)
        assert np.isfinite(FORMATS[form].decode(piece.rows, 256)).all()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_largest_magnitude(dtype: str) -> None:
    import ml_dtypes

    kind = np.dtype(getattr(ml_dtypes, dtype, dtype))
    random = np.random.default_rng(1)
    for rows in (
        random.normal(0, 5, (3, 7)), -random.uniform(1, 2, (2, 2)), random.uniform(1, 2, (2, 2)), np.zeros((1, 4)),
        -np.zeros((1, 4)), np.array([[-3.0, 2.0]]), np.array([[6e-8, -1e-7]]),
    ):  # fmt: skip
        stored = rows.astype(kind)
        assert largest(stored) == float(np.abs(stored.astype(np.float32)).max())


def test_abandoning_the_stream_ends_its_threads(checkpoint: Checkpoint) -> None:
    import threading

    chunks = encoded_chunks(checkpoint, [entries_of(checkpoint.spec)], 4)
    next(chunks)
    chunks.close()  # type: ignore[attr-defined]
    assert not [t for t in threading.enumerate() if t.name.startswith("encode")]


def test_file_that_shrinks_meanwhile(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, "llama", num_hidden_layers=1)
    checkpoint = open_checkpoint(folder)
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:60_000])
    with pytest.raises(SmolexportError, match="ends inside the tensor"):
        collect(checkpoint, entries_of(checkpoint.spec), 2)


def test_thread_count() -> None:
    assert thread_count(3) == 3
    assert thread_count(0) == 1
    assert 1 <= thread_count() <= 16
