"""Statistics of what each matrix of a checkpoint reads, gathered one layer at a time, and the model's own text.

Hidden states of all windows lie in a file [windows, window, h] float32, read and written a few windows at a time: what
is in memory does not grow with the text, nor with the number of layers.

Notation: n = windows, w = tokens of a window, h = hidden_size, c = columns of a matrix, k = tokens kept of a
distribution.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from smolexport.calibration.trainer import ActivationStats, input_columns
from smolexport.model.checkpoint import Checkpoint
from smolexport.run.session import choose_threads
from smolexport_on_torch._decoder import (
    Cache,
    Weights,
    check,
    embed,
    layer_forward,
    load_embedding,
    load_head,
    load_layer,
    norm,
)

BATCH = 2048  # tokens that go through a layer at a time
ROWS = 16 << 20  # numbers of logits at a time
STRIP = 256  # rows of a Hessian that are computed at a time: what lies below the diagonal is left out
CACHES = 512 << 20  # bytes of keys and values while text is written
KEPT = 1 << 30  # bytes of weights up to which all layers stay in memory while text is written


class Gathering:
    """Second moments of one input, as they come in.  `count`: positions that the Hessian will have seen in all."""

    def __init__(self, columns: int) -> None:
        self._hessian = torch.zeros(columns, columns)
        self._squares = torch.zeros(columns, dtype=torch.float64)
        self._positions = self._counted = 0
        self._trace = self._largest = 0.0

    def add(self, x: torch.Tensor) -> None:
        """Take in [b, w, c]; position 0 of each window counts for the mean squares only."""
        squares = x.square()
        self._squares += squares.sum((0, 1)).double()
        self._positions += x.shape[0] * x.shape[1]
        tokens = squares[:, 1:].sum(-1).double()
        del squares
        self._trace += float(tokens.sum())
        self._largest = max(self._largest, float(tokens.max()))
        rows = x[:, 1:].reshape(-1, x.shape[-1])
        # A running mean in place: numbers keep their size, and no second matrix of this size is ever there.
        total = self._counted + len(rows)
        for start in range(0, rows.shape[1], STRIP):
            strip = self._hessian[start : start + STRIP, start:]
            strip.addmm_(rows[:, start : start + STRIP].T, rows[:, start:], beta=self._counted / total, alpha=1 / total)
        self._counted = total

    def stats(self) -> ActivationStats:
        """What was gathered."""
        squares = (self._squares / self._positions).float().numpy()
        return ActivationStats(self._hessian.numpy(), squares, self._largest / self._trace if self._trace else 0.0)


class TorchEngine:
    """Runs the layers of `checkpoint` for `smolexport.calibration.collect`."""

    def __init__(self, checkpoint: Checkpoint, *, threads: int | None = None) -> None:
        check(checkpoint.spec)
        self._checkpoint = checkpoint
        self._threads = choose_threads(threads)

    def _start(self) -> None:
        if torch.get_num_threads() != self._threads:  # torch has one setting per process
            torch.set_num_threads(self._threads)

    def embed(self, windows: NDArray[np.int32], target: Path) -> None:
        """Write the hidden states before the first layer; raises OSError."""
        self._start()
        table = load_embedding(self._checkpoint)
        with torch.inference_mode(), target.open("wb") as file:
            for part in _parts(len(windows), windows.shape[1]):
                ids = torch.from_numpy(windows[part].astype(np.int64))
                file.write(embed(table, ids).numpy().data)

    def layer(self, index: int, shape: tuple[int, int], source: Path, target: Path) -> dict[str, ActivationStats]:
        """Run the layer `index` over all windows, `shape` [n, w]; by kind, what its matrices read.

        Args:
            index: of the layer.
            shape: number of windows, tokens of each.
            source: hidden states before it.
            target: gets those after it.
        """
        self._start()
        spec = self._checkpoint.spec
        gathered = {kind: Gathering(c) for kind, c in input_columns(spec, spec.layers[index]).items()}
        weights = load_layer(self._checkpoint, index)
        with torch.inference_mode(), target.open("wb") as file:
            for x in _hidden(source, (*shape, spec.hidden_size)):
                out = layer_forward(x, weights, spec, index, tap=lambda kind, y: gathered[kind].add(y))
                file.write(out.contiguous().numpy().data)
        return {kind: found.stats() for kind, found in gathered.items()}

    def finish(
        self,
        shape: tuple[int, int],
        source: Path,
        k: int,
        write: Callable[[NDArray[np.int32], NDArray[np.float32]], None],
    ) -> ActivationStats:
        """What the head reads; `write` is given ids and log-probabilities [w, k] of the k likeliest, window by window.

        Args:
            shape: number of windows, tokens of each.
            source: hidden states after the last layer.
            k: how many.
            write: called once for each window, in their order.
        """
        self._start()
        spec = self._checkpoint.spec
        gathered = Gathering(spec.hidden_size)
        weight, head = load_head(self._checkpoint)
        with torch.inference_mode():
            for x in _hidden(source, (*shape, spec.hidden_size)):
                y = norm(x, weight, spec.norm_eps)
                gathered.add(y)
                for window in y:
                    write(*_likeliest(window, head, k))
        return gathered.stats()

    def sample(
        self,
        count: int,
        window: int,
        first: NDArray[np.int32],
        bos: int | None,
        seed: int,
        progress: Callable[[int], None],
    ) -> NDArray[np.int32]:
        """[count, window] tokens that the model writes itself, at temperature 1, each window from a random first one.

        Args:
            count: how many windows.
            window: tokens of each.
            first: the tokens that may be first.
            bos: stands before the first; None: nothing does.
            seed: of the random numbers.
            progress: called with the number of tokens written.
        """
        self._start()
        random = torch.Generator().manual_seed(seed)
        spec = self._checkpoint.spec
        per_window = sum(8 * layer.mixer.num_key_value_heads * layer.mixer.head_dim * window for layer in spec.layers)
        batch = max(1, min(count, CACHES // per_window))
        written = []
        writer = _Writer(self._checkpoint)
        with torch.inference_mode():
            for start in range(0, count, batch):
                b = min(batch, count - start)
                chosen = torch.from_numpy(first.astype(np.int64))[torch.randint(len(first), (b, 1), generator=random)]
                prompt = chosen if bos is None else torch.cat((torch.full((b, 1), bos), chosen), 1)
                written.append(writer.write(prompt[:, :window], window, random, progress))
        return np.concatenate(written)


class _Writer:
    """The model with caches: all layers in memory where they are small, else read again for each token."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._table = load_embedding(checkpoint)
        self._norm, head = load_head(checkpoint)
        self._head = self._table if checkpoint.spec.tied else head
        count = len(checkpoint.spec.layers)
        small = 4 * sum(t.size for t in checkpoint.stored if t.layer is not None) <= KEPT
        self._layers = [load_layer(checkpoint, i) for i in range(count)] if small else None

    def _each(self) -> Iterator[Weights]:
        if self._layers is not None:
            yield from self._layers
            return
        for index in range(len(self._checkpoint.spec.layers)):
            yield load_layer(self._checkpoint, index)

    def write(
        self, prompt: torch.Tensor, window: int, random: torch.Generator, progress: Callable[[int], None]
    ) -> NDArray[np.int32]:
        """[b, window] tokens that begin with `prompt` [b, n]."""
        spec, b = self._checkpoint.spec, len(prompt)
        caches = [Cache.of(layer.mixer, b, window) for layer in spec.layers]
        ids = torch.zeros(b, window, dtype=torch.int64)
        ids[:, : prompt.shape[1]] = prompt
        progress(prompt.numel())
        done, fed = prompt.shape[1], 0
        while done < window:
            x = embed(self._table, ids[:, fed:done])
            for index, weights in enumerate(self._each()):
                x = layer_forward(x, weights, spec, index, cache=caches[index])
            logits = F.linear(norm(x[:, -1], self._norm, spec.norm_eps), self._head)
            ids[:, done] = torch.multinomial(torch.softmax(logits, -1), 1, generator=random)[:, 0]
            fed, done = done, done + 1
            progress(b)
        found: NDArray[np.int32] = ids.to(torch.int32).numpy()
        return found


def _likeliest(x: torch.Tensor, head: torch.Tensor, k: int) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """Ids and log-probabilities [w, k], the likeliest first, of normalised hidden states [w, h]."""
    ids, found = [], []
    for rows in x.split(max(1, ROWS // len(head))):
        logits = F.linear(rows, head)
        values, chosen = logits.topk(k, sorted=True)
        # In place: at this size torch's own logsumexp takes as long as the matrix product.
        top = values[:, :1].clone()
        found.append(values - top - logits.sub_(top).exp_().sum(-1, keepdim=True).log_())
        ids.append(chosen.to(torch.int32))
    return torch.cat(ids).numpy(), torch.cat(found).numpy()


def _parts(count: int, window: int) -> Iterator[slice]:
    """Slices of a few windows each."""
    step = max(1, BATCH // window)
    for start in range(0, count, step):
        yield slice(start, min(start + step, count))


def _hidden(path: Path, shape: tuple[int, int, int]) -> Iterator[torch.Tensor]:
    """Hidden states [b, w, h] from a file, a few windows at a time; raises OSError where it ends too soon."""
    with path.open("rb", buffering=0) as file:
        for part in _parts(shape[0], shape[1]):
            x = np.empty((part.stop - part.start, *shape[1:]), np.float32)
            view = memoryview(x.reshape(-1).view(np.uint8).data)
            filled = 0
            while filled < len(view):
                count = file.readinto(view[filled:])
                if not count:
                    raise OSError(0, "ends inside the hidden states", str(path))
                filled += count
            yield torch.from_numpy(x)
