"""README.md of an ONNX folder: what the hub shows, how the folder is run, and the source's licence and language."""

from __future__ import annotations

from collections.abc import Sequence

from smolexport.conversion.model_card import Value, front_matter, inline, installed_version, yaml_head
from smolexport.conversion.source_model import SourceModel


def card(model: SourceModel, scheme: str, dtype: str, bits_per_weight: float, lines: Sequence[str]) -> bytes:
    """The content of README.md; the same input gives the same bytes.

    Args:
        model: the source.
        scheme: name of the quantization scheme.
        dtype: what Transformers.js calls it.
        bits_per_weight: over all tensors.
        lines: further facts, one list item each.
    """
    matter: dict[str, Value] = {
        "library_name": "transformers.js", "pipeline_tag": "text-generation", "tags": ["onnx", "onnxruntime-genai"],
    }  # fmt: skip
    if model.origin:
        matter["base_model"] = model.origin
    matter |= front_matter(model.folder) or {}
    name = inline(model.name)
    source = f"[{inline(model.origin)}](https://huggingface.co/{inline(model.origin)})" if model.origin else name
    facts = "\n".join(f"- {inline(line)}" for line in lines)
    body = BODY.format(
        name=name,
        source=source,
        scheme=inline(scheme),
        dtype=dtype,
        bits=bits_per_weight,
        version=installed_version(),
        facts=f"\n{facts}\n" if facts else "",
    )
    return f"---\n{yaml_head(matter)}---\n\n{body}".encode("utf-8", "replace")


BODY = """\
# {name}, {scheme} for ONNX Runtime

{source}, converted to ONNX by smolexport {version} with the scheme `{scheme}` ({bits:.2f} bits per weight).
{facts}
## In a web page or in Node.js

With [Transformers.js](https://huggingface.co/docs/transformers.js), prompts of different lengths one by one: a list of
them is padded on the left, which this graph's attention takes for text.

```js
import {{ pipeline }} from "@huggingface/transformers";

const generator = await pipeline("text-generation", "PATH_OR_NAME_OF_THIS_FOLDER", {{ dtype: "{dtype}" }});
console.log(await generator("Once upon a time", {{ max_new_tokens: 60 }}));
```

## Python

With [ONNX Runtime GenAI](https://onnxruntime.ai/docs/genai):

```py
import onnxruntime_genai as og

model = og.Model("PATH_TO_THIS_FOLDER")
tokenizer, parameters = og.Tokenizer(model), og.GeneratorParams(model)
parameters.set_search_options(max_length=100)
generator = og.Generator(model, parameters)
generator.append_tokens(tokenizer.encode("Once upon a time"))
while not generator.is_done():
    generator.generate_next_token()
print(tokenizer.decode(generator.get_sequence(0)))
```
"""
