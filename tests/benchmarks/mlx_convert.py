"""One conversion to an MLX folder beside mlx-lm's own, at a published model's true shape, in one run.

    python -m tests.benchmarks.mlx_convert SmolLM2-1.7B q4 --tokenizer FOLDER

Writes a random bf16 checkpoint of that shape, converts it with `smolexport mlx` and with `mlx_lm.convert`, each in
a fresh process, in turns, and prints wall time, CPU time and peak resident memory with their ratios.  Memory is also
told above that of an interpreter that imports nothing.  Every tensor of the two folders is compared.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.benchmarks import conversion

THEIRS = """
import json
from mlx_lm import convert
convert(sys.argv[1], sys.argv[2], **json.loads(sys.argv[3]))
"""
# What mlx_lm.convert is told for the same scheme.
SCHEMES: Mapping[str, dict[str, Any]] = {
    "bf16": {},
    **{f"q{bits}": {"quantize": True, "q_bits": bits, "q_group_size": 64} for bits in (2, 3, 4, 5, 6, 8)},
    **{f"q{bits}_g32": {"quantize": True, "q_bits": bits, "q_group_size": 32} for bits in (2, 3, 4, 5, 6, 8)},
    "mixed_4_6": {"quantize": True, "quant_predicate": "mixed_4_6", "q_group_size": 64},
    "mxfp4": {"quantize": True, "q_mode": "mxfp4"},
    "nvfp4": {"quantize": True, "q_mode": "nvfp4"},
    "mxfp8": {"quantize": True, "q_mode": "mxfp8"},
}


def differing(ours: Path, theirs: Path) -> list[str]:
    """Names of tensors that are not equal to the byte."""
    from smolexport_to_mlx.container import read_arrays

    a, b = read_arrays(ours)[0], read_arrays(theirs)[0]
    wrong = sorted(a.keys() ^ b.keys())
    for name in a.keys() & b.keys():
        x, y = a[name], b[name]
        same = (x.dtype, x.shape) == (y.dtype, y.shape) and _bytes(x) == _bytes(y)
        wrong += [] if same else [name]
    return wrong


def _bytes(array: Any) -> bytes:
    with array.path.open("rb") as file:
        file.seek(array.offset)
        return bytes(file.read(array.nbytes))


def measure(name: str, scheme: str, tokenizer: Path, scratch: Path, repetitions: int = 3) -> dict[str, Any]:
    """Convert the shape `name` with both; median figures, ratios, and tensors that differ."""
    both = {"ours": (conversion.OURS, "mlx", scheme), "theirs": (THEIRS, json.dumps(SCHEMES[scheme]))}
    return {"scheme": scheme, **conversion.measure(name, tokenizer, scratch, repetitions, both, differing)}


if __name__ == "__main__":
    conversion.command_line(__doc__ or "", "mlx_lm.convert", SCHEMES, "q4", measure)
