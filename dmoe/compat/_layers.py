"""What the layers of DeepSpeed and Tutel share: a router under their name, and a forward that hands the loss back."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dmoe.config import MoEConfig
from dmoe.layer import MoE
from dmoe.losses import gshard_loss
from dmoe.metrics import metrics_of
from dmoe.ops.histogram import histogram
from dmoe.parallel.agreement import check_layers
from dmoe.parallel.build import owned_experts, ranks_of_layer
from dmoe.routing import Routing, TopKRouter


class LinearGate(TopKRouter):
    """dmoe's top-k router, whose weight is ``wg.weight``."""

    def _make_parameters(self, config: MoEConfig, **where: Any) -> None:
        self.wg = nn.Linear(config.hidden_size, config.num_experts, bias=False, **where)
        self.bias = None

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """``(E, H)``."""
        return self.wg.weight


class RoutedLayer(MoE):
    """A :class:`dmoe.MoE` whose losses go to the caller with each forward, in evaluation too, and are not kept.

    :func:`dmoe.aux_loss` finds nothing in it; metrics, and what walks over MoE layers, find it as any other.
    """

    l_aux: Tensor | None = None

    def join(self, group: Any, levels: Any = None) -> None:
        """Spread the experts over a group from now on, of which this rank's part is already here.

        Args:
            group: a ``torch.distributed`` process group, or a mesh of one dimension.
            levels: as ``ep_levels`` of :class:`dmoe.MoE`.
        """
        ranks = ranks_of_layer(self.config, group, None, levels, None)
        owned = owned_experts(self.config, ranks, device=None, dtensor=False)
        assert owned is not None
        self.dispatcher, self.experts.owned = ranks.dispatcher, owned
        self._ranks_agree = False

    def route_and_run(
        self, tokens: Tensor, gate: nn.Module, token_mask: Tensor | None = None
    ) -> tuple[Tensor, Routing]:
        """``(T, H)`` through a gate, and through the experts that it chooses."""
        if not self._ranks_agree:
            check_layers(self, tokens.dtype)
            self._ranks_agree = True
        with torch.autocast(tokens.device.type, enabled=False):
            routing: Routing = gate(tokens, token_mask=token_mask)
        y, arrived, kept = self._through_experts(tokens, routing)
        self.last_metrics = metrics_of(routing, arrived, kept)
        return y, routing

    def __getstate__(self) -> dict[str, Any]:
        """Without the last forward's loss, which would carry its graph along."""
        return {**super().__getstate__(), "l_aux": None}


def first_choice_loss(routing: Routing) -> Tensor:
    """GShard's loss of a routing: shares of first choices, before any drop, times mean probabilities, times E."""
    assert routing.router_probs is not None
    assert routing.expert_indices is not None
    num_experts = routing.plan.num_experts
    first = routing.expert_indices[:, 0].contiguous()
    return gshard_loss(routing.router_probs, histogram(first, num_experts + 1)[:num_experts])
