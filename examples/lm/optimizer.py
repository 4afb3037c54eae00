"""AdamW for a model with experts, and its learning rate over the steps."""

from __future__ import annotations

import math
from typing import Any

import torch

import dmoe

from .layers import experts_of_a_token
from .model import ByteLM
from .settings import Settings

FLOOR = 0.1  # the learning rate at the end, as a share of its peak


def learning_rate(step: int, settings: Settings) -> float:
    """The rate of step ``step``, counted from 0: linear warm-up, then a cosine down to a tenth of the peak."""
    s = settings
    warmup = min(s.warmup, s.steps)
    if step < warmup:
        return s.lr * (step + 1) / warmup
    progress = (step - warmup) / max(1, s.steps - warmup)
    return s.lr * (FLOOR + (1 - FLOOR) * (1 + math.cos(math.pi * progress)) / 2)


def optimizer(model: ByteLM, settings: Settings) -> torch.optim.AdamW:
    """AdamW of what is trained. Norms and the embedding are not decayed, experts learn at
    ``(top_k / experts) ** expert_lr_power`` of the rate, the root of that share unless the settings say otherwise.

    An expert sees that share, ``top_k / experts`` of its layer, of a batch. Adam's rate goes with the square root of
    the batch (Malladi et al. 2022, "On the SDEs and Scaling Rules for Adaptive Gradient Algorithms"): at the rate which
    suits weights that see every byte, experts would follow the noise of the few bytes that came to them.
    """
    whole: dict[str, Any] = {"params": [], "scale": 1.0}
    plain: dict[str, Any] = {"params": [], "scale": 1.0, "weight_decay": 0.0}
    experts: dict[float, dict[str, Any]] = {}
    for layer in model.moe_layers:
        scale = (experts_of_a_token(layer.config) / layer.config.num_experts) ** settings.expert_lr_power
        group = experts.setdefault(scale, {"params": [], "scale": scale})
        group["params"] += [p for p in layer.parameters() if dmoe.is_expert_param(p) and p.requires_grad]
    for parameter in model.parameters():
        if dmoe.is_expert_param(parameter) or not parameter.requires_grad:
            continue
        if parameter.ndim < 2 or parameter is model.embedding.weight:
            plain["params"].append(parameter)
        else:
            whole["params"].append(parameter)
    groups = [group for group in (whole, plain, *experts.values()) if group["params"]]
    return torch.optim.AdamW(groups, lr=settings.lr, betas=(0.9, 0.95), weight_decay=settings.weight_decay, fused=True)
