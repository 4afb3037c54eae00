"""Round robin: perfect balance without a router, to measure what the experts alone can do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from dmoe.config import MoEConfig
from dmoe.ops.activation import accumulate_dtype
from dmoe.router_family import RouterFamily, register
from dmoe.routing.base import Routing
from dmoe.routing.planning import plan_of_choices


@register("uniform")
@dataclass(frozen=True)
class Uniform(RouterFamily):
    """Round robin, without looking at the tokens; see :class:`UniformRouter`."""

    weights_sum_to_1: ClassVar[bool] = True

    def build(self, config: MoEConfig, *, ranks: Any = None, device: Any = None, dtype: Any = None) -> nn.Module:
        """See :class:`dmoe.router_family.RouterFamily`."""
        return UniformRouter(config, ranks=ranks, device=device, dtype=dtype)


class UniformRouter(nn.Module):
    """Choice k of token t goes to expert ``(t * K + k) mod E`` with weight 1 / K. Has no parameters and no losses.

    Args:
        config: E, K and the capacity.
        ranks: who shares a capacity with ``capacity_over="group"``.
        device, dtype: accepted as every router takes them.
    """

    def __init__(
        self,
        config: MoEConfig,
        *,
        ranks: Any = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.config, self.ranks = config, ranks
        self.by_sequence = config.token_groups == "sequence"

    def forward(
        self,
        x: Tensor,
        *,
        token_mask: Tensor | None = None,
        token_ids: Tensor | None = None,
        expert_indices: Tensor | None = None,
        num_sequences: int = 1,
    ) -> Routing:
        """Route ``(T, H)``; see :class:`dmoe.routing.Router`."""
        config = self.config
        num_tokens, top_k = x.shape[0], config.top_k
        if expert_indices is None:
            expert_indices = (
                torch.arange(num_tokens * top_k, device=x.device).view(num_tokens, top_k) % config.num_experts
            )
        if token_mask is not None:
            expert_indices = expert_indices.masked_fill(~token_mask.unsqueeze(1), config.num_experts)
        weights = x.new_full((num_tokens, top_k), 1 / top_k, dtype=accumulate_dtype(x.dtype))
        plan = plan_of_choices(expert_indices, weights, self, num_sequences)
        return Routing(plan=plan, gate_weights=weights, expert_indices=expert_indices, token_mask=token_mask)

    def update_selection_bias(self) -> None:
        """No bias to move."""
