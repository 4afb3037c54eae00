"""A plan's rows, moved so that every expert begins at a block: one launch beside the one that clears the result."""

# mypy: disable-error-code="no-untyped-def"
# Triton gives a kernel's arguments their types when it is launched.

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from dmoe.kernels._launch import launch


@triton.jit(do_not_specialize=["row_blocks"])
def _pad_plan(
    expert_offsets,
    row_to_token,
    row_to_slot,
    token_offsets,
    padded_offsets,
    padded_token,
    padded_slot,
    padded_assignment,
    token_rows,
    experts,
    row_blocks,
    BLOCK_SIZE: tl.constexpr,
    EXPERTS: tl.constexpr,
):
    """Program r < row_blocks fills row block r; the last one writes the experts' first rows."""
    pid = tl.program_id(0)
    ids = tl.arange(0, EXPERTS)
    real = ids < experts
    begins = tl.load(expert_offsets + ids, mask=real, other=0)
    counts = tl.load(expert_offsets + ids + 1, mask=real, other=0) - begins
    heights = tl.cdiv(counts, BLOCK_SIZE)
    ends = tl.cumsum(heights, 0)
    if pid < row_blocks:
        expert = tl.sum((real & (ends <= pid)).to(tl.int32))
        here = real & (ids == expert)
        rank = (pid - tl.sum(tl.where(here, ends - heights, 0))) * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
        taken = rank < tl.sum(tl.where(here, counts, 0))
        old = tl.sum(tl.where(here, begins, 0)) + rank
        token = tl.load(row_to_token + old, mask=taken, other=-1)
        slot = tl.load(row_to_slot + old, mask=taken, other=-1)
        taken = taken & (token >= 0)
        assignment = tl.load(token_offsets + token, mask=taken, other=-1)
        assignment = tl.where(taken, assignment + slot, -1)
        row = pid * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
        tl.store(padded_token + row, token)
        tl.store(padded_slot + row, slot)
        tl.store(padded_assignment + row, assignment)
        tl.store(token_rows + assignment, row, mask=taken)  # an assignment has one row: no two programs write here
    else:
        tl.store(padded_offsets + ids, (ends - heights) * BLOCK_SIZE, mask=real)
        tl.store(padded_offsets + ids + 1, ends * BLOCK_SIZE, mask=ids == experts - 1)


def pad_plan(
    expert_offsets: Tensor,
    row_to_token: Tensor,
    row_to_slot: Tensor,
    token_offsets: Tensor,
    token_rows: Tensor,
    block_size: int,
    num_row_blocks: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See ``dmoe.ops.pad_plan``."""
    experts = expert_offsets.shape[0] - 1
    rows = num_row_blocks * block_size
    padded_offsets = expert_offsets.new_empty(experts + 1)
    token, slot, assignment = (expert_offsets.new_empty(rows) for _ in range(3))
    padded_token_rows = token_rows.new_full(token_rows.shape, -1)
    launch(
        _pad_plan,
        (num_row_blocks + 1,),
        expert_offsets,
        row_to_token,
        row_to_slot,
        token_offsets,
        padded_offsets,
        token,
        slot,
        assignment,
        padded_token_rows,
        experts,
        num_row_blocks,
        BLOCK_SIZE=block_size,
        EXPERTS=triton.next_power_of_2(experts),
        num_warps=4,
        num_stages=2,
    )
    return padded_offsets, token, slot, assignment, padded_token_rows
