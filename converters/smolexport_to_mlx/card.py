"""README.md of an MLX folder: what the hub shows, and what the source's card says about licence and language."""

from __future__ import annotations

from collections.abc import Sequence

from smolexport.conversion.model_card import Value, front_matter, inline, installed_version, yaml_head
from smolexport.conversion.source_model import SourceModel


def card(model: SourceModel, scheme_name: str, bits_per_weight: float, lines: Sequence[str]) -> bytes:
    """The content of README.md; the same input gives the same bytes.

    Args:
        model: the source.
        scheme_name: the quantization scheme.
        bits_per_weight: over all tensors.
        lines: further facts, one list item each.
    """
    matter: dict[str, Value] = {"library_name": "mlx", "pipeline_tag": "text-generation", "tags": ["mlx"]}
    if model.origin:
        matter["base_model"] = model.origin
    matter |= front_matter(model.folder) or {}
    name = inline(model.name)
    source = f"[{inline(model.origin)}](https://huggingface.co/{inline(model.origin)})" if model.origin else name
    facts = "\n".join(f"- {inline(line)}" for line in lines)
    body = BODY.format(
        name=name,
        source=source,
        scheme=inline(scheme_name),
        bits=bits_per_weight,
        version=installed_version(),
        facts=f"\n{facts}\n" if facts else "",
    )
    return f"---\n{yaml_head(matter)}---\n\n{body}".encode("utf-8", "replace")


BODY = """\
# {name}, {scheme} for MLX

{source}, converted to MLX by smolexport {version} with the scheme `{scheme}` ({bits:.2f} bits per weight).
{facts}
## Python

```sh
pip install mlx-lm
mlx_lm.generate --model PATH_TO_THIS_FOLDER --prompt "Once upon a time"
```

## Swift

With [mlx-swift-lm](https://github.com/ml-explore/mlx-swift-lm) 3, on a device or a Mac with Apple silicon:

```swift
import Foundation
import HuggingFace
import MLXHuggingFace
import MLXLLM
import MLXLMCommon
import Tokenizers

let folder = URL(filePath: "PATH_TO_THIS_FOLDER")
let model = try await loadModelContainer(from: folder, using: #huggingFaceTokenizerLoader())
print(try await ChatSession(model).respond(to: "Tell me a story."))
```
"""
