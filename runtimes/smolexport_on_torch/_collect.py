"""Statistics of what each matrix of a checkpoint reads, collected one layer at a time, and the model's own text.

Hidden states of all windows are in a file [windows, window, h] float32, processed a few windows at a time: memory grows
neither with the text nor with the number of layers.

Notation: n = windows, w = tokens of a window, b = windows at a time, h = hidden_size, c = columns of a matrix,
k = tokens kept of a distribution.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from math import prod
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from smolexport.calibration.trainer import ActivationStats, input_columns
from smolexport.model.checkpoint import Checkpoint
from smolexport.run.session import choose_threads
from smolexport_on_torch import _decoder as decoder
from smolexport_on_torch._load import use_threads

BATCH = 2048  # tokens that go through a layer at a time
ROWS = 16 << 20  # logits at a time
STRIP = 256  # rows of a Hessian that are computed at a time: what is below the diagonal is left out
CACHES = 512 << 20  # bytes of keys and values while text is written
KEPT = 1 << 30  # bytes of weights up to which all layers stay in memory while text is written


class Moments:
    """Running second moments of one input of c columns."""

    def __init__(self, columns: int) -> None:
        self._hessian = torch.zeros(columns, columns)
        self._squares = torch.zeros(columns, dtype=torch.float64)
        self._positions = self._counted = 0
        self._trace = self._largest = 0.0

    def add(self, x: torch.Tensor) -> None:
        """Add [b, w, c]; position 0 of each window counts for the mean squares only."""
        squares = x.square()
        self._squares += squares.sum((0, 1)).double()
        self._positions += x.shape[0] * x.shape[1]
        tokens = squares[:, 1:].sum(-1).double()
        del squares
        self._trace += float(tokens.sum())
        self._largest = max(self._largest, float(tokens.max()))
        rows = x[:, 1:].reshape(-1, x.shape[-1])
        # A running mean in place: numbers keep their size, and there is never a second matrix of this size.
        total = self._counted + len(rows)
        for start in range(0, rows.shape[1], STRIP):
            strip = self._hessian[start : start + STRIP, start:]
            strip.addmm_(rows[:, start : start + STRIP].T, rows[:, start:], beta=self._counted / total, alpha=1 / total)
        self._counted = total

    def stats(self) -> ActivationStats:
        squares = (self._squares / self._positions).float().numpy()
        return ActivationStats(self._hessian.numpy(), squares, self._largest / self._trace if self._trace else 0.0)


class TorchEngine:
    """`smolexport.calibration.trainer.Engine` of one checkpoint; arguments as there."""

    def __init__(self, checkpoint: Checkpoint, *, threads: int | None = None) -> None:
        decoder.check(checkpoint.spec)
        self._checkpoint, self._spec = checkpoint, checkpoint.spec
        self._threads = choose_threads(threads)

    def embed(self, windows: NDArray[np.int32], target: Path) -> None:
        use_threads(self._threads)
        table = decoder.load_embedding(self._checkpoint)
        with torch.inference_mode(), target.open("wb") as file:
            for part in _parts(len(windows), windows.shape[1]):
                file.write(F.embedding(torch.from_numpy(windows[part].astype(np.int64)), table).numpy().data)

    def layer(self, index: int, shape: tuple[int, int], source: Path, target: Path) -> dict[str, ActivationStats]:
        use_threads(self._threads)
        moments = {kind: Moments(c) for kind, c in input_columns(self._spec, self._spec.layers[index]).items()}
        weights = decoder.load_layer(self._checkpoint, index)
        with torch.inference_mode(), target.open("wb") as file:
            for x in _hidden(source, (*shape, self._spec.hidden_size)):
                out = decoder.layer_forward(x, weights, self._spec, index, tap=lambda kind, y: moments[kind].add(y))
                file.write(out.contiguous().numpy().data)
        return {kind: found.stats() for kind, found in moments.items()}

    def finish(
        self,
        shape: tuple[int, int],
        source: Path,
        k: int,
        write: Callable[[NDArray[np.int32], NDArray[np.float32]], None],
    ) -> ActivationStats:
        use_threads(self._threads)
        moments = Moments(self._spec.hidden_size)
        weight, head = decoder.load_head(self._checkpoint)
        with torch.inference_mode():
            for x in _hidden(source, (*shape, self._spec.hidden_size)):
                y = decoder.norm(x, weight, self._spec.norm_eps)
                moments.add(y)
                for window in y:
                    write(*_likeliest(window, head, k))
        return moments.stats()

    def sample(
        self,
        count: int,
        window: int,
        first: NDArray[np.int32],
        bos: int | None,
        seed: int,
        progress: Callable[[int], None],
    ) -> NDArray[np.int32]:
        use_threads(self._threads)
        random = torch.Generator().manual_seed(seed)
        mixers = [layer.mixer for layer in self._spec.layers]
        per_window = sum(8 * mixer.num_key_value_heads * mixer.head_dim * window for mixer in mixers)
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
    """The model with caches: all layers in memory if they are small, else read again for each token."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint, self._spec = checkpoint, checkpoint.spec
        self._table = decoder.load_embedding(checkpoint)
        self._norm, head = decoder.load_head(checkpoint)
        self._head = self._table if checkpoint.spec.tied else head
        small = 4 * sum(t.size for t in checkpoint.stored if t.layer is not None) <= KEPT
        self._layers = list(self._read()) if small else None

    def _read(self) -> Iterator[decoder.Weights]:
        return (decoder.load_layer(self._checkpoint, index) for index in range(len(self._spec.layers)))

    def write(
        self, prompt: torch.Tensor, window: int, random: torch.Generator, progress: Callable[[int], None]
    ) -> NDArray[np.int32]:
        """[b, window] tokens that begin with `prompt` [b, n]."""
        spec, b = self._spec, len(prompt)
        caches = [decoder.Cache(layer.mixer, b, window) for layer in spec.layers]
        ids = torch.zeros(b, window, dtype=torch.int64)
        ids[:, : prompt.shape[1]] = prompt
        progress(prompt.numel())
        done, fed = prompt.shape[1], 0
        while done < window:
            x = F.embedding(ids[:, fed:done], self._table)
            for index, weights in enumerate(self._layers or self._read()):
                x = decoder.layer_forward(x, weights, spec, index, cache=caches[index])
            logits = F.linear(decoder.norm(x[:, -1], self._norm, spec.norm_eps), self._head)
            ids[:, done] = torch.multinomial(torch.softmax(logits, -1), 1, generator=random)[:, 0]
            fed, done = done, done + 1
            progress(b)
        found: NDArray[np.int32] = ids.to(torch.int32).numpy()
        return found


def _likeliest(x: torch.Tensor, head: torch.Tensor, k: int) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """Ids and log-probabilities [w, k], the likeliest first, of normalized hidden states [w, h]."""
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
    return (slice(start, min(start + step, count)) for start in range(0, count, step))


def _hidden(path: Path, shape: tuple[int, int, int]) -> Iterator[torch.Tensor]:
    """Hidden states [b, w, h] from a file, a few windows at a time; raises OSError if it ends too soon."""
    with path.open("rb") as file:
        for part in _parts(shape[0], shape[1]):
            size = (part.stop - part.start, *shape[1:])
            x = np.fromfile(file, np.float32, prod(size))
            if x.size < prod(size):
                raise OSError(0, "ends inside the hidden states", str(path))
            yield torch.from_numpy(x.reshape(size))
