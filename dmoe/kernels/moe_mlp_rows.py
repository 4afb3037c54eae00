"""Launches of what goes with the expert MLP's products, row by row: back to tokens, biases' gradients, a mask."""

from __future__ import annotations

import math

from torch import Tensor

from dmoe.kernels._launch import launch
from dmoe.kernels.combine import combine_kernel
from dmoe.kernels.grouped_gemm import bias_dots_kernel, expert_sums_kernel, masked_rows_kernel
from dmoe.kernels.operands import Dropout, Rows


def expert_sums(a: Tensor, out: Tensor, rows: Rows, *, gather: bool, gate_weights: Tensor | None = None) -> None:
    """``out[e]`` = sum of ``w[r] a[r]`` over e's rows: out ``(E, N)``."""
    n = a.shape[1]
    launch(
        expert_sums_kernel,
        (rows.num_experts, math.ceil(n / 128)),
        a,
        gate_weights,
        out,
        rows.expert_offsets,
        rows.row_to_token,
        rows.row_to_slot,
        rows.token_offsets,
        N=n,
        GATHER=gather,
        WEIGHED=gate_weights is not None,
        BLOCK_N=128,
        BLOCK_K=32,
        num_warps=4,
    )


def bias_dots(grad_out: Tensor, bias: Tensor, dots: Tensor, rows: Rows, *, gather: bool) -> None:
    """``dots[r] = <grad_out[r], bias[e]>``: dots ``(R,)`` float32."""
    launch(
        bias_dots_kernel,
        (rows.tiles.shape[0],),
        grad_out,
        bias,
        dots,
        rows.tiles,
        rows.expert_offsets,
        rows.row_to_token,
        N=bias.shape[1],
        GATHER=gather,
        BLOCK_M=rows.tile_rows,
        BLOCK_N=64,
        num_warps=8 if rows.tile_rows == 128 else 4,  # rows that are not aligned would spill with 4
    )


def masked_rows(grad_y: Tensor, out: Tensor, rows: Rows, dropout: Dropout) -> None:
    """``out[r] = grad_y[token of r]`` under the expert dropout's mask: ``(T, H)`` to ``(R, H)``."""
    n = grad_y.shape[1]
    launch(
        masked_rows_kernel,
        (rows.tiles.shape[0], math.ceil(n / 64)),
        grad_y,
        out,
        dropout.seed,
        rows.tiles,
        rows.expert_offsets,
        rows.row_to_token,
        rows.row_to_slot,
        rows.token_offsets,
        dropout.threshold,
        dropout.scale,
        N=n,
        BLOCK_M=rows.tile_rows,
        BLOCK_N=64,
        num_warps=4,
    )


def combine(
    values: Tensor,
    gate_weights: Tensor | None,
    residual: Tensor | None,
    out: Tensor,
    rows: Rows,
    *,
    row_grads: Tensor | None = None,
    gate_grads: Tensor | None = None,
) -> None:
    """``out[t] = residual[t] + sum of w[j] values[row of j]`` over t's assignments j, ``(R, H)`` to ``(T, H)``.

    With ``row_grads`` (parts, R) each assignment's sum over parts goes to ``gate_grads`` (N,).
    """
    num_tokens, h = out.shape
    num_parts = 0 if row_grads is None else row_grads.shape[0]
    assert rows.token_rows is not None
    slots = min(8, 1 << max(math.ceil(rows.token_rows.shape[0] / num_tokens) - 1, 0).bit_length())
    block = min(1024, max(16, 1 << (h - 1).bit_length()))
    launch(
        combine_kernel,
        (num_tokens, math.ceil(h / block)),
        values,
        gate_weights,
        residual,
        out,
        row_grads,
        gate_grads,
        rows.token_offsets,
        rows.token_rows,
        rows.num_rows,
        num_parts,
        rows.token_rows.shape[0],
        H=h,
        WEIGHED=gate_weights is not None,
        RESIDUAL=residual is not None,
        ROW_GRADS=row_grads is not None,
        PARTS=1 << max(num_parts - 1, 0).bit_length(),
        SLOTS=slots,
        BLOCK=block,
        num_warps=4 if block * slots >= 2048 else 1,
    )
