"""Which launches the Gluon kernels take over on Hopper, and how they are started.

Every function here tells whether it has done what its twin in :mod:`dmoe.kernels.moe_mlp` was asked for. They are off
unless ``DMOE_GLUON=1``: compiled and emulated, but not yet run on a GPU.
"""

from __future__ import annotations

import functools
import importlib.util
import math
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dmoe.kernels._launch import capability, launch, multiprocessors
from dmoe.strides import is_transposed

if TYPE_CHECKING:
    from dmoe.kernels.operands import Rows

_BLOCK_K = 64  # 128 bytes, one row of the swizzled layout
_GROUP = 8
_STAGES = 4  # 48 KB each
_TILE_ROWS = 128
_ACTIVATIONS = (
    "silu",
    "relu",
    "relu_squared",
    "sigmoid",
    "gelu_tanh",
)  # gelu's polynomial needs more registers than there are
# Steps that a consumer group is ahead of the other, of the four that the ring holds. No sum has fewer, but for none.
_SKEW = 1


@functools.cache
def _has_gluon() -> bool:
    return importlib.util.find_spec("triton.experimental.gluon") is not None


def serves(like: Tensor, *others: Tensor | None) -> bool:
    """Whether the Gluon kernels may run on these operands: asked for, Hopper, 16-bit numbers, rows that TMA can read.

    Args:
        like: an operand: bfloat16 or float16.
        *others: further tensors whose rows are copied or stored 16 bytes at a time; None is none.
    """
    return (
        os.environ.get("DMOE_GLUON") == "1"
        and _has_gluon()
        and like.dtype in (torch.bfloat16, torch.float16)
        and capability(like.device) // 10 == 9
        and all(_aligned(tensor) for tensor in (like, *others) if tensor is not None)
    )


def _aligned(tensor: Tensor) -> bool:
    """Rows, each contiguous, whose beginnings are 16-byte aligned, and at least 64 numbers long."""
    strides = (stride * tensor.element_size() % 16 for stride in tensor.stride()[:-1])
    return (
        tensor.stride(-1) == 1
        and tensor.shape[-1] >= 64
        and tensor.shape[-1] % 8 == 0
        and not any(strides)
        and tensor.data_ptr() % 16 == 0
    )


def _descriptor(tensor: Tensor, *block: int) -> Any:
    from triton.experimental.gluon.language import NVMMASharedLayout
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    layout = NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=len(block))
    return TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), list(block), layout)


def _grid(like: Tensor, rows: Rows, n: int, columns: int) -> tuple[int]:
    return (min(rows.tiles.shape[0] * math.ceil(n / columns), multiprocessors(like.device)),)


def _common(block_n: int) -> dict[str, int]:
    """What all kernels are told."""
    return {"BLOCK_N": block_n, "BLOCK_K": _BLOCK_K, "SKEW": _SKEW, "STAGES": _STAGES, "num_warps": 4}


def _width(n: int) -> int:
    """Columns of a tile of the result."""
    return 128 if n <= 128 else 256


def up(
    x: Tensor,
    weights: Sequence[Tensor],
    bias: Tensor | None,
    pre: Tensor | None,
    hidden: Tensor | None,
    rows: Rows,
    gated: bool,
    activation: str,
    plain: bool,
) -> bool:
    """See :func:`dmoe.kernels.moe_mlp.up`; ``plain``: nothing is dropped or weighed."""
    weight = weights[0]
    if not (
        plain
        and activation in _ACTIVATIONS
        and len(weights) == 1
        and weight.is_contiguous()
        and rows.tile_rows == _TILE_ROWS
    ):
        return False
    parts = 2 if gated else 1
    h, f = weight.shape[2], weight.shape[1] // parts
    if not serves(x, weight, pre, hidden) or f % 8 or not x.is_contiguous() or rows.row_to_token is None:
        return False
    from dmoe.kernels.gluon_up import gluon_up_kernel

    block_n = 256 if gated else _width(f)
    columns = block_n // parts
    halves = weight.view(parts * weight.shape[0], f, h)
    launch(
        gluon_up_kernel,
        _grid(x, rows, f, columns),
        x,
        _descriptor(halves, parts, columns, _BLOCK_K),
        bias,
        pre,
        hidden,
        rows.tiles,
        rows.expert_offsets,
        rows.row_to_token,
        rows.num_experts,
        rows.tiles.shape[0],
        H=h,
        F=f,
        ACTIVATION=activation,
        GATED=gated,
        GROUP=_GROUP,
        **_common(block_n),
    )
    return True


def multiply_rows(
    a: Tensor,
    weight: Tensor | Sequence[Tensor],
    out: Tensor,
    rows: Rows,
    trans_b: bool,
    bias: Tensor | None,
    plain: bool,
) -> bool:
    """See :func:`dmoe.kernels.moe_mlp.multiply_rows`; ``plain``: nothing is dropped, and no dot products are wanted."""
    weights = (weight,) if isinstance(weight, Tensor) else tuple(weight)
    if not (plain and len(weights) == 1 and weights[0].is_contiguous() and rows.tile_rows == _TILE_ROWS):
        return False
    k, n = a.shape[1], out.shape[1]
    if not serves(a, weights[0], out) or not out.is_contiguous() or a.dtype != out.dtype:
        return False
    from dmoe.kernels.gluon_rows import gluon_rows_kernel

    block_n = _width(n)
    b_block = (1, block_n, _BLOCK_K) if trans_b else (1, _BLOCK_K, block_n)
    launch(
        gluon_rows_kernel,
        _grid(a, rows, n, block_n),
        _descriptor(a, 64, _BLOCK_K),
        _descriptor(weights[0], *b_block),
        bias,
        out,
        rows.tiles,
        rows.expert_offsets,
        rows.num_experts,
        rows.tiles.shape[0],
        K=k,
        N=n,
        B_ROWS=not trans_b,
        GROUP=_GROUP,
        **_common(block_n),
    )
    return True


def hidden_grad(
    grad_out: Tensor,
    weight: Tensor,
    pre: Tensor,
    gate_weights: Tensor,
    grad_pre: Tensor,
    hidden: Tensor | None,
    row_grads: Tensor | None,
    rows: Rows,
    gated: bool,
    activation: str,
    weighed: bool,
    plain: bool,
    twin_columns: int,
) -> bool:
    """See :func:`dmoe.kernels.moe_mlp.hidden_grad`; ``plain``: gathered, and nothing is dropped.

    The caller has made a row of ``row_grads`` for each tile side by side that the twin has, of ``twin_columns``.
    """
    if not (plain and activation in _ACTIVATIONS and weight.is_contiguous() and rows.tile_rows == _TILE_ROWS):
        return False
    if not serves(grad_out, weight, pre, grad_pre, hidden) or not grad_out.is_contiguous():
        return False
    h, f = weight.shape[-2:]
    block_n = min(max(twin_columns, 128), 256)
    if f % 8 or h % 8 or math.ceil(f / block_n) != math.ceil(f / twin_columns) or rows.row_to_token is None:
        return False
    from dmoe.kernels.gluon_hidden_grad import gluon_hidden_grad_kernel

    launch(
        gluon_hidden_grad_kernel,
        _grid(grad_out, rows, f, block_n),
        grad_out,
        _descriptor(weight, 1, _BLOCK_K, block_n),
        pre,
        gate_weights,
        grad_pre,
        hidden,
        row_grads,
        rows.tiles,
        rows.expert_offsets,
        rows.row_to_token,
        rows.row_to_slot,
        rows.token_offsets,
        rows.num_experts,
        rows.tiles.shape[0],
        rows.num_rows,
        H=h,
        F=f,
        ACTIVATION=activation,
        GATED=gated,
        WEIGHED=weighed,
        GROUP=_GROUP,
        **_common(block_n),
    )
    return True


def weight_grad(
    a: Tensor, b: Tensor, out: Tensor, rows: Rows, gather_a: bool, gather_b: bool, accumulate: bool, plain: bool
) -> bool:
    """See :func:`dmoe.kernels.moe_mlp.weight_grad`; ``plain``: rows are not weighed."""
    if is_transposed(out):  # that of outer(b, a)
        a, b, gather_a, gather_b, out = b, a, gather_b, gather_a, out.mT
    if not plain or rows.row_to_token is None or not serves(a, b, out) or a.dtype != b.dtype:
        return False
    m, n, experts = a.shape[1], b.shape[1], out.shape[0]
    stride = out.stride(1)
    if out.stride(0) % stride:
        return False
    from dmoe.kernels.gluon_weight_grad import gluon_weight_grad_kernel

    block_n = _width(n)
    sums = experts * math.ceil(m / _TILE_ROWS) * math.ceil(n / block_n)
    launch(
        gluon_weight_grad_kernel,
        (min(sums, multiprocessors(a.device)),),
        a,
        b,
        out,
        rows.expert_offsets,
        rows.experts_by_load,
        rows.row_to_token,
        experts,
        M=m,
        N=n,
        A_STRIDE=a.stride(0),
        B_STRIDE=b.stride(0),
        EXPERT_ROWS=out.stride(0) // stride,
        STRIDE=stride,
        GATHER_A=gather_a,
        GATHER_B=gather_b,
        ACCUMULATE=accumulate,
        **_common(block_n),
    )
    return True
