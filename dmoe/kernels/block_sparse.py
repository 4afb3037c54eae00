"""Products with one block-sparse factor: dense x dense -> sparse blocks, and sparse x dense -> dense.

Every program owns one tile of the result and sums it up alone, in the order of the blocks: no atomics, so the same
bits every time. Sizes that depend on the data are read by the programs themselves: a program whose block is not in use
ends at once, and the host never waits.

The factor that blocks of columns point into comes as a stack of equal matrices, ``(G, ...)``: matrix 0 holds the first
column blocks, matrix 1 the next. So ``(E, H, F)`` weights are read where they lie; a plain matrix is a stack of one.
"""

# mypy: disable-error-code="no-untyped-def"
# Triton gives a kernel's arguments their types when it is launched.

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dmoe.kernels._launch import capability, launch

_GROUP = 8  # row blocks that programs running side by side share, so that both factors stay in L2


@triton.jit(do_not_specialize=["row_blocks", "column_blocks", "blocks", "per_matrix"])
def _block_sdd(
    a,
    b,
    out,
    row_indices,
    column_indices,
    row_blocks,
    column_blocks,
    blocks,
    width,
    inner,
    per_matrix,
    stride_am,
    stride_ak,
    stride_bg,
    stride_bn,
    stride_bk,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    TILE_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    ZERO_TAIL: tl.constexpr,
    GROUP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``out[i] = a[rows of block i] @ b[columns of block i]^T``; b is stored (N, K), as a weight is."""
    SIDE: tl.constexpr = BLOCK // TILE
    pid = tl.program_id(0)
    part = pid % (SIDE * SIDE)
    place = pid // (SIDE * SIDE)
    # Blocks in groups of GROUP block rows, were all rows as long as their mean; any order of blocks is right.
    lines = tl.cdiv(blocks, width)
    first = place // (GROUP * width) * GROUP
    height = tl.minimum(lines - first, GROUP)
    local = place % (GROUP * width)
    block = (first + local % height) * width + local // height
    if block < blocks:
        row = tl.load(row_indices + block)
        column = tl.load(column_indices + block)
        rm = (part // SIDE) * TILE + tl.arange(0, TILE)
        rn = (part % SIDE) * TILE + tl.arange(0, TILE)
        out_at = out + block.to(tl.int64) * (BLOCK * BLOCK) + rm[:, None] * BLOCK + rn[None, :]
        used = (row >= 0) & (row < row_blocks) & (column >= 0) & (column < column_blocks)
        if used:
            rk = tl.arange(0, TILE_K)
            at_a = (row * BLOCK).to(tl.int64) + rm
            at_b = (column % per_matrix * BLOCK).to(tl.int64) + rn
            a_at = a + at_a[:, None] * stride_am + rk[None, :].to(tl.int64) * stride_ak
            b_at = b + (column // per_matrix).to(tl.int64) * stride_bg
            b_at = b_at + at_b[None, :] * stride_bn + rk[:, None].to(tl.int64) * stride_bk
            sums = tl.zeros((TILE, TILE), dtype=tl.float32)
            for k in range(0, inner, TILE_K):
                if EVEN_K:
                    left = tl.load(a_at)
                    right = tl.load(b_at)
                else:
                    left = tl.load(a_at, mask=rk[None, :] < inner - k, other=0.0)
                    right = tl.load(b_at, mask=rk[:, None] < inner - k, other=0.0)
                sums = tl.dot(left, right, sums, input_precision=PRECISION)
                a_at += tl.full((), TILE_K, tl.int64) * stride_ak
                b_at += tl.full((), TILE_K, tl.int64) * stride_bk
            tl.store(out_at, sums.to(out.dtype.element_ty))
        elif ZERO_TAIL:
            tl.store(out_at, tl.zeros((TILE, TILE), dtype=out.dtype.element_ty))


@triton.jit(do_not_specialize=["row_blocks", "dense_per_matrix", "out_per_matrix"])
def _block_spmm(
    data,
    dense,
    out,
    offsets,
    indices,
    block_offsets,
    row_blocks,
    columns,
    dense_per_matrix,
    out_per_matrix,
    stride_dg,
    stride_dk,
    stride_dn,
    stride_og,
    stride_om,
    stride_on,
    BLOCK: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_K: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    INDIRECT: tl.constexpr,
    EVEN_N: tl.constexpr,
    GROUP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``out[row block] = sum of its blocks @ dense[rows that each block's column names]``."""
    SIDE: tl.constexpr = BLOCK // TILE_M
    STEPS: tl.constexpr = BLOCK // TILE_K
    pid = tl.program_id(0)
    tiles_n = tl.cdiv(columns, TILE_N)
    tiles_m = row_blocks * SIDE
    first = pid // (GROUP * tiles_n) * GROUP
    height = tl.minimum(tiles_m - first, GROUP)
    local = pid % (GROUP * tiles_n)
    tile_m = first + local % height
    tile_n = local // height
    row = tile_m // SIDE
    rm = (tile_m % SIDE) * TILE_M + tl.arange(0, TILE_M)
    rn = tile_n * TILE_N + tl.arange(0, TILE_N)
    rk = tl.arange(0, TILE_K)
    begin = tl.load(offsets + row)
    end = tl.load(offsets + row + 1)

    a_in = rk[None, :] * BLOCK + rm[:, None] if TRANSPOSED else rm[:, None] * BLOCK + rk[None, :]
    d_in = rk[:, None].to(tl.int64) * stride_dk + rn[None, :].to(tl.int64) * stride_dn
    sums = tl.zeros((TILE_M, TILE_N), dtype=tl.float32)
    for step in range((end - begin) * STEPS):
        entry = begin + step // STEPS
        inside = step % STEPS * TILE_K
        position = entry
        if INDIRECT:
            position = tl.load(block_offsets + entry)
        column = tl.load(indices + entry)
        a_at = data + position.to(tl.int64) * (BLOCK * BLOCK)
        left = tl.load(a_at + (inside * BLOCK if TRANSPOSED else inside) + a_in)
        d_at = dense + (column // dense_per_matrix).to(tl.int64) * stride_dg
        d_at += (column % dense_per_matrix * BLOCK + inside).to(tl.int64) * stride_dk
        right = tl.load(d_at + d_in) if EVEN_N else tl.load(d_at + d_in, mask=rn[None, :] < columns, other=0.0)
        sums = tl.dot(left, right, sums, input_precision=PRECISION)

    at_m = (row % out_per_matrix * BLOCK).to(tl.int64) + rm
    out_at = out + (row // out_per_matrix).to(tl.int64) * stride_og
    out_at = out_at + at_m[:, None] * stride_om + rn[None, :].to(tl.int64) * stride_on
    if EVEN_N:
        tl.store(out_at, sums.to(out.dtype.element_ty))
    else:
        tl.store(out_at, sums.to(out.dtype.element_ty), mask=rn[None, :] < columns)


class _Tile(NamedTuple):
    m: int
    n: int
    k: int
    warps: int
    stages: int
    indirect_stages: int  # where an index is loaded first: the compiler spends about two of them on that load


def _precision(dtype: torch.dtype) -> str:
    """float32 is rounded to tf32 where the user allowed it for PyTorch's own products, and nowhere else."""
    allowed = dtype != torch.float32 or torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if allowed else "ieee"


def _tile(block_size: int, columns: int, dtype: torch.dtype, precision: str, device: torch.device) -> _Tile:
    """Tile sizes: the block where it fits; ``columns`` bounds the tile's width where that is free."""
    if dtype == torch.float32 and precision == "ieee":  # plain FMA: larger tiles spill
        side = min(block_size, 64)
        return _Tile(side, side, min(block_size, 16), 8 if side == 64 else 4, 2, 2)
    if block_size < 64:
        return _Tile(block_size, 128 if columns >= 128 else 64, block_size, 4, 4, 6)
    if block_size == 64:
        return _Tile(64, 128, 32 if dtype == torch.float32 else 64, 4, 3, 5)
    hopper = capability(device) >= 90
    if dtype == torch.float32:
        return _Tile(128, 128, 32, 8, 3, 5)
    # Columns that do not fill their last tile are not copied ahead: seven stages of the blocks alone would be 112 KB.
    indirect_stages = 5 if hopper or columns % 128 else 7
    return _Tile(128, 256 if hopper and columns >= 256 else 128, 64, 8, 3, indirect_stages)


def sdd(
    a: Tensor,
    b: Tensor,
    row_indices: Tensor,
    column_indices: Tensor,
    block_size: int,
    zero_tail: bool = True,
) -> Tensor:
    """Blocks ``(nnz, B, B)`` of ``a @ b^T``.

    Args:
        a: ``(M, K)``, one stride 1.
        b: ``(G, N / G, K)``, a stack of G equal parts of an (N, K) matrix; likewise.
        row_indices, column_indices: ``(nnz,)`` int32, in blocks. A block outside the product is not in use.
        block_size: B.
        zero_tail: write zeros in blocks that are not in use; otherwise they are not touched.
    """
    blocks, inner = row_indices.shape[0], a.shape[1]
    out = a.new_empty(blocks, block_size, block_size)
    precision = _precision(a.dtype)
    tile = _tile(block_size, 0, a.dtype, precision, a.device)
    row_blocks = a.shape[0] // block_size
    width = max(1, blocks // max(row_blocks, 1))
    launch(
        _block_sdd,
        (-(-blocks // width) * width * (block_size // tile.m) ** 2,),
        a,
        b,
        out,
        row_indices,
        column_indices,
        row_blocks,
        b.shape[0] * b.shape[1] // block_size,
        blocks,
        width,
        inner,
        max(b.shape[1] // block_size, 1),
        a.stride(0),
        a.stride(1),
        b.stride(0),
        b.stride(1),
        b.stride(2),
        BLOCK=block_size,
        TILE=tile.m,
        TILE_K=tile.k,
        EVEN_K=inner % tile.k == 0,
        ZERO_TAIL=zero_tail,
        GROUP=_GROUP,
        PRECISION=precision,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return out


def spmm(
    data: Tensor,
    transposed: bool,
    offsets: Tensor,
    indices: Tensor,
    block_offsets: Tensor | None,
    dense: Tensor,
    out: Tensor,
) -> None:
    """``out = S @ dense`` for a sparse S given by block rows; every element of ``out`` is written.

    Args:
        data: ``(nnz, B, B)`` contiguous.
        transposed: whether each block is used transposed.
        offsets: ``(M / B + 1,)`` int32: where each block row's entries begin.
        indices: int32: column block of each entry.
        block_offsets: int32: where in ``data`` each entry's block lies; None when that is its own position.
        dense: ``(G, K / G, N)``, a stack of G equal parts of a (K, N) matrix.
        out: ``(G', M / G', N)``, likewise; written.
    """
    block_size, columns = data.shape[-1], dense.shape[2]
    precision = _precision(data.dtype)
    tile = _tile(block_size, columns, data.dtype, precision, data.device)
    row_blocks = offsets.shape[0] - 1
    launch(
        _block_spmm,
        (row_blocks * (block_size // tile.m) * -(-columns // tile.n),),
        data,
        dense,
        out,
        offsets,
        indices,
        offsets if block_offsets is None else block_offsets,
        row_blocks,
        columns,
        max(dense.shape[1] // block_size, 1),
        max(out.shape[1] // block_size, 1),
        dense.stride(0),
        dense.stride(1),
        dense.stride(2),
        out.stride(0),
        out.stride(1),
        out.stride(2),
        BLOCK=block_size,
        TILE_M=tile.m,
        TILE_N=tile.n,
        TILE_K=tile.k,
        TRANSPOSED=transposed,
        INDIRECT=block_offsets is not None,
        EVEN_N=columns % tile.n == 0,
        GROUP=_GROUP,
        PRECISION=precision,
        num_warps=tile.warps,
        num_stages=tile.indirect_stages,
    )
