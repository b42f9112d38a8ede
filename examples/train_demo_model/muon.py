"""Muon for the matrices, Adam for the rest, both with float32 state.

Muon (Jordan et al. 2024): momentum, then orthogonalise the update with Newton-Schulz steps, so that every
direction of a weight matrix moves at the same rate.  torch's own Muon keeps bfloat16 momentum, which on a CPU
without matrix units is slower than the whole backward pass; here only the Newton-Schulz products are bfloat16.
"""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor, nn

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


def orthogonalise(x: Tensor, steps: int = 5) -> Tensor:
    """Nearest semi-orthogonal matrices of a stack [n, rows, columns], approximately, in bfloat16."""
    tall = x.shape[-2] > x.shape[-1]
    y = (x.mT if tall else x).bfloat16()
    y = y / (y.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    a, b, c = NEWTON_SCHULZ
    for _ in range(steps):
        gram = y @ y.mT
        y = a * y + (b * gram + c * gram @ gram) @ y
    return (y.mT if tall else y).float()


class Muon:
    """Muon over all 2-D parameters given; equal shapes are orthogonalised as one stack."""

    def __init__(self, parameters: list[nn.Parameter], lr: float, momentum: float = 0.95, decay: float = 0.1) -> None:
        self.lr, self.momentum, self.decay = lr, momentum, decay
        self.stacks: dict[torch.Size, list[nn.Parameter]] = defaultdict(list)
        for p in parameters:
            self.stacks[p.shape].append(p)
        self.momenta = {shape: torch.zeros(len(ps), *shape) for shape, ps in self.stacks.items()}

    @torch.no_grad()
    def step(self, scale: float) -> None:
        """One update at `scale` times the base learning rate; clears the gradients."""
        for shape, parameters in self.stacks.items():
            grads = torch.stack([p.grad for p in parameters if p.grad is not None])
            buffer = self.momenta[shape].lerp_(grads, 1 - self.momentum)
            update = orthogonalise(grads.lerp(buffer, self.momentum))
            rate = self.lr * scale * max(1.0, shape[0] / shape[1]) ** 0.5
            for p, u in zip(parameters, update, strict=True):
                p.mul_(1 - self.lr * scale * self.decay).sub_(u, alpha=rate)
                p.grad = None
