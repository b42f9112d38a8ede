"""A decoder's forward pass from its `ModelSpec`, one layer at a time, in float32, with functions of torch only.

Only the weights of one layer, of the embedding or of the head are in memory at a time; the caller decides how long.
Each layer passes what its matrices read to a `Tap`: four vectors per position.

Notation: b = sequences, n = positions of one call, p = positions held in a cache, h = hidden_size, d = head_dim,
q = query heads, k = key and value heads, v = vocab_size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import prod

import numpy as np
import torch
import torch.nn.functional as F

from smolexport.errors import TensorError, UnsupportedError
from smolexport.model.checkpoint import Checkpoint
from smolexport.model.rope import Rope
from smolexport.model.spec import Attention, ModelSpec, Role, departures
from smolexport.model.tensor_file import StoredTensor
from smolexport.text import label

Weights = Mapping[tuple[Role, str], torch.Tensor]  # by role and part, float32
# Called with `attn` (q, k and v read it), `o`, `mlp` (gate and up do) or `down`, and what is read: [b, n, columns].
Tap = Callable[[str, torch.Tensor], None]
BLOCK = 8 << 20  # bytes read at a time
COMPUTED: Mapping[str, tuple[object, ...]] = {"mlp.activation": ("silu",)}


def check(spec: ModelSpec) -> None:
    """Raise UnsupportedError for what the forward pass below does not compute."""
    for reason in departures(spec, COMPUTED):
        raise UnsupportedError(f"the layer-by-layer forward pass {reason}")


class Cache:
    """Keys (rotated) and values of one layer, [b, k, capacity, d] each, of which `length` positions are held."""

    def __init__(self, a: Attention, b: int, capacity: int) -> None:
        shape = (b, a.num_key_value_heads, capacity, a.head_dim)
        self._keys, self._values, self.length = torch.zeros(shape), torch.zeros(shape), 0

    def extend(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Append `keys` and `values` of the next positions; returns all that are held."""
        start, self.length = self.length, self.length + keys.shape[2]
        self._keys[:, :, start : self.length] = keys
        self._values[:, :, start : self.length] = values
        return self._keys[:, :, : self.length], self._values[:, :, : self.length]


def _load(place: StoredTensor) -> torch.Tensor:
    """A tensor in float32, read in blocks: beside it only one block is in memory.  Raises TensorError for NaN."""
    rows, columns = prod(place.shape[:-1]), place.shape[-1]
    out = np.empty((rows, columns), np.float32)
    step = max(1, BLOCK // (columns * place.dtype.itemsize))
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        out[start:stop] = place.read_rows(start, stop)
        if not np.isfinite(out[start:stop]).all():
            raise TensorError(f"{place.path}: tensor {label(place.name)} holds numbers that are not finite")
    return torch.from_numpy(out.reshape(place.shape))


def load_layer(checkpoint: Checkpoint, index: int) -> Weights:
    """All tensors of the layer `index` in float32; raises CheckpointError."""
    return {(t.role, t.part): _load(place) for t, place in checkpoint.stored.items() if t.layer == index}


def load_embedding(checkpoint: Checkpoint) -> torch.Tensor:
    """[v, h] float32; raises CheckpointError."""
    return _load(next(place for t, place in checkpoint.stored.items() if t.role is Role.EMBED))


def load_head(checkpoint: Checkpoint) -> tuple[torch.Tensor, torch.Tensor]:
    """The final norm's weight [h], and the head [v, h], which is the embedding where the two are tied."""
    role = Role.EMBED if checkpoint.spec.tied else Role.HEAD
    found = {t.role: place for t, place in checkpoint.stored.items() if t.role in (role, Role.FINAL_NORM)}
    return _load(found[Role.FINAL_NORM]), _load(found[role])


def norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """RMS normalization over the last axis."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def _rotate(x: torch.Tensor, rope: Rope, start: int) -> torch.Tensor:
    """Rotate the first `rope.dim` dimensions of [b, heads, n, d], whose first position is `start`."""
    # In float32 from the frequencies on, as transformers has it.
    frequencies = torch.from_numpy(rope.inverse_frequencies().astype(np.float32))
    angles = torch.arange(start, start + x.shape[2], dtype=torch.float32)[:, None] * frequencies
    cos, sin = angles.cos() * rope.attention_factor, angles.sin() * rope.attention_factor
    half = rope.dim // 2
    a, b, rest = x[..., :half], x[..., half : rope.dim], x[..., rope.dim :]
    return torch.cat((a * cos - b * sin, b * cos + a * sin, rest), -1)


def _mask(window: int | None, n: int, held: int) -> torch.Tensor | None:
    """Which of `held` positions each of the last `n` sees, [n, held]; None where plain causality suffices."""
    if n in (1, held) and (window is None or held <= window):
        return None
    queries = torch.arange(held - n, held)[:, None]
    keys = torch.arange(held)[None]
    seen = keys <= queries
    return seen if window is None else seen & (keys > queries - window)


def _attention(x: torch.Tensor, weights: Weights, a: Attention, eps: float, cache: Cache | None) -> torch.Tensor:
    """What o_proj reads, [b, n, q * d], of the normalized hidden states [b, n, h]."""
    b, n, _ = x.shape
    start = cache.length if cache else 0
    heads = []
    for role, normed in ((Role.Q, Role.Q_NORM), (Role.K, Role.K_NORM), (Role.V, None)):
        y = F.linear(x, weights[role, "weight"], weights.get((role, "bias"))).view(b, n, -1, a.head_dim)
        if a.qk_norm and normed is not None:
            y = norm(y, weights[normed, "weight"], eps)
        y = y.transpose(1, 2)
        heads.append(_rotate(y, a.rope, start) if a.rope is not None and normed is not None else y)
    queries, keys, values = heads
    if cache is not None:
        keys, values = cache.extend(keys, values)
    groups = a.num_attention_heads // a.num_key_value_heads
    mask = _mask(a.window, n, keys.shape[2])
    if n == 1 and mask is None:  # heads that share keys are like positions that see all of them: no copies
        out = F.scaled_dot_product_attention(queries.view(b, -1, groups, a.head_dim), keys, values)
        return out.reshape(b, 1, -1)
    if groups > 1:
        keys, values = keys.repeat_interleave(groups, 1), values.repeat_interleave(groups, 1)
    out = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, is_causal=mask is None and n > 1)
    return out.transpose(1, 2).reshape(b, n, -1)


def layer_forward(
    x: torch.Tensor,
    weights: Weights,
    spec: ModelSpec,
    index: int,
    *,
    tap: Tap | None = None,
    cache: Cache | None = None,
) -> torch.Tensor:
    """Hidden states [b, n, h] after the layer `index`, from those before it, `x`.

    The n positions begin at 0, or follow those in `cache`, to which they are added.
    """

    def linear(role: Role, y: torch.Tensor) -> torch.Tensor:
        return F.linear(y, weights[role, "weight"], weights.get((role, "bias")))

    tap = tap or (lambda _kind, _x: None)
    y = norm(x, weights[Role.NORM_BEFORE_ATTENTION, "weight"], spec.norm_eps)
    tap("attn", y)
    y = _attention(y, weights, spec.layers[index].mixer, spec.norm_eps, cache)
    tap("o", y)
    x = x + linear(Role.O, y)
    y = norm(x, weights[Role.NORM_BEFORE_MLP, "weight"], spec.norm_eps)
    tap("mlp", y)
    y = F.silu(linear(Role.GATE, y), inplace=True).mul_(linear(Role.UP, y))
    tap("down", y)
    return x + linear(Role.DOWN, y)
