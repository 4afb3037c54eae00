"""``tile_table``: the work list of a grouped product, tiles of rows that never straddle two experts.

A program of the product takes one entry, so no host needs to know how the rows fell. Experts with most rows come first:
the long ones start early and the short ones fill the gaps at the end; an expert's tiles stay together, so its weights
stay in the cache.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dmoe.ops._checks import check_index_tensors
from dmoe.ops._library import define
from dmoe.ops._trust import Subject
from dmoe.sizes import smaller


def tile_bound(num_rows: int, num_experts: int, tile_rows: int) -> int:
    """Tiles that a table reserves: at least what any split of ``num_rows`` needs. The sizes may be symbolic.

    Only an expert with a row has a tile that is not full.
    """
    return num_rows // tile_rows + smaller(num_experts, num_rows)


def preferred_tile_rows(num_rows: int, num_experts: int) -> int:
    """Rows of a tile that fit an average expert: 128, 64, 32 or 16, from shapes alone.

    A tile that is not full still costs a whole one, and a tensor core takes 16 rows at least.
    """
    for rows, enough in ((128, 96), (64, 40), (32, 20)):
        if num_rows >= enough * num_experts:
            return rows
    return 16


def tile_table_ref(expert_offsets: Tensor, num_rows: int, tile_rows: int) -> tuple[Tensor, Tensor]:
    """The plain-PyTorch meaning of :func:`tile_table`."""
    num_experts = expert_offsets.shape[0] - 1
    by_load = torch.sort(expert_offsets.diff(), descending=True, stable=True).indices
    starts, rows = expert_offsets[by_load], expert_offsets.diff()[by_load]
    counts = (rows + tile_rows - 1) // tile_rows
    ends = counts.cumsum(0)
    position = torch.arange(tile_bound(num_rows, num_experts, tile_rows), device=expert_offsets.device)
    rank = torch.searchsorted(ends, position, right=True)  # a tile belongs to the first expert that ends behind it
    owner = rank.clamp(max=num_experts - 1)
    first = starts[owner] + (position - (ends - counts)[owner]) * tile_rows
    tiles = torch.stack((by_load[owner], first), dim=1)
    return tiles.masked_fill((rank == num_experts).unsqueeze(1), -1).int(), by_load.int()


def _fake(expert_offsets: Tensor, num_rows: int, tile_rows: int) -> tuple[Tensor, Tensor]:
    num_experts = expert_offsets.shape[0] - 1
    bound = tile_bound(num_rows, num_experts, tile_rows)
    return expert_offsets.new_empty((bound, 2)), expert_offsets.new_empty((num_experts,))


def tile_table_cuda(expert_offsets: Tensor, num_rows: int, tile_rows: int) -> tuple[Tensor, Tensor]:
    """The same in one launch."""
    from dmoe.kernels.tile_table import launch_tile_table

    tiles, by_load = _fake(expert_offsets, num_rows, tile_rows)
    launch_tile_table(expert_offsets.contiguous(), tiles, by_load, tile_rows)
    return tiles, by_load


_tile_table = define(
    "tile_table(Tensor expert_offsets, SymInt num_rows, int tile_rows) -> (Tensor tiles, Tensor experts_by_load)",
    tile_table_ref,
    fake=_fake,
    cuda=tile_table_cuda,
    subjects=lambda *arguments: [Subject("tile_table", arguments, kind=(arguments[2],))],
)


def tile_table(expert_offsets: Tensor, num_rows: int, tile_rows: int) -> tuple[Tensor, Tensor]:
    """Cut every expert's rows into tiles.

    Args:
        expert_offsets: first row of each expert, ``(E + 1,)`` int32 with a leading 0, E >= 1, not decreasing, at most
            ``num_rows``.
        num_rows: static bound of the rows, R.
        tile_rows: rows of one tile, at least 1; an expert's last tile may hold fewer.

    Returns:
        two int32 tensors:

        - tiles ``(M, 2)``, M = :func:`tile_bound`: expert and first row of each tile. Experts with most rows come
          first, equal ones by id; an expert's tiles stand together, in the order of its rows. -1 behind the last.
        - experts_by_load ``(E,)``: the experts in that order.

    Raises:
        TypeError: ``expert_offsets`` is not int32.
        ValueError: a shape or a number does not fit.
    """
    check_index_tensors("tile_table", expert_offsets.device, expert_offsets=expert_offsets)
    if expert_offsets.shape[0] < 2:
        raise ValueError(f"tile_table: expert_offsets: expected E + 1 >= 2 offsets, got {expert_offsets.shape[0]}")
    if tile_rows < 1 or num_rows < 0:
        raise ValueError(
            f"tile_table: expected tile_rows of at least 1 and num_rows of at least 0, got {tile_rows} and {num_rows}"
        )
    return _tile_table(expert_offsets, num_rows, tile_rows)
