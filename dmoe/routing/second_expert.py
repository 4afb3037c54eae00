"""What becomes of a token's second expert: policies of GShard, fairseq, NLLB and DeepSpeed, for two choices."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from dmoe.routing import noise

SecondExpert = Literal["all", "sampling", "random", "random_raw"]


def sample_second(logits: Tensor, chosen: Tensor) -> Tensor:
    """Second choices drawn from the softmax over all experts but the first (GShard's ``sampling``).

    Args:
        logits: ``(T, E)``.
        chosen: ``(T, 2)``, E where masked, which stays.
    """
    num_experts = logits.shape[1]
    wide = logits.detach().to(torch.promote_types(logits.dtype, torch.float32))
    first = chosen[:, :1]
    others = (wide + noise.gumbel(wide)).scatter(1, first.clamp(max=num_experts - 1), -math.inf)
    second = torch.where(first < num_experts, others.argmax(1, keepdim=True), num_experts)
    return torch.cat([first, second.to(chosen.dtype)], 1)


def keep_second(scores: Tensor, chosen: Tensor, *, normalized: bool) -> Tensor:
    """Second choices kept with probability ``min(1, 2 g)``, others E (GShard's ``random``: Lepikhin et al. 2021).

    Args:
        scores: ``(T, E)``.
        chosen: ``(T, 2)``, E where masked.
        normalized: whether g is relative to the sum of both scores, or the score itself.
    """
    num_experts = scores.shape[1]
    gates = scores.detach().gather(1, chosen.clamp(max=num_experts - 1))
    second = gates[:, 1]
    if normalized:
        second = second / gates.sum(1).clamp(min=torch.finfo(gates.dtype).eps)
    lucky = 2 * second > noise.uniform(second)
    return torch.stack([chosen[:, 0], torch.where(lucky, chosen[:, 1], num_experts)], 1)
