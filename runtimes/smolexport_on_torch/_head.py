"""Divergence of a model's last layer from what another one predicted, never holding the logits of all positions.

The classes are the k tokens that the teacher keeps and one more for all others.  With z the student's logits, q their
softmax, p the teacher's probabilities, Q and P the two tails:

    loss = sum p log(p / q) + P log(P / Q),      d loss / d z = q - p for the k,  q (1 - P / Q) for the others

so a piece of positions takes one buffer of logits: they become probabilities and then the gradient in place, and the
backward of the whole has nothing left to compute but a product.

Notation: t = positions, c = hidden size, v = vocabulary, k as above.
"""

from __future__ import annotations

from typing import Any

import torch

PIECE = 1 << 22  # logits held at a time: 16 MB


def divergence(
    hidden: torch.Tensor, head: torch.Tensor, ids: torch.Tensor, log_probs: torch.Tensor, piece: int = PIECE
) -> torch.Tensor:
    """Sum over positions of KL(teacher || student), nats.

    Args:
        hidden: [t, c], input of the head.
        head: [v, c].
        ids: [t, k] int64, distinct in a row.
        log_probs: [t, k] float32.
        piece: most logits held at a time, but at least those of one position.
    """
    out: torch.Tensor = Divergence.apply(hidden, head, ids, log_probs, max(1, piece // head.shape[0]))
    return out


class Divergence(torch.autograd.Function):
    """`divergence` with both gradients made along the way."""

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, head: torch.Tensor, ids: torch.Tensor, log_probs: torch.Tensor, step: int
    ) -> torch.Tensor:
        """The loss, and the gradients by the way."""
        wanted = ctx.needs_input_grad[:2]
        of_hidden = torch.empty_like(hidden) if wanted[0] else None
        of_head = torch.zeros_like(head) if wanted[1] else None
        total = hidden.new_zeros((), dtype=torch.float64)
        buffer = hidden.new_empty(min(step, len(hidden)), len(head))
        for start in range(0, len(hidden), step):
            piece = slice(start, start + step)
            logits = buffer[: len(hidden[piece])]
            torch.mm(hidden[piece], head.T, out=logits)
            total += _to_gradient(logits, ids[piece], log_probs[piece], any(wanted))
            if of_hidden is not None:
                torch.mm(logits, head, out=of_hidden[piece])
            if of_head is not None:
                of_head.addmm_(logits.T, hidden[piece])
        ctx.save_for_backward(of_hidden, of_head)
        return total.to(hidden.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        """Of hidden and head."""
        return *(None if x is None else x * gradient for x in ctx.saved_tensors), None, None, None


def _to_gradient(logits: torch.Tensor, ids: torch.Tensor, log_probs: torch.Tensor, wanted: bool) -> torch.Tensor:
    """The loss of one piece; where `wanted`, `logits` become its gradient.

    The tail's sum is taken over the tail itself: 1 minus the rest has no digits left where the tail is small.
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
    if wanted:
        tail_q = tail_log_q.exp()
        logits.mul_((tail_q - tail_p) / tail.clamp_min(tiny)).scatter_(1, ids, log_q.exp() - p)
    return loss.double()
