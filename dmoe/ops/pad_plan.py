"""A packed plan, turned into one whose experts begin at multiples of a block size, without reading the device.

The block-sparse backend makes its plan from the layer's, so that routers, dispatchers and losses know nothing of
blocks, and every kind of plan (packed, with a capacity, with holes, Expert Choice) takes the same way.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dmoe.ops._library import on_gpu
from dmoe.ops._trust import Guard, on_its_own_arguments
from dmoe.ops.routing_plan import row_bound


class PaddedPlan(NamedTuple):
    """Index tensors of a padded plan, int32; -1 means "nothing here".

    Attributes:
        expert_offsets: ``(E + 1,)``, multiples of the block size.
        row_to_token, row_to_slot: ``(R',)``, -1 in padding.
        row_to_assignment: ``(R',)``: which entry of ``token_rows`` a row is, -1 in padding.
        token_rows: ``(N,)``: row of each assignment, -1 where dropped.
    """

    expert_offsets: Tensor
    row_to_token: Tensor
    row_to_slot: Tensor
    row_to_assignment: Tensor
    token_rows: Tensor


def padded_row_blocks(num_rows: int, num_experts: int, block_size: int) -> int:
    """Row blocks that :func:`pad_plan` reserves: the most that any routing of ``num_rows`` rows can use."""
    return row_bound(num_rows, num_experts, block_size=block_size) // block_size


def pad_plan_ref(
    expert_offsets: Tensor,
    row_to_token: Tensor,
    row_to_slot: Tensor,
    token_offsets: Tensor,
    token_rows: Tensor,
    block_size: int,
    num_row_blocks: int,
) -> PaddedPlan:
    """What :func:`pad_plan` computes, in plain PyTorch."""
    device, experts = expert_offsets.device, expert_offsets.shape[0] - 1
    begins = expert_offsets.long()
    counts = begins.diff()
    ends = ((counts + block_size - 1) // block_size * block_size).cumsum(0)
    padded = torch.cat((ends.new_zeros(1), ends))

    row = torch.arange(num_row_blocks * block_size, device=device)
    expert = torch.searchsorted(ends, row, right=True)
    behind = expert == experts
    expert = expert.clamp(max=experts - 1)
    rank = row - padded[expert]
    taken = (rank < counts[expert]) & ~behind
    old = (begins[expert] + rank).masked_fill(~taken, 0)
    if row_to_token.shape[0]:
        token, slot = row_to_token[old].masked_fill(~taken, -1), row_to_slot[old].masked_fill(~taken, -1)
    else:
        token = slot = torch.full_like(row, -1, dtype=torch.int32)
    held = token >= 0
    assignment = torch.where(held, token_offsets[token.clamp(min=0).long()] + slot, -1).to(torch.int32)

    of_row = torch.searchsorted(begins[1:].contiguous(), token_rows.long(), right=True).clamp(max=experts - 1)
    moved = token_rows + padded[of_row] - begins[of_row]
    return PaddedPlan(
        padded.to(torch.int32), token, slot, assignment, torch.where(token_rows >= 0, moved, -1).to(torch.int32)
    )


def pad_plan_cuda(*arguments: Tensor | int) -> PaddedPlan:
    """:func:`pad_plan` on CUDA."""
    from dmoe.kernels import pad_plan as kernels

    return PaddedPlan(*kernels.pad_plan(*arguments))  # type: ignore[arg-type]


_on_cuda = Guard("pad_plan", pad_plan_cuda, pad_plan_ref, on_its_own_arguments("pad_plan", lengths=True))


def pad_plan(
    expert_offsets: Tensor,
    row_to_token: Tensor,
    row_to_slot: Tensor,
    token_offsets: Tensor,
    token_rows: Tensor,
    block_size: int,
) -> PaddedPlan:
    """Round every expert's rows up to whole blocks. An expert without rows takes none.

    Args:
        expert_offsets, row_to_token, row_to_slot, token_offsets, token_rows: of a :class:`dmoe.RoutingPlan`, int32.
        block_size: rows of a block, a power of two.

    Returns:
        :class:`PaddedPlan` with ``R' = row_bound(R, E, block_size=block_size)`` rows; rows keep their order.
    """
    blocks = padded_row_blocks(row_to_token.shape[0], expert_offsets.shape[0] - 1, block_size)
    run = _on_cuda if on_gpu(expert_offsets) else pad_plan_ref
    return run(expert_offsets, row_to_token, row_to_slot, token_offsets, token_rows, block_size, blocks)
