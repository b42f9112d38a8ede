"""A Hugging Face checkpoint: a local folder or a hub id, read tensor by tensor and row by row; never a pickle."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from smolexport.errors import CheckpointError, ConfigError, TensorError, UsageError
from smolexport.files import open_regular
from smolexport.model.arch import load_spec
from smolexport.model.source_files import SMALL_FILES, Stamps, file_in, stamps
from smolexport.model.spec import ModelSpec, Role, Tensor, stored_shape
from smolexport.model.tensor_file import DTYPES, StoredTensor, stored_tensors
from smolexport.text import few, first_line, label, show

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
MAX_JSON = 64 << 20  # the index of the largest published models is about 10 MB
# Weights by the names that trainers and publishers give them, the pickled ones included.
WEIGHTS = ("*.safetensors", "pytorch_model*.bin", "consolidated*.pth", "adapter_model.bin")
QUANTIZED = ("quantization_config", "quantization", "compression_config")  # keys of config.json that claim it


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint; weights stay on disk.

    Attributes:
        folder: its folder.
        config: config.json, without the ignored keys.
        spec: what the model is.
        stored: location of each tensor of `spec`.
        notes: choices made where the folder is ambiguous, one line each.
        stamps: of its files, before the first was read; see `source_files.refuse_changes`.
    """

    folder: Path
    config: Mapping[str, Any]
    spec: ModelSpec
    stored: Mapping[Tensor, StoredTensor]
    notes: tuple[str, ...] = ()
    stamps: Stamps = field(default_factory=dict, repr=False)

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

    Of a hub id the files that an export reads are downloaded into the Hugging Face cache; without a network the cached
    snapshot is used.

    Args:
        source: folder, `demo` or hub id.
        revision: branch, tag or commit on the hub.
        token: hub token.
        cache_dir: cache in place of the default one.
        weights: False = fetch only config, tokenizer and templates of a hub id.

    Raises:
        CheckpointError: no such folder, and no such model on the hub or in the cache.
        UsageError: an empty name; `demo` in a folder with a checkpoint of that name.
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
                allow_patterns=[*SMALL_FILES, *(["*.safetensors"] if weights else [])],
                ignore_patterns=["original/*", "onnx/*", "gguf/*", "consolidated*"],
                local_files_only=offline,
            )
        )

    try:
        return fetch(offline=False)
    except HFValidationError as error:
        raise CheckpointError(f"{repo}: neither a folder nor a valid hub id ({first_line(error)})") from error
    except LocalEntryNotFoundError as error:
        raise CheckpointError(f"{repo}: no such folder, the hub cannot be reached and the cache has no copy") from error
    except HfHubHTTPError as error:
        raise CheckpointError(
            f"{repo}: the hub refused it ({first_line(error)}); check the name, the revision and the token"
        ) from error
    except Exception as error:  # timeouts, proxies and resets come as the classes of the hub's own HTTP library
        with contextlib.suppress(Exception):
            folder = fetch(offline=True)
            if weights:
                weight_files(folder)  # a download that broke off leaves a snapshot in which some are missing
            return folder
        raise CheckpointError(f"{repo}: no such folder, and the hub could not be read ({first_line(error)})") from error


def open_checkpoint(folder: Path, *, ignore_config: Collection[str] = ()) -> Checkpoint:
    """Read config and headers of `folder` and match them; no weight is read except a head that may be tied.

    Args:
        folder: a local checkpoint folder.
        ignore_config: keys of config.json to ignore; the caller guarantees that they are inert.

    Raises:
        CheckpointError: a file is missing or damaged, or a link that leads out of the folder.
        ConfigError: config.json is not understood.
        TensorError: a tensor is missing, unexpected, of another shape or of an unknown dtype.
    """
    seen = stamps(folder)
    config, spec = read_config(folder, ignore_config=ignore_config)
    files, notes = weight_files(folder)
    found: dict[str, StoredTensor] = {}
    for place in (t for path in files for t in stored_tensors(path, claimed_quantization(config))):
        if place.name in found:
            raise TensorError(f"{place.path}: tensor {label(place.name)} is in {found[place.name].path.name} too")
        found[place.name] = place
    if method := claimed_quantization(config):
        notes.append(
            f"config.json claims quantized weights ({method}), but every tensor is plain: the claim is ignored"
        )
    spec, more = _head(spec, config, found, folder)
    return Checkpoint(folder, config, spec, _match(spec, found, folder), (*notes, *more), seen)


def read_config(folder: Path, *, ignore_config: Collection[str] = ()) -> tuple[dict[str, Any], ModelSpec]:
    """config.json of `folder` and the model that it describes; needs no weights.

    Raises:
        CheckpointError: the file is missing or damaged.
        ConfigError: it is not understood.
    """
    path = file_in(folder, CONFIG)
    if path is None:
        raise CheckpointError(f"{folder / CONFIG}: not found; {_instead(folder)}")
    config = {key: value for key, value in read_json(path).items() if key not in ignore_config}
    try:
        return config, load_spec(config)
    except ConfigError as error:
        raise ConfigError(f"{folder}: {error}") from error


def read_json(path: Path, otherwise: str = "the file is needed") -> dict[str, Any]:
    """Parse a JSON object.

    Raises:
        CheckpointError: missing, unreadable, not UTF-8, not JSON or not an object.
    """
    try:
        with open_regular(path) as file:
            data = file.read(MAX_JSON + 1)
        if len(data) > MAX_JSON:
            raise CheckpointError(f"{path}: is larger than {MAX_JSON >> 20} MiB; is it the right file?")
        value = json.loads(data.decode("utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: not found; {otherwise}") from None
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:  # UTF-8, JSON, or a number of thousands of digits
        raise CheckpointError(f"{path}: is not valid JSON ({first_line(error)})") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def _instead(folder: Path) -> str:
    """What a folder without a config.json is, judged by the names in it."""
    if (folder / "adapter_config.json").is_file():
        return "the folder holds an adapter, not a model: merge it into its base model first (peft: merge_and_unload)"
    below = sorted(path.parent.name for path in folder.glob(f"*/{CONFIG}"))
    return f"the folder is not a checkpoint; give one of those in it, e.g. {below[-1]}" if below else (
        "the folder is not a checkpoint"
    )  # fmt: skip


def weight_files(folder: Path) -> tuple[list[Path], list[str]]:
    """The safetensors files of the model in `folder`, and notes on other weights there.

    As in transformers: model.safetensors if it exists, else the shards that the index names.

    Raises:
        CheckpointError: there are none, or one that the index names is missing.
    """
    single, index = file_in(folder, SINGLE), file_in(folder, INDEX)
    listed = _listed(index) if index else []
    if single and SINGLE not in listed:
        files, why = [single], f"{SINGLE} is taken, as transformers does"
    elif listed:
        files, why = [_shard(folder, name) for name in listed], f"the files that {INDEX} names are taken"
    else:
        raise CheckpointError(f"{folder}: has neither {SINGLE} nor {INDEX}{_weights_instead(folder)}")
    others = [path for pattern in WEIGHTS for path in sorted(folder.glob(pattern)) if path not in files]
    adapters = [path.name for path in others if path.name.startswith("adapter_model")]
    rest = [path.name for path in others if path.name not in adapters]
    notes = [f"{_are(rest)} in the same folder but not read: {why}"] if rest else []
    if adapters:
        notes.append(f"{_are(adapters)} in the same folder but not merged: the model is exported without the adapter")
    return files, notes


def _are(names: Sequence[str]) -> str:
    verb = "is" if len(names) == 1 else "are" if len(names) <= 3 else "files are"
    return f"{few([label(name) for name in names])} {verb}"


def _listed(index: Path) -> list[str]:
    """The files that the index names."""
    found = read_json(index).get("weight_map")
    if not isinstance(found, dict) or not found or not all(isinstance(v, str) for v in found.values()):
        raise CheckpointError(f"{index}: weight_map must map tensor names to file names")
    names = sorted(set(found.values()))
    for name in names:
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise CheckpointError(f"{index}: names the file {show(name)}, which is not a *.safetensors beside it")
    return names


def _shard(folder: Path, name: str) -> Path:
    path = file_in(folder, name)
    if path is None:
        raise CheckpointError(f"{folder / label(name)}: not found, but {INDEX} names it; the download is incomplete")
    return path


def _weights_instead(folder: Path) -> str:
    """Advice for a folder without weights of the usual names."""
    names = [path.name for path in sorted(folder.glob("*.safetensors"))]
    if len(names) == 1:
        return f"; if {label(names[0])} is the model, rename it to {SINGLE}"
    if names:
        return f", only {_are(names)} there: the download is incomplete"
    pickled = [path.name for pattern in ("*.bin", "*.pt*") for path in sorted(folder.glob(pattern))]
    if pickled:
        return (
            f"; {label(pickled[0])} is a pickle, which is never opened: load the model with transformers "
            "and save it again with save_pretrained"
        )
    return ""


def claimed_quantization(config: Mapping[str, Any]) -> str | None:
    """The quantization of the weights that config.json claims, as a short text; None without a claim."""
    for key in QUANTIZED:
        value = config.get(key)
        if value is not None:
            method = value.get("quant_method") if isinstance(value, dict) else None
            return f"{key}: {show(method)}" if isinstance(method, str) else key
    return None


def _head(
    spec: ModelSpec, config: Mapping[str, Any], found: dict[str, StoredTensor], folder: Path
) -> tuple[ModelSpec, list[str]]:
    """`spec` with the head that the checkpoint really has, as in transformers 5, and a note if config.json differs.

    A copy of the tied embedding is dropped from `found`.

    Raises:
        TensorError: there is no head, and config.json does not allow the embedding in its place.
    """
    name, embedding = spec.source(Role.HEAD).name, spec.source(Role.EMBED).name
    head, embed = found.get(name), found.get(embedding)
    if not spec.tied:
        if head is not None or embed is None:
            return spec, []
        if config.get("tie_word_embeddings") is not None:
            raise TensorError(
                f"{folder}: tensor {name} is missing, and config.json says that tie_word_embeddings is false; "
                "complete the download, or set it to true if the embedding is the head"
            )
        note = f"there is no {name} and config.json does not say tie_word_embeddings: the embedding is the head"
        return replace(spec, tied=True), [note]
    # Weights are read only if they have the shape of config.json; `_match` refuses an embedding of another one.
    if head is None or (embed is not None and embed.shape != (spec.vocab_size, spec.hidden_size)):
        return spec, []
    if embed is None:
        found[embedding] = replace(found.pop(name), name=embedding)
        return spec, [f"there is no {embedding}, and the head is tied to it: {name} serves as both"]
    if head.shape == embed.shape and _equal(head, embed):
        del found[name]
        return spec, []
    return replace(spec, tied=False), [
        f"config.json ties the head to the embedding (tie_word_embeddings), but {name} differs from {embedding}: "
        "both are kept, as transformers 5 does"
    ]


def _equal(a: StoredTensor, b: StoredTensor, chunk: int = 512) -> bool:
    def rows(stored: StoredTensor, start: int) -> NDArray[np.float32]:
        return stored.read_rows(start, min(start + chunk, stored.shape[0])).astype(np.float32)

    return all(np.array_equal(rows(a, start), rows(b, start)) for start in range(0, a.shape[0], chunk))


def _match(spec: ModelSpec, found: dict[str, StoredTensor], folder: Path) -> dict[Tensor, StoredTensor]:
    """The location of every tensor of the spec; none may be missing, unexpected or of another shape."""
    fused: dict[str, list[Tensor]] = {}
    for tensor in spec.tensors():
        fused.setdefault(tensor.stored_name, []).append(tensor)
    stored: dict[Tensor, StoredTensor] = {}
    for name, parts in fused.items():
        place, shape = found.pop(name, None), stored_shape(parts)
        if place is None:
            raise TensorError(f"{folder}: tensor {name} {list(shape)} is missing")
        if place.shape != shape:
            raise TensorError(
                f"{place.path}: tensor {name} has shape {list(place.shape)}, config.json asks for {list(shape)}"
            )
        first = 0
        for tensor in parts:
            how = tensor.source
            stored[tensor] = place.part(first, tensor.shape, transposed=how.transposed, added=how.added)
            first += tensor.shape[0]
    if found:
        name = min(found)
        more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
        raise TensorError(f"{found[name].path}: tensor {label(name)}{more} is not part of a {spec.model_type} model")
    return {tensor: stored[tensor] for tensor in spec.tensors()}
