"""Round robin: perfect balance without a router, to measure what the experts alone can do."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dmoe.config import MoEConfig
from dmoe.ops.activation import accumulate_dtype
from dmoe.plan import device_tile_rows, plan_token_choice
from dmoe.routing.base import Routing


class UniformRouter(nn.Module):
    """Choice k of token t goes to expert ``(t * K + k) mod E`` with weight 1 / K. Has no parameters and no losses.

    Args:
        config: E, K and the capacity.
        device, dtype: accepted as every router takes them.
    """

    def __init__(
        self, config: MoEConfig, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.config = config

    def forward(
        self,
        x: Tensor,
        *,
        token_mask: Tensor | None = None,
        token_ids: Tensor | None = None,
        expert_indices: Tensor | None = None,
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
        plan = plan_token_choice(
            expert_indices,
            config.num_experts,
            capacity=config.capacity_for(num_tokens),
            drop_order=config.drop_order,
            priority=weights,
            tile_rows=device_tile_rows(x.device, num_tokens * top_k, config.num_experts),
        )
        return Routing(plan=plan, gate_weights=weights, expert_indices=expert_indices, token_mask=token_mask)

    def update_selection_bias(self) -> None:
        """No bias to move."""
