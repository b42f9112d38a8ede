"""Matrices with frozen codes and trained factors, computed from them whenever they are needed.

Only the codes stay in memory, in the smallest type that holds them exactly; neither a matrix nor its gradient outlives
the product that needs it.

Notation: n = rows, c = columns, g = blocks of a row, t = tokens.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from smolexport.calibration.trainer import AffineBlocks, Trained

TYPES = (np.int8, np.int16, np.float16)
Factors = tuple[torch.Tensor, torch.Tensor | None]


class Codes(torch.nn.Module):
    """The frozen a and b of one matrix of `shape` [n, c].

    b is mostly one number per block or per part of a block, so it is kept once for each run of equal numbers.
    """

    def __init__(self, blocks: AffineBlocks) -> None:
        super().__init__()
        self.shape = blocks.a.shape
        groups = blocks.d.shape[1]
        self.register_buffer("a", _compact(_whole_blocks(blocks.a, groups, blocks.block)))
        b = None if blocks.b is None else _compact(_runs(_whole_blocks(blocks.b, groups, blocks.block)))
        self.register_buffer("b", b)

    def matrix(self, d: torch.Tensor, m: torch.Tensor | None) -> torch.Tensor:
        """[n, c] from d and m [n, g]."""
        rows, groups, block = self.a.shape
        out = self.a * d[:, :, None]
        if self.b is not None and m is not None:
            out.view(rows, groups, self.b.shape[2], -1).sub_((self.b * m[:, :, None])[..., None])
        return out.view(rows, groups * block)[:, : self.shape[1]]

    def gradients(self, matrix: torch.Tensor) -> Factors:
        """The gradients of d and m from that of the matrix."""
        rows, groups, block = self.a.shape
        cut = F.pad(matrix, (0, groups * block - self.shape[1])).view(rows, groups, block)
        d = torch.mul(cut, self.a).sum(-1)
        if self.b is None:
            return d, None
        runs = cut.view(rows, groups, self.b.shape[2], -1).sum(-1)
        return d, runs.mul_(self.b).sum(-1).neg_()

    def rows(self, ids: torch.Tensor, d: torch.Tensor, m: torch.Tensor | None) -> torch.Tensor:
        """[t, c]: the rows `ids` [t] alone; gradients of d and m are torch's own."""
        out = self.a[ids] * d[ids][:, :, None]
        if self.b is not None and m is not None:
            least = (self.b[ids] * m[ids][:, :, None])[..., None]
            out = (out.view(*least.shape[:3], -1) - least).view_as(out)
        return out.flatten(1)[:, : self.shape[1]]


def _whole_blocks(values: NDArray[np.float32], groups: int, block: int) -> NDArray[np.float32]:
    """[n, g, block], a short last block is padded with its last column."""
    missing = groups * block - values.shape[1]
    return np.pad(values, ((0, 0), (0, missing)), "edge").reshape(len(values), groups, block)


def _runs(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """[n, g, runs] from [n, g, block]: one number for each of the longest equal parts of all blocks."""
    rows, groups, block = values.shape
    for length in (n for n in range(block, 1, -1) if block % n == 0):
        parts = values.reshape(rows, groups, -1, length)
        if np.array_equal(parts, np.broadcast_to(parts[..., :1], parts.shape)):
            return np.ascontiguousarray(parts[..., 0])
    return values


def _compact(values: NDArray[np.float32]) -> torch.Tensor:
    """A copy in the smallest type that holds the values exactly."""
    for dtype in TYPES:
        with np.errstate(all="ignore"):
            small = values.astype(dtype)
        if np.array_equal(small.astype(np.float32), values):
            return torch.from_numpy(small)
    return torch.from_numpy(values.astype(np.float32))


def _directions(blocks: AffineBlocks, b: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Per block [n, g]: the least squares share of b in a, and |d| times the length of the rest over that of b."""
    starts = np.arange(0, blocks.a.shape[1], blocks.block)
    lengths = np.maximum(np.add.reduceat(b * b, starts, axis=1), np.finfo(np.float32).tiny)
    share = (np.add.reduceat(blocks.a * b, starts, axis=1) / lengths).astype(np.float32)
    rest = np.maximum(np.add.reduceat(blocks.a * blocks.a, starts, axis=1) - share * share * lengths, 0)
    reach: NDArray[np.float32] = np.abs(blocks.d) * np.sqrt(rest / lengths)
    return share, reach


class Matrix(torch.autograd.Function):
    """The matrix itself, for the head."""

    @staticmethod
    def forward(ctx: Any, d: torch.Tensor, m: torch.Tensor | None, codes: Codes) -> torch.Tensor:
        ctx.codes = codes
        return codes.matrix(d, m)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        return *ctx.codes.gradients(gradient), None


class Product(torch.autograd.Function):
    """x @ matrix.T; the backward makes the matrix again instead of keeping it."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, d: torch.Tensor, m: torch.Tensor | None, codes: Codes) -> torch.Tensor:
        ctx.save_for_backward(x, d, m)
        ctx.codes = codes
        return F.linear(x, codes.matrix(d, m))

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        x, d, m = ctx.saved_tensors
        above = gradient.flatten(0, -2)
        of_x = None
        if ctx.needs_input_grad[0]:
            of_x = (above @ ctx.codes.matrix(d, m)).view_as(x)
        if not any(ctx.needs_input_grad[1:3]):
            return of_x, None, None, None
        return of_x, *ctx.codes.gradients(above.T @ x.flatten(0, -2)), None


class Scaled(torch.nn.Module):
    """Frozen codes and trained factors, in steps that are relative to the weights.

    d = start * exp(d_log).  A minimum is trained apart from what d alone does to the block's mean, or the two would
    oppose each other: m = start + (d - start of d) * share + reach * m_move, where `share` is how much of a is along b,
    and `reach` the size of the remaining weights, in units of b.  d_log and m_move are trained, from 0 on.

    `held`: factors that replace the trained ones, e.g. rounded; None while training.
    """

    def __init__(self, blocks: AffineBlocks) -> None:
        super().__init__()
        self.codes = Codes(blocks)
        self.register_buffer("d", torch.tensor(blocks.d))
        self.d_log = torch.nn.Parameter(torch.zeros_like(self.d))
        self.m_move = None
        if blocks.m is not None and blocks.b is not None:
            share, reach = _directions(blocks, blocks.b)
            self.register_buffer("m", torch.tensor(blocks.m))
            self.register_buffer("share", torch.from_numpy(share))
            self.register_buffer("reach", torch.from_numpy(reach))
            self.m_move = torch.nn.Parameter(torch.zeros_like(self.m))
        self.held: Factors | None = None

    def factors(self) -> Factors:
        if self.held is not None:
            return self.held
        d = self.d * self.d_log.exp()
        if self.m_move is None:
            return d, None
        return d, self.m + (d - self.d) * self.share + self.reach * self.m_move

    def matrix(self) -> torch.Tensor:
        made: torch.Tensor = Matrix.apply(*self.factors(), self.codes)
        return made

    def trained(self) -> Trained:
        d, m = self.factors()
        return Trained(d.detach().cpu().numpy(), None if m is None else m.detach().cpu().numpy())

    def hold(self, factors: Trained | None) -> None:
        """Compute with these, or again with the trained ones."""
        if factors is None:
            self.held = None
            return
        device = self.d_log.device
        m = None if factors.m is None else torch.tensor(factors.m, device=device)
        self.held = torch.tensor(factors.d, device=device), m


class ScaledLinear(torch.nn.Module):
    """Replaces a Linear."""

    def __init__(self, scaled: Scaled, bias: torch.Tensor | None) -> None:
        super().__init__()
        self.scaled, self.bias = scaled, bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = Product.apply(x, *self.scaled.factors(), self.scaled.codes)
        return out if self.bias is None else out + self.bias


class ScaledEmbedding(torch.nn.Module):
    """Replaces an Embedding."""

    def __init__(self, scaled: Scaled) -> None:
        super().__init__()
        self.scaled = scaled

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.scaled.codes.rows(ids.flatten(), *self.scaled.factors()).view(*ids.shape, -1)
