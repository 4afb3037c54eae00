"""The plan: which row belongs to which token and expert. Built once per forward, frozen, without reading a device."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, get_args

import torch
from torch import Tensor

from dmoe.config import DropOrder
from dmoe.ops.cumsum import exclusive_cumsum
from dmoe.ops.histogram import histogram
from dmoe.ops.routing_plan import routing_plan
from dmoe.ops.sort import sort
from dmoe.ops.tile_table import preferred_tile_rows, tile_table

_BY_PRIORITY = ("batch_prioritized", "gate_weight", "normalized_gate_weight", "random")


@dataclass(frozen=True)
class RoutingPlan:
    """Rows sorted by expert, and how tokens find theirs. All index tensors are int32; -1 means "nothing here".

    Lengths are static bounds; ``expert_offsets[-1]`` is how many rows are in use. N counts assignments: T * K for token
    choice, E * C for Expert Choice; R bounds the rows.

    Attributes:
        row_to_token: token of each row, ``(R,)``.
        row_to_slot: which of its token's assignments a row is, ``(R,)``.
        expert_offsets: first row of each expert, ``(E + 1,)`` with a leading 0.
        token_offsets: first assignment of each token, ``(T + 1,)`` with a leading 0.
        token_rows: row of each assignment, token by token, ``(N,)``; -1 where it was dropped.
        tokens_per_expert: assignments per expert before any drop, ``(E,)``.
        capacity: the most rows an expert keeps; None when nothing is dropped.
        top_k: K, when every token has the same number of assignments.
        tiles: the work of a grouped product, ``(M, 2)``: expert and first row of each tile of ``tile_rows`` rows, the
            experts with most rows first; expert -1 behind the last tile. None when nobody has asked for it.
        experts_by_load: experts from most to fewest rows, equal ones by id, ``(E,)``; None likewise.
        tile_rows: rows of one tile.
        kept: rows that each expert computes, ``(E,)``, where they are not the first ``capacity`` of its assignments.
    """

    row_to_token: Tensor
    row_to_slot: Tensor
    expert_offsets: Tensor
    token_offsets: Tensor
    token_rows: Tensor
    tokens_per_expert: Tensor
    capacity: int | None = None
    top_k: int | None = None
    tiles: Tensor | None = None
    experts_by_load: Tensor | None = None
    tile_rows: int = 0
    kept: Tensor | None = None

    @property
    def num_tokens(self) -> int:
        """T."""
        return self.token_offsets.shape[0] - 1

    @property
    def num_experts(self) -> int:
        """E."""
        return self.tokens_per_expert.shape[0]

    @property
    def num_rows(self) -> int:
        """R, the static bound."""
        return self.row_to_token.shape[0]

    @property
    def token_to_rows(self) -> Tensor:
        """Rows of each token, ``(T, K)``, -1 where dropped: a view of ``token_rows``.

        Raises:
            ValueError: tokens have different numbers of assignments (Expert Choice).
        """
        if self.top_k is None:
            raise ValueError(
                "RoutingPlan: token_to_rows: tokens have no common K here; use token_offsets and token_rows"
            )
        return self.token_rows.view(self.num_tokens, self.top_k)

    @property
    def kept_per_expert(self) -> Tensor:
        """Rows that each expert computes, ``(E,)``, padding not counted."""
        if self.kept is not None:
            return self.kept
        return self.tokens_per_expert if self.capacity is None else self.tokens_per_expert.clamp(max=self.capacity)


def plan_token_choice(
    expert_indices: Tensor,
    num_experts: int,
    *,
    capacity: int | None = None,
    drop_order: DropOrder = "token_major",
    priority: Tensor | None = None,
    block_size: int = 1,
    binned: bool = False,
    tile_rows: int = 0,
    token_groups: int = 1,
) -> RoutingPlan:
    """Plan for tokens that chose their experts.

    Args:
        expert_indices: ``(T, K)`` int32 or int64 in [0, E]; E marks a choice that takes no row.
        num_experts: E.
        capacity: the most rows one expert takes; None drops nothing.
        drop_order: which assignments come first where a capacity binds; see :class:`dmoe.MoEConfig`.
        priority: scores of the choices, ``(T, K)``; needed by ``batch_prioritized``, by ``random`` (which keeps those
            that drew most), and by the two orders by gate weight, which differ in what the caller gives here.
        block_size: round each expert's rows up to a multiple of this.
        binned: give every expert exactly ``capacity`` rows, so that they form an ``(E, capacity, H)`` batch.
        tile_rows: also cut the rows into tiles of so many, see :func:`device_tile_rows`; 0 does not.
        token_groups: the capacity is of each of so many groups of consecutive tokens, equally large (GShard's G).

    Returns:
        A plan whose rows stand in visiting order inside each expert (and group); ties in priority keep token order.

    Raises:
        ValueError: shapes or values that do not fit, a missing priority, or tokens that are no equal groups.
        RuntimeError: on the CPU, an id outside [0, E].
    """
    if expert_indices.dim() != 2:
        raise ValueError(f"plan_token_choice: expert_indices: expected shape (T, K), got {tuple(expert_indices.shape)}")
    if drop_order not in get_args(DropOrder):
        raise ValueError(f"plan_token_choice: drop_order: expected one of {get_args(DropOrder)}, got {drop_order!r}")
    num_tokens, top_k = expert_indices.shape
    token_order, choices = None, expert_indices
    if capacity is not None and token_groups > 1:
        return _plan_in_groups(
            expert_indices,
            num_experts,
            token_groups,
            capacity=capacity,
            drop_order=drop_order,
            priority=priority,
            tile_rows=tile_rows,
        )
    if capacity is not None and drop_order in _BY_PRIORITY:
        if priority is None or priority.shape != expert_indices.shape:
            got = None if priority is None else tuple(priority.shape)
            raise ValueError(f"plan_token_choice: priority: {drop_order} needs shape {(num_tokens, top_k)}, got {got}")
        if drop_order == "batch_prioritized":
            token_order = _descending(priority.amax(1))
        else:  # every assignment is ranked on its own: T * K tokens with one choice each
            token_order, choices = _descending(priority.flatten()), expert_indices.reshape(-1, 1)

    row_to_token, row_to_slot, expert_offsets, token_rows, tokens_per_expert, tiles, by_load = routing_plan(
        choices,
        num_experts,
        block_size=block_size,
        capacity=capacity,
        choice_major=drop_order in ("choice_major", "batch_prioritized"),
        token_order=token_order,
        binned=binned,
        tile_rows=tile_rows,
    )
    if choices is not expert_indices:
        real = row_to_token >= 0
        row_to_slot = torch.where(real, row_to_token % top_k, row_to_token)
        row_to_token = torch.where(real, row_to_token // top_k, row_to_token)
    token_offsets = torch.arange(0, num_tokens * top_k + 1, top_k, dtype=torch.int32, device=expert_indices.device)
    return RoutingPlan(
        row_to_token,
        row_to_slot,
        expert_offsets,
        token_offsets,
        token_rows,
        tokens_per_expert,
        capacity,
        top_k,
        tiles=tiles if tile_rows else None,
        experts_by_load=by_load if tile_rows else None,
        tile_rows=tile_rows,
    )


def check_token_groups(operation: str, num_tokens: int, groups: int) -> None:
    """Raise ValueError unless so many tokens are ``groups`` groups of one size."""
    if num_tokens % groups:
        raise ValueError(
            f"{operation}: token_groups: expected a divisor of the number of tokens, {num_tokens}, got {groups}"
        )


def _plan_in_groups(
    expert_indices: Tensor, num_experts: int, groups: int, *, capacity: int, tile_rows: int, **how: Any
) -> RoutingPlan:
    """A capacity for each group: G experts of which each takes one group's tokens stand for one."""
    num_tokens = expert_indices.shape[0]
    check_token_groups("plan_token_choice", num_tokens, groups)
    each = torch.arange(groups, dtype=expert_indices.dtype, device=expert_indices.device)
    group = each.repeat_interleave(num_tokens // groups, output_size=num_tokens).unsqueeze(1)
    inside = (expert_indices >= 0) & (expert_indices < num_experts)
    apart = torch.where(inside, expert_indices * groups + group, num_experts * groups)
    plan = plan_token_choice(apart, num_experts * groups, capacity=capacity, **how)
    offsets = plan.expert_offsets[::groups].contiguous()
    counts = plan.tokens_per_expert.view(num_experts, groups)
    tiles, by_load = tile_table(offsets, plan.num_rows, tile_rows) if tile_rows else (None, None)
    return replace(
        plan,
        expert_offsets=offsets,
        tokens_per_expert=counts.sum(1, dtype=torch.int32),
        tiles=tiles,
        experts_by_load=by_load,
        tile_rows=tile_rows,
        kept=offsets.diff(),
    )


def plan_expert_choice(token_indices: Tensor, num_tokens: int, *, tile_rows: int = 0) -> RoutingPlan:
    """Plan for experts that chose their tokens (Zhou et al. 2022).

    Args:
        token_indices: ``(E, C)`` integer in [0, T): the tokens of each expert; -1 marks an unused place.
        num_tokens: T.
        tile_rows: also cut the rows into tiles of so many, see :func:`device_tile_rows`; 0 does not.

    Returns:
        A plan of E * C rows, C for every expert; a token's assignments stand in the order of its experts.
    """
    num_experts, per_expert = token_indices.shape
    device = token_indices.device
    row_to_token = token_indices.to(torch.int32).flatten()
    # Places without a token are sorted behind the last one and belong to nobody.
    keys = torch.where(row_to_token < 0, num_tokens, row_to_token)
    # While tracing the number may be a symbol, which has no bits to count; all of them sort as well.
    _, order = sort(keys, end_bit=None if torch.compiler.is_compiling() else max(num_tokens.bit_length(), 1))
    counts = histogram(keys, num_tokens + 1)
    starts = exclusive_cumsum(counts, 0)
    position = torch.empty_like(order)
    position[order.long()] = torch.arange(order.shape[0], dtype=torch.int32, device=device)
    real = row_to_token >= 0
    row_to_slot = torch.where(real, position - starts[keys.long()], -1).to(torch.int32)
    token_rows = torch.where(keys[order.long()] < num_tokens, order, -1)
    offsets = torch.arange(num_experts + 1, dtype=torch.int32, device=device) * per_expert
    kept = real.view(num_experts, per_expert).sum(1, dtype=torch.int32)
    tiles, by_load = tile_table(offsets, num_experts * per_expert, tile_rows) if tile_rows else (None, None)
    return RoutingPlan(
        row_to_token,
        row_to_slot,
        offsets,
        starts,
        token_rows,
        kept,
        tiles=tiles,
        experts_by_load=by_load,
        tile_rows=tile_rows,
    )


def device_tile_rows(device: torch.device, num_assignments: int, num_experts: int) -> int:
    """The ``tile_rows`` that the products on a device want of a plan: 0 on the CPU, where nothing reads tiles."""
    return preferred_tile_rows(num_assignments, num_experts) if device.type == "cuda" else 0


def _descending(values: Tensor) -> Tensor:
    """Positions of the values from largest to smallest, equal ones in order, int32."""
    return torch.sort(values.detach(), stable=True, descending=True).indices.to(torch.int32)


def sort_by_group(plan: RoutingPlan, group_of_token: Tensor, num_groups: int) -> tuple[RoutingPlan, Tensor]:
    """The same routing with each expert's rows sorted by a group of their tokens, as adapters of several tenants need.

    Args:
        plan: any.
        group_of_token: ``(T,)`` integers in [0, G); rows of any other token, and of none, come last in their expert.
        num_groups: G.

    Returns:
        The plan, without tiles, and the first row of each group of each expert, ``(E * (G + 1) + 1,)`` int32 with a
        leading 0: expert by expert the G groups, then the rest.
    """
    each = num_groups + 1
    rows = torch.arange(plan.num_rows, device=plan.row_to_token.device, dtype=torch.int32)
    expert = torch.searchsorted(plan.expert_offsets[1:].contiguous(), rows, right=True)  # E behind the last one's rows
    groups = group_of_token.long() if group_of_token.numel() else group_of_token.new_full((1,), -1, dtype=torch.long)
    group = groups[plan.row_to_token.clamp(min=0).long()]
    outside = (plan.row_to_token < 0) | (group < 0) | (group >= num_groups)
    key = expert * each + group.masked_fill(outside, num_groups)
    key, order = torch.sort(key.masked_fill(expert >= plan.num_experts, plan.num_experts * each), stable=True)
    bounds = torch.arange(plan.num_experts * each + 1, device=key.device)
    offsets = torch.searchsorted(key, bounds).to(torch.int32)
    place = torch.empty_like(rows)
    place[order] = rows
    token_rows = plan.token_rows
    if place.numel():
        token_rows = torch.where(token_rows < 0, token_rows, place[token_rows.clamp(min=0).long()])
    moved = replace(
        plan,
        row_to_token=plan.row_to_token[order],
        row_to_slot=plan.row_to_slot[order],
        token_rows=token_rows,
        tiles=None,
        experts_by_load=None,
        tile_rows=0,
    )
    return moved, offsets
