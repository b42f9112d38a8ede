"""Writes the old form of an importance matrix, which smolexport only reads."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np

from smolexport_to_gguf.imatrix import Imatrix


def write_dat(imatrix: Imatrix, path: Path) -> None:
    """Importances and one text, entries in the order of their names; counts of tokens become counts of chunks."""
    counted = {n: s for n, s in sorted(imatrix.entries.items()) if s.counts.any()}
    out = bytearray(struct.pack("<i", len(counted)))
    for name, statistic in counted.items():
        calls = -(-int(statistic.counts.max()) // max(imatrix.chunk_size, 1))
        values = statistic.importance() * np.float32(calls)
        raw = name.encode()
        out += struct.pack("<i", len(raw)) + raw + struct.pack("<ii", calls, values.size)
        out += values.astype("<f4").tobytes()
    text = imatrix.datasets[-1].encode("utf-8", "replace") if imatrix.datasets else b""
    path.write_bytes(bytes(out + struct.pack("<ii", imatrix.chunks, len(text)) + text))
