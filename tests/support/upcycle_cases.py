"""Tiny dense language models with weights in which nothing is zero or one, saved as Transformers saves them."""

from __future__ import annotations

import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    Qwen2Config,
    Qwen3Config,
)

VOCABULARY, WIDTH, FFN, LAYERS = 67, 32, 48, 2
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": FFN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# Name -> config class, its own fields, and the family that it becomes.
DENSE = {
    "qwen2": (Qwen2Config, {}, "qwen2_moe"),
    "qwen2, windows in the second layer": (
        Qwen2Config,
        {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
        "qwen2_moe",
    ),
    "qwen3": (Qwen3Config, {"head_dim": 16}, "qwen3_moe"),
    "qwen3, biases and windows": (
        Qwen3Config,
        {
            "head_dim": 16,
            "attention_bias": True,
            "use_sliding_window": True,
            "sliding_window": 5,
            "max_window_layers": 0,
        },
        "qwen3_moe",
    ),
    "llama": (LlamaConfig, {"head_dim": 16, "hidden_act": "gelu", "rms_norm_eps": 1e-3}, "mixtral"),
    "mistral": (MistralConfig, {"sliding_window": 5}, "mixtral"),
    "olmo2": (Olmo2Config, {"attention_bias": True, "rms_norm_eps": 1e-3}, "flex_olmo"),
}


def dense_model(kind, *, seed=0, **fields):
    """A model of :data:`DENSE`; further fields of its config may be given."""
    config_class, own, _ = DENSE[kind]
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config_class(**SIZES | own | fields)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.normal_(1 if "norm" in name else 0, 0.2)
            else:
                parameter.normal_(0, 0.2)
    return model


def save_dense(folder, kind, *, max_shard_size="50GB", **fields):
    """The same in files; returns the folder."""
    dense_model(kind, **fields).save_pretrained(folder, max_shard_size=max_shard_size)
    return folder


def token_ids(rows=3, length=20):
    return torch.randint(VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(5))


@torch.no_grad()
def logits(folder):
    """In float32, by Transformers."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()(token_ids()).logits


def apart(expected, actual):
    """The largest difference, relative to the largest number."""
    return ((expected - actual).abs().max() / expected.abs().max()).item()
