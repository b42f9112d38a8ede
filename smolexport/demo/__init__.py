"""The embedded demo model: a small Llama-type checkpoint, really trained, and a text that it has never seen.

How it was made: `examples/train_demo_model/` in the repository; what it is: `MODEL_CARD.md` beside the weights.
"""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path


def demo_checkpoint() -> Path:
    """Folder of the embedded checkpoint."""
    return Path(str(files("smolexport.demo"))) / "checkpoint"


def demo_text() -> str:
    """A few kB of held-out text from the demo model's domain."""
    return (demo_checkpoint() / "held_out.txt").read_text(encoding="utf-8")
