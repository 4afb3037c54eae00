"""hidden -> who goes where: one file per family of routers, one protocol between them (``base.py``)."""

from __future__ import annotations

import torch
from torch import nn

from dmoe.config import MoEConfig
from dmoe.routing.base import LinearRouter, Router, Routing
from dmoe.routing.expert_choice import ExpertChoiceRouter
from dmoe.routing.token_choice import TopKRouter
from dmoe.routing.uniform import UniformRouter

__all__ = ["ExpertChoiceRouter", "LinearRouter", "Router", "Routing", "TopKRouter", "UniformRouter", "build_router"]

_FAMILIES: dict[str, type[nn.Module]] = {
    "top_k": TopKRouter,
    "expert_choice": ExpertChoiceRouter,
    "uniform": UniformRouter,
}


def build_router(
    config: MoEConfig, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
) -> nn.Module:
    """The router that ``config.router`` names."""
    return _FAMILIES[config.router](config, device=device, dtype=dtype)
