"""How sensitive the predictions are to a small error in the outputs of each matrix.

To second order, an error e in the outputs of a matrix costs a divergence of 1/2 e F e, F the mean of g g^T over
tokens, g the gradient of log p(y | context) with respect to these outputs, y drawn from the model's own prediction.
Rounding errors of different rows are independent, so the diagonal of F suffices: a number for each row.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from smolexport.run.session import choose_threads
from smolexport_on_torch._load import limited_threads, load_model

PIECE = 1 << 24  # logits at a time


def sensitivity(
    folder: Path, windows: NDArray[np.int32], seed: int = 0, threads: int | None = None
) -> dict[str, NDArray[np.float64]]:
    """As `smolexport.calibration.trainer.Trainer.sensitivity`."""
    model = load_model(folder, "f32", None).requires_grad_(False)
    gradients = Gradients(model)
    generator = torch.Generator().manual_seed(seed)
    step = max(1, PIECE // (windows.shape[1] * model.config.vocab_size))
    with limited_threads(choose_threads(threads)):
        for start in range(0, len(windows), step):
            gradients.add(torch.from_numpy(windows[start : start + step].astype(np.int64)), generator)
    return gradients.means()


class Gradients:
    """Sums of squared gradients with respect to the outputs of a model's matrices, without a window's first position.

    The model's parameters must not require gradients.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self._sums: dict[str, torch.Tensor] = {}
        self._tokens = 0
        head = model.get_output_embeddings()
        for name, module in model.named_modules():
            if isinstance(module, (torch.nn.Linear, torch.nn.Embedding)) and module is not head:
                module.register_forward_hook(partial(self._watch, f"{name}.weight"))

    def _watch(self, name: str, module: Any, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
        if isinstance(module, torch.nn.Embedding):
            output = output.detach().requires_grad_(True)  # the graph begins here
        output.register_hook(lambda gradient: self._note(name, gradient.double().square()))
        return output

    def _note(self, name: str, squares: torch.Tensor) -> None:
        found = squares[:, 1:].sum((0, 1), dtype=torch.float64)
        self._sums[name] = self._sums[name] + found if name in self._sums else found

    def add(self, windows: torch.Tensor, generator: torch.Generator) -> None:
        """Add windows [n, w]."""
        logits = self._model(input_ids=windows, use_cache=False).logits
        log_p = logits.float().log_softmax(-1)
        with torch.no_grad():
            p = log_p.exp()
            drawn = torch.multinomial(p.view(-1, p.shape[-1]), 1, generator=generator).view(*p.shape[:2], 1)
            self._note("lm_head.weight", p * (1 - p))
        log_p.gather(-1, drawn).sum().backward()
        self._tokens += windows.shape[0] * (windows.shape[1] - 1)

    def means(self) -> dict[str, NDArray[np.float64]]:
        """By source name, per token."""
        return {name: (found / self._tokens).numpy() for name, found in self._sums.items()}
