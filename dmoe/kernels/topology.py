"""Index tensors of the experts' block-sparse activation, written by one launch without reading anything back."""

# mypy: disable-error-code="no-untyped-def"
# Triton gives a kernel's arguments their types when it is launched.

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from dmoe.kernels._launch import launch


@triton.jit(do_not_specialize=["row_blocks"])
def _expert_topology(
    expert_offsets,
    first_columns,
    row_indices,
    column_indices,
    offsets,
    column_indices_t,
    offsets_t,
    block_offsets_t,
    experts,
    width,
    columns,
    row_blocks,
    row_share,
    BLOCK_SIZE: tl.constexpr,
    EXPERTS: tl.constexpr,
    UNIFORM: tl.constexpr,
    HALVES: tl.constexpr,
    SIDE_BY_SIDE: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Programs 0 .. row_blocks write a block row each, the others a block column each; see ``expert_topology_ref``."""
    pid = tl.program_id(0)
    ids = tl.arange(0, EXPERTS)
    real = ids < experts
    begins = tl.load(expert_offsets + ids, mask=real, other=0).to(tl.int32) // BLOCK_SIZE
    ends = tl.load(expert_offsets + ids + 1, mask=real, other=0).to(tl.int32) // BLOCK_SIZE
    if UNIFORM:
        lefts = ids * width
        rights = lefts + width
    else:
        lefts = tl.load(first_columns + ids, mask=real, other=0)
        rights = tl.load(first_columns + ids + 1, mask=real, other=0)
    heights = ends - begins
    areas = heights * (rights - lefts)
    chunk = tl.arange(0, CHUNK)

    if pid <= row_blocks:
        expert = tl.sum((real & (ends <= pid)).to(tl.int32))
        here = ids == expert
        size = tl.sum(tl.where(here & real, rights - lefts, 0))
        left = tl.sum(tl.where(here & real, lefts, 0))
        first = tl.sum(tl.where(here & real, begins, 0))
        start = HALVES * (tl.sum(tl.where(real & (ids < expert), areas, 0)) + (pid - first) * size)
        tl.store(offsets + pid, start)
        for begin in range(0, size * HALVES, CHUNK):
            entry = begin + chunk
            half, at = entry % HALVES, entry // HALVES
            column = half * columns + left + at if SIDE_BY_SIDE else left * HALVES + half * size + at
            inside = entry < size * HALVES
            tl.store(row_indices + start + entry, tl.full((CHUNK,), 0, tl.int32) + pid, mask=inside)
            tl.store(column_indices + start + entry, column, mask=inside)
        if pid < row_blocks:
            used = HALVES * tl.sum(tl.where(real, areas, 0))
            nothing = tl.full((CHUNK,), -1, tl.int32)
            for begin in range(0, row_share, CHUNK):
                entry = pid * row_share + begin + chunk
                tail = (begin + chunk < row_share) & (entry >= used)
                tl.store(row_indices + entry, nothing, mask=tail)
                tl.store(column_indices + entry, nothing, mask=tail)
                tl.store(column_indices_t + entry, nothing, mask=tail)
                tl.store(block_offsets_t + entry, nothing, mask=tail)
    else:
        column = pid - row_blocks - 1
        if SIDE_BY_SIDE:
            half = column // columns
            column = column % columns
            expert = tl.sum((real & (rights <= column)).to(tl.int32))
        else:
            half = 0
            expert = tl.sum((real & (rights * HALVES <= column)).to(tl.int32))
        here = (ids == expert) & real
        size = tl.sum(tl.where(here, rights - lefts, 0))
        left = tl.sum(tl.where(here, lefts, 0))
        first = tl.sum(tl.where(here, begins, 0))
        height = tl.sum(tl.where(here, heights, 0))
        before = tl.sum(tl.where(real & (ids < expert), areas, 0))
        if SIDE_BY_SIDE:
            at = column - left
            start = half * tl.sum(tl.where(real, areas, 0)) + before + at * height
        else:
            at = column - left * HALVES
            start = HALVES * before + at * height
            half = at // tl.maximum(size, 1)
            at = at % tl.maximum(size, 1)
        tl.store(offsets_t + pid - row_blocks - 1, start)
        if pid == row_blocks + 1 + columns * HALVES:  # behind the last column: an end, and no blocks
            height = 0
        for begin in range(0, height, CHUNK):
            entry = begin + chunk
            tl.store(column_indices_t + start + entry, first + entry, mask=entry < height)
            position = (before + entry * size + at) * HALVES + half
            tl.store(block_offsets_t + start + entry, position, mask=entry < height)


def expert_topology(
    expert_offsets: Tensor,
    first_columns: Tensor | None,
    width: int,
    columns: int,
    block_size: int,
    num_row_blocks: int,
    halves: int,
    side_by_side: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See ``dmoe.ops.topology``. Sizes in blocks: ``width`` of the widest expert, ``columns`` of all together."""
    experts = expert_offsets.shape[0] - 1
    row_share = width * halves
    size = num_row_blocks * row_share
    lengths = (size, size, num_row_blocks + 1, size, columns * halves + 1, size)
    out = [expert_offsets.new_empty(length, dtype=expert_offsets.dtype) for length in lengths]
    launch(
        _expert_topology,
        (num_row_blocks + columns * halves + 2,),
        expert_offsets,
        expert_offsets if first_columns is None else first_columns,
        *out,
        experts,
        width,
        columns,
        num_row_blocks,
        row_share,
        BLOCK_SIZE=block_size,
        EXPERTS=triton.next_power_of_2(experts),
        UNIFORM=first_columns is None,
        HALVES=halves,
        SIDE_BY_SIDE=side_by_side,
        CHUNK=128,
        num_warps=4,
        num_stages=2,
    )
    return out[0], out[1], out[2], out[3], out[4], out[5]
