"""``moe_mlp`` and its backward in PyTorch's own operations, where no kernel of ours runs or is trusted, and by name.

``MoEConfig(backend="torch")``. It gathers the rows, multiplies them (:mod:`dmoe.ops.expert_products`), and takes what
lies between and behind the products in chunks: in float32, rounded where :mod:`dmoe.ops.moe_mlp_ref` rounds, without a
float32 copy of all rows. Saved for backward is what the formula needs and no more, as for the kernels.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import Tensor

from dmoe.ops._moe_mlp_call import WEIGHTS, Call
from dmoe.ops._moe_mlp_parts import (
    Stacked,
    beside,
    bias_rows,
    dropout_mask,
    grads_as_given,
    of_assignments,
    outside_experts,
    row_values,
    row_widths,
    stacked_weights,
)
from dmoe.ops.activation import accumulate_dtype, activate, activate_backward
from dmoe.ops.expert_products import ExpertProducts, RowProducts
from dmoe.ops.permute import permute_ref, unpermute_ref
from dmoe.ops.philox import ACTIVATION_DROPOUT, EXPERT_DROPOUT
from dmoe.strides import is_transposed

# Numbers of a chunk: what a core keeps in its cache, and enough for a GPU to be busy with.
_CHUNK = {"cpu": 2**17}
_LARGE_CHUNK = 2**25


def _chunks(rows: int, width: int, device: torch.device) -> Iterator[slice]:
    """Slices of ``rows`` rows of ``width`` numbers."""
    step = max(1, _CHUNK.get(device.type, _LARGE_CHUNK) // max(width, 1))
    return (slice(begin, min(begin + step, rows)) for begin in range(0, rows, step))


class Pass:
    """One call, and what both of its directions derive from it.

    The products with the projections are methods, for :mod:`dmoe.ops.moe_mlp_composed` to make otherwise.
    """

    def __init__(self, call: Call, products: RowProducts | None = None, weights: Stacked | None = None) -> None:
        self.call = call
        self.weights: Stacked = stacked_weights(call) if weights is None else weights
        self.real, self.expert, self.assignment, self.gate = row_values(call)
        self.row_widths = row_widths(call, self.expert, self.real)
        operands = (call.x, *self.weights.up, self.weights.down)
        self.products: RowProducts = products or ExpertProducts(call.expert_offsets, *operands)
        self.wide = accumulate_dtype(call.x.dtype)

    def before_bias(self) -> Tensor:
        """Rows of the pre-activation, without bias."""
        rows = self.inputs()
        return beside([self.products.rows(rows, up.mT) for up in self.weights.up])

    def through_down(self, hidden: Tensor) -> Tensor:
        """Rows of the hidden layer to the experts' results, without bias."""
        return self.products.rows(hidden, self.weights.down.mT)

    def back_through_down(self, grad_out: Tensor) -> Tensor:
        """The gradient of the hidden layer."""
        return self.products.rows(grad_out, self.weights.down)

    def back_through_up(self, grad_pre: Tensor) -> Tensor:
        """The gradient of the rows of x."""
        parts = zip(grad_pre.split(self.weights.widths, 1), self.weights.up, strict=True)
        return functools.reduce(operator.add, (self.products.rows(part, up) for part, up in parts))

    def gathered(self, source: Tensor) -> Tensor:
        """Its token's row for each row of the plan, zeros where it holds none; ``(T, H)`` to ``(R, H)``."""
        call = self.call
        return permute_ref(source, call.row_to_token, call.token_offsets, call.token_rows)

    def chunks(self, width: int) -> Iterator[slice]:
        """Of the plan's rows."""
        return _chunks(self.real.shape[0], width, self.real.device)

    def inputs(self) -> Tensor:
        """What the up projection multiplies: x, or x weighed."""
        rows = self.gathered(self.call.x)
        if self.call.gate_weight_on == "input":
            for part in self.chunks(rows.shape[1]):
                rows[part] = rows[part] * self.gate[part]
        return rows

    def activation_mask(self, part: slice) -> Tensor | None:
        """Dropout of the activation, for some rows."""
        call = self.call
        assignment = self.assignment[part]
        return dropout_mask(call, ACTIVATION_DROPOUT, call.activation_dropout, assignment, call.width, self.wide)

    def outside(self, part: slice) -> Tensor | None:
        """Which numbers of the hidden layer are no expert's, for some rows; None for activations that do not mind."""
        return None if self.row_widths is None else outside_experts(self.row_widths[part], self.call.width)

    def hidden_of(self, pre: Tensor) -> Tensor:
        """The activation, masked, and weighed where that is its place."""
        call = self.call
        hidden = pre.new_empty(pre.shape[0], call.width)
        for part in self.chunks(call.pre_width):
            value = activate(pre[part], call.activation, call.gated, self.outside(part))
            mask = self.activation_mask(part)
            if mask is not None:
                value *= mask
            if call.gate_weight_on == "activation":
                value *= self.gate[part]
            hidden[part] = value
        return hidden

    def back_through_activation(self, grad_hidden: Tensor, pre: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The gradient of the pre-activation as products take it, the hidden layer again, weighed, and row grads."""
        call = self.call
        grad_pre, hidden = torch.empty_like(pre), torch.empty_like(grad_hidden)
        row_grads = pre.new_empty(pre.shape[0], dtype=self.wide)
        for part in self.chunks(call.pre_width):
            hole = ~self.real[part].unsqueeze(1)  # what lies behind the last expert's rows may be anything
            grad = grad_hidden[part].to(self.wide).masked_fill(hole, 0)
            here = pre[part].masked_fill(hole, 0)
            outside = self.outside(part)
            value, mask = activate(here, call.activation, call.gated, outside), self.activation_mask(part)
            if mask is not None:
                grad *= mask
            row_grads[part] = (value * grad).sum(1)
            if mask is not None:
                value *= mask
            if call.gate_weight_on != "input":
                value *= self.gate[part]
                grad *= self.gate[part]
            hidden[part] = value
            grad_here = activate_backward(grad, here, call.activation, call.gated, outside)
            grad_pre[part] = self.weights.as_multiplied(grad_here)
        return grad_pre, hidden, row_grads

    def drop_outputs(self, rows: Tensor) -> Tensor:
        """Dropout of the experts' outputs, or of their gradient, in place."""
        call = self.call
        if call.expert_dropout:
            for part in self.chunks(rows.shape[1]):
                mask = dropout_mask(
                    call, EXPERT_DROPOUT, call.expert_dropout, self.assignment[part], rows.shape[1], self.wide
                )
                rows[part] = rows[part] if mask is None else rows[part] * mask
        return rows

    def summed(self, rows: Tensor, weigh: bool, residual: Tensor | None = None) -> Tensor:
        """Each token's rows, weighed or not, and the residual: ``(R, H)`` to ``(T, H)``."""
        call, dtype = self.call, self.call.x.dtype
        tokens, assignments = call.x.shape[0], call.token_rows.shape[0]
        top_k = assignments // max(tokens, 1)
        if call.gate_weights.dim() != 2 or call.gate_weights.shape != (tokens, top_k) or not rows.shape[0] or not top_k:
            flat = call.gate_weights.flatten() if weigh else None
            y = unpermute_ref(rows, flat, call.row_to_token, call.row_to_slot, call.token_offsets, call.token_rows)
            return y if residual is None else y + residual
        y = torch.empty_like(call.x)
        token_rows = call.token_rows.view(tokens, top_k)
        for part in _chunks(tokens, top_k * rows.shape[1], rows.device):
            picked = token_rows[part]
            terms = rows.index_select(0, picked.clamp_min(0).flatten()).to(self.wide).unflatten(0, picked.shape)
            if weigh:
                terms *= call.gate_weights[part].to(self.wide).unsqueeze(2)
            total = terms.masked_fill_((picked < 0).unsqueeze(2), 0).sum(1)
            y[part] = total if residual is None else total.to(dtype) + residual[part]
        return y


def moe_mlp_torch(*arguments: Any) -> tuple[Tensor, Tensor]:
    """y and the pre-activation; rows of the latter behind the last expert's have any values."""
    return forward_of(Pass(Call(*arguments)))


def forward_of(now: Pass) -> tuple[Tensor, Tensor]:
    """The same of a pass."""
    pre = pre_activation_of(now)
    return _from_pre_activation(now, pre), pre


def pre_activation_torch(*arguments: Any) -> Tensor:
    """The pre-activation alone."""
    return pre_activation_of(Pass(Call(*arguments)))


def pre_activation_of(now: Pass) -> Tensor:
    """The same of a pass."""
    pre = now.before_bias()
    if now.weights.up_bias is not None:
        pre.add_(bias_rows(now.weights.up_bias, now.expert, now.real))
    return now.weights.half_beside_half(pre)


def _from_pre_activation(now: Pass, pre: Tensor) -> Tensor:
    call = now.call
    out = now.through_down(now.hidden_of(pre))
    if call.down_bias is not None:
        out.add_(bias_rows(call.down_bias, now.expert, now.real))
    return now.summed(now.drop_outputs(out), call.gate_weight_on == "output", call.residual)


def backward_torch(grad_y: Tensor, pre: Tensor, of_weights: bool, *arguments: Any) -> tuple[Tensor, ...]:
    """See :func:`dmoe.ops.moe_mlp_ref.moe_mlp_backward_ref`."""
    grad_x, grad_gate, grad_pre, hidden = backward_data_torch(grad_y, pre, *arguments)
    if not of_weights:
        return grad_x, grad_gate, *(grad_x.new_empty(0) for _ in WEIGHTS)
    return grad_x, grad_gate, *backward_weights_torch(grad_y, grad_pre, hidden, *arguments)


def backward_data_torch(grad_y: Tensor, pre: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    """See :func:`dmoe.ops.moe_mlp_ref.moe_mlp_backward_data_ref`."""
    return backward_data_of(Pass(Call(*arguments)), grad_y, pre)


def backward_data_of(now: Pass, grad_y: Tensor, pre: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same of a pass."""
    call = now.call
    grad_out = now.drop_outputs(now.gathered(grad_y))
    grad_hidden = now.back_through_down(grad_out)
    grad_pre, hidden, row_grads = now.back_through_activation(grad_hidden, pre)
    del grad_hidden
    if call.down_bias is not None and call.gate_weight_on == "output":
        for part in now.chunks(grad_out.shape[1]):
            bias = bias_rows(call.down_bias, now.expert[part], now.real[part])
            row_grads[part] += (bias.to(now.wide) * grad_out[part]).sum(1)
    del grad_out

    grad_rows = now.back_through_up(grad_pre)
    if call.gate_weight_on == "input":
        rows = now.gathered(call.x)
        for part in now.chunks(rows.shape[1]):
            products = rows[part].to(now.wide) * grad_rows[part]
            row_grads[part] = products.masked_fill_(~now.real[part].unsqueeze(1), 0).sum(1)
    grad_x = now.summed(grad_rows, call.gate_weight_on == "input")
    return grad_x, of_assignments(call, row_grads), grad_pre, hidden


def backward_weights_torch(grad_y: Tensor, grad_pre: Tensor, hidden: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    """See :func:`dmoe.ops.moe_mlp_ref.moe_mlp_backward_weights_ref`."""
    return backward_weights_of(Pass(Call(*arguments)), grad_y, grad_pre, hidden)


def backward_weights_of(
    now: Pass, grad_y: Tensor, grad_pre: Tensor, hidden: Tensor, wanted: Collection[str] = WEIGHTS
) -> tuple[Tensor, ...]:
    """The same of a pass; of those that are not wanted, empty ones."""
    call, weights, products = now.call, now.weights, now.products
    grad_out = now.drop_outputs(now.gathered(grad_y))
    grad_down = grad_up_bias = grad_down_bias = None
    grads_up: list[Tensor] = []
    if "down_proj" in wanted:
        grad_down = products.sums(grad_out, hidden, columns_first=is_transposed(weights.down))
    if call.down_bias is not None and "down_bias" in wanted:
        if call.gate_weight_on == "output":
            for part in now.chunks(grad_out.shape[1]):
                grad_out[part] = grad_out[part] * now.gate[part]
        grad_down_bias = products.row_sums(grad_out)
    del grad_out
    if "up_proj" in wanted or "gate_proj" in wanted:
        rows = now.inputs()
        halves = zip(grad_pre.split(weights.widths, 1), weights.up, strict=True)
        grads_up = [products.sums(half, rows, columns_first=is_transposed(up)) for half, up in halves]
    if call.up_bias is not None and "up_bias" in wanted:
        grad_up_bias = products.row_sums(grad_pre)
    return grads_as_given(call, weights.interleaved, grads_up, grad_down, grad_up_bias, grad_down_bias)
