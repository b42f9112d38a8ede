"""Write a trained `Decoder` as a Hugging Face checkpoint folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from model import Decoder, Shape
from safetensors.torch import save_file
from tokenizers import Tokenizer

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
BOS, EOS, PAD = 1, 2, 2


def config_of(shape: Shape) -> dict[str, Any]:
    """config.json: Llama, or SmolLM3 where some layers have no rotary embedding."""
    smollm3 = shape.nope_every > 0
    config = {
        "architectures": ["SmolLM3ForCausalLM" if smollm3 else "LlamaForCausalLM"],
        "model_type": "smollm3" if smollm3 else "llama",
        "attention_bias": False,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "pad_token_id": PAD,
        "hidden_act": "silu",
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "max_position_embeddings": shape.max_position_embeddings,
        "mlp_bias": False,
        "num_attention_heads": shape.num_attention_heads,
        "num_hidden_layers": shape.num_hidden_layers,
        "num_key_value_heads": shape.num_key_value_heads,
        "rms_norm_eps": shape.rms_norm_eps,
        "rope_scaling": None,
        "rope_theta": shape.rope_theta,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "vocab_size": shape.vocab_size,
    }
    if smollm3:
        layers = range(shape.num_hidden_layers)
        config["no_rope_layer_interval"] = shape.nope_every
        config["no_rope_layers"] = [int((i + 1) % shape.nope_every != 0) for i in layers]
        config["use_sliding_window"] = False
    return config


def write_checkpoint(folder: Path, model: Decoder, tokenizer: Tokenizer, excerpt: str) -> None:
    """Config, generation config, tokenizer, bf16 weights and an excerpt of the held-out text into `folder`."""

    def write(name: str, content: dict[str, Any]) -> None:
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")

    write("config.json", config_of(model.shape))
    write("generation_config.json", {"bos_token_id": BOS, "eos_token_id": [EOS, 0], "pad_token_id": PAD})
    write(
        "tokenizer_config.json",
        {
            "add_prefix_space": False,
            "bos_token": "<|im_start|>",
            "eos_token": "<|im_end|>",
            "pad_token": "<|im_end|>",
            "unk_token": "<|endoftext|>",
            "chat_template": CHAT_TEMPLATE,
            "clean_up_tokenization_spaces": False,
            "model_max_length": model.shape.max_position_embeddings,
            "tokenizer_class": "GPT2Tokenizer",
        },
    )
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    state = {f"model.{k}": v.to(torch.bfloat16).contiguous() for k, v in model.state_dict().items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "held_out.txt").write_text(excerpt)
