"""The branch's gates as a router of dmoe's layer: who goes where, and with what weight.

One linear without bias, g = softmax(logits). The first expert is the best; the second follows the policy. A capacity
counts first choices before second ones, tokens in order (or by their gate, batch-prioritised). Lepikhin et al. 2021
(GShard), as fairseq's ``moe`` branch has it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

import dmoe
from dmoe.integrations.fairseq_moe.flags import MoEFlags
from dmoe.integrations.fairseq_moe.statistics import gate_statistics
from dmoe.ops.gate_weights import gate_weights
from dmoe.ops.histogram import histogram
from dmoe.ops.router_top_k import TopKRule, router_top_k


class Gate(dmoe.routing.LinearRouter):
    """Top-2 or top-1 gate with the policies and capacities of the flags.

    Args:
        config: of the layer; the gate takes its sizes.
        flags: what ``--moe-*`` said.
        device, dtype: of the linear.

    Attributes:
        padding: ``(T,)`` bool, True for padding that takes no expert; set before a forward, for that forward. Padding
            still counts in the mean probabilities, as on the branch, and so it is no ``token_mask`` of the layer.
        gate_loss: of the last forward, scalar float32 with a graph: ``E * sum_e(mean_e * share_e)`` of the mean
            probability and the share of tokens with e as their first choice, 1 under even routing.
        statistics: of the last forward, see :mod:`dmoe.integrations.fairseq_moe.statistics`.
    """

    def __init__(
        self,
        config: dmoe.MoEConfig,
        flags: MoEFlags,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(config, device=device, dtype=dtype)
        self.flags = flags
        self.padding: Tensor | None = None
        self.gate_loss: Tensor | None = None
        self.statistics: Tensor | None = None

    def capacity(self, num_tokens: int) -> int | None:
        """The most rows one expert takes of so many tokens; None when nothing is dropped."""
        flags = self.flags
        if flags.moe_dropless:
            return None
        fraction = flags.moe_eval_capacity_token_fraction or 0.0
        if not self.training and fraction > 0:
            return math.ceil(fraction * num_tokens)
        return self.config.top_k * math.ceil(num_tokens / self.config.num_experts)

    @property
    def policy(self) -> str:
        """What happens to the second expert in this mode."""
        drawn = self.training or self.flags.moe_random_second_expert_in_eval
        return self.flags.moe_second_expert_policy if drawn and self.config.top_k == 2 else "all"

    def forward(
        self,
        x: Tensor,
        *,
        token_mask: Tensor | None = None,
        token_ids: Tensor | None = None,
        expert_indices: Tensor | None = None,
    ) -> dmoe.routing.Routing:
        """Route ``(T, H)``; see :class:`dmoe.routing.Router`. A choice cannot be replayed, masks go by ``padding``."""
        if token_mask is not None or expert_indices is not None:
            raise ValueError("Gate: expected no token_mask and no expert_indices; padding is set on the gate")
        logits = self.logits(x)
        return self.route(logits.float() if self.flags.moe_gating_use_fp32 else logits)

    def route(self, logits: Tensor) -> dmoe.routing.Routing:
        """Route by given logits ``(T, E)``."""
        num_experts = logits.shape[1]
        top_k, policy, capacity = self.config.top_k, self.policy, self.capacity(len(logits))
        rule = TopKRule(top_k=top_k, normalization=float(top_k == 2))
        at_once = capacity is None and policy == "all"  # nothing to wait for: the weights are those of the choices
        choice = router_top_k(logits, rule, with_weights=at_once)
        scores, chosen = choice.scores, choice.expert_indices.long()
        if policy == "sampling":
            chosen = _sample_second(logits.detach(), chosen)
        routed = chosen
        if policy == "random":
            routed = torch.where(self._lucky(scores.detach(), chosen), chosen, num_experts)
        if self.padding is not None:
            routed = routed.masked_fill(self.padding.unsqueeze(1), num_experts)
        by_gate = bool(self.flags.moe_batch_prioritized_routing) and top_k == 2
        plan = dmoe.plan_token_choice(
            routed,
            num_experts,
            capacity=capacity,
            drop_order="batch_prioritized" if by_gate else "choice_major",
            priority=scores.detach().gather(1, chosen) if by_gate else None,
            tile_rows=dmoe.device_tile_rows(scores.device, routed.numel(), num_experts),
        )
        weights = choice.gate_weights
        if weights is None:
            weights = gate_weights(
                scores,
                chosen,  # not `routed`: what the policy took away still counts in a norm before the drop
                plan.token_to_rows,
                normalization=rule.normalization or None,
                after_drop=not self.flags.moe_normalize_gate_prob_before_dropping,
            )
        first = histogram(routed[:, 0].contiguous(), num_experts + 1)[:-1]
        self.gate_loss = _gate_loss(scores, first)
        self.statistics = gate_statistics(chosen, routed, plan.token_to_rows, num_experts)
        return dmoe.routing.Routing(plan, weights, router_probs=scores, expert_indices=routed)

    def _lucky(self, scores: Tensor, chosen: Tensor) -> Tensor:
        """Which choices 'random' keeps, ``(T, 2)`` bool: every first one, and a second one when 2 g > U(0, 1)."""
        gates = scores.gather(1, chosen)
        if self.flags.moe_normalize_gate_prob_before_dropping:
            gates = gates / gates.sum(1, keepdim=True).clamp(min=torch.finfo(gates.dtype).eps)
        kept = 2 * gates > torch.rand_like(gates)
        kept[:, 0] = True
        return kept


def _sample_second(logits: Tensor, chosen: Tensor) -> Tensor:
    """Second choices drawn from the softmax over all experts but the first: the largest logit under Gumbel noise."""
    wide = logits.float()
    gumbel = -torch.empty_like(wide).exponential_().log()
    noisy = (wide + gumbel).scatter(1, chosen[:, :1], -math.inf)
    return torch.cat([chosen[:, :1], noisy.argmax(1, keepdim=True)], 1)


def _gate_loss(scores: Tensor, first_choices: Tensor) -> Tensor:
    num_tokens, num_experts = scores.shape
    wide = torch.promote_types(scores.dtype, torch.float32)
    mean = scores.sum(0, dtype=wide) / max(num_tokens, 1)
    return (mean * first_choices.to(wide)).sum() * (num_experts / max(num_tokens, 1))
