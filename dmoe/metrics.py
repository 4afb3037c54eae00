"""What the router did: pure functions of tensors, and the small record a layer keeps of its last forward."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dmoe.parallel.interface import Dispatched
from dmoe.routing import Routing
from dmoe.sums import sum_tokens


@dataclass(frozen=True)
class RoutingMetrics:
    """One layer's last routing, as detached tensors on the layer's device (reading one is what synchronises).

    Attributes:
        tokens_per_expert: assignments per expert before any drop, ``(E,)`` integer.
        kept_per_expert: rows each expert computed, ``(E,)`` integer.
        entropy: mean entropy of the router's probabilities over the tokens that count, nats, scalar.
        bytes_sent: bytes that this rank sent to others in forward: rows with their choices, results, counts, and copies
            of experts. A Python integer, or a scalar tensor when summed over ranks (:func:`dmoe.reduce_metrics`); None
            without expert parallelism.
        naive_bytes_sent: bytes of the rows and results alone, had each choice of a token sent a copy; None without
            expert parallelism, and in its static mode.
        rows_dropped: rows on their way to other ranks, or to this one, that ``max_rows_received`` had no room for: one
            for each rank that a token did not come to, scalar integer; None outside the static mode.
        rank_rows: rows that each rank's experts compute, its copies of others' with them, those that share experts
            counted once, ``(O,)`` integer; None without ``balance_ranks``.
        rank_rows_unbalanced: what it would have been without copies.
        copies_hosted: experts of others that this rank computed, too; 0 without ``balance_ranks``.
    """

    tokens_per_expert: Tensor
    kept_per_expert: Tensor
    entropy: Tensor
    bytes_sent: int | Tensor | None = None
    naive_bytes_sent: int | Tensor | None = None
    rows_dropped: Tensor | None = None
    rank_rows: Tensor | None = None
    rank_rows_unbalanced: Tensor | None = None
    copies_hosted: int = 0

    @property
    def load(self) -> Tensor:
        """Share of the assignments each expert was given, ``(E,)`` float32, summing to 1."""
        return expert_load(self.tokens_per_expert)

    @property
    def dropped_share(self) -> Tensor:
        """Share of the assignments that were dropped, scalar float32."""
        return dropped_share(self.tokens_per_expert, self.kept_per_expert)

    @property
    def dead_experts(self) -> Tensor:
        """How many experts were given nothing, scalar integer."""
        return dead_experts(self.tokens_per_expert)


@torch.no_grad()
def metrics_of(routing: Routing, arrived: Sequence[Dispatched], kept_per_expert: Tensor | None) -> RoutingMetrics:
    """The record of one forward.

    Args:
        routing: of this rank's tokens.
        arrived: what was dispatched, in one piece or several.
        kept_per_expert: ``(E,)`` where the dispatch dropped more than the plan; None otherwise.
    """
    plan, probs = routing.plan, routing.router_probs
    if probs is None:
        entropy = routing.gate_weights.new_full((), math.log(plan.num_experts))
    else:
        entropy = routing_entropy(probs.detach(), routing.token_mask)
    kept = plan.kept_per_expert if kept_per_expert is None else kept_per_expert
    traffic = [each.traffic for each in arrived if each.traffic is not None]
    if not traffic:
        return RoutingMetrics(plan.tokens_per_expert, kept, entropy)
    naive = [each.naive_bytes_sent for each in traffic]
    total = None if None in naive else sum(number for number in naive if number is not None)
    sent = sum(each.bytes_sent for each in traffic)
    levels, copies = arrived[0].levels, arrived[0].copies
    dropped = [each.rows_dropped for each in arrived if each.rows_dropped is not None]
    return RoutingMetrics(
        plan.tokens_per_expert,
        kept,
        entropy,
        sent if copies is None else sent + copies.bytes_sent,
        total,
        rank_rows=None if levels is None else levels.rows,
        rank_rows_unbalanced=None if levels is None else levels.rows_before,
        rows_dropped=torch.stack(dropped).sum() if dropped else None,
        copies_hosted=0 if copies is None else copies.num_hosted,
    )


def expert_load(tokens_per_expert: Tensor) -> Tensor:
    """Each expert's share of the assignments, ``(E,)`` float32; zeros for an empty batch."""
    counts = tokens_per_expert.float()
    return counts / counts.sum().clamp(min=1)


def dropped_share(tokens_per_expert: Tensor, kept_per_expert: Tensor) -> Tensor:
    """``1 - kept / assigned`` over all experts, scalar float32 in [0, 1]; 0 for an empty batch."""
    assigned = tokens_per_expert.sum().float()
    return (assigned - kept_per_expert.sum().float()) / assigned.clamp(min=1)


def dead_experts(tokens_per_expert: Tensor) -> Tensor:
    """The number of experts without one assignment, scalar int64."""
    return (tokens_per_expert == 0).sum()


def routing_entropy(router_probs: Tensor, token_mask: Tensor | None = None) -> Tensor:
    """Mean over tokens of ``-sum_e p_e ln p_e``, nats, scalar: ln E when the router is undecided, 0 when certain.

    Args:
        router_probs: ``(T, E)``, rows summing to 1.
        token_mask: ``(T,)`` bool, True for tokens that count; None counts all.
    """
    per_token = torch.special.entr(router_probs).sum(-1, keepdim=True)
    if token_mask is None:
        return sum_tokens(per_token).squeeze(0) / max(per_token.shape[0], 1)
    counted = per_token.masked_fill(~token_mask.unsqueeze(1), 0)
    return sum_tokens(counted).squeeze(0) / token_mask.sum().clamp(min=1)


def choice_dropped_share(expert_indices: Tensor, token_to_rows: Tensor, num_experts: int) -> Tensor:
    """Share of the tokens whose k-th choice was dropped, ``(K,)`` float32 (fairseq's ``overflow_expertK`` / 100).

    Args:
        expert_indices: ``(T, K)``; ``num_experts`` marks a masked token, which was never a choice.
        token_to_rows: ``(T, K)`` of the plan, -1 where no row was made.
        num_experts: E.
    """
    dropped = (token_to_rows < 0) & (expert_indices != num_experts)
    return dropped.sum(0).float() / max(expert_indices.shape[0], 1)
