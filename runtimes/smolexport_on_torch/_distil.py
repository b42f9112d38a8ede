"""Scale distillation: the factors of a quantized model trained until it predicts what the original does.

The teacher is not here: what it predicted was kept.  The student is transformers' own model in float32, in which every
trained matrix is made of frozen codes and its factors.  What is judged, and handed back, are always rounded factors.

Notation: w = tokens of a window, k = tokens of a prediction that are kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.checkpoint import checkpoint

from smolexport.calibration.trainer import (
    AffineBlocks,
    Distilled,
    DistilSettings,
    Rounding,
    Step,
    Teacher,
    Trained,
    held_out,
)
from smolexport.errors import TensorError, UsageError
from smolexport.run.session import choose_threads
from smolexport.text import show
from smolexport_on_torch._factors import Scaled, ScaledEmbedding, ScaledLinear
from smolexport_on_torch._head import divergence
from smolexport_on_torch._load import load_model

WEIGHT = ".weight"


def distil(
    folder: Path,
    frozen: Iterable[tuple[str, NDArray[np.float32]]],
    trained: Mapping[str, AffineBlocks],
    windows: NDArray[np.int32],
    teacher: Teacher,
    *,
    settings: DistilSettings,
    rounded: Rounding,
    progress: Callable[[Step], None] | None = None,
) -> Distilled:
    """As `smolexport.calibration.trainer.Trainer.distil`."""
    device = _device(settings.device)
    _check_teacher(windows, teacher)
    student = Student(folder, frozen, trained, device)
    with limited_threads(choose_threads(settings.threads)):
        return Training(student, windows, teacher, settings, rounded, progress).run()


def _device(asked: str) -> torch.device:
    there = torch.cuda.is_available()
    if asked == "cuda" and not there:
        raise UsageError("distillation: device = cuda, and torch finds none; take auto or cpu")
    return torch.device("cuda" if there and asked != "cpu" else "cpu")


def _check_teacher(windows: NDArray[np.int32], teacher: Teacher) -> None:
    shapes = tuple(teacher.ids.shape), tuple(teacher.log_probs.shape)
    if windows.ndim != 2 or shapes[0][:2] != windows.shape or shapes[0] != shapes[1] or len(shapes[0]) != 3:
        raise UsageError(
            f"distillation: windows {list(windows.shape)} and teacher {list(shapes[0])}, {list(shapes[1])}"
            " should be [n, w] and twice [n, w, k]"
        )


@contextmanager
def limited_threads(count: int) -> Iterator[None]:
    """Torch has one setting per process."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Student:
    """The quantized model.

    Attributes:
        scaled: the trained matrices by source name.
        device: where it computes.
    """

    def __init__(
        self,
        folder: Path,
        frozen: Iterable[tuple[str, NDArray[np.float32]]],
        trained: Mapping[str, AffineBlocks],
        device: torch.device,
    ) -> None:
        self.device = device
        self.scaled = {name: Scaled(blocks) for name, blocks in trained.items()}
        # The loader is shown matrices of the right shape that take no memory.
        nothing = torch.zeros(1)
        places = {name: nothing.expand(scaled.codes.shape) for name, scaled in self.scaled.items()}
        self._model: Any = load_model(folder, "f32", _once(frozen, places))
        for parameter in self._model.parameters():
            parameter.requires_grad_(False)
        self._head = self._find_head()
        for name, scaled in self.scaled.items():
            _replace(self._model, name, scaled)
        self._model.to(device)
        self._recomputing = False

    def _find_head(self) -> Callable[[], torch.Tensor]:
        """What gives the matrix of the head, which a tied model shares with its embedding."""
        head = self._model.get_output_embeddings()
        mine = (name for name in self.scaled if _module(self._model, name).weight is head.weight)
        name = next(mine, None)
        return (lambda: head.weight) if name is None else self.scaled[name].matrix

    @property
    def parameters(self) -> list[torch.nn.Parameter]:
        """The logarithms that are trained."""
        return [p for scaled in self.scaled.values() for p in scaled.parameters()]

    def divergence(self, windows: NDArray[np.int32], teacher: Teacher, chosen: NDArray[np.int64]) -> torch.Tensor:
        """Of the windows `chosen`, summed over all positions."""
        ids, log_probs = (np.asarray(x[chosen]) for x in (teacher.ids, teacher.log_probs))
        k = ids.shape[-1]
        hidden = self._model.base_model(input_ids=self._put(windows[chosen], np.int64), use_cache=False)[0]
        return divergence(
            hidden.flatten(0, 1),
            self._head(),
            self._put(ids, np.int64).view(-1, k),
            self._put(log_probs, np.float32).view(-1, k),
        )

    def _put(self, array: NDArray[Any], dtype: Any) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array, dtype=dtype)).to(self.device)

    def part(self, window: int, memory: int) -> int:
        """Windows to compute at a time; where even one takes more than `memory`, layers are computed twice."""
        config = self._model.config.get_text_config()
        # Floats that a layer keeps for its backward, per token: counted in transformers' Llama, rounded up.
        layer = 16 * config.hidden_size + 5 * config.intermediate_size
        token = 4 * layer * config.num_hidden_layers
        if token * window > memory and not self._recomputing:
            self._recomputing = True
            for module in self._model.base_model.layers:
                module.forward = partial(checkpoint, module.forward, use_reentrant=False)
        if self._recomputing:
            token = 4 * (layer + config.hidden_size * config.num_hidden_layers)
        return int(max(1, memory // (token * window)))


def _once(frozen: Iterable[tuple[str, Any]], places: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, array in frozen:
        if name in places:
            raise UsageError(f"distillation: the tensor {show(name)} is given as frozen and as trained")
        yield name, array
    yield from places.items()


def _module(model: Any, name: str) -> Any:
    """The module that the matrix `name` is the weight of."""
    try:
        module = model.get_submodule(name.removesuffix(WEIGHT))
    except AttributeError:
        module = None
    if not name.endswith(WEIGHT) or not isinstance(module, (torch.nn.Linear, torch.nn.Embedding)):
        raise TensorError(
            f"distillation: {show(name)} is not a matrix of this model's: only the weights of those are trained"
        )
    return module


def _replace(model: Any, name: str, scaled: Scaled) -> None:
    path, _, last = name.removesuffix(WEIGHT).rpartition(".")
    old = _module(model, name)
    new = ScaledEmbedding(scaled) if isinstance(old, torch.nn.Embedding) else ScaledLinear(scaled, old.bias)
    setattr(model.get_submodule(path), last, new)


class Training:
    """One run; arguments as for `distil`."""

    def __init__(
        self,
        student: Student,
        windows: NDArray[np.int32],
        teacher: Teacher,
        settings: DistilSettings,
        rounded: Rounding,
        progress: Callable[[Step], None] | None,
    ) -> None:
        self._student, self._windows, self._teacher = student, windows, teacher
        self._settings, self._rounded, self._progress = settings, rounded, progress
        self._part = student.part(windows.shape[1], settings.memory)
        count = len(windows) - held_out(len(windows))
        self._validation = np.arange(count, len(windows))
        self._batches = _batches(count, min(settings.batch, count), settings.seed)
        self._history: list[Step] = []
        self._tokens = 0

    def run(self) -> Distilled:
        """Train, judge, and keep the best."""
        best = {name: scaled.trained() for name, scaled in self._student.scaled.items()}
        before = after = self._validate(best)
        found, ended = 0, "steps"
        optimizer = torch.optim.Adam(self._student.parameters, lr=self._settings.rate)
        for number in range(1, self._settings.steps + 1):
            loss = self._update(optimizer, number)
            sound, kld = math.isfinite(loss), None
            if sound and (number % self._settings.validate_every == 0 or number == self._settings.steps):
                factors = self._round()
                kld = self._validate(factors)
                if kld < after:
                    best, after, found = factors, kld, number
            step = Step(number, loss, kld)
            self._history.append(step)
            if self._progress:
                self._progress(step)
            if not sound or (kld is not None and not math.isfinite(kld)):
                ended = "diverged"
                break
            if kld is not None and number - found >= self._settings.patience * self._settings.validate_every:
                ended = ended if number == self._settings.steps else "patience"
                break
        device = self._student.device.type
        return Distilled(best, before, after, found, tuple(self._history), ended, self._tokens, device)

    def _update(self, optimizer: torch.optim.Optimizer, number: int) -> float:
        """One step of Adam; the loss before it."""
        batch = next(self._batches)
        for group in optimizer.param_groups:
            group["lr"] = self._settings.rate_at(number - 1)
        optimizer.zero_grad(set_to_none=True)
        positions = len(batch) * self._windows.shape[1]
        total = 0.0
        for chosen in self._parts(batch):
            loss = self._student.divergence(self._windows, self._teacher, chosen) / positions
            loss.backward()
            total += float(loss.detach())
        if math.isfinite(total):
            optimizer.step()
        self._tokens += positions
        return total

    def _round(self) -> dict[str, Trained]:
        return {name: self._rounded(name, scaled.trained()) for name, scaled in self._student.scaled.items()}

    def _validate(self, factors: Mapping[str, Trained]) -> float:
        """Divergence per token on the held-out windows with these factors."""
        for name, scaled in self._student.scaled.items():
            scaled.hold(factors[name])
        total = 0.0
        with torch.no_grad():
            for chosen in self._parts(self._validation):
                total += float(self._student.divergence(self._windows, self._teacher, chosen))
        for scaled in self._student.scaled.values():
            scaled.hold(None)
        return total / self._windows[self._validation].size

    def _parts(self, chosen: NDArray[np.int64]) -> Iterator[NDArray[np.int64]]:
        yield from (chosen[i : i + self._part] for i in range(0, len(chosen), self._part))


def _batches(count: int, size: int, seed: int) -> Iterator[NDArray[np.int64]]:
    """Windows in a new order each time that all have been taken; a batch may reach over two rounds."""
    random = np.random.default_rng(seed)
    order = random.permutation(count)
    while True:
        while len(order) < size:
            order = np.concatenate([order, random.permutation(count)])
        yield np.sort(order[:size])
        order = order[size:]
