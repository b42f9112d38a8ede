"""Filling the folder of statistics: layer by layer, resumed after a kill where it stopped.

Hidden states of all windows lie in two files of the folder, of which one is read while the other is written.  A layer's
file appears once the states after that layer are on the disk, so the files that are there say which states are whole.
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
        """Layers whose files are there."""
        done = 0
        while done < self.manifest.layers and _whole(_file(self.folder, done)):
            done += 1
        return done

    @property
    def done(self) -> bool:
        """Whether nothing is left to do."""
        last = (self.folder / HEAD_FILE, self.folder / TEACHER_FILE)
        return self.layers_done == self.manifest.layers and all(map(_whole, last))


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
    """Choose the windows and write them with the manifest, or find those of a run that was stopped.

    Args:
        checkpoint: the original.
        folder: of the statistics; made when missing.
        texts: files, see `smolexport.calibration.texts`; none: the model writes its own text.
        tokens: most tokens in all windows.
        window: tokens of a window.
        seed: of the order of windows, and of the text that the model writes.
        threads: of the engine; None: its own choice.
        force: statistics with other arguments in the folder are replaced.
        progress: called with numbers of tokens that were read, or written by the model.

    Raises:
        UsageError: a window or text that cannot be.
        MissingDependencyError: the engine's library is not installed.
        CalibrationError: the folder holds statistics made otherwise; the text is too short.
        OutputError: the folder cannot be written, or holds other things.
    """
    engine, versions = _engine(checkpoint, threads)
    wanted = _wanted(checkpoint, texts, tokens, window, seed, versions)
    check_parent(folder)
    try:
        with made_folder(folder):
            manifest = claim(folder, wanted, force)
            if manifest is None or not _readable(checkpoint, folder, manifest):
                clear(folder)
                manifest = _choose(checkpoint, engine, folder, wanted, texts, progress)
    except OSError as error:
        raise OutputError(f"{error.filename or folder}: {error.strerror or error}") from error
    return Collection(checkpoint, engine, folder, manifest)


def _readable(checkpoint: Checkpoint, folder: Path, manifest: Manifest) -> bool:
    try:
        Statistics(folder, manifest, checkpoint.spec.vocab_size).windows()
    except CalibrationError:
        return False
    return True


def _choose(
    checkpoint: Checkpoint,
    engine: Engine,
    folder: Path,
    wanted: Manifest,
    texts: Sequence[Path],
    progress: Callable[[int], None],
) -> Manifest:
    """Write the windows, and the manifest, which is returned."""
    windows, sources = _windows(checkpoint, engine, wanted, texts, progress)
    manifest = replace(wanted, sources=sources, windows=len(windows), sha256=hash_of(windows))
    check_space(folder, _nbytes(checkpoint, manifest))
    with _until(folder / MANIFEST, folder / TOKENS_FILE):
        write_arrays(folder / TOKENS_FILE, {"tokens": ("int32", windows.shape)}, [windows])
        write_manifest(folder, manifest)
    return manifest


def _until(mark: Path, path: Path) -> Provisional:
    """A block in which `path` is written: without `mark`, which comes last, nobody would use it, so it goes again."""
    return Provisional(lambda: None if mark.exists() else path.unlink(missing_ok=True), keep=True)


def _wanted(
    checkpoint: Checkpoint, texts: Sequence[Path], tokens: int, window: int, seed: int, versions: Mapping[str, str]
) -> Manifest:
    """What is known before the windows are; raises UsageError."""
    spec = checkpoint.spec
    if not SHORTEST <= window <= spec.context_length:
        raise UsageError(f"--window {window}: should lie between {SHORTEST} and the model's {spec.context_length}")
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
    """Hidden states after a layer, and then its statistics."""
    with _until(_file(job.folder, index), target):
        found = job.engine.layer(index, (job.manifest.windows, job.manifest.window), source, target)
        _flush(target)
        refuse_changes(job.checkpoint.folder, job.checkpoint.stamps)
        write_activation_stats(job.folder, index, found)


def _file(folder: Path, layer: int) -> Path:
    return folder / file_of(Input(layer, "attn"))


def _first(job: Collection) -> int:
    """The layer to go on with, its input being on the disk."""
    done, m = job.layers_done, job.manifest
    source = job.folder / HIDDEN[done % 2]
    size = 4 * m.tokens * job.checkpoint.spec.hidden_size
    if done and source.is_file() and source.stat().st_size == size:
        return done
    # From the back, so that a kill between two leaves a run of whole files from the first layer on.
    for path in sorted(job.folder.glob("layer-*.safetensors"), reverse=True):
        path.unlink()
    for name in (HEAD_FILE, TEACHER_FILE, *HIDDEN):
        (job.folder / name).unlink(missing_ok=True)
    with _until(_file(job.folder, 0), job.folder / HIDDEN[0]):
        job.engine.embed(Statistics(job.folder, m).windows(), job.folder / HIDDEN[0])
    return 0


def _finish(job: Collection, source: Path) -> None:
    """The head's statistic, and the model's predictions."""
    m = job.manifest
    shapes = {
        name: (dtype, (m.windows, m.window, m.kept)) for name, dtype in (("ids", "int32"), ("log_probs", "float32"))
    }
    with writing(job.folder / TEACHER_FILE, shapes, {}) as (file, starts):
        places = dict(starts)

        def write(ids: NDArray[np.int32], log_probs: NDArray[np.float32]) -> None:
            for name, array, dtype in (("ids", ids, "<i4"), ("log_probs", log_probs, "<f4")):
                file.seek(places[name])
                places[name] += file.write(np.ascontiguousarray(array, dtype).tobytes())

        found = job.engine.finish((m.windows, m.window), source, m.kept, write)
    refuse_changes(job.checkpoint.folder, job.checkpoint.stamps)
    write_activation_stats(job.folder, None, {"head": found})


def _engine(checkpoint: Checkpoint, threads: int | None) -> tuple[Engine, dict[str, str]]:
    trainer = plugins.trainer()
    versions = {"smolexport": installed_version(), trainer.NAME: trainer.version()}
    return trainer.engine(checkpoint, threads=threads), versions


def _windows(
    checkpoint: Checkpoint,
    engine: Engine,
    wanted: Manifest,
    texts: Sequence[Path],
    progress: Callable[[int], None],
) -> tuple[NDArray[np.int32], tuple[TextSource, ...]]:
    vocab_size = checkpoint.spec.vocab_size
    tokenizer = read_tokenizer(checkpoint.folder, vocab_size)
    bos = tokenizer.bos if tokenizer.add_bos else None
    count = wanted.asked // wanted.window
    if not texts:
        normal = [i for i, kind in enumerate(tokenizer.kinds[:vocab_size]) if kind is TokenKind.NORMAL]
        first = np.array(normal, np.int32)
        windows = engine.sample(count, wanted.window, first, bos, wanted.seed, progress)
        return windows, (TextSource("written by the model", hash_of(windows), windows.size),)
    codec = open_tokenizer(checkpoint.folder, tokenizer)
    ids, sources = [], []
    with _rendering(checkpoint.folder, tokenizer) as render:
        for path in texts:
            mark, found = read_source(
                path, codec, limit=wanted.asked, seed=wanted.seed, vocab_size=vocab_size, render=render,
                progress=progress,
            )  # fmt: skip
            ids.append(found)
            sources.append(TextSource(source_name(path), mark, len(found)))
    return training_windows(ids, wanted.window, count, bos=bos, seed=wanted.seed), tuple(sources)


@contextmanager
def _rendering(folder: Path, tokenizer: TokenizerSpec) -> Iterator[Render]:
    """Answers with texts by the checkpoint's chat template; one process does all, from the first conversation on."""
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


def _whole(path: Path) -> bool:
    try:
        open_arrays(path, "a layer")
    except CalibrationError:
        return False
    return True


def _nbytes(checkpoint: Checkpoint, m: Manifest) -> int:
    """Bytes that the folder will have at most."""
    spec = checkpoint.spec
    layers = sum(2 * c * (c + 1) for layer in spec.layers for c in input_columns(spec, layer).values())
    return layers + 8 * m.tokens * m.kept + 8 * m.tokens * spec.hidden_size


def _flush(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def write_importance(statistics: Statistics, checkpoint: Checkpoint, path: Path, *, force: bool = False) -> None:
    """Write llama.cpp's importance matrix: of the matrices in the layers, as llama-imatrix does.

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


def claim(folder: Path, wanted: Manifest, force: bool) -> Manifest | None:
    """Claim the folder for these arguments; returns the manifest of an earlier run with the same, None without one.

    Args:
        folder: one that is there.
        wanted: what is asked for; windows and hashes of ids in it are not looked at.
        force: statistics with other arguments are removed.

    Raises:
        CalibrationError: the folder holds statistics with other arguments.
        OutputError: it holds other things.
    """
    others = sorted(path.name for path in folder.iterdir() if not _is_ours(path.name))
    if others:
        raise OutputError(f"{folder}: holds {others[0]}, which is not a statistic; give another folder with -o")
    if force:
        clear(folder)
    for path in folder.glob(".*.partial"):  # left by a run that was killed
        path.unlink()
    if not (folder / MANIFEST).exists():
        clear(folder)
        return None
    found = read_manifest(folder)
    differs = list(_differences(found, wanted))
    if differs:
        raise CalibrationError(
            f"{folder}: holds statistics with {_some(differs, '; ')}; give another folder with -o, or --force"
        )
    return found


def _differences(found: Manifest, wanted: Manifest) -> Iterable[str]:
    """What another run was asked for otherwise."""
    if found.checkpoint != wanted.checkpoint:
        yield "another checkpoint"
    names = {
        "method": "method", "asked": "--tokens", "window": "--window", "seed": "--seed", "layers": "layers",
        "kept": "predictions of",
    }  # fmt: skip
    for key, name in names.items():
        old, new = getattr(found, key), getattr(wanted, key)
        if old != new:
            yield f"{name} {_short(old)}, not {new}"
    if found.method == wanted.method == "text":
        old_texts, new_texts = ([(s.name, s.sha256) for s in m.sources] for m in (found, wanted))
        if old_texts != new_texts:
            yield f"other --text files ({_some([_short(name) for name, _ in old_texts], ', ')})"
    for name in sorted({*found.versions, *wanted.versions}):
        old, new = found.versions.get(name, "nothing"), wanted.versions.get(name, "nothing")
        if old != new:
            yield f"{_short(name)} {_short(old)}, not {new}"


def _short(value: object) -> str:
    """A stranger's fact for a message; a manifest holds only what can be printed."""
    text = str(value)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}…"


def _some(words: Sequence[str], between: str) -> str:
    more = f" and {len(words) - 3} more" if len(words) > 3 else ""
    return between.join(words[:3]) + more


def _is_ours(name: str) -> bool:
    layer = name.startswith("layer-") and name.endswith(".safetensors")
    partial = name.startswith(".") and name.endswith(".partial")
    return name in OURS or layer or partial


def clear(folder: Path) -> None:
    """Remove the statistics, the manifest first: what is left without one is never believed."""
    (folder / MANIFEST).unlink(missing_ok=True)
    for path in folder.iterdir():
        if _is_ours(path.name):
            path.unlink()
