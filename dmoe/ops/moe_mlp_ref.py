"""The meaning of ``moe_mlp`` and of its backward, in terms of permute, grouped_gemm and unpermute.

These serve where neither ``csrc/`` nor the Triton kernels do, and the tests compare those with them.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from dmoe.ops._moe_mlp_call import WEIGHTS, Call
from dmoe.ops._moe_mlp_parts import (
    beside,
    bias_rows,
    dropout_mask,
    grads_as_given,
    of_assignments,
    outside_experts,
    row_values,
    row_widths,
    stacked_weights,
    widths_of_rows,
)
from dmoe.ops.activation import accumulate_dtype, activate, activate_backward
from dmoe.ops.grouped_gemm import grouped_gemm, grouped_gemm_weight, outer_sums
from dmoe.ops.permute import permute, unpermute
from dmoe.ops.philox import ACTIVATION_DROPOUT, EXPERT_DROPOUT
from dmoe.strides import is_transposed

AddedRows = Callable[[Tensor, Tensor], Tensor] | None  # of rows (R, K) and their assignments (R,)
NO_ADDED_ROWS: tuple[AddedRows, AddedRows] = (None, None)


def moe_mlp_ref(*arguments: Any) -> tuple[Tensor, Tensor]:
    """y and the pre-activation."""
    out, _, pre = _expert_rows(*arguments)
    call = Call(*arguments)
    combine = call.gate_weights if call.gate_weight_on == "output" else None
    y = unpermute(out, combine, call.row_to_token, call.row_to_slot, call.token_offsets, call.token_rows)
    return y if call.residual is None else y + call.residual, pre


def moe_mlp_twice_differentiable(*arguments: Any, added: Sequence[AddedRows] = NO_ADDED_ROWS) -> Tensor:
    """y, through operations that autograd may differentiate again: the weights are multiplied in before the sum.

    ``added`` makes, of the rows that the up and the down projection multiply and of their assignments, what is added to
    the products.
    """
    out, gate, _ = _expert_rows(*arguments, added=added)
    call = Call(*arguments)
    if call.gate_weight_on == "output":
        out = out * gate
    y = unpermute(out, None, call.row_to_token, call.row_to_slot, call.token_offsets, call.token_rows)
    return (y if call.residual is None else y + call.residual).to(call.x.dtype)


def _expert_rows(*arguments: Any, added: Sequence[AddedRows] = NO_ADDED_ROWS) -> tuple[Tensor, Tensor, Tensor]:
    """Every row through its expert ``(R, H)``, the rows' gate weights ``(R, 1)``, and the pre-activation."""
    call = Call(*arguments)
    weights = stacked_weights(call)
    dtype = call.x.dtype
    real, expert, assignment, gate = row_values(call)

    rows = permute(call.x, call.row_to_token, call.token_offsets, call.token_rows)
    if call.gate_weight_on == "input":
        rows = (rows * gate).to(dtype)
    pre = beside([grouped_gemm(rows, up, call.expert_offsets) for up in weights.up])
    if added[0] is not None:
        pre = pre + added[0](rows, assignment)
    if weights.up_bias is not None:
        pre = pre + bias_rows(weights.up_bias, expert, real)
    pre = weights.half_beside_half(pre)

    widths = row_widths(call, expert, real)
    outside = None if widths is None else outside_experts(widths, call.width)
    hidden = activate(pre, call.activation, call.gated, outside)
    mask = dropout_mask(call, ACTIVATION_DROPOUT, call.activation_dropout, assignment, call.width, hidden.dtype)
    if mask is not None:
        hidden = hidden * mask
    if call.gate_weight_on == "activation":
        hidden = hidden * gate
    out = grouped_gemm(hidden.to(dtype), weights.down, call.expert_offsets)
    if added[1] is not None:
        out = out + added[1](hidden.to(dtype), assignment)
    if call.down_bias is not None:
        out = out + bias_rows(call.down_bias, expert, real)
    mask = dropout_mask(call, EXPERT_DROPOUT, call.expert_dropout, assignment, call.x.shape[1], accumulate_dtype(dtype))
    if mask is not None:
        out = (out * mask).to(dtype)
    return out, gate, pre


def moe_mlp_backward_ref(grad_y: Tensor, pre: Tensor, of_weights: bool, *arguments: Any) -> tuple[Tensor, ...]:
    """Gradients of x, gate weights, up and down projection, both biases and the gate projection.

    Empty tensors stand for what does not exist, and for all five without ``of_weights`` (frozen experts).
    """
    grad_x, grad_gate, grad_pre, hidden = moe_mlp_backward_data_ref(grad_y, pre, *arguments)
    if not of_weights:
        return grad_x, grad_gate, *(grad_x.new_empty(0) for _ in WEIGHTS)
    return grad_x, grad_gate, *moe_mlp_backward_weights_ref(grad_y, grad_pre, hidden, *arguments)


def _grad_out(call: Call, grad_y: Tensor, assignment: Tensor) -> Tensor:
    """The gradient of every row's output, without its gate weight, whose own gradient needs the bare value."""
    grad_out = permute(grad_y, call.row_to_token, call.token_offsets, call.token_rows)
    wide = accumulate_dtype(call.x.dtype)
    mask = dropout_mask(call, EXPERT_DROPOUT, call.expert_dropout, assignment, call.x.shape[1], wide)
    return grad_out if mask is None else (grad_out * mask).to(call.x.dtype)


def moe_mlp_backward_data_ref(grad_y: Tensor, pre: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    """Gradients of x and gate weights; and what those of the weights are made of, besides x and grad_y.

    That is the gradient of the pre-activation and the activations as the down projection saw them, a row of the plan
    each, ``(R, pre_width)`` and ``(R, width)``; zeros in holes, and beyond the width of an expert that is not the
    widest. Columns of the former are in the order of the up projection's rows in memory.
    """
    call = Call(*arguments)
    weights = stacked_weights(call)
    dtype, wide = call.x.dtype, accumulate_dtype(call.x.dtype)
    real, expert, assignment, gate = row_values(call)

    # Through the combine and the down projection.
    grad_out = _grad_out(call, grad_y, assignment)
    grad_hidden = grouped_gemm(grad_out, weights.down, call.expert_offsets, trans_b=False).to(wide)
    hidden = activate(pre, call.activation, call.gated)
    mask = dropout_mask(call, ACTIVATION_DROPOUT, call.activation_dropout, assignment, call.width, wide)
    grad_hidden = grad_hidden if mask is None else grad_hidden * mask
    grad_gate = (hidden * grad_hidden).sum(1)
    hidden = hidden if mask is None else hidden * mask
    if call.gate_weight_on != "input":
        hidden, grad_hidden = hidden * gate, grad_hidden * gate
    if call.down_bias is not None and call.gate_weight_on == "output":
        grad_gate = grad_gate + (bias_rows(call.down_bias, expert, real).to(wide) * grad_out).sum(1)

    # Through the activation and the up projection.
    grad_pre = weights.as_multiplied(activate_backward(grad_hidden, pre, call.activation, call.gated).to(dtype))
    parts = zip(grad_pre.split(weights.widths, 1), weights.up, strict=True)
    products = (grouped_gemm(part, up, call.expert_offsets, trans_b=False) for part, up in parts)
    grad_rows = functools.reduce(operator.add, products)
    if call.gate_weight_on == "input":
        rows = permute(call.x, call.row_to_token, call.token_offsets, call.token_rows)
        grad_gate = (rows.to(wide) * grad_rows).sum(1)
    to_tokens = call.gate_weights if call.gate_weight_on == "input" else None
    grad_x = unpermute(grad_rows, to_tokens, call.row_to_token, call.row_to_slot, call.token_offsets, call.token_rows)
    outside = outside_experts(widths_of_rows(call, expert, real), call.width)
    return grad_x, of_assignments(call, grad_gate), grad_pre, hidden.masked_fill(outside, 0).to(dtype)


def moe_mlp_backward_weights_ref(
    grad_y: Tensor, grad_pre: Tensor, hidden: Tensor, *arguments: Any
) -> tuple[Tensor, ...]:
    """Gradients of the weights, in the order of ``WEIGHTS``, from what :func:`moe_mlp_backward_data_ref` returned."""
    call = Call(*arguments)
    weights = stacked_weights(call)
    _, _, assignment, gate = row_values(call)
    offsets, num_experts = call.expert_offsets, call.num_experts

    def sums(a: Tensor, b: Tensor, weight: Tensor) -> Tensor:
        return outer_sums(a, b, offsets, columns_first=is_transposed(weight))

    def per_expert_sum(rows: Tensor) -> Tensor:
        ones = rows.new_ones(rows.shape[0], 1)
        return grouped_gemm_weight(ones, rows, offsets, num_experts).squeeze(1)

    grad_out = _grad_out(call, grad_y, assignment)
    rows = permute(call.x, call.row_to_token, call.token_offsets, call.token_rows)
    if call.gate_weight_on == "input":
        rows = (rows * gate).to(call.x.dtype)
    parts = grad_pre.split(weights.widths, 1)
    grads_up = [sums(part, rows, up) for part, up in zip(parts, weights.up, strict=True)]
    grad_down = sums(grad_out, hidden, weights.down)
    grad_up_bias = grad_down_bias = None
    if call.up_bias is not None:
        grad_up_bias = per_expert_sum(grad_pre)
    if call.down_bias is not None:
        weighted = (grad_out * gate).to(call.x.dtype) if call.gate_weight_on == "output" else grad_out
        grad_down_bias = per_expert_sum(weighted)
    return grads_as_given(call, weights.interleaved, grads_up, grad_down, grad_up_bias, grad_down_bias)
