"""Where rows go and what they are told: pure functions of the choices, without a word to another rank."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from dmoe.ops.histogram import histogram
from dmoe.ops.permute import permute
from dmoe.ops.tile_table import tile_bound
from dmoe.plan import RoutingPlan


def once_per_rank(choices: Tensor, num_local_experts: int, num_ranks: int) -> Tensor:
    """The ranks that each token goes to, each once, in ascending order; ``num_ranks`` fills up.

    Args:
        choices: ``(T, K)`` int32 in [0, E]; E marks a choice that takes no expert.
        num_local_experts: E / W.
        num_ranks: W.

    Returns:
        ``(T, min(K, W))`` int32 in [0, W].
    """
    ranks = choices // num_local_experts
    if num_ranks < ranks.shape[1]:
        every = torch.arange(num_ranks, dtype=ranks.dtype, device=ranks.device)
        chosen = (ranks.unsqueeze(2) == every).any(1)
        return torch.where(chosen, every, num_ranks)
    ranks = ranks.sort(1).values
    again = ranks[:, 1:] == ranks[:, :-1]
    return torch.cat([ranks[:, :1], ranks[:, 1:].masked_fill(again, num_ranks)], 1)


def destinations_of(choices: Tensor, num_local_experts: int, num_ranks: int, shards: int) -> Tensor:
    """As :func:`once_per_rank`, where ``shards`` ranks in a row share their experts: a token goes to all of them.

    Returns:
        ``(T, min(K, W / shards) * shards)`` int32 in [0, W], the ranks of a token in ascending order but for the
        fillers.
    """
    owners = once_per_rank(choices, num_local_experts, num_ranks // shards)
    if shards == 1:
        return owners
    shard = torch.arange(shards, dtype=owners.dtype, device=owners.device)
    return (owners.unsqueeze(2) * shards + shard).clamp(max=num_ranks).flatten(1)


def choices_of_rows(choices: Tensor, gates: Tensor, way: RoutingPlan, num_local_experts: int, shards: int) -> Tensor:
    """What travels beside each row: K gate weights, then K ids of its rank's experts; ``(R, 2 K)``.

    An id of ``num_local_experts`` says "not here", and its weight is not read. Ids travel as numbers in the dtype of
    the weights, exact in float32 up to 2**24, so that both are one exchange.

    Args:
        choices: ``(T, K)`` int32 in [0, E].
        gates: ``(T, K)`` floating point; carries the gradient.
        way: the plan of the tokens, with ranks as experts.
        num_local_experts: experts of one rank.
        shards: ranks in a row that share their experts.
    """
    each, index = num_local_experts, (way.row_to_token, way.token_offsets, way.token_rows)
    position = torch.arange(way.num_rows, dtype=torch.int32, device=choices.device)
    rank = torch.searchsorted(way.expert_offsets[1:].contiguous(), position, right=True)
    local = permute(choices, *index) - (rank // shards * each).unsqueeze(1)
    here = (local >= 0) & (local < each) & (way.row_to_token >= 0).unsqueeze(1)
    weights = permute(gates, *index)
    return torch.cat([weights, local.masked_fill(~here, each).to(weights.dtype)], 1)


def kept_per_expert(
    choices: Tensor, destinations: Tensor, way: RoutingPlan, num_local_experts: int, shards: int
) -> Tensor:
    """Choices of each expert whose token found room on its way, ``(E,)``.

    The ranks that share an expert are sent the same tokens, so that what one has no room for, none has.
    """
    owners = way.num_experts // shards
    num_experts = owners * num_local_experts
    lost = way.token_rows.view(destinations.shape)[:, ::shards] < 0
    nowhere = torch.where(lost, destinations[:, ::shards] // shards, -1)  # fillers match choices of no expert
    gone = ((choices // num_local_experts).unsqueeze(2) == nowhere.unsqueeze(1)).any(2)
    return histogram(choices.masked_fill(gone, num_experts).flatten(), num_experts + 1)[:num_experts]


def shortened(plan: RoutingPlan, num_rows: int) -> RoutingPlan:
    """A plan with no more rows than are in use: all K choices of a row are rarely on one rank."""
    tiles = plan.tiles
    if tiles is not None:
        tiles = tiles[: tile_bound(num_rows, plan.num_experts, plan.tile_rows)]
    return replace(
        plan, row_to_token=plan.row_to_token[:num_rows], row_to_slot=plan.row_to_slot[:num_rows], tiles=tiles
    )


def choices_of_plan(plan: RoutingPlan | None, gate_weights: Tensor) -> tuple[Tensor, Tensor]:
    """Experts that chose tokens, as choices of the tokens: each token has a place for every expert.

    Args:
        plan: of T tokens and E experts, in which a token has any number of experts.
        gate_weights: one per assignment of ``plan``, ``(N,)``. Carries the gradient.

    Returns:
        ``(T, E)`` int32, expert e or E in column e; and their weights, ``(T, E)``, 0 where there is none.

    Raises:
        ValueError: no plan.
    """
    if plan is None:
        raise ValueError("dispatch: expected expert_indices (T, K), or the plan of experts that chose, got neither")
    tokens, experts = plan.num_tokens, plan.num_experts
    unused = plan.token_rows < 0
    row = plan.token_rows.clamp(min=0)
    expert = torch.searchsorted(plan.expert_offsets[1:].contiguous(), row, right=True).clamp(max=experts - 1)
    token = row if plan.num_rows == 0 else plan.row_to_token[row.long()].clamp(min=0)
    place = (token.long() * experts + expert).masked_fill(unused, tokens * experts)
    ids = torch.full((tokens * experts + 1,), experts, dtype=torch.int32, device=place.device)
    ids = ids.scatter(0, place, expert.int())[:-1]
    weights = gate_weights.new_zeros(tokens * experts + 1).scatter(0, place, gate_weights.flatten())[:-1]
    return ids.view(tokens, experts), weights.view(tokens, experts)
