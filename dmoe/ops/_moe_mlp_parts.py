"""What the compositions of ``moe_mlp`` from smaller operations share: weights in one form, what belongs to each row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dmoe.ops._moe_mlp_call import PROJECTIONS, WEIGHTS, Call
from dmoe.ops.philox import dropout_scale
from dmoe.strides import in_halves, in_layout_of, in_memory_order, is_interleaved, matrices


def stack_widths(packed: Tensor, sizes: Sequence[int], dim: int) -> Tensor:
    """Experts of different widths, side by side along ``dim``, to zero-padded ones stacked in front."""
    widest, parts = max(sizes), []
    for part in packed.split(list(sizes), dim=dim):
        padding = [0, 0] * (packed.dim() - dim % packed.dim())
        padding[-1] = widest - part.shape[dim]
        parts.append(F.pad(part, padding))
    return torch.stack(parts)


def _unstack(stacked: Tensor, sizes: Sequence[int], dim: int) -> Tensor:
    """The inverse of :func:`stack_widths`: drop the padding."""
    return torch.cat([part.narrow(dim, 0, size) for part, size in zip(stacked, sizes, strict=True)], dim=dim)


class Stacked(NamedTuple):
    """Weights as grouped_gemm takes them: up (E, C, H) with C the pre-activation's width, down (E, H, F).

    Where gate and up lie apart from each other in memory, ``up`` is the two, ``(E, F, H)`` each. Where they are
    ``interleaved``, its C rows, the C numbers of ``up_bias``, and the columns of whatever is multiplied by them, are in
    the order of memory.
    """

    up: tuple[Tensor, ...]
    down: Tensor
    up_bias: Tensor | None
    interleaved: bool

    @property
    def widths(self) -> list[int]:
        """Columns of the pre-activation that each of ``up`` makes."""
        return [up.shape[1] for up in self.up]

    def half_beside_half(self, columns: Tensor) -> Tensor:
        """The pre-activation's columns ``(R, C)`` as the rest of a call has them, all of the gate's first."""
        return columns.unflatten(1, (-1, 2)).mT.flatten(1) if self.interleaved else columns

    def as_multiplied(self, columns: Tensor) -> Tensor:
        """The inverse of :meth:`half_beside_half`."""
        return columns.unflatten(1, (2, -1)).mT.flatten(1) if self.interleaved else columns


def stacked_weights(call: Call) -> Stacked:
    """The call's weights in that form; experts of different widths are padded with zeros."""
    up, gate, down, up_bias = call.up_proj, call.gate_proj, call.down_proj, call.up_bias
    if call.ffn_sizes:
        up, down = stack_widths(up, call.ffn_sizes, -2), stack_widths(down, call.ffn_sizes, -1)
        gate = None if gate is None else stack_widths(gate, call.ffn_sizes, -2)
        up_bias = None if up_bias is None else stack_widths(up_bias, call.ffn_sizes, -1)
    interleaved = call.gated and gate is None and is_interleaved(up)
    if up_bias is not None:
        up_bias = in_memory_order(up_bias) if interleaved else up_bias.reshape(down.shape[0], -1)
    return Stacked(matrices(up, gate, call.gated), down, up_bias, interleaved)


def row_values(call: Call) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Per row: is it real, its expert, its assignment (position in token_rows), its gate weight (R, 1)."""
    num_experts = call.expert_offsets.shape[0] - 1
    rows = torch.arange(call.row_to_token.shape[0], device=call.row_to_token.device, dtype=torch.int32)
    real = call.row_to_token >= 0
    expert = torch.searchsorted(call.expert_offsets[1:].contiguous(), rows, right=True).clamp(
        max=max(num_experts - 1, 0)
    )
    assignment = call.token_offsets[call.row_to_token.clamp(min=0).long()] + call.row_to_slot
    assignment = assignment.masked_fill(~real, 0).long()
    weights = call.gate_weights.flatten()
    if not weights.numel():  # no token, yet a plan with holes
        weights = weights.new_zeros(1)
    return real, expert, assignment, (weights[assignment] * real).unsqueeze(1)


def row_widths(call: Call, expert: Tensor, real: Tensor) -> Tensor | None:
    """:func:`widths_of_rows` for an activation that minds zeros.

    None for an activation by name: it is finite of the zeros behind, and zeros are what it is multiplied by.
    """
    return None if isinstance(call.activation, str) else widths_of_rows(call, expert, real)


def widths_of_rows(call: Call, expert: Tensor, real: Tensor) -> Tensor:
    """How wide each row's expert is, ``(R, 1)``, 0 where a row holds no token."""
    sizes = call.ffn_sizes or [call.width] * call.num_experts
    widths = torch.cat([expert.new_full((1,), size) for size in sizes])  # a copy from the host would wait
    return (widths[expert.long()] * real).unsqueeze(1)


def outside_experts(widths: Tensor, width: int) -> Tensor:
    """Numbers of the hidden layer ``(R, width)`` that are no expert's."""
    return torch.arange(width, device=widths.device) >= widths


def save_values(ctx: Any, values: Sequence[Any]) -> None:
    """Keep values of any kind for backward; tensors as autograd keeps them."""
    ctx.are_tensors = [isinstance(value, Tensor) for value in values]
    ctx.others = [None if isinstance(value, Tensor) else value for value in values]
    ctx.save_for_backward(*(value for value in values if isinstance(value, Tensor)))


def saved_values(ctx: Any) -> list[Any]:
    """What :func:`save_values` kept."""
    tensors = iter(ctx.saved_tensors)
    return [next(tensors) if is_one else other for is_one, other in zip(ctx.are_tensors, ctx.others, strict=True)]


def beside(parts: list[Tensor]) -> Tensor:
    """Columns side by side; one part as it is."""
    return torch.cat(parts, 1) if len(parts) > 1 else parts[0]


def dropout_mask(
    call: Call, stream: int, p: float, assignment: Tensor, width: int, dtype: torch.dtype
) -> Tensor | None:
    """``(R, width)`` of 0 or 1 / (1 - p), or None without dropout; see :func:`dmoe.ops.philox.dropout_scale`."""
    if p == 0 or call.seed is None:
        return None
    return dropout_scale(call.seed, assignment, width, stream, p, dtype)


def bias_rows(bias: Tensor, expert: Tensor, real: Tensor) -> Tensor:
    """Its expert's bias for each row, zeros where a row holds no token."""
    return bias[expert.long()] * real.unsqueeze(1)


def of_assignments(call: Call, row_grads: Tensor) -> Tensor:
    """The gate weights' gradient in their shape, from that of rows ``(R,)``; zeros where an assignment has none."""
    rows = call.token_rows
    if not row_grads.numel() or not rows.numel():
        return torch.zeros_like(call.gate_weights)
    grads = row_grads[rows.clamp_min(0).long()].masked_fill_(rows < 0, 0)
    return grads.to(call.gate_weights.dtype).view(call.gate_weights.shape)


def grads_as_given(
    call: Call,
    interleaved: bool,
    grads_up: Sequence[Tensor],
    grad_down: Tensor | None,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
) -> tuple[Tensor, ...]:
    """Gradients in the order of ``WEIGHTS``, each in its weight's shape and memory order; empty where there is none.

    Args:
        call: whose weights.
        interleaved: as in :class:`Stacked`.
        grads_up, grad_down: of :class:`Stacked`'s ``up`` and ``down``; none, and None, where they are not wanted.
        up_bias, down_bias: of the biases, ``(E, C)`` and ``(E, H)``.
    """
    grad_up = grad_gate = None
    if grads_up:
        grad_up = grads_up[-1]
        if call.gate_proj is not None:
            grad_gate = _as_given(call, grads_up[0], call.gate_proj, -2)
        elif len(grads_up) == 2:
            grad_up = torch.stack(list(grads_up), 1)
        elif call.gated:
            grad_up = in_halves(grad_up, interleaved)
        grad_up = _as_given(call, grad_up, call.up_proj, -2)
    if grad_down is not None:
        grad_down = _as_given(call, grad_down, call.down_proj, -1)
    if call.up_bias is not None and up_bias is not None:
        up_bias = _as_given(call, in_halves(up_bias, interleaved) if call.gated else up_bias, call.up_bias, -1)
    grads = (grad_up, grad_down, up_bias, down_bias, grad_gate)
    return tuple(call.x.new_empty(0) if grad is None else grad for grad in grads)  # none shares memory with another


def _as_given(call: Call, grad: Tensor, weight: Tensor, f_dim: int) -> Tensor:
    """A weight's gradient in the weight's shape and memory order, from that of stacked weights."""
    return in_layout_of(weight, _unstack(grad, call.ffn_sizes, f_dim) if call.ffn_sizes else grad)


def add_to_main_grads(call: Call, grads: tuple[Tensor, ...], first: int = 2) -> tuple[Tensor, ...]:
    """Move the projections' gradients into the call's buffers, where it has some; the weights' begin at ``first``."""
    moved = list(grads)
    for name, buffer in zip(PROJECTIONS, call.buffers, strict=True):
        index = first + WEIGHTS.index(name)
        if buffer is not None and moved[index].numel():
            buffer.add_(moved[index])
            moved[index] = moved[index].new_empty(0)
    return tuple(moved)
