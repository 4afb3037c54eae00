"""Tiny MoE models of Transformers, and folders of them as the hub has them."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, GenerationConfig, MixtralConfig, Qwen3MoeConfig

VOCAB, LAYERS = 48, 2
_SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "num_experts_per_tok": 2,
    "router_aux_loss_coef": 0.1,
}


def config_of(family, experts=4, **fields):
    """``qwen3_moe`` or ``mixtral``."""
    if family == "mixtral":
        return MixtralConfig(num_local_experts=experts, **_SIZES | fields)
    options = {"moe_intermediate_size": 12, "norm_topk_prob": True, "tie_word_embeddings": True}
    return Qwen3MoeConfig(num_experts=experts, **_SIZES | options | fields)


def model_of(family, *, dtype=torch.float32, **fields):
    """With values of some size: fresh ones are so small that errors would hide."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config_of(family, **fields), dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.2) if parameter.dim() > 1 else parameter.uniform_(0.5, 1.5)
    return model.eval()


def write_checkpoint(folder, family, *, fused=False, shard="9KB", **options):
    """A folder as ``save_pretrained`` writes it: experts one by one, or stacked; several files. The model."""
    model = model_of(family, **options)
    model.generation_config = GenerationConfig(max_new_tokens=7, temperature=0.5, do_sample=True)
    model.save_pretrained(folder, save_original_format=not fused, max_shard_size=shard)
    (Path(folder) / "tokenizer.json").write_text(json.dumps({"version": "1.0"}))
    return model


def batches_of(steps, ranks, *, length=6, seed=1):
    """Token ids ``(ranks, length)`` of each step: a row is a rank's."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(VOCAB, (steps, ranks, length), generator=generator)
