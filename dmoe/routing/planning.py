"""From chosen experts to a plan: the capacity, whose tokens share it, and who is dropped first."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from dmoe.config import MoEConfig
from dmoe.ops.gate_weights import gate_weights
from dmoe.ops.router_top_k import TopKRule
from dmoe.plan import RoutingPlan, check_token_groups, device_tile_rows, plan_token_choice
from dmoe.routing import noise
from dmoe.routing.over_ranks import keep_within
from dmoe.sizes import larger


def plan_choices(
    expert_indices: Tensor,
    scores: Tensor,
    config: MoEConfig,
    *,
    capacity: int | None,
    groups: int = 1,
    rule: TopKRule | None = None,
    ranks: Any = None,
    of_choices: bool = False,
) -> RoutingPlan:
    """The plan of what tokens chose, under a config's capacity.

    Args:
        expert_indices: ``(T, K)`` integer in [0, E]; E takes no row.
        scores: ``(T, E)``; what orders by priority look at.
        config: E, and the order of drops.
        capacity: the most rows of an expert (and group), from :meth:`dmoe.MoEConfig.capacity_for`; None drops nothing.
        groups: of consecutive tokens, each with a capacity of its own.
        rule: whose norm ``normalized_gate_weight`` means; None is none.
        ranks: whose tokens share the capacity with ``capacity_over="group"``; None is this rank alone.
        of_choices: ``scores`` are ``(T, K)``, those of the choices alone.
    """
    num_experts = config.num_experts
    tile_rows = device_tile_rows(scores.device, expert_indices.numel(), num_experts)
    if capacity is None:
        return plan_token_choice(expert_indices, num_experts, tile_rows=tile_rows)
    if config.capacity_over == "group" and ranks is not None:
        choice_major = config.drop_order == "choice_major"
        kept, counts = keep_within(expert_indices, num_experts, capacity, ranks, choice_major=choice_major)
        plan = plan_token_choice(kept, num_experts, tile_rows=tile_rows)
        return replace(plan, tokens_per_expert=counts, capacity=capacity, kept=plan.tokens_per_expert)
    return plan_token_choice(
        expert_indices,
        num_experts,
        capacity=capacity,
        drop_order=config.drop_order,
        priority=_priority(expert_indices, scores.detach(), config, rule, of_choices),
        tile_rows=tile_rows,
        token_groups=groups,
    )


def plan_of_choices(expert_indices: Tensor, weights: Tensor, router: Any, num_sequences: int = 1) -> RoutingPlan:
    """:func:`plan_choices` for a router without scores: capacity, groups and ranks as its config says.

    Args:
        expert_indices: ``(T, K)`` integer in [0, E].
        weights: ``(T, K)`` of the choices.
        router: a module with ``config``, ``training`` and ``ranks``.
        num_sequences: equally long ones that the tokens are.
    """
    config: MoEConfig = router.config
    num_tokens = expert_indices.shape[0]
    groups = groups_of(config, num_tokens, num_sequences)
    capacity = config.capacity_for(tokens_sharing(config, num_tokens // groups, router.ranks), router.training)
    return plan_choices(
        expert_indices, weights, config, capacity=capacity, groups=groups, ranks=router.ranks, of_choices=True
    )


def groups_of(config: MoEConfig, num_tokens: int, num_sequences: int) -> int:
    """In how many groups capacities and losses are counted; says so where the tokens are no equal groups."""
    if config.token_groups == 1:
        return 1
    # A batch of no sequence is one group of no token.
    groups = larger(num_sequences, 1) if config.token_groups == "sequence" else config.token_groups
    assert not isinstance(groups, str)
    check_token_groups("MoE", num_tokens, groups)
    return groups


def tokens_sharing(config: MoEConfig, num_tokens: int, ranks: Any) -> int:
    """How many tokens share a capacity: these, or as many of each rank."""
    return num_tokens * ranks.num_ranks if config.capacity_over == "group" and ranks is not None else num_tokens


def _priority(
    expert_indices: Tensor, scores: Tensor, config: MoEConfig, rule: TopKRule | None, of_choices: bool
) -> Tensor | None:
    if config.drop_order in ("token_major", "choice_major"):
        return None
    if config.drop_order == "random":  # a number for each token and expert, as DeepSpeed draws them
        drawn = noise.uniform(scores)
        last = config.num_experts - 1
        return drawn if of_choices else drawn.gather(1, expert_indices.long().clamp(max=last))
    if of_choices:
        return scores
    norm = rule.normalization if rule is not None and config.drop_order == "normalized_gate_weight" else 0.0
    return gate_weights(scores, expert_indices, normalization=norm or None)
