"""A Hugging Face checkpoint: a local folder or a hub id, read tensor by tensor and row by row.

Weights are read with positioned reads into small buffers, never mapped: mapped pages count as resident memory,
and an export must stay small whatever the model.  safetensors itself checks each file's header (lengths,
overlaps, gaps, sizes); pickled weights are never opened.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from smolexport.arch import load_spec
from smolexport.errors import CheckpointError, ConfigError, TensorError, UsageError
from smolexport.source_files import file_in
from smolexport.spec import ModelSpec, Role, Tensor
from smolexport.text import label, reason, show

__all__ = ["Checkpoint", "StoredTensor", "find_checkpoint", "open_checkpoint", "read_config"]

DTYPES: Mapping[str, np.dtype[Any]] = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
MAX_JSON = 64 << 20  # the index of the largest published models is about 10 MB
# What is fetched of a hub id.  The hub's `*` crosses folders, so these cover the index and all chat templates.
SMALL_FILES = ("*.json", "*.jinja", "merges.txt", "README.md", "LICENSE*")
HUB_FILES = (*SMALL_FILES, "*.safetensors")
# Buffers that old checkpoints carry and that are computed, not learned.
COMPUTED = (".rotary_emb.inv_freq", ".self_attn.masked_bias", ".self_attn.bias")


@dataclass(frozen=True)
class StoredTensor:
    """Where one tensor lies: file, dtype, shape, first byte in the file."""

    name: str
    path: Path
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    offset: int

    def read_rows(self, start: int = 0, stop: int | None = None) -> NDArray[Any]:
        """Rows [start, stop) as [rows, columns] in the stored dtype; a vector is one row.

        Raises:
            CheckpointError: the file vanished, became shorter or unreadable since it was opened.
        """
        rows, columns = self.shape if len(self.shape) == 2 else (1, self.shape[0])
        stop = rows if stop is None else stop
        out = np.empty((stop - start, columns), self.dtype)
        try:
            self._fill(memoryview(out.view(np.uint8).reshape(-1).data), start * columns * self.dtype.itemsize)
        except OSError as error:
            raise CheckpointError(f"{self.path}: reading the tensor {label(self.name)}: {error.strerror}") from error
        return out

    def _fill(self, view: memoryview, skip: int) -> None:
        with self.path.open("rb", buffering=0) as file:
            file.seek(self.offset + skip)
            filled = 0
            while filled < len(view):
                count = file.readinto(view[filled:])
                if not count:
                    raise CheckpointError(f"{self.path}: ends inside the tensor {label(self.name)}")
                filled += count


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint.  `stored` maps each tensor of `spec` to its place; weights stay on disk."""

    folder: Path
    config: Mapping[str, Any]
    spec: ModelSpec
    stored: Mapping[Tensor, StoredTensor]

    @property
    def dtype(self) -> str:
        """The dtype of most weights: `F32`, `F16` or `BF16`."""
        sizes = dict.fromkeys(DTYPES, 0)
        names = {v: k for k, v in DTYPES.items()}
        for tensor, place in self.stored.items():
            sizes[names[place.dtype]] += tensor.size
        return max(sizes, key=lambda k: sizes[k])

    @property
    def nbytes(self) -> int:
        """Bytes of all weights."""
        return sum(t.size * s.dtype.itemsize for t, s in self.stored.items())


def find_checkpoint(
    source: str | Path,
    *,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: Path | None = None,
    weights: bool = True,
) -> Path:
    """The folder of `source`: a local folder, the word `demo`, or a hub id such as `HuggingFaceTB/SmolLM2-135M`.

    A hub id is downloaded (only the files that an export reads) into the usual Hugging Face cache; without a
    network the cached snapshot serves.

    Args:
        source: folder, `demo` or hub id.
        revision: branch, tag or commit on the hub.
        token: hub token.
        cache_dir: another cache than the usual one.
        weights: False = of a hub id only config, tokenizer and templates are fetched.

    Raises:
        CheckpointError: no such folder, and no such model on the hub or in the cache.
        UsageError: an empty name; `demo`, where a checkpoint folder of that name lies too.
    """
    if not str(source):
        raise UsageError("the name of the checkpoint is empty; give a folder, a hub id 'owner/name', or 'demo'")
    folder = Path(source)
    try:
        is_folder, is_there = folder.is_dir(), folder.exists()
    except OSError as error:  # a name that no file can have
        raise CheckpointError(f"{source}: {error.strerror}") from error
    if source == "demo":
        from smolexport.demo import demo_checkpoint

        if (folder / "config.json").exists():
            raise UsageError("demo is the embedded model, and a checkpoint folder here too; for the folder say ./demo")
        return demo_checkpoint()
    if is_folder:
        return folder
    if is_there:
        raise CheckpointError(f"{source}: is a file; give the checkpoint's folder (with config.json and *.safetensors)")
    parts = str(source).split("/")
    if len(parts) != 2 or not all(parts) or parts[0] in (".", "..", "~"):
        raise CheckpointError(f"{source}: no such folder; give a folder, a hub id 'owner/name', or 'demo'")
    return _from_hub(str(source), revision, token, cache_dir, weights)


def _from_hub(repo: str, revision: str | None, token: str | None, cache_dir: Path | None, weights: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    def fetch(offline: bool) -> Path:
        return Path(
            snapshot_download(
                repo,
                revision=revision,
                token=token,
                cache_dir=cache_dir,
                allow_patterns=list(HUB_FILES if weights else SMALL_FILES),
                ignore_patterns=["original/*", "onnx/*", "gguf/*"],
                local_files_only=offline,
            )
        )

    try:
        return fetch(offline=False)
    except HFValidationError as error:
        raise CheckpointError(f"{repo}: neither a folder nor a valid hub id ({reason(error)})") from error
    except LocalEntryNotFoundError as error:
        raise CheckpointError(f"{repo}: no such folder, the hub cannot be reached and the cache has no copy") from error
    except HfHubHTTPError as error:
        raise CheckpointError(
            f"{repo}: the hub refused it ({reason(error)}); check the name, the revision and the token"
        ) from error
    except Exception as error:  # timeouts, proxies and resets come as the classes of the hub's own HTTP library
        with contextlib.suppress(Exception):
            folder = fetch(offline=True)
            if weights:
                _weight_files(folder)  # a download that broke off leaves a snapshot in which some are missing
            return folder
        raise CheckpointError(f"{repo}: no such folder, and the hub could not be read ({reason(error)})") from error


def open_checkpoint(folder: Path, *, ignore_config: Collection[str] = ()) -> Checkpoint:
    """Read config and headers of `folder` and match them; no weight is read.

    Args:
        folder: a local checkpoint folder.
        ignore_config: keys of config.json that the caller vouches for as inert.

    Raises:
        CheckpointError: a file is missing or damaged.
        ConfigError: config.json is not understood.
        TensorError: a tensor is missing, unexpected, of another shape or of an unknown dtype.
    """
    config, spec = read_config(folder, ignore_config=ignore_config)
    found: dict[str, StoredTensor] = {}
    for place in (t for path in _weight_files(folder) for t in _stored_tensors(path)):
        if place.name in found:
            raise TensorError(f"{place.path}: tensor {label(place.name)} stands in {found[place.name].path.name} too")
        found[place.name] = place
    if spec.tied:
        _drop_tied_head(spec, found, folder)
    return Checkpoint(folder, config, spec, _match(spec, found, folder))


def read_config(folder: Path, *, ignore_config: Collection[str] = ()) -> tuple[dict[str, Any], ModelSpec]:
    """config.json of `folder` and what it says about the model; weights need not be there.

    Raises:
        CheckpointError: the file is missing or damaged.
        ConfigError: it is not understood.
    """
    config = read_json(folder / "config.json", "the folder is no checkpoint")
    try:
        return config, load_spec(config, ignore_config)
    except ConfigError as error:
        raise ConfigError(f"{folder}: {error}") from error


def read_json(path: Path, otherwise: str = "the file is needed") -> dict[str, Any]:
    """Parse a JSON object.

    Raises:
        CheckpointError: missing, unreadable, not UTF-8, not JSON or not an object.
    """
    try:
        if path.stat().st_size > MAX_JSON:
            raise CheckpointError(f"{path}: is larger than {MAX_JSON >> 20} MiB; is it the right file?")
        if not path.is_file() and not path.is_dir():  # reading a pipe would wait for ever
            raise CheckpointError(f"{path}: is no regular file")
        value = json.loads(path.read_bytes().decode("utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: not found; {otherwise}") from None
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:  # UTF-8, JSON, or a number of thousands of digits
        raise CheckpointError(f"{path}: is not valid JSON ({reason(error)})") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: should hold a JSON object, holds {type(value).__name__}")
    return value


def _weight_files(folder: Path) -> list[Path]:
    """The safetensors files: those that the index names, else the single one."""
    if not (folder / INDEX).exists():
        if (folder / SINGLE).is_file():
            return [folder / SINGLE]
        pickled = sorted(p.name for p in folder.glob("*.bin")) + sorted(p.name for p in folder.glob("*.pt*"))
        hint = f"; {pickled[0]} is a pickle, which is never opened: convert it to safetensors" if pickled else ""
        raise CheckpointError(f"{folder}: neither {SINGLE} nor {INDEX} found{hint}")
    index = read_json(folder / INDEX).get("weight_map")
    if not isinstance(index, dict) or not index or not all(isinstance(v, str) for v in index.values()):
        raise CheckpointError(f"{folder / INDEX}: weight_map should map tensor names to file names")
    names = sorted(set(index.values()))
    for name in names:
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise CheckpointError(f"{folder / INDEX}: names the file {show(name)}, which is no *.safetensors beside it")
        if file_in(folder, name) is None:
            raise CheckpointError(
                f"{folder / label(name)}: not found, but {INDEX} names it; the download is incomplete"
            )
    return [folder / name for name in names]


def _stored_tensors(path: Path) -> Iterator[StoredTensor]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np"):
            pass
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: is damaged or no safetensors file ({reason(error)})") from error
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        if name.endswith(COMPUTED):
            continue
        if entry["dtype"] not in DTYPES:
            raise TensorError(
                f"{path}: tensor {label(name)} has dtype {entry['dtype']}; "
                f"only {', '.join(DTYPES)} weights are exported"
            )
        yield StoredTensor(
            name, path, DTYPES[entry["dtype"]], tuple(entry["shape"]), 8 + length + entry["data_offsets"][0]
        )


def _drop_tied_head(spec: ModelSpec, found: dict[str, StoredTensor], folder: Path) -> None:
    """Drop a stray lm_head that equals the tied embedding; refuse one that differs."""
    head, embed = found.get(f"{Role.HEAD.value}.weight"), found.get(f"{Role.EMBED.value}.weight")
    # Reading begins only at the shape that config.json asks for; `_match` names an embedding of another one.
    if head is None or embed is None or embed.shape != (spec.vocab_size, spec.hidden_size):
        return
    if head.shape != embed.shape or not _equal(head, embed):
        raise TensorError(
            f"{folder}: config.json ties the head to the embedding (tie_word_embeddings), but lm_head.weight "
            "differs from model.embed_tokens.weight; remove one of the two"
        )
    del found[head.name]


def _equal(a: StoredTensor, b: StoredTensor, chunk: int = 512) -> bool:
    rows = a.shape[0]
    return all(
        np.array_equal(
            a.read_rows(i, min(i + chunk, rows)).astype(np.float32),
            b.read_rows(i, min(i + chunk, rows)).astype(np.float32),
        )
        for i in range(0, rows, chunk)
    )


def _match(spec: ModelSpec, found: dict[str, StoredTensor], folder: Path) -> dict[Tensor, StoredTensor]:
    """Every tensor of the spec with its place; nothing missing, nothing left over, all shapes equal."""
    stored = {}
    for tensor in spec.tensors():
        place = found.pop(tensor.source, None)
        if place is None:
            raise TensorError(f"{folder}: tensor {tensor.source} {list(tensor.shape)} is missing")
        if place.shape != tensor.shape:
            raise TensorError(
                f"{place.path}: tensor {tensor.source} has shape {list(place.shape)}, "
                f"config.json asks for {list(tensor.shape)}"
            )
        stored[tensor] = place
    if found:
        name = min(found)
        more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
        raise TensorError(f"{found[name].path}: tensor {label(name)}{more} is not part of a {spec.model_type} model")
    return stored
