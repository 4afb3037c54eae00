"""Layers on several ranks, for tests: a small config, and what a rank holds of a parameter."""

from __future__ import annotations

import torch

H = 6
BASE = {"hidden_size": H, "ffn_hidden_size": 4, "num_experts": 4, "top_k": 2, "load_balancing_coefficient": 0.0}


def part_of(module, name, tensor, rank, world, tp=1):
    """What a rank holds of a parameter of the whole layer."""
    if not name.startswith("experts."):
        return tensor
    experts, of_tp = module.config.num_experts, rank % tp
    rank, world = rank // tp, world // tp
    shards = max(1, world // experts)
    each = max(1, experts // world)
    first, shard = rank // shards * each, rank % shards * tp + of_tp
    shards *= tp
    if name.endswith("down_bias"):
        return tensor[first : first + each]
    dim = tensor.dim() - (1 if name.endswith(("down_proj", "bias")) else 2)
    if isinstance(module.config.ffn_hidden_size, int):
        return tensor[first : first + each].chunk(shards, dim)[shard]
    of_experts = tensor.split(module.config.ffn_sizes, dim)[first : first + each]
    return torch.cat([one.chunk(shards, dim)[shard] for one in of_experts], dim)


def close(name, actual, expected, tolerance=1e-12):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance, msg=lambda m: f"{name}: {m}")
