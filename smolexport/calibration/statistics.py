"""The folder of statistics: the inputs of every matrix of a checkpoint on text, gathered once for all formats.

| file | what it holds |
|---|---|
| `manifest.json` | the checkpoint, the text and its length, the seed, the versions |
| `tokens.safetensors` | the windows, [n, w] |
| `layer-000.safetensors` … | for each of a layer's inputs: the Hessian's upper triangle, and the mean squares |
| `head.safetensors` | the same for the input of the head |
| `teacher.safetensors` | the model's own predictions: ids and log-probabilities of the likeliest tokens, [n, w, k] |

Notation: n = windows, w = tokens of a window, c = columns of a matrix, k = tokens kept of a distribution.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from smolexport.calibration.files import AGAIN, Arrays, open_arrays, triangle_rows, triangle_size, write_arrays
from smolexport.calibration.texts import TextSource
from smolexport.calibration.trainer import KINDS, ActivationStats, Teacher
from smolexport.errors import CalibrationError
from smolexport.files import atomic_file, open_regular
from smolexport.model.checkpoint import Checkpoint
from smolexport.model.identity import identity
from smolexport.model.spec import Role, Tensor
from smolexport.text import show

MANIFEST, TOKENS_FILE, HEAD_FILE = "manifest.json", "tokens.safetensors", "head.safetensors"
TEACHER_FILE = "teacher.safetensors"
FORM = 1  # of the folder; counts up when it changes
LARGEST_MANIFEST = 16 << 20  # bytes
LARGEST_VOCABULARY = 1 << 31  # of ids in 32 bits
LONGEST_WORD = 400  # characters of a name in it
READS: Mapping[Role, str] = {
    Role.Q: "attn", Role.K: "attn", Role.V: "attn", Role.O: "o", Role.GATE: "mlp", Role.UP: "mlp", Role.DOWN: "down",
    Role.EMBED: "head", Role.HEAD: "head",
}  # fmt: skip


@dataclass(frozen=True)
class Input:
    """The input of one or several matrices: `kind` is attn, o, mlp or down of `layer`, or head with no layer."""

    layer: int | None
    kind: str


def input_of(tensor: Tensor) -> Input:
    """The input of the matrix `tensor`; the embedding counts as the head.

    Raises:
        CalibrationError: it is not a matrix of a linear map.
    """
    if tensor.role not in READS or tensor.part != "weight":
        raise CalibrationError(f"{tensor.name}: is not a matrix, so there is no statistic of what it reads")
    return Input(tensor.layer, READS[tensor.role])


@dataclass(frozen=True)
class Manifest:
    """How the statistics were made.

    Attributes:
        checkpoint: hash of config, weights and tokenizer, see `smolexport.model.identity`.
        method: `text`, or `self` if the model wrote the text.
        sources: name, SHA-256 and tokens of each text.
        asked: requested number of tokens.
        windows: number of windows.
        window: tokens of each, BOS included.
        seed: of the order of the windows, and of the text that a model writes.
        layers: number of the model's layers.
        kept: tokens kept of each prediction.
        sha256: of the windows' ids.
        versions: of the libraries, by name.
    """

    checkpoint: str
    method: str
    sources: tuple[TextSource, ...]
    asked: int
    windows: int
    window: int
    seed: int
    layers: int
    kept: int
    sha256: str
    versions: Mapping[str, str] = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        """Tokens in all windows."""
        return self.windows * self.window


def file_of(where: Input) -> str:
    """Name of the file with the statistic of an input."""
    return HEAD_FILE if where.layer is None else f"layer-{where.layer:03d}.safetensors"


@dataclass(frozen=True)
class Statistics:
    """An opened folder of statistics.  Every call reads what it returns, and keeps nothing.

    Attributes:
        folder: the folder.
        manifest: its manifest.
        vocab_size: of the checkpoint; all token ids must be below it.
    """

    folder: Path
    manifest: Manifest
    vocab_size: int = LARGEST_VOCABULARY

    def hessian(self, tensor: Tensor) -> NDArray[np.float32]:
        """[c, c] X^T X / T of the input of `tensor`, over all positions but the first of each window; symmetric.

        Raises:
            CalibrationError: names the file and the tensor.
        """
        file, name, columns = self._place(tensor, "hessian")
        file.check(name, tensor.name, (triangle_size(columns),), "float32")
        found = file.symmetric(name, columns)
        if not (np.isfinite(found.min()) and np.isfinite(found.max())):  # without an array of booleans
            raise CalibrationError(f"{file.path}: {name} holds numbers that are not finite ({tensor.name}); {AGAIN}")
        return found

    def mean_squares(self, tensor: Tensor) -> NDArray[np.float32]:
        """[c] mean squares of the input of `tensor`, over all positions: llama.cpp's importance.

        Raises:
            CalibrationError: names the file and the tensor.
        """
        file, name, columns = self._place(tensor, "mean_squares")
        found: NDArray[np.float32] = file.read(name, tensor.name, (columns,), "float32")
        if not (np.isfinite(found) & (found >= 0)).all():
            raise CalibrationError(f"{file.path}: {name} holds negative or non-finite numbers ({tensor.name}); {AGAIN}")
        return found

    def largest_share(self, tensor: Tensor) -> float:
        """Share of the Hessian's trace that comes from the largest single token; raises CalibrationError."""
        file, name, _ = self._place(tensor, "largest_share")
        try:
            found = float(file.metadata[name])
        except (KeyError, ValueError):
            found = math.nan
        if not math.isfinite(found):
            raise CalibrationError(f"{file.path}: has no {name} ({tensor.name}); {AGAIN}")
        return found

    def windows(self) -> NDArray[np.int32]:
        """[n, w] token ids; raises CalibrationError."""
        m = self.manifest
        file = open_arrays(self.folder / TOKENS_FILE, "the tokens")
        found: NDArray[np.int32] = file.read("tokens", "the tokens", (m.windows, m.window), "int32")
        if hash_of(found) != m.sha256:
            raise CalibrationError(f"{file.path}: holds other tokens than {MANIFEST} says; {AGAIN}")
        self._check_ids(file, found)
        return found

    def teacher(self, start: int = 0) -> Teacher:
        """The original model's predictions from window `start` on; raises CalibrationError."""
        m, what = self.manifest, "the original's predictions"
        file = open_arrays(self.folder / TEACHER_FILE, what)
        for name, dtype in (("ids", "int32"), ("log_probs", "float32")):
            file.check(name, what, (m.windows, m.window, m.kept), dtype)
        ids, log_probs = (file.rows(name, start, m.windows) for name in ("ids", "log_probs"))
        if not np.isfinite(log_probs).all():
            raise CalibrationError(f"{file.path}: log_probs holds numbers that are not finite; {AGAIN}")
        self._check_ids(file, ids)
        return Teacher(ids, log_probs)

    def _check_ids(self, file: Arrays, ids: NDArray[np.int32]) -> None:
        if ids.size and not 0 <= ids.min() <= ids.max() < self.vocab_size:
            raise CalibrationError(f"{file.path}: holds ids outside the vocabulary of {self.vocab_size}; {AGAIN}")

    def _place(self, tensor: Tensor, what: str) -> tuple[Arrays, str, int]:
        where = input_of(tensor)
        return open_arrays(self.folder / file_of(where), tensor.name), f"{where.kind}.{what}", tensor.shape[1]


def open_statistics(folder: Path, checkpoint: Checkpoint | None = None) -> Statistics:
    """The statistics in `folder`, which must be those of `checkpoint` if it is given.

    Raises:
        CalibrationError: they are missing, damaged or of another checkpoint.
    """
    manifest = read_manifest(folder)
    if checkpoint is not None and identity(checkpoint) != manifest.checkpoint:
        raise CalibrationError(
            f"{folder}: holds statistics of another checkpoint than {checkpoint.folder}; make its own with "
            f"smolexport calibrate {checkpoint.folder} -o FOLDER"
        )
    return Statistics(folder, manifest, checkpoint.spec.vocab_size if checkpoint else LARGEST_VOCABULARY)


def hash_of(windows: NDArray[np.int32]) -> str:
    """SHA-256 of token ids, as little-endian 32-bit numbers."""
    return hashlib.sha256(np.ascontiguousarray(windows, "<i4").tobytes()).hexdigest()


def read_manifest(folder: Path) -> Manifest:
    """The manifest in `folder`; raises CalibrationError."""
    path = folder / MANIFEST
    try:
        with open_regular(path) as file:
            found = json.loads(file.read(LARGEST_MANIFEST))
    except (FileNotFoundError, NotADirectoryError):
        raise CalibrationError(f"{path}: not found; make statistics with smolexport calibrate") from None
    except (OSError, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else show(str(error))
        raise CalibrationError(f"{path}: cannot be read ({reason}); {AGAIN}") from error
    if not isinstance(found, dict) or found.get("form") != FORM:
        raise CalibrationError(f"{path}: is not of this version of smolexport; {AGAIN}")
    for key, fits in FACTS.items():
        if not fits(found.get(key)):
            raise CalibrationError(f"{path}: {key} is {show(found.get(key), 40)}, which it cannot be; {AGAIN}")
    sources = tuple(TextSource(s["name"], s["sha256"], s["tokens"]) for s in found["sources"])
    return Manifest(**{key: found[key] for key in FACTS if key != "sources"}, sources=sources)


def _is_word(value: object) -> bool:
    return isinstance(value, str) and len(value) <= LONGEST_WORD and value.isprintable()


def _is_count(value: object, least: int = 1) -> bool:
    return type(value) is int and least <= value < 1 << 40


def _is_source(value: object) -> bool:
    if not isinstance(value, dict):
        return False
    return _is_word(value.get("name")) and _is_word(value.get("sha256")) and _is_count(value.get("tokens"), 0)


# The fields of a manifest, which may have been made by a stranger.
FACTS: Mapping[str, Callable[[Any], bool]] = {
    "checkpoint": _is_word, "method": _is_word, "asked": _is_count, "windows": _is_count, "window": _is_count,
    "seed": lambda value: _is_count(value, 0), "layers": _is_count, "kept": _is_count, "sha256": _is_word,
    "sources": lambda value: isinstance(value, list) and all(map(_is_source, value)),
    "versions": lambda value: isinstance(value, dict) and all(map(_is_word, chain(*value.items()))),
}  # fmt: skip


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write it; raises OutputError."""
    facts: dict[str, Any] = {"form": FORM, **asdict(manifest)}
    with atomic_file(folder / MANIFEST, force=True) as file:
        file.write(json.dumps(facts, indent=1).encode())


def write_activation_stats(folder: Path, layer: int | None, found: Mapping[str, ActivationStats]) -> None:
    """Write the file of a layer (None: of the head), whole or not at all; raises OutputError."""
    kinds: Sequence[str] = KINDS if layer is not None else ("head",)
    shapes, parts, metadata = {}, list[Iterable[NDArray[np.float32]]](), {}
    for kind in kinds:
        stats = found[kind]
        columns = len(stats.mean_squares)
        shapes[f"{kind}.hessian"] = ("float32", (triangle_size(columns),))
        shapes[f"{kind}.mean_squares"] = ("float32", (columns,))
        metadata[f"{kind}.largest_share"] = f"{stats.largest_share:.6g}"
        parts += [triangle_rows(stats.hessian), [stats.mean_squares]]
    write_arrays(folder / file_of(Input(layer, kinds[0])), shapes, chain.from_iterable(parts), metadata)
