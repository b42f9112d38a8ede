"""One conversion to a GGUF beside llama.cpp's two-step path, at a published model's true shape, in one run.

    python -m tests.benchmarks.gguf_convert SmolLM2-1.7B q4_k_m --tokenizer FOLDER

Writes a random bf16 checkpoint of that shape and makes the file with `smolexport gguf` and with llama.cpp's library: a
bf16 GGUF first, then `llama_model_quantize` with as many threads.  The first step is `smolexport gguf -q bf16` there
too, for no package has llama.cpp's script; the script itself would add torch and its time.  Each runs in a fresh
process, in turns; wall time, CPU time, peak resident memory and the bytes written, with the file in between, are
printed with their ratios.  Every tensor of the two files is compared.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from smolexport.conversion import portable
from smolexport_to_gguf.container import read_gguf
from smolexport_to_gguf.schemes import SCHEMES
from tests.benchmarks import conversion

FILE = "model.gguf"
OURS = f"""
import os
os.mkdir(sys.argv[2])
sys.argv[2] += "/{FILE}"
{conversion.OURS}"""
THEIRS = f"""
import ctypes, os
import llama_cpp, smolexport
from smolexport.run.session import choose_threads
folder, out, code = sys.argv[1:]
os.mkdir(out)
wide = out + "/between.gguf"
smolexport.export("gguf", folder, wide, quant="bf16")
listen = llama_cpp.llama_log_callback(lambda *_: None)
llama_cpp.llama_log_set(listen, ctypes.c_void_p(0))
params = llama_cpp.llama_model_quantize_default_params()
params.ftype, params.nthread = int(code), choose_threads(None)
assert not llama_cpp.llama_model_quantize(wide.encode(), (out + "/{FILE}").encode(), ctypes.byref(params))
"""
OWN = (*portable.SCHEMES, portable.AUTO_BITS)  # llama.cpp has no name for them
OFFERED = (s for s in SCHEMES.values() if s.quantized and s.name not in OWN and not s.needs_importance)
QUANTIZED = {s.name: str(s.file_type) for s in OFFERED}


def differing(ours: Path, theirs: Path) -> list[str]:
    """Names of tensors that are not equal to the byte."""
    a, b = read_gguf(ours / FILE), read_gguf(theirs / FILE)
    wrong = sorted(a.tensors.keys() ^ b.tensors.keys())
    with a.path.open("rb") as mine, b.path.open("rb") as other:
        for name in a.tensors.keys() & b.tensors.keys():
            x, y = a.tensors[name], b.tensors[name]
            mine.seek(x.offset)
            other.seek(y.offset)
            same = (x.format.name, x.shape) == (y.format.name, y.shape) and mine.read(x.nbytes) == other.read(y.nbytes)
            wrong += [] if same else [name]
    return wrong


def measure(name: str, scheme: str, tokenizer: Path, scratch: Path, repetitions: int = 3) -> dict[str, Any]:
    """Make the file of the shape `name` in both ways; median figures, ratios, and tensors that differ."""
    both = {"ours": (OURS, "gguf", scheme), "theirs": (THEIRS, QUANTIZED[scheme])}
    return {"scheme": scheme, **conversion.measure(name, tokenizer, scratch, repetitions, both, differing)}


if __name__ == "__main__":
    conversion.command_line(__doc__ or "", "llama.cpp, 2 steps", QUANTIZED, "q4_k_m", measure)
