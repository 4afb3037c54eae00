"""Tokens choose experts: softmax or sigmoid scores, top-k, maybe in the best groups and under a load-driven bias."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dmoe.config import MoEConfig
from dmoe.ops.gate_weights import gate_weights
from dmoe.ops.router_top_k import TopKRule, router_top_k
from dmoe.plan import device_tile_rows, plan_token_choice
from dmoe.routing.base import LinearRouter, Routing


class TopKRouter(LinearRouter):
    """Each token takes its K best experts (Shazeer et al. 2017); see :class:`dmoe.MoEConfig` for the variants.

    NaN in a token's logits makes that token's scores NaN: it goes to the lowest expert ids, its own output is NaN, and
    no other token's is.

    Args:
        config: everything about scores, selection, normalisation and capacity.
        device, dtype: of the parameters. The selection bias and its counters are float32.

    Attributes:
        rule: how experts are scored, chosen and weighed, as :func:`dmoe.ops.router_top_k.router_top_k` takes it.
    """

    selection_bias: Tensor | None
    load_since_update: Tensor | None

    def __init__(
        self, config: MoEConfig, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__(config, device=device, dtype=dtype)
        self.rule = _rule(config)
        if config.selection_bias:
            self.register_float32("selection_bias", 0.0, config.num_experts, device=device)
            self.register_float32("load_since_update", 0.0, config.num_experts, device=device, persistent=False)
        else:
            self.register_buffer("selection_bias", None)
            self.load_since_update = None

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Fresh values: the linear's, and a selection bias of 0."""
        super().reset_parameters()
        for name in (*self.float32_saved, *self.float32_unsaved):
            getattr(self, name).zero_()

    def forward(
        self,
        x: Tensor,
        *,
        token_mask: Tensor | None = None,
        token_ids: Tensor | None = None,
        expert_indices: Tensor | None = None,
    ) -> Routing:
        """Route ``(T, H)``; see :class:`dmoe.routing.Router`. ``token_ids`` are not looked at."""
        return self.route(self.logits(x), token_mask=token_mask, expert_indices=expert_indices)

    def route(
        self, router_logits: Tensor, *, token_mask: Tensor | None = None, expert_indices: Tensor | None = None
    ) -> Routing:
        """Route by given logits ``(T, E)``, without the router's linear.

        Args:
            router_logits: ``(T, E)`` floating point.
            token_mask: ``(T,)`` bool; False takes no expert and counts in no loss.
            expert_indices: ``(T, K)`` integer: take these instead of the best; weights come from the logits.

        Raises:
            ValueError: logits for another number of experts, or indices of another shape or type.
        """
        config = self.config
        if router_logits.dim() != 2 or router_logits.shape[1] != config.num_experts:
            raise ValueError(
                f"route: router_logits: expected shape (T, num_experts = {config.num_experts}), got "
                f"{tuple(router_logits.shape)}"
            )
        num_tokens = router_logits.shape[0]
        if expert_indices is not None and (
            expert_indices.shape != (num_tokens, config.top_k) or expert_indices.is_floating_point()
        ):
            raise ValueError(
                f"route: expert_indices: expected integers of shape {(num_tokens, config.top_k)}, got "
                f"{expert_indices.dtype} {tuple(expert_indices.shape)}"
            )
        capacity = config.capacity_for(num_tokens)
        choice = router_top_k(
            router_logits,
            self.rule,
            selection_bias=self.float32("selection_bias", router_logits.device) if config.selection_bias else None,
            token_mask=token_mask,
            expert_indices=expert_indices,
            with_log_z=config.router_z_loss_coefficient > 0,
            with_weights=capacity is None,
            count_first=config.load_balancing_choices == "first" and config.load_balancing_coefficient > 0,
            backend=config.backend,
        )
        scores, chosen, weights = choice.scores, choice.expert_indices, choice.gate_weights
        by_weight = self.rule.normalization if config.drop_order == "normalized_gate_weight" else 0.0
        plan = plan_token_choice(
            chosen,
            config.num_experts,
            capacity=capacity,
            drop_order=config.drop_order,
            priority=None
            if capacity is None
            else gate_weights(scores.detach(), chosen, normalization=by_weight or None),
            tile_rows=device_tile_rows(scores.device, chosen.numel(), config.num_experts),
        )
        if weights is None:  # a dropped choice weighs 0, and the norm may count the kept ones alone
            weights = gate_weights(
                scores,
                chosen,
                plan.token_to_rows,
                normalization=self.rule.normalization or None,
                after_drop=config.normalize_when == "after_drop" and config.gate_normalization is not None,
                scale=config.gate_scale,
                backend=config.backend,
            )
        if self.load_since_update is not None and self.training and torch.is_grad_enabled():
            counter = self.float32("load_since_update", weights.device)
            weights = _CountInBackward.apply(weights, plan.tokens_per_expert, counter)
        return Routing(
            plan=plan,
            gate_weights=weights,
            router_probs=self._probabilities(scores),
            log_z=choice.log_z,
            expert_indices=chosen,
            first_choices_per_expert=choice.first_choices_per_expert,
            token_mask=token_mask,
        )

    @torch.no_grad()
    def update_selection_bias(self) -> None:
        """Raise the bias of experts below the mean load since the last update and lower the others (DeepSeek-V3)."""
        if self.selection_bias is None or self.load_since_update is None:
            return
        load = self.float32("load_since_update", self.selection_bias.device)
        bias = self.float32("selection_bias", load.device)
        bias += self.config.selection_bias_update_rate * torch.sign(load.mean() - load)
        load.zero_()


def _rule(config: MoEConfig) -> TopKRule:
    """The part of the configuration that scores, chooses and weighs."""
    # A softmax over the chosen logits alone is the softmax over all, renormalised over the chosen ones (as long as
    # these do not all underflow beside an expert that was not chosen, as a replayed routing may have it).
    over_chosen = 1.0 if config.softmax_order == "after_topk" else 0.0
    return TopKRule(
        top_k=config.top_k,
        score_function=config.score_function,
        num_groups=config.num_groups,
        top_k_groups=config.num_groups if config.top_k_groups is None else config.top_k_groups,
        group_score=config.group_score,
        normalization=float(config.gate_normalization or over_chosen),
        scale=config.gate_scale,
    )


class _CountInBackward(torch.autograd.Function):
    """Identity on the gate weights that adds the load to a counter when, and each time, backward runs.

    Counting in forward would count a checkpointed layer twice and an evaluation once.
    """

    @staticmethod
    def forward(ctx: Any, weights: Tensor, tokens_per_expert: Tensor, counter: Tensor) -> Tensor:
        ctx.save_for_backward(tokens_per_expert)
        ctx.counter = counter
        return weights.view_as(weights)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (tokens_per_expert,) = ctx.saved_tensors
        ctx.counter.add_(tokens_per_expert)
        return grad, None, None
