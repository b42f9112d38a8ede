"""Speed of models, measured in interleaved rounds so that a drift of the machine affects all of them equally.

One round measures every model once: a prompt up to the first chosen token, single steps from there, and one long block
in an empty context.  Each round starts with a different model.  All models are open at once; if memory cannot hold
them, each is reopened for each of its rounds.
"""

from __future__ import annotations

import platform
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from smolexport.errors import UsageError
from smolexport.model.spec import Role
from smolexport.parity.candidates import model_infos
from smolexport.parity.inputs import Candidate, Progress, Settings, no_progress
from smolexport.parity.peak_memory import peaks
from smolexport.parity.results import Estimate, ModelResult, NonNegative, Speed
from smolexport.run.session import Runtime, Session, choose_threads

READ = 256 << 20  # bytes, more than the processor's caches hold
TIMES = 5

Opened = tuple[Session, float]
"""A session, and the seconds that opening it took."""


@dataclass(frozen=True)
class BenchRow(ModelResult):
    """Figures of one model."""

    speed: Speed
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Bench:
    """Speed of several models; members as in `results.Comparison`."""

    models: Sequence[BenchRow]
    bandwidth_bytes_per_s: NonNegative
    environment: Mapping[str, str]
    notes: tuple[str, ...]


def bench(models: Sequence[Candidate], settings: Settings, progress: Progress = no_progress) -> Bench:
    """Measure the speed and memory of `models` on the same random tokens, without a reference.

    Args:
        models: files, or checkpoints on the reference's runtime.
        settings: lengths, repetitions, threads.
        progress: called at each step.

    Raises:
        UsageError: no model, or no repetition.
        SmolexportError: any error of a runtime while it opens or runs a file.
    """
    if not models or settings.repetitions < 1:
        raise UsageError("nothing to measure: name at least one file, and at least one repetition")
    context = max(settings.prompt_tokens + settings.decode_tokens, settings.prefill_tokens)
    found, note = speeds(models, None, context, settings, progress)
    rate = memory_bandwidth(settings.threads)
    infos, memory = model_infos(models), peaks(models, context, settings, progress)
    rows = [
        BenchRow(info, speed, bandwidth_share(model, speed, rate), seconds, peak, (unknown,) if unknown else ())
        for model, info, (speed, seconds), (peak, unknown) in zip(models, infos, found, memory, strict=True)
    ]
    environment = machine_facts([model.runtime for model in models], settings.threads)
    return Bench(rows, rate, environment, (note,) if note else ())


def speeds(
    models: Sequence[Candidate], ids: NDArray[np.int64] | None, context: int, settings: Settings, progress: Progress
) -> tuple[list[tuple[Speed, float]], str]:
    """Speed of every model with the seconds that opening it took, and a note on the method, empty if all were open.

    Args:
        models: what to measure.
        ids: tokens to feed; None feeds random ones.
        context: tokens that every session holds.
        settings: lengths, repetitions, threads.
        progress: called at each step.
    """
    total = settings.repetitions * len(models)
    steps = iter(range(1, total + 1))
    progress("speed", 0, total)
    note = lack_of_memory(models)
    with ExitStack() as stack:
        opened, facts = [], []
        for model in models:
            with ExitStack() if note else nullcontext(stack) as kept:
                session, seconds = kept.enter_context(_opened(model, context, settings))
                facts.append((session.context, session.vocab_size, seconds))
                opened += [] if note else [(session, seconds)]
            del session  # no memory for a closed one
        contexts, sizes, load_seconds = zip(*facts, strict=True)
        if ids is None:
            ids = np.random.default_rng(0).integers(0, min(sizes), context)

        def use(place: int) -> AbstractContextManager[Opened]:
            return _opened(models[place], context, settings) if note else nullcontext(opened[place])

        least = min(contexts)
        found = measure(use, len(models), ids, least, settings, advance=lambda: progress("speed", next(steps), total))
    return list(zip(found, load_seconds, strict=True)), note


def lack_of_memory(models: Sequence[Candidate]) -> str:
    """The reason why `models` cannot all be open at once; empty if they can."""
    import psutil

    needed = 2 * sum(model.bytes for model in models)  # weights may be repacked while they are loaded
    free = psutil.virtual_memory().available
    if len(models) == 1 or needed <= free:
        return ""
    lacking = f"all together need {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free"
    return f"speed: each model was reopened for each of its rounds: {lacking}"


@contextmanager
def _opened(model: Candidate, context: int, settings: Settings) -> Iterator[Opened]:
    """A session after a short warm-up, not counted, in which libraries compile, allocate and read the file."""
    start = time.perf_counter()
    with model.open(settings.threads, context) as session:
        seconds = time.perf_counter() - start
        for tokens in ([0] * min(settings.prompt_tokens, session.context - 1), [0]):
            session.append(tokens, last_only=True)
        yield session, seconds


def measure(
    use: Callable[[int], AbstractContextManager[Opened]],
    models: int,
    tokens: NDArray[np.int64],
    context: int,
    settings: Settings,
    *,
    clock: Callable[[], float] = time.perf_counter,
    advance: Callable[[], None] = lambda: None,
) -> list[Speed]:
    """Measure models on `tokens`, repeated if they are fewer than a block.

    Args:
        use: gives the session of the model at an index for one round.
        models: number of models.
        tokens: what to feed.
        context: smallest context of the sessions, which limits all lengths.
        settings: lengths and repetitions.
        clock: seconds.
        advance: called after each model of each round.
    """
    prompt = np.resize(tokens, min(settings.prompt_tokens, context - 1))
    block = np.resize(tokens, min(settings.prefill_tokens, context))
    steps = min(settings.decode_tokens, context - len(prompt))
    samples: list[list[tuple[float, float, float]]] = [[] for _ in range(models)]
    for turn in range(settings.repetitions):
        for place in range(models):
            index = (place + turn) % models
            with use(index) as (session, _):
                samples[index].append(_round(session, prompt, block, steps, clock))
            advance()
    found = []
    for rows in samples:
        ttft, prefill, decode = map(_estimate, zip(*rows, strict=True))
        found.append(Speed(ttft, prefill, decode, len(prompt), len(block), steps, len(rows)))
    return found


def _round(
    session: Session, prompt: NDArray[np.int64], block: NDArray[np.int64], steps: int, clock: Callable[[], float]
) -> tuple[float, float, float]:
    """Milliseconds until the first token is chosen, tokens per second of the block and of single steps."""
    session.rewind(0)
    start = clock()
    token = int(session.append(prompt, last_only=True)[-1].argmax())
    first = clock()
    for _ in range(steps):
        token = int(session.append([token], last_only=True)[-1].argmax())
    last = clock()
    session.rewind(0)
    begin = clock()
    session.append(block, last_only=True)
    return (first - start) * 1e3, len(block) / (clock() - begin), steps / (last - first)


def _estimate(values: Sequence[float]) -> Estimate:
    error = float(np.std(values, ddof=1) / np.sqrt(len(values))) if len(values) > 1 else float("nan")
    return Estimate(float(np.mean(values)), error)


def bandwidth_share(model: Candidate, rate: Speed | None, bandwidth: float | None) -> float | None:
    """Decode rate over the rate at which memory allows all weights of a token to be read; None if either is unknown."""
    if rate is None or bandwidth is None or model.weights is None:
        return None
    found = model.weights()
    untied = any(tensor.role is Role.HEAD for tensor in found)
    read = sum(tensor.size for tensor in found if not (untied and tensor.role is Role.EMBED))
    return rate.decode_tok_s.value * model.bits_per_weight / 8 * read / bandwidth


def memory_bandwidth(threads: int | None = None) -> float:
    """Memory read bandwidth of `threads` together, bytes per second, best of several runs; None: one per core."""
    parts = np.array_split(np.ones(READ // 4, np.float32), choose_threads(threads))
    rates = []
    for _ in range(TIMES):
        workers = [threading.Thread(target=np.max, args=(part,)) for part in parts]
        start = time.perf_counter()
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        rates.append(READ / (time.perf_counter() - start))
    return max(rates)


def machine_facts(runtimes: Iterable[Runtime], threads: int | None) -> dict[str, str]:
    """System, processor, cores, threads, memory, and the versions of `runtimes`, as text."""
    import psutil

    from smolexport.conversion.model_card import installed_version

    logical, physical = psutil.cpu_count() or 1, psutil.cpu_count(logical=False)
    info = Path("/proc/cpuinfo")
    name = re.search(r"^model name\s*:\s*(.+)$", info.read_text(errors="replace"), re.M) if info.exists() else None
    facts = {
        "smolexport": installed_version(),
        "system": f"{platform.system()} {platform.release()}, Python {platform.python_version()}",
        "processor": f"{name[1] if name else platform.processor() or 'unknown'} ({platform.machine()})",
        "cores": f"{logical} logical" + (f", {physical} physical" if physical else ""),
        "threads": str(choose_threads(threads)),
        "memory": f"{psutil.virtual_memory().total / 1e9:.0f} GB",
    }
    return facts | {runtime.NAME: runtime.version() for runtime in runtimes}
