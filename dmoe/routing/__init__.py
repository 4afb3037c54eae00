"""hidden -> who goes where: one file per family of routers, one protocol between them (``base.py``).

``MoEConfig(router=...)`` takes a family with its options, or its name. A family of your own needs no change here: see
``docs/routing.md``.
"""

from __future__ import annotations

import torch
from torch import nn

from dmoe.config import MoEConfig
from dmoe.parallel.statistics import LoadOfRanks
from dmoe.router_family import RouterFamily, register
from dmoe.routing.balanced import Base, BaseRouter
from dmoe.routing.base import LinearRouter, Router, Routing
from dmoe.routing.cosine import Cosine, CosineRouter
from dmoe.routing.expert_choice import ExpertChoice, ExpertChoiceRouter
from dmoe.routing.hashed import Hash, HashRouter, LearnedHashRouter
from dmoe.routing.planning import groups_of, plan_choices, plan_of_choices
from dmoe.routing.sinkhorn import Sinkhorn, SinkhornRouter
from dmoe.routing.token_choice import TopK, TopKRouter
from dmoe.routing.uniform import Uniform, UniformRouter

__all__ = [
    "Base",
    "BaseRouter",
    "Cosine",
    "CosineRouter",
    "ExpertChoice",
    "ExpertChoiceRouter",
    "Hash",
    "HashRouter",
    "LearnedHashRouter",
    "LinearRouter",
    "Router",
    "RouterFamily",
    "Routing",
    "Sinkhorn",
    "SinkhornRouter",
    "TopK",
    "TopKRouter",
    "Uniform",
    "UniformRouter",
    "build_router",
    "groups_of",
    "plan_choices",
    "plan_of_choices",
    "register",
]


def build_router(
    config: MoEConfig,
    given: nn.Module | None = None,
    *,
    ranks: LoadOfRanks | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> nn.Module:
    """The router of a layer: the one given, or what ``config.router`` builds.

    ``ranks``: whose tokens share the experts, for what is counted over all of them; None is this rank alone.
    """
    return config.family.build(config, ranks=ranks, device=device, dtype=dtype) if given is None else given
