"""Sinkhorn: in training tokens choose by a matrix whose columns have been made equally heavy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from dmoe.config import MoEConfig
from dmoe.losses import NOISE_LOSSES
from dmoe.ops.sinkhorn import sinkhorn
from dmoe.ops.topk_indices import topk_indices
from dmoe.router_family import RouterFamily, register
from dmoe.routing.token_choice import TopK, TopKRouter


@register("sinkhorn")
@dataclass(frozen=True)
class Sinkhorn(RouterFamily):
    """Balanced by Sinkhorn's algorithm in training, top-k in evaluation (Clark et al. 2022; Megatron-Core).

    The weight is the logit's sigmoid for K = 1, the softmax over all experts otherwise: balancing chooses, and does not
    weigh. Without a loss: set ``load_balancing_coefficient=0``, as Megatron does, to have none.

    Args:
        tolerance, max_iterations: when to stop, see :func:`dmoe.ops.sinkhorn.sinkhorn`.
    """

    looks_ahead: ClassVar[bool] = True
    lacks_losses: ClassVar[tuple[str, ...]] = NOISE_LOSSES

    tolerance: float = 1e-4
    max_iterations: int = 200

    def _check_fields(self) -> None:
        self.require(self.tolerance >= 0, "tolerance", "at least 0")
        self.require(self.max_iterations >= 1, "max_iterations", "at least 1")

    def check(self, config: MoEConfig) -> None:
        """See :class:`dmoe.router_family.RouterFamily`."""
        super().check(config)
        fixed = {"score_function": "softmax", "softmax_order": "before_topk", "selection_bias": False, "num_groups": 1}
        for name, value in fixed.items():
            if getattr(config, name) != value:
                raise ValueError(
                    f"MoEConfig: {name}: expected {value!r} with router='sinkhorn', which scores and balances in its "
                    f"own way, got {getattr(config, name)!r}"
                )

    def build(self, config: MoEConfig, *, ranks: Any = None, device: Any = None, dtype: Any = None) -> nn.Module:
        """See :class:`dmoe.router_family.RouterFamily`."""
        return SinkhornRouter(config, self, ranks=ranks, device=device, dtype=dtype)


class SinkhornRouter(TopKRouter):
    """The router of :class:`Sinkhorn`."""

    def __init__(self, config: MoEConfig, balance: Sinkhorn, **where: Any) -> None:
        self.balance = balance
        super().__init__(config, TopK(), **where)
        self.score_function = "sigmoid" if config.top_k == 1 else "softmax"
        self.rule = self.rule._replace(score_function=self.score_function)

    def _choose(self, logits: Tensor, token_mask: Tensor | None) -> tuple[Tensor | None, None]:
        if not self.training:
            return None, None
        wide = logits.detach().to(torch.promote_types(logits.dtype, torch.float32))
        if token_mask is not None:  # a row of zeros would take a share of every expert
            wide = wide.masked_fill(~token_mask.unsqueeze(1), -torch.inf)
        matrix = sinkhorn(wide, self.balance.tolerance, self.balance.max_iterations)
        return topk_indices(matrix, self.rule.top_k), None
