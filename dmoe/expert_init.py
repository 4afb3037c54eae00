"""Initial values of experts: expert e's are a function of (seed, e), so who holds which expert does not change them."""

from __future__ import annotations

import math

import torch

from dmoe.expert_slice import ExpertSlice
from dmoe.expert_weights import F_DIM, ExpertWeights


@torch.no_grad()
def initialise(weights: ExpertWeights, owned: ExpertSlice, seed: int, std: float | None) -> None:
    """Fresh values for the experts of one rank, written in place.

    Args:
        weights: of the experts, or the parts of them, that live here.
        owned: which those are. Each expert's values are drawn whole, and the part of F that lives here is kept.
        seed: of all experts.
        std: of a normal distribution, beside zero biases; None is uniform in +-1/sqrt(fan_in), as ``nn.Linear``.
    """
    for position, expert in enumerate(owned.experts):
        generator = torch.Generator(device="cpu").manual_seed((seed + expert * 0x9E3779B97F4A7C15) % 2**63)
        of_expert = weights.of_expert(position)
        width = of_expert["down_proj"].shape[-1] * owned.num_shards
        for name, tensor in of_expert.items():
            shape, dim = list(tensor.shape), F_DIM[name]
            if dim is not None:
                shape[dim] *= owned.num_shards
            fresh = torch.empty(shape, dtype=torch.float32, device="cpu")
            if std is None:
                fan_in = width if name.startswith("down") else weights.hidden_size
                bound = 1 / math.sqrt(fan_in)
                fresh.uniform_(-bound, bound, generator=generator)
            elif name.endswith("proj"):
                fresh.normal_(0, std, generator=generator)
            else:
                fresh.zero_()
            if dim is not None:
                columns = owned.columns(shape[dim])
                fresh = fresh.narrow(dim, columns.start, columns.stop - columns.start)
            tensor.copy_(fresh)
