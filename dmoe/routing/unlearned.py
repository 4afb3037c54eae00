"""A router without parameters, probabilities or losses: it names experts, and all choices weigh the same."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dmoe.config import MoEConfig
from dmoe.ops.activation import accumulate_dtype
from dmoe.routing.base import Routing
from dmoe.routing.planning import plan_of_choices


class UnlearnedRouter(nn.Module):
    """What such routers share; a subclass has :meth:`choose`.

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

    def choose(self, x: Tensor, token_ids: Tensor | None, token_mask: Tensor | None) -> Tensor:
        """The experts of ``(T, H)``, ``(T, K)`` integer; a mask is applied afterwards."""
        raise NotImplementedError(f"{type(self).__name__}: expected a choose method that returns the experts")

    @property
    def gate_weight(self) -> float:
        """What every choice weighs."""
        return 1 / self.config.top_k

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
        chosen = self.choose(x, token_ids, token_mask) if expert_indices is None else expert_indices
        if token_mask is not None:
            chosen = chosen.masked_fill(~token_mask.unsqueeze(1), self.config.num_experts)
        shape = (x.shape[0], self.config.top_k)
        weights = x.new_full(shape, self.gate_weight, dtype=accumulate_dtype(x.dtype))
        plan = plan_of_choices(chosen, weights, self, num_sequences)
        return Routing(plan=plan, gate_weights=weights, expert_indices=chosen, token_mask=token_mask)

    def update_selection_bias(self) -> None:
        """No bias to move."""
