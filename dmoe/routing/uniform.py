"""Round robin: perfect balance without a router, to measure what the experts alone can do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from dmoe.config import MoEConfig
from dmoe.router_family import RouterFamily, register
from dmoe.routing.unlearned import UnlearnedRouter


@register("uniform")
@dataclass(frozen=True)
class Uniform(RouterFamily):
    """Round robin, without looking at the tokens; see :class:`UniformRouter`."""

    weights_sum_to_1: ClassVar[bool] = True

    def build(self, config: MoEConfig, *, ranks: Any = None, device: Any = None, dtype: Any = None) -> nn.Module:
        """See :class:`dmoe.router_family.RouterFamily`."""
        return UniformRouter(config, ranks=ranks, device=device, dtype=dtype)


class UniformRouter(UnlearnedRouter):
    """Choice k of token t goes to expert ``(t * K + k) mod E`` with weight 1 / K. Has no parameters and no losses."""

    def choose(self, x: Tensor, token_ids: Tensor | None, token_mask: Tensor | None) -> Tensor:
        """Round robin; see :class:`dmoe.routing.unlearned.UnlearnedRouter`."""
        num_tokens, top_k = x.shape[0], self.config.top_k
        in_turn = torch.arange(num_tokens * top_k, device=x.device).view(num_tokens, top_k)
        return in_turn % self.config.num_experts
