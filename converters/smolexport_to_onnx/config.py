"""The two configurations of an ONNX folder: config.json for Transformers.js, genai_config.json for ONNX Runtime GenAI.

Facts: Transformers.js 4.3 `src/models/session.js`, `src/configs.js`; ONNX Runtime GenAI 0.18 `src/config.cpp`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from smolexport.conversion.folder_files import GENERATION, config_eos, eos_ids, file_object, writable
from smolexport.conversion.plan import Companion
from smolexport.conversion.source_model import SourceModel
from smolexport_to_onnx.container import Layout
from smolexport_to_onnx.schemes import Scheme

# Keys of a source that name places or ask for code.
DROPPED = frozenset(
    """_attn_implementation _attn_implementation_internal _commit_hash _name_or_path _orig_model_type auto_map
    compression_config name_or_path transformers.js_config""".split()
)
SEARCHED = ("do_sample", "repetition_penalty", "temperature", "top_k", "top_p")


def compose(model: SourceModel, schemes: Sequence[Scheme], layouts: Sequence[Layout]) -> dict[str, Any]:
    """The content of config.json, keys sorted: the source's, with what Transformers.js reads spelled out.

    Args:
        model: the source.
        schemes: of the graphs, the one that is taken without being asked first.
        layouts: their files.
    """
    spec = model.spec
    config = {
        key: value
        for key, value in model.config.items()
        if key not in DROPPED and not key.startswith("quantization") and writable(key, value)
    }
    config |= {
        "model_type": spec.model_type,
        "vocab_size": spec.vocab_size,
        "hidden_size": spec.hidden_size,
        "num_hidden_layers": len(spec.layers),
        "num_attention_heads": spec.attention.num_attention_heads,
        "num_key_value_heads": spec.attention.num_key_value_heads,
        "head_dim": spec.attention.head_dim,
        "tie_word_embeddings": spec.tied,
        "eos_token_id": config_eos(model),
    }
    for key, index in (("bos_token_id", model.tokenizer.bos), ("pad_token_id", model.tokenizer.pad)):
        config.setdefault(key, index)
    halves = {scheme.js: "float16" for scheme in schemes if scheme.dtype == "F16"}
    config["transformers.js_config"] = {
        "dtype": schemes[0].js,
        "use_external_data_format": {f"{layout.stem}.onnx": 1 for layout in layouts},
        **({"kv_cache_dtype": halves} if halves else {}),
    }
    return dict(sorted(config.items()))


def genai(model: SourceModel, layout: Layout, positions: int, files: Mapping[str, Companion]) -> dict[str, Any]:
    """The content of genai_config.json.

    Args:
        model: the source.
        layout: of the graph that it names.
        positions: the longest text.
        files: the small files, of which generation_config.json says how to sample.
    """
    spec, tokenizer = model.spec, model.tokenizer
    eos = eos_ids(model)
    first = eos[0] if isinstance(eos, list) else eos
    given = file_object(dict(files), GENERATION)
    # Without do_sample transformers is greedy, whatever else the file says.
    search = {key: given[key] for key in SEARCHED if isinstance(given.get(key), (int, float))}
    if not search.get("do_sample"):
        search = {"do_sample": False}
    ids = {
        "bos_token_id": tokenizer.bos,
        "eos_token_id": eos,
        "pad_token_id": first if tokenizer.pad is None else tokenizer.pad,
    }
    caches = ("key", "value")
    return {
        "model": {
            "type": "decoder",
            "vocab_size": spec.vocab_size,
            "context_length": positions,
            **{key: value for key, value in ids.items() if value is not None},
            "decoder": {
                "filename": layout.graph,
                "head_size": spec.attention.head_dim,
                "hidden_size": spec.hidden_size,
                "num_attention_heads": spec.attention.num_attention_heads,
                "num_key_value_heads": spec.attention.num_key_value_heads,
                "num_hidden_layers": len(spec.layers),
                "inputs": {
                    "input_ids": "input_ids",
                    "attention_mask": "attention_mask",
                    **{f"past_{part}_names": f"past_key_values.%d.{part}" for part in caches},
                },
                "outputs": {"logits": "logits", **{f"present_{part}_names": f"present.%d.{part}" for part in caches}},
                "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
            },
        },
        "search": {"max_length": positions, "past_present_share_buffer": True, **search},
    }
