"""Experts choose tokens (Zhou et al. 2022): perfect balance, and tokens with none, one or many experts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from dmoe.capacity import capacity_rows, round_up
from dmoe.config import MoEConfig
from dmoe.losses import NOISE_LOSSES
from dmoe.ops.router_scores import router_scores
from dmoe.ops.topk_indices import topk_indices
from dmoe.plan import device_tile_rows, plan_expert_choice
from dmoe.router_family import RouterFamily, register
from dmoe.routing.base import LinearRouter, Routing
from dmoe.routing.planning import groups_of
from dmoe.sizes import larger, smaller


@register("expert_choice")
@dataclass(frozen=True)
class ExpertChoice(RouterFamily):
    """Every expert takes the tokens that score highest for it (Zhou et al. 2022); see :class:`ExpertChoiceRouter`."""

    experts_choose: ClassVar[bool] = True
    looks_ahead: ClassVar[bool] = True
    unread: ClassVar[tuple[str, ...]] = ("softmax_order", "normalize_when", "drop_order")
    lacks_losses: ClassVar[tuple[str, ...]] = NOISE_LOSSES

    def build(self, config: MoEConfig, *, ranks: Any = None, device: Any = None, dtype: Any = None) -> nn.Module:
        """See :class:`dmoe.router_family.RouterFamily`."""
        return ExpertChoiceRouter(config, device=device, dtype=dtype)


class ExpertChoiceRouter(LinearRouter):
    """Every expert takes the tokens that score highest for it: ``ceil(capacity_factor * T / E)`` of them.

    ``capacity_factor`` (default: ``top_k``) is the mean number of experts per token; ``capacity_formula`` may round
    otherwise, with K = 1 in it. A token sees the whole batch through this choice, later tokens included: see
    ``MoEConfig.causal``. With ``token_groups`` experts take as many of each group instead.
    """

    def route(
        self,
        router_logits: Tensor,
        *,
        token_mask: Tensor | None = None,
        expert_indices: Tensor | None = None,
        num_sequences: int = 1,
    ) -> Routing:
        """Route by given logits ``(T, E)``; see :meth:`dmoe.routing.LinearRouter.route`.

        Raises:
            ValueError: ``expert_indices`` were given: tokens do not choose here.
        """
        if expert_indices is not None:
            raise ValueError("ExpertChoiceRouter: expert_indices: cannot replay a token's choice, experts choose here")
        config = self.config
        num_tokens = router_logits.shape[0]
        groups = groups_of(config, num_tokens, num_sequences)
        in_group = num_tokens // groups
        scores, log_z = router_scores(
            router_logits,
            config.score_function,
            with_log_z=config.has_loss("z"),
            backend=config.backend,
        )
        factor = config.top_k if config.capacity_factor is None else config.capacity_factor
        share = capacity_rows(config.capacity_formula, factor, in_group, 1, config.num_experts)
        if config.min_capacity:  # a symbolic share is easier to reason about alone
            share = larger(share, config.min_capacity)
        if config.capacity_multiple_of > 1:
            share = round_up(share, config.capacity_multiple_of)
        per_group = smaller(share, in_group)
        per_expert = per_group * groups
        wanted = scores.detach()
        if token_mask is not None:
            wanted = wanted.masked_fill(~token_mask.unsqueeze(1), -torch.inf)
        if num_tokens == 0:
            token_indices = torch.empty(config.num_experts, 0, dtype=torch.int64, device=scores.device)
        elif groups == 1:
            token_indices = topk_indices(wanted.t().contiguous(), per_expert)
        else:
            by_group = wanted.t().reshape(config.num_experts * groups, in_group)
            first = torch.arange(groups, device=scores.device).view(1, groups, 1) * in_group
            chosen = topk_indices(by_group, per_group).view(config.num_experts, groups, per_group)
            token_indices = (chosen + first).view(config.num_experts, per_expert)
        if token_mask is not None:
            token_indices = torch.where(token_mask[token_indices], token_indices, -1)

        tile_rows = device_tile_rows(scores.device, token_indices.numel(), config.num_experts)
        plan = plan_expert_choice(token_indices, num_tokens, tile_rows=tile_rows)
        # The weight of each assignment, token by token: the score at (token, expert) of its row.
        row = plan.token_rows.clamp(min=0).long()
        token = token_indices.flatten()[row].clamp(min=0)
        expert = row // larger(per_expert, 1)
        weights = scores.flatten()[token * config.num_experts + expert].masked_fill(plan.token_rows < 0, 0)
        return Routing(
            plan=plan,
            gate_weights=weights * config.gate_scale,
            router_probs=self._probabilities(scores),
            log_z=log_z,
            token_mask=token_mask,
            router_logits=router_logits,
        )
