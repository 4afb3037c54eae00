"""One launch that ranks the experts by load and writes their tiles."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from dmoe.kernels._launch import launch

_CHUNK = 1024  # experts read at a time
_BLOCK = 128  # tiles written at a time


@triton.jit(do_not_specialize=["num_experts", "num_tiles", "tile_rows"])
def tile_table_kernel(
    offsets, tiles, experts_by_load, num_experts, num_tiles, tile_rows, CHUNK: tl.constexpr, BLOCK: tl.constexpr
):
    """One program an expert: it counts who ranks before it, which is where its own tiles go. Nothing is sorted."""
    expert = tl.program_id(0)
    begin = tl.load(offsets + expert)
    rows = tl.load(offsets + expert + 1) - begin
    rank = 0
    place = 0
    for start in range(0, num_experts, CHUNK):
        other = start + tl.arange(0, CHUNK)
        real = other < num_experts
        theirs = tl.load(offsets + other + 1, mask=real, other=0) - tl.load(offsets + other, mask=real, other=0)
        first = real & ((theirs > rows) | ((theirs == rows) & (other < expert)))
        rank += tl.sum(first.to(tl.int32))
        place += tl.sum(tl.where(first, tl.cdiv(theirs, tile_rows), 0))
    tl.store(experts_by_load + rank, expert)

    # The last in rank also clears what is behind its tiles. Stores stay in range whatever the offsets hold.
    count = tl.cdiv(rows, tile_rows)
    end = tl.where(rank == num_experts - 1, num_tiles, tl.minimum(place + count, num_tiles))
    for start in range(place, end, BLOCK):
        position = start + tl.arange(0, BLOCK)
        mine = position < place + count
        row = begin + (position - place) * tile_rows
        where = tiles + 2 * position.to(tl.int64)
        tl.store(where, tl.where(mine, expert, -1), mask=position < end)
        tl.store(where + 1, tl.where(mine, row, -1), mask=position < end)


def launch_tile_table(
    expert_offsets: torch.Tensor, tiles: torch.Tensor, experts_by_load: torch.Tensor, tile_rows: int
) -> None:
    """Fill ``tiles (M, 2)`` and ``experts_by_load (E,)`` from ``expert_offsets (E + 1,)``, all int32 and contiguous."""
    num_experts = experts_by_load.shape[0]
    launch(
        tile_table_kernel,
        (num_experts,),
        expert_offsets,
        tiles,
        experts_by_load,
        num_experts,
        tiles.shape[0],
        tile_rows,
        CHUNK=min(_CHUNK, triton.next_power_of_2(num_experts)),
        BLOCK=_BLOCK,
        num_warps=4,
        num_stages=1,
    )
