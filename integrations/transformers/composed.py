"""Experts whose gate is none of dmoe's activations, or that do more than one operation holds: piece by piece.

What stands between the two products is run as the module has it, and again in backward: saved are x, the result of the
up projection and the routing, whatever the gate and the norm would keep for themselves.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import dmoe
from dmoe.ops import grouped_gemm, grouped_gemm_weight, permute, unpermute


def composed_experts(
    x: Tensor,
    expert_indices: Tensor,
    gate_weights: Tensor,
    up: Tensor,
    down: Tensor,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    gate: Callable[[Tensor], Tensor],
    norm: Callable[[Tensor], Tensor] | None,
    *,
    transposed: bool,
) -> Tensor:
    """``y_t = sum_k w_tk norm(down(gate(up(x_t))))``.

    Args:
        x: ``(T, H)``.
        expert_indices, gate_weights: ``(T, K)``; E takes no expert.
        up, down: ``(E, columns, H)`` and ``(E, H, F)``; ``transposed`` with the last two dimensions exchanged.
        up_bias, down_bias: ``(E, columns)`` and ``(E, H)``, or None.
        gate: ``(R, columns)`` to ``(R, F)``, row by row.
        norm: ``(R, H)`` to the same, row by row; or None.
        transposed: see ``up``.

    Returns:
        ``(T, H)`` in the dtype of the weights, under autocast in that of autocast.
    """
    dtype = _product_dtype(x, up)
    x, up, down = x.to(dtype), up.to(dtype), down.to(dtype)
    plan = dmoe.plan_token_choice(expert_indices, up.shape[0])
    where = plan.token_offsets, plan.token_rows
    ones = x.new_ones(plan.num_rows, 1)

    def add(rows: Tensor, bias: Tensor | None) -> Tensor:
        """As a product, whose gradient is summed in float32: as ``bias[expert]`` it would be in the rows' dtype."""
        if bias is None:
            return rows
        return rows + grouped_gemm(ones, bias.to(dtype).unsqueeze(1), plan.expert_offsets, trans_b=False)

    def rest(pre: Tensor, gate_weights: Tensor) -> Tensor:
        out = grouped_gemm(gate(pre).to(dtype), down, plan.expert_offsets, trans_b=not transposed)
        out = add(out, down_bias)
        out = out if norm is None else norm(out).to(dtype)
        return unpermute(out, gate_weights, plan.row_to_token, plan.row_to_slot, *where)

    indices = plan.expert_offsets, plan.row_to_token, plan.row_to_slot, *where
    pre = add(_Up.apply(x, up, not transposed, *indices), up_bias)
    return again_in_backward(rest, pre, gate_weights)


def again_in_backward(function: Callable[..., Tensor], *arguments: Tensor) -> Tensor:
    """Call it, and again in backward, so that nothing inside is kept; a compiler decides itself what to keep."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        y: Tensor = checkpoint(function, *arguments, use_reentrant=False)
        return y
    return function(*arguments)


def _product_dtype(x: Tensor, weight: Tensor) -> torch.dtype:
    device = x.device.type
    autocast = not x.is_meta and torch.is_autocast_enabled(device) and weight.dtype != torch.float64
    return torch.get_autocast_dtype(device) if autocast else weight.dtype


class _Up(torch.autograd.Function):
    """Tokens to their rows and through the up projection: saves the tokens, and gathers the rows again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, up: Tensor, trans_b: bool, expert_offsets: Tensor, *where: Tensor) -> Tensor:
        ctx.trans_b = trans_b
        ctx.save_for_backward(x, up, expert_offsets, *where)
        return grouped_gemm(permute(x, where[0], *where[2:]), up, expert_offsets, trans_b=trans_b)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, up, expert_offsets, *where = ctx.saved_tensors
        grad_x = grad_up = None
        if ctx.needs_input_grad[0]:
            rows = grouped_gemm(grad, up, expert_offsets, trans_b=not ctx.trans_b)
            grad_x = unpermute(rows, None, *where)
        if ctx.needs_input_grad[1]:
            rows = permute(x, where[0], *where[2:])
            grad_up = grouped_gemm_weight(*((grad, rows) if ctx.trans_b else (rows, grad)), expert_offsets)
        return grad_x, grad_up, None, None, *(None for _ in where)
