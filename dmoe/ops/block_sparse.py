"""Block-sparse products on plain tensors: ``block_sdd``, ``block_dsd`` and ``block_dds``, each other's gradients.

A block-sparse (M, N) matrix is ``data (nnz, B, B)`` with the structure of :class:`dmoe.ops.topology.BlockTopology`; it
may be used transposed. With S sparse and A, B, C dense::

    sdd  S = (A B) where S has blocks     dA = dS B^T (dsd)      dB = A^T dS (dds)
    dsd  C = S B                          dS = dC B^T (sdd)      dB = S^T dC (dsd)
    dds  C = A S                          dA = dC S^T (dds)      dS = A^T dC (sdd)

so derivatives of any order exist. Sums run in float32 (float64 for float64), block after block: deterministic.

Entries behind ``offsets[-1]``, and blocks whose row or column index is out of range (-1), are not in use: no product
reads them, and sdd writes zeros there. That is how a structure that depends on routing keeps a static length.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dmoe.ops._library import define, register_autograd
from dmoe.ops._trust import on_its_own_arguments
from dmoe.ops.activation import accumulate_dtype
from dmoe.ops.grouped_gemm import grouped_gemm
from dmoe.ops.topology import BlockTopology

BLOCK_SIZES = (128, 64, 32, 16)


def block_size_for(ffn_sizes: Sequence[int]) -> int | None:
    """The largest of 128, 64, 32 and 16 that divides every width; None when there is none."""
    return next((size for size in BLOCK_SIZES if all(width % size == 0 for width in ffn_sizes)), None)


def sdd_ref(
    a: Tensor, b: Tensor, row_indices: Tensor, column_indices: Tensor, block_size: int, zero_tail: bool = True
) -> Tensor:
    """Blocks ``(nnz, B, B)`` of ``a @ b^T`` in plain PyTorch; a is ``(M, K)``, b a stack ``(G, N / G, K)``."""
    wide, inner = accumulate_dtype(a.dtype), a.shape[1]
    rows = a.reshape(a.shape[0] // block_size, block_size, inner)
    columns = b.reshape(b.shape[0] * (b.shape[1] // block_size), block_size, inner)
    used = (row_indices >= 0) & (row_indices < rows.shape[0])
    used = used & (column_indices >= 0) & (column_indices < columns.shape[0])
    if rows.shape[0] == 0 or columns.shape[0] == 0:
        return a.new_zeros(row_indices.shape[0], block_size, block_size)
    left = rows[row_indices.masked_fill(~used, 0).long()].to(wide)
    right = columns[column_indices.masked_fill(~used, 0).long()].to(wide)
    return grouped_gemm(left, right).masked_fill(~used[:, None, None], 0).to(a.dtype)


def spmm_ref(
    data: Tensor,
    transposed: bool,
    offsets: Tensor,
    indices: Tensor,
    block_offsets: Tensor | None,
    dense: Tensor,
    out: Tensor,
) -> None:
    """``out = S @ dense`` in plain PyTorch; ``dense`` is ``(G, K / G, N)`` and ``out`` ``(G', M / G', N)``."""
    wide, block_size, columns = accumulate_dtype(data.dtype), data.shape[-1], dense.shape[2]
    row_blocks = offsets.shape[0] - 1
    entry = torch.arange(indices.shape[0], device=data.device)
    used = entry < offsets[-1]
    row = torch.searchsorted(offsets[1:].contiguous(), entry, right=True).masked_fill(~used, row_blocks)
    sums = torch.zeros(row_blocks + 1, block_size, columns, dtype=wide, device=data.device)
    if entry.shape[0] and dense.shape[1]:
        position = entry if block_offsets is None else block_offsets.masked_fill(~used, 0).long()
        blocks = data[position].to(wide).masked_fill(~used[:, None, None], 0)
        blocks = blocks.transpose(1, 2) if transposed else blocks
        factor = dense.reshape(dense.shape[0] * (dense.shape[1] // block_size), block_size, columns)
        factor = factor[indices.masked_fill(~used, 0).long()].to(wide)
        sums.index_add_(0, row, grouped_gemm(blocks, factor, trans_b=False))
    out.copy_(sums[:-1].reshape(out.shape))


def _dtype_on_cuda(op: str, *tensors: Tensor) -> None:
    for tensor in tensors:
        if tensor.dtype not in (torch.bfloat16, torch.float16, torch.float32):
            raise TypeError(f"{op}: expected bfloat16, float16 or float32 on CUDA, got {tensor.dtype}")


def streamed(x: Tensor) -> Tensor:
    """x, or a copy where no dimension is contiguous, which the kernels would read one element at a time."""
    return x if 1 in x.stride() else x.contiguous()


def sdd_cuda(
    a: Tensor, b: Tensor, row_indices: Tensor, column_indices: Tensor, block_size: int, zero_tail: bool = True
) -> Tensor:
    """:func:`sdd_ref` on CUDA."""
    from dmoe.kernels import block_sparse as kernels

    _dtype_on_cuda("sdd", a, b)
    return kernels.sdd(streamed(a), streamed(b), row_indices, column_indices, block_size, zero_tail)


def spmm_cuda(
    data: Tensor,
    transposed: bool,
    offsets: Tensor,
    indices: Tensor,
    block_offsets: Tensor | None,
    dense: Tensor,
    out: Tensor,
) -> None:
    """:func:`spmm_ref` on CUDA."""
    from dmoe.kernels import block_sparse as kernels

    _dtype_on_cuda("dsd, dds", data, dense)
    kernels.spmm(data.contiguous(), transposed, offsets, indices, block_offsets, streamed(dense), out)


def _by_rows(topology: BlockTopology) -> tuple[Tensor, Tensor, None]:
    return topology.offsets, topology.column_indices, None


def _by_columns(topology: BlockTopology) -> tuple[Tensor, Tensor, Tensor]:
    return topology.offsets_t, topology.column_indices_t, topology.block_offsets_t


def _sdd(kernel: Any, a: Tensor, b: Tensor, *rest: Any) -> Tensor:
    topology, block_size = BlockTopology(*rest[:6]), rest[6]
    return kernel(a, b.t().unsqueeze(0), topology.row_indices, topology.column_indices, block_size)


def _dsd(kernel: Any, data: Tensor, *rest: Any) -> Tensor:
    topology, transposed, dense = BlockTopology(*rest[:6]), rest[6], rest[7]
    out = _fake_dsd(data, *rest)
    order = _by_columns(topology) if transposed else _by_rows(topology)
    kernel(data, transposed, *order, dense.unsqueeze(0), out.unsqueeze(0))
    return out


def _dds(kernel: Any, dense: Tensor, data: Tensor, *rest: Any) -> Tensor:
    # C = A S is C^T = S^T A^T: the same product, reading and writing the dense matrices by their other stride.
    topology, transposed = BlockTopology(*rest[:6]), rest[6]
    out = _fake_dds(dense, data, *rest)
    order = _by_rows(topology) if transposed else _by_columns(topology)
    kernel(data, not transposed, *order, dense.t().unsqueeze(0), out.t().unsqueeze(0))
    return out


def _fake_sdd(a: Tensor, b: Tensor, *rest: Any) -> Tensor:
    return a.new_empty(rest[0].shape[0], rest[6], rest[6])


def _fake_dsd(data: Tensor, *rest: Any) -> Tensor:
    offsets = rest[4] if rest[6] else rest[2]
    return data.new_empty((offsets.shape[0] - 1) * data.shape[-1], rest[7].shape[1])


def _fake_dds(dense: Tensor, data: Tensor, *rest: Any) -> Tensor:
    offsets = rest[2] if rest[6] else rest[4]
    return dense.new_empty(dense.shape[0], (offsets.shape[0] - 1) * data.shape[-1])


def _autocast(op: Any, dtype: torch.dtype, *arguments: Any) -> Tensor:
    def cast(value: Any) -> Any:
        eligible = isinstance(value, Tensor) and value.is_floating_point() and value.dtype != torch.float64
        return value.to(dtype) if eligible else value

    return op(*map(cast, arguments))


_TOPOLOGY = (
    "Tensor row_indices, Tensor column_indices, Tensor offsets, Tensor column_indices_t, Tensor offsets_t, "
    "Tensor block_offsets_t"
)
block_sdd = define(
    f"block_sdd(Tensor a, Tensor b, {_TOPOLOGY}, int block_size) -> Tensor",
    functools.partial(_sdd, sdd_ref),
    fake=_fake_sdd,
    cuda=functools.partial(_sdd, sdd_cuda),
    subjects=on_its_own_arguments("block_sdd"),
    autocast=_autocast,
)
block_dsd = define(
    f"block_dsd(Tensor data, {_TOPOLOGY}, bool transposed, Tensor dense) -> Tensor",
    functools.partial(_dsd, spmm_ref),
    fake=_fake_dsd,
    cuda=functools.partial(_dsd, spmm_cuda),
    subjects=on_its_own_arguments("block_dsd"),
    autocast=_autocast,
)
block_dds = define(
    f"block_dds(Tensor dense, Tensor data, {_TOPOLOGY}, bool transposed) -> Tensor",
    functools.partial(_dds, spmm_ref),
    fake=_fake_dds,
    cuda=functools.partial(_dds, spmm_cuda),
    subjects=on_its_own_arguments("block_dds"),
    autocast=_autocast,
)


# What each saves: its two factors, either only if the other's gradient is wanted, and the structure.


def _save_sdd(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    a, b, *topology, _ = inputs
    need_a, need_b = ctx.needs_input_grad[:2]
    ctx.save_for_backward(a if need_b else None, b if need_a else None, *topology)


def _sdd_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    a, b, *topology = ctx.saved_tensors
    grad_a = block_dsd(grad, *topology, False, b.t()) if ctx.needs_input_grad[0] else None
    grad_b = block_dds(a.t(), grad, *topology, False) if ctx.needs_input_grad[1] else None
    return grad_a, grad_b, *(None,) * 7


def _save_dsd(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    data, *topology, ctx.transposed, dense = inputs
    ctx.block_size = data.shape[-1]
    need_data, need_dense = ctx.needs_input_grad[0], ctx.needs_input_grad[8]
    ctx.save_for_backward(data if need_dense else None, dense if need_data else None, *topology)


def _dsd_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    data, dense, *topology = ctx.saved_tensors
    grad_data = grad_dense = None
    if ctx.needs_input_grad[0]:  # of S as it is stored: C = S^T B has dS = B dC^T
        pair = (dense, grad.t()) if ctx.transposed else (grad, dense.t())
        grad_data = block_sdd(*pair, *topology, ctx.block_size)
    if ctx.needs_input_grad[8]:
        grad_dense = block_dsd(data, *topology, not ctx.transposed, grad)
    return grad_data, *(None,) * 7, grad_dense


def _save_dds(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    dense, data, *topology, ctx.transposed = inputs
    ctx.block_size = data.shape[-1]
    need_dense, need_data = ctx.needs_input_grad[:2]
    ctx.save_for_backward(dense if need_data else None, data if need_dense else None, *topology)


def _dds_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    dense, data, *topology = ctx.saved_tensors
    grad_dense = grad_data = None
    if ctx.needs_input_grad[0]:
        grad_dense = block_dds(grad, data, *topology, not ctx.transposed)
    if ctx.needs_input_grad[1]:
        pair = (grad.t(), dense) if ctx.transposed else (dense.t(), grad)
        grad_data = block_sdd(*pair, *topology, ctx.block_size)
    return grad_dense, grad_data, *(None,) * 7


register_autograd(block_sdd, _sdd_backward, _save_sdd)
register_autograd(block_dsd, _dsd_backward, _save_dsd)
register_autograd(block_dds, _dds_backward, _save_dds)
