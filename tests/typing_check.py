"""Never run, only type-checked: the public interface as a user's code would use it, and the modules as protocols."""

from __future__ import annotations

from pathlib import Path

import smolexport
import smolexport_on_llamacpp
import smolexport_on_mlx
import smolexport_on_onnxruntime
import smolexport_on_onnxruntime_genai
import smolexport_on_torch
import smolexport_on_torch.trainer
import smolexport_to_gguf
import smolexport_to_mlx
import smolexport_to_onnx
from smolexport.calibration.calibrator import Calibration
from smolexport.calibration.trainer import Trainer
from smolexport.conversion.converter import Converter
from smolexport.conversion.plan import Plan
from smolexport.recipe import Recipe
from smolexport.run.session import Runtime, Session

gguf: Converter = smolexport_to_gguf
mlx: Converter = smolexport_to_mlx
onnx: Converter = smolexport_to_onnx
llamacpp: Runtime = smolexport_on_llamacpp
mlx_lm: Runtime = smolexport_on_mlx
onnxruntime: Runtime = smolexport_on_onnxruntime
onnxruntime_genai: Runtime = smolexport_on_onnxruntime_genai
torch: Runtime = smolexport_on_torch
trainer: Trainer = smolexport_on_torch.trainer
recipe: Recipe = Calibration()

done: smolexport.Export = smolexport.export("gguf", "owner/name", quant="q8_0", strict=True, threads=2)
path: Path = done.path
plan: Plan = done.plan
made: list[smolexport.Export] = smolexport.export_all("demo", "out", quant="int8", targets=["gguf", "mlx"])
mark: str = smolexport.fingerprint(made[0].path, threads=2)
found: smolexport.FileInfo = smolexport.inspect(path)
bits: float = found.bits_per_weight
text: str = smolexport.generate(path, "Once", sampling=smolexport.Sampling(temperature=0.7)).text
result: smolexport.Comparison = smolexport.compare("demo", [path], dtype="f32")
passed: bool = result.passed
spec: smolexport.ModelSpec = smolexport.load_spec({"model_type": "llama"})

with torch.open(path, threads=1) as session:
    opened: Session = session
    width: int = session.append([1, 2, 3]).shape[-1]
