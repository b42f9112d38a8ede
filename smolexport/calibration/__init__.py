"""Calibrated quantization: a model's own activations decide how its weights are rounded.

| file | what it holds |
|---|---|
| `texts.py` | texts, conversations and token ids as windows; their overlap with other texts |
| `collect.py` | fills the folder of statistics, with the engine of a trainer |
| `statistics.py`, `files.py` | the folder: its manifest, its files, reading it |
| `calibrator.py` | a method and a budget applied to the plans of one export |
| `methods/` | one file per method: rtn, imatrix, gptq, distil |
| `gptq.py`, `gptq_kernels.py` | rows encoded with error feedback, on any grid |
| `bit_allocation.py`, `knapsack.py` | bits chosen matrix by matrix under a budget |
| `trainer.py`, `student.py` | the interface of a trainer; a planned output as a model that it can train or measure |

Nothing here imports PyTorch: the trainer is a plug-in, and all but collecting and training needs NumPy alone.
"""
