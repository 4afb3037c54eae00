"""Tokens to the ranks of their experts and back: by dmoe's dispatcher, to the ranks where MegaBlocks has them.

::

    x (T, H) --> one row per (token, rank) --> this rank's experts: weighted, summed --> sum over a token's ranks (T, H)

MegaBlocks sends a row for every choice, and weighs the results where the token came from; here a token travels once to
each rank, whatever its choices, with their weights. Where S ranks share an expert (``W = E * S``), rank ``s * E + e``
has part s of expert e. To the dispatcher these are ``E * S`` experts, one on each rank, and a token that chose expert e
chose all of ``e, E + e, 2 E + e, ...``, whose results are terms of one sum.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction

import torch
from torch import Tensor

from dmoe.compat.megablocks.layers import mpu
from dmoe.compat.megablocks.layers.arguments import Arguments
from dmoe.ops.permute import unpermute
from dmoe.parallel import AllToAllDispatcher, Dispatched
from dmoe.parallel.agreement import check_agreement
from dmoe.parallel.collectives import all_reduce, outside_graphs
from dmoe.plan import plan_token_choice


def dispatcher_of(args: Arguments) -> AllToAllDispatcher:
    """The dispatcher of ``expert_parallel_group``; it holds no state."""
    experts = args.moe_num_experts * mpu.hidden_sharding_degree(args)
    return AllToAllDispatcher(mpu.group_of(args, "expert_parallel_group"), experts)


def sharing_ranks(args: Arguments) -> AllToAllDispatcher | None:
    """The ranks that share a layer's experts, as :mod:`dmoe.parallel` asks for them; None where one rank has all.

    Under weight parallelism too, where nothing is dispatched.
    """
    if mpu.get_expert_parallel_world_size(args) > 1:
        return dispatcher_of(args)
    ranks = mpu.get_weight_parallel_world_size(args)
    return AllToAllDispatcher(mpu.group_of(args, "weight_parallel_group"), ranks) if ranks > 1 else None


def through_ranks(
    args: Arguments,
    x: Tensor,
    expert_weights: Tensor,
    top_experts: Tensor,
    experts: Callable[[Dispatched], Tensor],
    capacity: Callable[[], int | None],
) -> Tensor:
    """Tokens through their experts, wherever these are, weighted and summed.

    Args:
        args: with expert parallelism over several ranks.
        x: ``(T, H)``, this rank's tokens; ranks may have any number.
        expert_weights, top_experts: ``(T, K)``.
        experts: this rank's, from the rows that arrived to the weighted sum of each, ``(R', H)``.
        capacity: rows that one expert takes of all ranks' tokens: those of rank 0 first, each rank's in order; None is
            all. Called while rows travel.

    Returns:
        ``(T, H)``.

    Raises:
        ValueError: on every rank, rows that differ between ranks in width, dtype, K or the need of a gradient.
    """
    dispatcher, shards = dispatcher_of(args), mpu.hidden_sharding_degree(args)
    if shards > 1:
        part = torch.arange(shards, device=x.device, dtype=top_experts.dtype) * args.moe_num_experts
        top_experts = (top_experts.unsqueeze(1) + part.view(-1, 1)).flatten(1)
        expert_weights = expert_weights.unsqueeze(1).expand(-1, shards, -1).flatten(1)
    going = dispatcher.start_dispatch(x, top_experts, expert_weights)
    rows = capacity()
    arrived = dispatcher.finish_dispatch(going)
    if rows is not None:
        arrived = _with_capacity(arrived, rows)
    return dispatcher.combine(experts(arrived), arrived)


def _with_capacity(arrived: Dispatched, capacity: int) -> Dispatched:
    """The same rows, of which each expert takes the first ``capacity``."""
    plan = arrived.plan
    expert = torch.searchsorted(plan.expert_offsets[1:].contiguous(), plan.token_rows.clamp(min=0), right=True)
    ids = torch.where(plan.token_rows < 0, plan.num_experts, expert).view(arrived.gate_weights.shape)
    return replace(arrived, plan=plan_token_choice(ids, plan.num_experts, capacity=capacity))


def rows_by_steps(arrived: Dispatched, permute_and_compute: Callable[..., Tensor]) -> Tensor:
    """Rows that arrived through a layer's own step, as MegaBlocks calls it: a row for each assignment, no weights.

    Args:
        arrived: rows ``(R', H)``, their plan and weights.
        permute_and_compute: that of the layer.

    Returns:
        The weighted sum of each row, ``(R', H)``.
    """
    plan = arrived.plan
    with torch.no_grad():
        bins, counts = plan.expert_offsets[1:], plan.expert_offsets.diff()
        bin_ids = torch.arange(len(counts), dtype=torch.int32, device=bins.device).repeat_interleave(counts)
        indices = torch.arange(bin_ids.shape[0], dtype=torch.int32, device=bins.device)
        capacity = int(counts.max())
    rows = arrived.x.index_select(0, plan.row_to_token[: bin_ids.shape[0]])
    rows = permute_and_compute(rows, counts, indices, bin_ids, None, bins, capacity, 1)
    places = (plan.row_to_token, plan.row_to_slot, plan.token_offsets, plan.token_rows)
    return unpermute(rows, arrived.gate_weights, *places)


@outside_graphs
def mean_tokens(args: Arguments, tokens: int, device: torch.device) -> int | Fraction:
    """Tokens of all ranks over the number of ranks, exactly: the host waits for their sum."""
    total = torch.tensor(tokens, device=device)
    all_reduce(total, "numbers of tokens", mpu.group_of(args, "expert_parallel_group"))
    mean = Fraction(int(total), mpu.get_expert_parallel_world_size(args))
    return mean.numerator if mean.denominator == 1 else mean


def check_ranks(layer: str, args: Arguments) -> None:
    """Ask once whether all ranks run the same layer.

    Raises:
        ValueError: on every rank, when they do not.
    """
    same = (
        *("hidden_size", "ffn_hidden_size", "moe_num_experts", "moe_top_k", "moe_capacity_factor"),
        *("mlp_type", "fp16", "bf16"),
    )
    group = mpu.group_of(args, "expert_parallel_group")
    check_agreement(layer, {name: getattr(args, name) for name in same}, group, {})
