"""Calibrated quantization: what a model's own activations say about how its weights should be rounded.

| file | what it holds |
|---|---|
| `texts.py` | texts, conversations and token ids become windows; what they share with other texts |
| `collect.py`, `moments.py` | the folder of statistics is filled, with the engine that a runtime offers |
| `statistics.py`, `folder.py`, `files.py` | the folder: its manifest, its files, reading it |
| `methods.py` | rtn, imatrix, gptq, distil: what each does to a plan |
| `feedback.py`, `gptq.py`, `gptq_kernels.py` | rows encoded with error feedback, on any grid |
| `budget.py`, `costs.py`, `mixing.py` | bits chosen matrix by matrix under a budget |
| `training.py`, `distillation.py` | the scales of an export trained, with the engine that a runtime offers |

Nothing here imports torch: the engine is found by its name, and all but collecting and training needs NumPy alone.
"""

from __future__ import annotations

from collections.abc import Mapping

__all__ = ["METHODS"]

METHODS: Mapping[str, str] = {
    "rtn": "to the nearest, as the formats' own tools do",
    "imatrix": "with scales searched by the importance of every input column",
    "gptq": "and what rounding one column changes made up for by the columns after it",
    "distil": "and the scales trained until the predictions are nearest to the original's; needs PyTorch",
}
