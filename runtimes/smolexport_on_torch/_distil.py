"""Scale distillation: the factors of a quantized model trained until it predicts what the original does.

The teacher's predictions are given.  The student is transformers' own model in float32, in which every trained matrix
is made of frozen codes and its factors.  What is validated and returned are always rounded factors.

The loss is the divergence over k + 1 classes: the k tokens that the teacher keeps, and one for all others.  With z the
student's logits, q their softmax, p the teacher's probabilities, Q and P the two tails:

    loss = sum p log(p / q) + P log(P / Q),      d loss / d z = q - p for the k,  q (1 - P / Q) for the others

so a piece of positions needs one buffer of logits, which become probabilities and then the gradient in place, and the
backward pass of the whole is only a product.

Notation: t = positions, w = tokens of a window, c = hidden size, v = vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
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
from smolexport_on_torch._load import limited_threads, load_model

WEIGHT = ".weight"
PIECE = 1 << 22  # logits held at a time: 16 MB


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


def divergence(
    folder: Path,
    weights: Iterable[tuple[str, NDArray[np.float32]]],
    windows: NDArray[np.int32],
    teacher: Teacher,
    threads: int | None = None,
) -> float:
    """As `smolexport.calibration.trainer.Trainer.divergence`."""
    student = Student(folder, weights, {}, torch.device("cpu"))
    total = 0.0
    with limited_threads(choose_threads(threads)), torch.no_grad():
        for number in range(len(windows)):
            total += float(student.divergence(windows, teacher, np.array([number])))
    return total / windows.size


def _device(requested: str) -> torch.device:
    available = torch.cuda.is_available()
    if requested == "cuda" and not available:
        raise UsageError("distillation: device = cuda, and torch finds none; use auto or cpu")
    return torch.device("cuda" if available and requested != "cpu" else "cpu")


def _check_teacher(windows: NDArray[np.int32], teacher: Teacher) -> None:
    shapes = tuple(teacher.ids.shape), tuple(teacher.log_probs.shape)
    if windows.ndim != 2 or shapes[0][:2] != windows.shape or shapes[0] != shapes[1] or len(shapes[0]) != 3:
        raise UsageError(
            "distillation: expected windows [n, w] and a teacher of twice [n, w, k], found"
            f" {list(windows.shape)} and {list(shapes[0])}, {list(shapes[1])}"
        )


class Student:
    """The quantized model; `scaled` are the trained matrices by source name."""

    def __init__(
        self,
        folder: Path,
        frozen: Iterable[tuple[str, NDArray[np.float32]]],
        trained: Mapping[str, AffineBlocks],
        device: torch.device,
    ) -> None:
        self.device = device
        self.scaled = {name: Scaled(blocks) for name, blocks in trained.items()}
        # The loader gets matrices of the right shape that take no memory.
        nothing = torch.zeros(1)
        places = {name: nothing.expand(scaled.codes.shape) for name, scaled in self.scaled.items()}
        self._model: Any = load_model(folder, "f32", _once(frozen, places)).requires_grad_(False)
        head = self._model.get_output_embeddings()
        self._head: Callable[[], torch.Tensor] = lambda: head.weight
        for name, scaled in self.scaled.items():
            old = _module(self._model, name)
            if old.weight is head.weight:  # a tied model's is that of its embedding
                self._head = scaled.matrix
            new = ScaledEmbedding(scaled) if isinstance(old, torch.nn.Embedding) else ScaledLinear(scaled, old.bias)
            path, _, last = name.removesuffix(WEIGHT).rpartition(".")
            setattr(self._model.get_submodule(path), last, new)
        self._model.to(device)
        self._recomputing = False

    def divergence(self, windows: NDArray[np.int32], teacher: Teacher, chosen: NDArray[np.int64]) -> torch.Tensor:
        """Of the windows `chosen` from the teacher, summed over all positions."""
        ids, log_probs = (np.asarray(x[chosen]) for x in (teacher.ids, teacher.log_probs))
        k = ids.shape[-1]
        hidden = self._model.base_model(input_ids=self._put(windows[chosen], np.int64), use_cache=False)[0]
        return head_divergence(
            hidden.flatten(0, 1),
            self._head(),
            self._put(ids, np.int64).view(-1, k),
            self._put(log_probs, np.float32).view(-1, k),
        )

    def _put(self, array: NDArray[Any], dtype: Any) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array, dtype=dtype)).to(self.device)

    def part(self, window: int, memory: int) -> int:
        """Windows to compute at a time; if even one takes more than `memory`, layers are computed twice."""
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
    """The module whose weight the matrix `name` is."""
    try:
        module = model.get_submodule(name.removesuffix(WEIGHT))
    except AttributeError:
        module = None
    if not name.endswith(WEIGHT) or not isinstance(module, (torch.nn.Linear, torch.nn.Embedding)):
        raise TensorError(f"distillation: {show(name)} is not a matrix of this model; only matrices can be trained")
    return module


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
        """Train, validate, and keep the best."""
        best = {name: scaled.trained() for name, scaled in self._student.scaled.items()}
        before = after = self._validate(best)
        found, ended = 0, "steps"
        parameters = [p for scaled in self._student.scaled.values() for p in scaled.parameters()]
        optimizer = torch.optim.Adam(parameters, lr=self._settings.rate)
        for number in range(1, self._settings.steps + 1):
            loss = self._update(optimizer, number)
            sound, kld = math.isfinite(loss), None
            if sound and (number % self._settings.validate_every == 0 or number == self._settings.steps):
                factors = {name: self._rounded(name, s.trained()) for name, s in self._student.scaled.items()}
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
    """Windows in a new order each time all have been used; a batch may span two rounds."""
    random = np.random.default_rng(seed)
    order = random.permutation(count)
    while True:
        while len(order) < size:
            order = np.concatenate([order, random.permutation(count)])
        yield np.sort(order[:size])
        order = order[size:]


def head_divergence(
    hidden: torch.Tensor, head: torch.Tensor, ids: torch.Tensor, log_probs: torch.Tensor, piece: int = PIECE
) -> torch.Tensor:
    """Sum over positions of KL(teacher || student), nats; at most `piece` logits, or one position, are held at a time.

    Args:
        hidden: [t, c], input of the head.
        head: [v, c].
        ids: [t, k] int64, distinct in a row.
        log_probs: [t, k] float32.
    """
    out: torch.Tensor = Divergence.apply(hidden, head, ids, log_probs, max(1, piece // head.shape[0]))
    return out


class Divergence(torch.autograd.Function):
    """`head_divergence` with both gradients computed in the forward pass."""

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, head: torch.Tensor, ids: torch.Tensor, log_probs: torch.Tensor, step: int
    ) -> torch.Tensor:
        needed = ctx.needs_input_grad[:2]
        of_hidden = torch.empty_like(hidden) if needed[0] else None
        of_head = torch.zeros_like(head) if needed[1] else None
        total = hidden.new_zeros((), dtype=torch.float64)
        buffer = hidden.new_empty(min(step, len(hidden)), len(head))
        for start in range(0, len(hidden), step):
            piece = slice(start, start + step)
            logits = buffer[: len(hidden[piece])]
            torch.mm(hidden[piece], head.T, out=logits)
            total += _to_gradient(logits, ids[piece], log_probs[piece], any(needed))
            if of_hidden is not None:
                torch.mm(logits, head, out=of_hidden[piece])
            if of_head is not None:
                of_head.addmm_(logits.T, hidden[piece])
        ctx.save_for_backward(of_hidden, of_head)
        return total.to(hidden.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        return *(None if x is None else x * gradient for x in ctx.saved_tensors), None, None, None


def _to_gradient(logits: torch.Tensor, ids: torch.Tensor, log_probs: torch.Tensor, needed: bool) -> torch.Tensor:
    """The loss of one piece; if `needed`, `logits` become its gradient.

    The tail is summed itself: 1 minus the rest has no digits left where the tail is small.
    """
    p = log_probs.exp()
    whole = p.sum(1, keepdim=True)
    all_kept = ids.shape[1] == logits.shape[1]
    excess = whole if all_kept else whole.clamp_min(1)  # rounded log-probabilities need not sum to 1
    p = p / excess
    log_p = log_probs - excess.log()
    tail_p = torch.zeros_like(whole) if all_kept else (1 - whole).clamp_min(0)
    top = logits.gather(1, ids)
    peak = logits.amax(1, keepdim=True)
    logits.scatter_(1, ids, float("-inf")).sub_(peak).exp_()
    tail = logits.sum(1, keepdim=True)
    top = top - peak
    norm = (tail + top.exp().sum(1, keepdim=True)).log()
    log_q = top - norm
    tiny = torch.finfo(logits.dtype).tiny
    tail_log_q = tail.clamp_min(tiny).log() - norm
    loss = (p * (log_p - log_q)).sum() + (torch.xlogy(tail_p, tail_p) - tail_p * tail_log_q).sum()
    if needed:
        tail_q = tail_log_q.exp()
        logits.mul_((tail_q - tail_p) / tail.clamp_min(tiny)).scatter_(1, ids, log_q.exp() - p)
    return loss.double()
