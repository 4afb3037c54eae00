"""``topology``: which blocks of a block-sparse activation are not zero, from a padded plan (MegaBlocks, 2022)."""

from __future__ import annotations

import torch
from torch import Tensor

from dmoe.ops._library import define


def topology_ref(expert_offsets: Tensor, block_size: int, ffn_blocks_per_expert: int, num_row_blocks: int) -> Tensor:
    """What :func:`topology` computes, in plain PyTorch."""
    E = expert_offsets.shape[0] - 1
    if expert_offsets.device.type == "cpu":
        before = 0
        for e, offset in enumerate(expert_offsets.tolist()):
            fits = offset == 0 if e == 0 else before <= offset <= num_row_blocks * block_size
            if not fits or offset % block_size != 0:
                raise RuntimeError(
                    f"dmoe::topology: expert_offsets[{e}]: expected a multiple of block_size {block_size} in "
                    f"{before} .. {num_row_blocks * block_size if e else 0} (never falling), got {offset}"
                )
            before = offset
    device = expert_offsets.device
    first_row = torch.arange(num_row_blocks, device=device) * block_size
    expert = torch.searchsorted(expert_offsets[1:].long().contiguous(), first_row, right=True)[:, None]
    columns = expert * ffn_blocks_per_expert + torch.arange(ffn_blocks_per_expert, device=device)
    return torch.where(expert < E, columns, -1).reshape(-1).int()


def _fake(expert_offsets: Tensor, block_size: int, ffn_blocks_per_expert: int, num_row_blocks: int) -> Tensor:
    return expert_offsets.new_empty((num_row_blocks * ffn_blocks_per_expert,), dtype=torch.int32)


_topology = define(
    "topology(Tensor expert_offsets, int block_size, int ffn_blocks_per_expert, int num_row_blocks) -> Tensor",
    topology_ref,
    fake=_fake,
)


def topology(expert_offsets: Tensor, block_size: int, ffn_blocks_per_expert: int, num_row_blocks: int) -> Tensor:
    """Column indices of the non-zero blocks of the ``(rows, E * F)`` hidden activation of a padded, sorted batch.

    Row block r lies within one expert e; its non-zero blocks are that expert's own columns,
    ``e * ffn_blocks_per_expert .. (e + 1) * ffn_blocks_per_expert - 1``.

    Args:
        expert_offsets: ``(E+1,)`` int32 or int64, multiples of ``block_size`` from 0 on, never falling: a padded
            plan's.
        block_size: rows (and columns) of a block.
        ffn_blocks_per_expert: F / block_size.
        num_row_blocks: row blocks of the result: the plan's static bound R / block_size.

    Returns:
        ``(num_row_blocks * ffn_blocks_per_expert,)`` int32, row block after row block; -1 in row blocks behind the last
        expert's rows.

    Raises:
        TypeError: another dtype.
        ValueError: a wrong shape or size, or a column index that does not fit in int32.
        RuntimeError: an offset that breaks the rules above or exceeds ``num_row_blocks * block_size``, on the CPU. On
            CUDA such offsets give unspecified columns in range, or -1.
    """
    if expert_offsets.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"topology: expert_offsets: expected dtype int32 or int64, got {expert_offsets.dtype}")
    if expert_offsets.dim() != 1 or expert_offsets.shape[0] < 2:
        raise ValueError(f"topology: expert_offsets: expected shape (E+1,), got {tuple(expert_offsets.shape)}")
    if block_size < 1:
        raise ValueError(f"topology: block_size: expected at least 1, got {block_size}")
    if ffn_blocks_per_expert < 1:
        raise ValueError(f"topology: ffn_blocks_per_expert: expected at least 1, got {ffn_blocks_per_expert}")
    if num_row_blocks < 0:
        raise ValueError(f"topology: num_row_blocks: expected at least 0, got {num_row_blocks}")
    columns = (expert_offsets.shape[0] - 1) * ffn_blocks_per_expert
    if columns >= 2**31:
        raise ValueError(f"topology: expected fewer than 2**31 column blocks (they are int32), got {columns}")
    return _topology(expert_offsets, block_size, ffn_blocks_per_expert, num_row_blocks)
