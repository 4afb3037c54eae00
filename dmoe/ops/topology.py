"""``topology``: which blocks of a block-sparse activation are not zero, from a padded plan (MegaBlocks, 2022).

``expert_topology`` gives the whole structure: both orders, and experts of different widths in one matrix.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dmoe.ops._checks import check_integer, known
from dmoe.ops._library import define, on_gpu
from dmoe.ops._trust import Guard, on_its_own_arguments


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
    "topology(Tensor expert_offsets, int block_size, int ffn_blocks_per_expert, SymInt num_row_blocks) -> Tensor",
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
    check_integer("topology", expert_offsets=expert_offsets)
    if expert_offsets.dim() != 1 or expert_offsets.shape[0] < 2:
        raise ValueError(f"topology: expert_offsets: expected shape (E+1,), got {tuple(expert_offsets.shape)}")
    if block_size < 1:
        raise ValueError(f"topology: block_size: expected at least 1, got {block_size}")
    if ffn_blocks_per_expert < 1:
        raise ValueError(f"topology: ffn_blocks_per_expert: expected at least 1, got {ffn_blocks_per_expert}")
    if known(num_row_blocks < 0):
        raise ValueError(f"topology: num_row_blocks: expected at least 0, got {num_row_blocks}")
    columns = (expert_offsets.shape[0] - 1) * ffn_blocks_per_expert
    if columns >= 2**31:
        raise ValueError(f"topology: expected fewer than 2**31 column blocks (they are int32), got {columns}")
    return _topology(expert_offsets, block_size, ffn_blocks_per_expert, num_row_blocks)


class BlockTopology(NamedTuple):
    """Structure of a block-sparse matrix, in both orders, as ``stk.Matrix`` holds it; int32, in units of blocks.

    Lengths are static: ``offsets[-1]`` entries are in use, and behind them the indices are -1.

    Attributes:
        row_indices, column_indices: block row and block column of each block, ``(nnz,)``, row by row.
        offsets: first block of each block row, ``(rows + 1,)``.
        column_indices_t: block row of each block, ``(nnz,)``, column by column.
        offsets_t: first entry of each block column in that order, ``(columns + 1,)``.
        block_offsets_t: where each of them lies in the row-by-row order, ``(nnz,)``.
    """

    row_indices: Tensor
    column_indices: Tensor
    offsets: Tensor
    column_indices_t: Tensor
    offsets_t: Tensor
    block_offsets_t: Tensor


def expert_topology_ref(
    expert_offsets: Tensor,
    first_columns: Tensor | None,
    width: int,
    columns: int,
    block_size: int,
    num_row_blocks: int,
    halves: int,
    side_by_side: bool,
) -> BlockTopology:
    """What :func:`expert_topology` computes, in plain PyTorch; sizes in blocks.

    With heights h_e and widths w_e of the experts' rectangles of blocks and A_e = sum of h w over the experts before e,
    block (k, j) of expert e lies at A_e + k w_e + j in row order and at A_e + j h_e + k in column order.
    """
    device, experts = expert_offsets.device, expert_offsets.shape[0] - 1
    if first_columns is None:
        first_columns = torch.arange(experts + 1, device=device) * width
    lefts, begins = first_columns.long(), expert_offsets.long() // block_size
    widths, heights = lefts.diff(), begins.diff()
    starts = torch.cat((lefts.new_zeros(1), (widths * heights).cumsum(0)))

    entry = torch.arange(num_row_blocks * width * halves, device=device)
    block = entry // halves
    expert = torch.searchsorted(starts[1:].contiguous(), block, right=True)
    used, expert = expert < experts, expert.clamp(max=experts - 1)
    local, size = block - starts[expert], widths[expert]
    row, at, half = begins[expert] + local // size, local % size, entry % halves
    column = half * columns + lefts[expert] + at if side_by_side else lefts[expert] * halves + half * size + at

    row_number = torch.arange(num_row_blocks + 1, device=device)
    expert = torch.searchsorted(begins[1:].contiguous(), row_number, right=True)
    inside, expert = expert < experts, expert.clamp(max=experts - 1)
    offsets = torch.where(inside, starts[expert] + (row_number - begins[expert]) * widths[expert], starts[-1]) * halves

    # Blocks of each column, from expert and half; the columns' order says where they begin.
    column_number = torch.arange(columns * halves, device=device)
    plain = column_number % columns if side_by_side else column_number
    edges = lefts[1:] if side_by_side else lefts[1:] * halves
    expert = torch.searchsorted(edges.contiguous(), plain, right=True)
    offsets_t = torch.cat((lefts.new_zeros(1), heights[expert].cumsum(0)))
    its_column = torch.searchsorted(offsets_t[1:].contiguous(), entry, right=True).clamp(max=columns * halves - 1)
    expert, rank = expert[its_column], entry - offsets_t[its_column]
    size = widths[expert]
    if side_by_side:
        half, at = its_column // columns, its_column % columns - lefts[expert]
    else:
        at = its_column - lefts[expert] * halves
        half, at = at // size, at % size
    position = (starts[expert] + rank * size + at) * halves + half

    def cut(index: Tensor) -> Tensor:
        return index.masked_fill(~used, -1).int()

    return BlockTopology(
        cut(row), cut(column), offsets.int(), cut(begins[expert] + rank), offsets_t.int(), cut(position)
    )


def expert_topology_cuda(*arguments: Tensor | int | bool | None) -> BlockTopology:
    """:func:`expert_topology` on CUDA."""
    from dmoe.kernels import topology as kernels

    return BlockTopology(*kernels.expert_topology(*arguments))  # type: ignore[arg-type]


@functools.lru_cache(maxsize=256)
def _first_columns(widths: tuple[int, ...], device: torch.device) -> Tensor:
    """Where each expert's columns begin, ``(E + 1,)`` int32: copied to a device once, for all layers alike."""
    edges = [0]
    for width in widths:
        edges.append(edges[-1] + width)
    with torch.inference_mode(False):
        return torch.tensor(edges, dtype=torch.int32, device=device)


def topology_arguments(
    ffn_sizes: Sequence[int], num_experts: int, block_size: int, device: torch.device
) -> tuple[Tensor | None, int, int]:
    """``first_columns``, ``width`` and ``columns`` of :func:`expert_topology_ref`, from widths in features.

    Args:
        ffn_sizes: one width for all experts, or one for each.
        num_experts: E.
        block_size: B, a divisor of every width.
        device: of the result. The first call for a device and a list of widths copies them there.
    """
    widths = tuple(size // block_size for size in ffn_sizes)
    if len(widths) == 1:
        return None, widths[0], widths[0] * num_experts
    if device.type == "meta":
        table = torch.empty(num_experts + 1, dtype=torch.int32, device=device)
    else:
        table = _first_columns(widths, device)
    return table, max(widths), sum(widths)


_on_cuda = Guard(
    "expert_topology", expert_topology_cuda, expert_topology_ref, on_its_own_arguments("expert_topology", lengths=True)
)


def expert_topology(
    expert_offsets: Tensor, block_size: int, ffn_sizes: int | Sequence[int], num_row_blocks: int
) -> BlockTopology:
    """Structure of the ``(rows, sum of widths)`` hidden activation of a padded, sorted batch.

    Each expert's row blocks cross its own range of block columns. Nothing is read back from the device.

    Args:
        expert_offsets: ``(E + 1,)`` int32, multiples of ``block_size`` from 0 on, never falling: a padded plan's.
        block_size: rows and columns of a block.
        ffn_sizes: the experts' width, or a list of E widths, in features; multiples of ``block_size``. Expert e owns
            the block columns from the sum of the widths before it on.
        num_row_blocks: row blocks of the result: the plan's static bound R / block_size.

    Returns:
        :class:`BlockTopology` of length ``num_row_blocks * widest / block_size``, whatever the routing.

    Raises:
        TypeError: ``expert_offsets`` is not int32.
        ValueError: a wrong shape, a width that is no positive multiple of ``block_size``, or 2**31 or more blocks.
    """
    if expert_offsets.dtype != torch.int32:
        raise TypeError(f"expert_topology: expert_offsets: expected dtype int32, got {expert_offsets.dtype}")
    if expert_offsets.dim() != 1 or expert_offsets.shape[0] < 2:
        raise ValueError(f"expert_topology: expert_offsets: expected shape (E+1,), got {tuple(expert_offsets.shape)}")
    if block_size < 1:
        raise ValueError(f"expert_topology: block_size: expected at least 1, got {block_size}")
    experts = expert_offsets.shape[0] - 1
    sizes = (ffn_sizes,) if isinstance(ffn_sizes, int) else tuple(ffn_sizes)
    if not isinstance(ffn_sizes, int) and len(sizes) != experts:
        raise ValueError(f"expert_topology: ffn_sizes: expected {experts} widths, got {len(sizes)}")
    if any(size < 1 or size % block_size for size in sizes):
        raise ValueError(
            f"expert_topology: ffn_sizes: expected positive multiples of block_size {block_size}, got {list(sizes)}"
        )
    if num_row_blocks < 0 or num_row_blocks * max(sizes) // block_size >= 2**31:
        raise ValueError(
            f"expert_topology: expected at least 0 row blocks and fewer than 2**31 blocks (they are int32), got "
            f"{num_row_blocks} row blocks of up to {max(sizes) // block_size}"
        )
    table = topology_arguments(sizes, experts, block_size, expert_offsets.device)
    run = _on_cuda if on_gpu(expert_offsets) else expert_topology_ref
    return run(expert_offsets.contiguous(), *table, block_size, num_row_blocks, 1, False)
