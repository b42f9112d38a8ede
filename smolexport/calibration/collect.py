"""Filling the folder of statistics: layer by layer, resumed where a killed run stopped.

The hidden states of all windows are in two files of the folder, one read while the other is written.  A layer's file
appears after the states behind that layer are on disk, so the existing files say which states are complete.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from smolexport import plugins
from smolexport.calibration.files import open_arrays, write_arrays, writing
from smolexport.calibration.statistics import (
    HEAD_FILE,
    MANIFEST,
    TEACHER_FILE,
    TOKENS_FILE,
    Input,
    Manifest,
    Statistics,
    file_of,
    hash_of,
    read_manifest,
    write_activation_stats,
    write_manifest,
)
from smolexport.calibration.texts import Render, TextSource, read_source, source_name, training_windows
from smolexport.calibration.trainer import Engine, input_columns
from smolexport.cleanup import Provisional
from smolexport.conversion.model_card import installed_version
from smolexport.errors import CalibrationError, OutputError, UsageError
from smolexport.files import check_parent, check_space, made_folder
from smolexport.model.checkpoint import Checkpoint
from smolexport.model.identity import file_hash, identity
from smolexport.model.source_files import refuse_changes
from smolexport.run.chat import Answer, Renderer
from smolexport.text import few
from smolexport.tokenizer import TokenizerSpec, TokenKind, open_tokenizer, read_tokenizer

KEPT = 256  # tokens of each prediction
SHORTEST = 4  # tokens of a window
HIDDEN = ("hidden-0.f32", "hidden-1.f32")
LONGEST = 60  # characters of a fact in a message
OURS = (MANIFEST, TOKENS_FILE, HEAD_FILE, TEACHER_FILE, *HIDDEN)


@dataclass(frozen=True)
class Collection:
    """Statistics that are ready to be collected: windows and manifest are in the folder."""

    checkpoint: Checkpoint
    engine: Engine
    folder: Path
    manifest: Manifest

    @property
    def layers_done(self) -> int:
        """Number of layers, from the first on, whose files exist."""
        done = 0
        while done < self.manifest.layers and _is_complete(_layer_file(self.folder, done)):
            done += 1
        return done

    @property
    def done(self) -> bool:
        """Whether nothing is left to do."""
        last = (self.folder / HEAD_FILE, self.folder / TEACHER_FILE)
        return self.layers_done == self.manifest.layers and all(map(_is_complete, last))


def open_collection(
    checkpoint: Checkpoint,
    folder: Path,
    *,
    texts: Sequence[Path] = (),
    tokens: int = 65536,
    window: int = 512,
    seed: int = 0,
    threads: int | None = None,
    force: bool = False,
    progress: Callable[[int], None] = lambda _: None,
) -> Collection:
    """Choose the windows and write them with the manifest, or find those of an interrupted run.

    Args:
        checkpoint: the original.
        folder: for the statistics; created if missing.
        texts: files, see `smolexport.calibration.texts`; none = the model writes its own text.
        tokens: maximum of tokens in all windows.
        window: tokens of a window.
        seed: of the order of windows, and of the text that the model writes.
        threads: of the engine; None = its own choice.
        force: replace statistics with other arguments in the folder.
        progress: called with numbers of tokens that were read, or written by the model.

    Raises:
        UsageError: an impossible window, or a text that cannot be read.
        MissingDependencyError: the engine's library is not installed.
        CalibrationError: the folder holds statistics with other arguments; the text is too short.
        OutputError: the folder cannot be written, or holds other things.
    """
    trainer = plugins.trainer()
    versions = {"smolexport": installed_version(), trainer.NAME: trainer.version()}
    engine = trainer.engine(checkpoint, threads=threads)
    requested = _requested(checkpoint, texts, tokens, window, seed, versions)
    check_parent(folder)
    try:
        with made_folder(folder):
            manifest = _claim(folder, requested, force)
            if manifest is None or not _is_valid(Statistics(folder, manifest, checkpoint.spec.vocab_size).windows):
                _clear(folder)
                windows, sources = _windows(checkpoint, engine, requested, texts, progress)
                manifest = replace(requested, sources=sources, windows=len(windows), sha256=hash_of(windows))
                check_space(folder, _nbytes(checkpoint, manifest))
                with _until(folder / MANIFEST, folder / TOKENS_FILE):
                    write_arrays(folder / TOKENS_FILE, {"tokens": ("int32", windows.shape)}, [windows])
                    write_manifest(folder, manifest)
    except OSError as error:
        raise OutputError(f"{error.filename or folder}: {error.strerror or error}") from error
    return Collection(checkpoint, engine, folder, manifest)


def _until(mark: Path, path: Path) -> Provisional:
    """A block that writes `path`, and removes it again unless `mark`, which makes it valid, exists at the end."""
    return Provisional(lambda: None if mark.exists() else path.unlink(missing_ok=True), keep=True)


def _requested(
    checkpoint: Checkpoint, texts: Sequence[Path], tokens: int, window: int, seed: int, versions: Mapping[str, str]
) -> Manifest:
    """The manifest as far as it is known before the windows are; raises UsageError."""
    spec = checkpoint.spec
    if not SHORTEST <= window <= spec.context_length:
        raise UsageError(f"--window {window}: must be between {SHORTEST} and the model's {spec.context_length}")
    if tokens < window:
        raise UsageError(f"--tokens {tokens}: is less than one window of {window}")
    try:
        sources = tuple(TextSource(source_name(path), file_hash(path), 0) for path in texts)
    except OSError as error:
        raise UsageError(f"{error.filename}: {error.strerror}") from error
    return Manifest(
        identity(checkpoint), "text" if texts else "self", sources, tokens, 0, window, seed, len(spec.layers),
        min(KEPT, spec.vocab_size), "", versions,
    )  # fmt: skip


def collect(job: Collection, progress: Callable[[int], None] = lambda _: None) -> Statistics:
    """Do what is left; `progress` is called with 1 for each layer, and for the head.

    Raises:
        CheckpointError: a weight is damaged.
        OutputError: the disk is full.
    """
    folder, m = job.folder, job.manifest
    hidden = [folder / name for name in HIDDEN]
    if not job.done:
        try:
            start = _first(job)
            progress(start)
            for index in range(start, m.layers):
                _layer(job, index, hidden[index % 2], hidden[(index + 1) % 2])
                progress(1)
            _finish(job, hidden[m.layers % 2])
        except OSError as error:
            raise OutputError(
                f"{error.filename or folder}: {error.strerror or error}; run it again to go on"
            ) from error
        progress(1)
    for path in hidden:
        path.unlink(missing_ok=True)
    return Statistics(folder, m)


def _layer(job: Collection, index: int, source: Path, target: Path) -> None:
    """Write the hidden states after a layer, and then its statistics."""
    with _until(_layer_file(job.folder, index), target):
        found = job.engine.layer(index, (job.manifest.windows, job.manifest.window), source, target)
        with target.open("rb") as file:
            os.fsync(file.fileno())
        refuse_changes(job.checkpoint.folder, job.checkpoint.stamps)
        write_activation_stats(job.folder, index, found)


def _layer_file(folder: Path, layer: int) -> Path:
    return folder / file_of(Input(layer, "attn"))


def _first(job: Collection) -> int:
    """The first layer to run, with its input on disk."""
    done, m = job.layers_done, job.manifest
    source = job.folder / HIDDEN[done % 2]
    size = 4 * m.tokens * job.checkpoint.spec.hidden_size
    if done and source.is_file() and source.stat().st_size == size:
        return done
    # Last layers first, so that a kill in between leaves complete files from the first layer on.
    for path in sorted(job.folder.glob("layer-*.safetensors"), reverse=True):
        path.unlink()
    for name in (HEAD_FILE, TEACHER_FILE, *HIDDEN):
        (job.folder / name).unlink(missing_ok=True)
    with _until(_layer_file(job.folder, 0), job.folder / HIDDEN[0]):
        job.engine.embed(Statistics(job.folder, m).windows(), job.folder / HIDDEN[0])
    return 0


def _finish(job: Collection, source: Path) -> None:
    """Write the head's statistics, and the model's predictions."""
    m = job.manifest
    shape = m.windows, m.window, m.kept
    shapes = {"ids": ("int32", shape), "log_probs": ("float32", shape)}
    with writing(job.folder / TEACHER_FILE, shapes, {}) as (file, places):

        def write(ids: NDArray[np.int32], log_probs: NDArray[np.float32]) -> None:
            for name, array, dtype in (("ids", ids, "<i4"), ("log_probs", log_probs, "<f4")):
                file.seek(places[name])
                places[name] += file.write(np.ascontiguousarray(array, dtype).tobytes())

        found = job.engine.finish((m.windows, m.window), source, m.kept, write)
    refuse_changes(job.checkpoint.folder, job.checkpoint.stamps)
    write_activation_stats(job.folder, None, {"head": found})


def _windows(
    checkpoint: Checkpoint, engine: Engine, requested: Manifest, texts: Sequence[Path], progress: Callable[[int], None]
) -> tuple[NDArray[np.int32], tuple[TextSource, ...]]:
    vocab_size = checkpoint.spec.vocab_size
    tokenizer = read_tokenizer(checkpoint.folder, vocab_size)
    bos = tokenizer.bos if tokenizer.add_bos else None
    count, window, seed = requested.asked // requested.window, requested.window, requested.seed
    if not texts:
        normal = [i for i, kind in enumerate(tokenizer.kinds[:vocab_size]) if kind is TokenKind.NORMAL]
        windows = engine.sample(count, window, np.array(normal, np.int32), bos, seed, progress)
        return windows, (TextSource("written by the model", hash_of(windows), windows.size),)
    codec = open_tokenizer(checkpoint.folder, tokenizer)
    ids, sources = [], []
    with _rendering(checkpoint.folder, tokenizer) as render:
        for path in texts:
            sha256, found = read_source(
                path, codec, limit=requested.asked, seed=seed, vocab_size=vocab_size, render=render, progress=progress
            )
            ids.append(found)
            sources.append(TextSource(source_name(path), sha256, len(found)))
    return training_windows(ids, window, count, bos=bos, seed=seed), tuple(sources)


@contextmanager
def _rendering(folder: Path, tokenizer: TokenizerSpec) -> Iterator[Render]:
    """Renders conversations with the checkpoint's chat template, in one process that starts with the first of them."""
    with ExitStack() as stack:

        @cache
        def renderer() -> Renderer:
            runtime: Any = plugins.checkpoint_runtime("open_chat")
            return stack.enter_context(Renderer(runtime.__name__, folder))

        def render(conversation: Mapping[str, Any]) -> Answer:
            if tokenizer.chat_template is None and not tokenizer.chat_templates:
                return Answer(error="the checkpoint has none")
            return renderer().ask(conversation, ids=False)

        yield render


def _is_complete(path: Path) -> bool:
    return _is_valid(lambda: open_arrays(path, "a layer"))


def _is_valid(read: Callable[[], object]) -> bool:
    try:
        read()
    except CalibrationError:
        return False
    return True


def _nbytes(checkpoint: Checkpoint, m: Manifest) -> int:
    """Maximum size of the folder in bytes."""
    spec = checkpoint.spec
    layers = sum(2 * c * (c + 1) for layer in spec.layers for c in input_columns(spec, layer).values())
    return layers + 8 * m.tokens * m.kept + 8 * m.tokens * spec.hidden_size


def write_importance(statistics: Statistics, checkpoint: Checkpoint, path: Path, *, force: bool = False) -> None:
    """Write llama.cpp's importance matrix for the matrices of the layers, as llama-imatrix does.

    Raises:
        UsageError: the GGUF converter is not installed.
        CalibrationError: a statistic is missing.
        OutputError: the target exists or cannot be written.
    """
    write = getattr(plugins.converter("gguf"), "write_importance", None)
    if write is None:
        raise UsageError("--imatrix: the installed GGUF converter writes no importance matrix; update it")
    m = statistics.manifest
    matrices = [t for t in checkpoint.spec.tensors() if t.layer is not None and t.is_matrix]
    sums = {t: statistics.mean_squares(t) * np.float32(m.tokens) for t in matrices}
    names = tuple(source.name for source in m.sources)
    write(sums, path, count=m.tokens, datasets=names, chunks=m.windows, chunk_size=m.window, force=force)


def _claim(folder: Path, requested: Manifest, force: bool) -> Manifest | None:
    """Prepare the folder for these arguments; the manifest of an earlier run with the same ones, None without one.

    Raises:
        CalibrationError: the folder holds statistics with other arguments, and `force` is not given.
        OutputError: it holds other things.
    """
    others = sorted(path.name for path in folder.iterdir() if not _is_ours(path.name))
    if others:
        raise OutputError(f"{folder}: holds {others[0]}, which is not a statistic; give another folder with -o")
    if force:
        _clear(folder)
    for path in folder.glob(".*.partial"):  # of a run that was killed
        path.unlink()
    if not (folder / MANIFEST).exists():
        _clear(folder)
        return None
    found = read_manifest(folder)
    differs = list(_differences(found, requested))
    if differs:
        raise CalibrationError(
            f"{folder}: holds statistics with {few(differs, between='; ')}; give another folder with -o, or --force"
        )
    return found


def _differences(found: Manifest, requested: Manifest) -> Iterable[str]:
    """Arguments of another run that differ from the requested ones."""
    if found.checkpoint != requested.checkpoint:
        yield "another checkpoint"
    names = {
        "method": "method", "asked": "--tokens", "window": "--window", "seed": "--seed", "layers": "layers",
        "kept": "predictions of",
    }  # fmt: skip
    for key, name in names.items():
        old, new = getattr(found, key), getattr(requested, key)
        if old != new:
            yield f"{name} {_short(old)}, not {new}"
    if found.method == requested.method == "text":
        old_texts, new_texts = ([(s.name, s.sha256) for s in m.sources] for m in (found, requested))
        if old_texts != new_texts:
            yield f"other --text files ({few([_short(name) for name, _ in old_texts])})"
    for name in sorted({*found.versions, *requested.versions}):
        old, new = found.versions.get(name, "nothing"), requested.versions.get(name, "nothing")
        if old != new:
            yield f"{_short(name)} {_short(old)}, not {new}"


def _short(value: object) -> str:
    """A value of a manifest, which is printable, for a message."""
    text = str(value)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}…"


def _is_ours(name: str) -> bool:
    layer = name.startswith("layer-") and name.endswith(".safetensors")
    partial = name.startswith(".") and name.endswith(".partial")
    return name in OURS or layer or partial


def _clear(folder: Path) -> None:
    """Remove the statistics, the manifest first: without one the other files count as invalid."""
    (folder / MANIFEST).unlink(missing_ok=True)
    for path in folder.iterdir():
        if _is_ours(path.name):
            path.unlink()
