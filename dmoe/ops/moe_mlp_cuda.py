"""``moe_mlp`` on a GPU: three kernels forward, five backward, whatever the number of experts.

forward     up (gathers its tokens, activates), down, combine
backward    hidden_grad (through down and the activation), weight gradient of down, row_grad (through up), combine,
            weight gradient of up; one more for each bias, and where a bias or the expert dropout needs it; or in two
            halves, of the data and of the weights, in this order

Nothing waits for the host: grids come from shapes, and the tile table, on the device, says which rows and which expert
a program owns. Rows of no token are zeros wherever they could be summed, and are never read elsewhere. Calls that the
kernels do not serve (float64, experts of different widths, nothing to do, no Triton) run the composition of PyTorch's
own operations.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from dmoe.ops._library import has_triton
from dmoe.ops._moe_mlp_call import Call
from dmoe.ops._moe_mlp_parts import add_to_main_grads
from dmoe.ops._trust import Subject, precision
from dmoe.ops.moe_mlp_torch import (
    backward_data_torch,
    backward_torch,
    backward_weights_torch,
    moe_mlp_torch,
    pre_activation_torch,
)
from dmoe.ops.tile_table import preferred_tile_rows, tile_table
from dmoe.strides import bias_beside, in_halves, in_layout_of, is_interleaved, matrices, readable

if TYPE_CHECKING:
    from dmoe.kernels.operands import Rows


def _served(call: Call) -> bool:
    return (
        has_triton()
        and call.x.dtype in (torch.bfloat16, torch.float16, torch.float32)
        and not call.ffn_sizes
        and 0 not in (call.x.numel(), call.row_to_token.numel(), call.down_proj.numel())
        and (call.gate_proj is None or call.gate_proj.stride() == call.up_proj.stride())
        and all(readable(weight) is weight for weight in (call.up_proj, call.down_proj))
    )


def _interleaved(call: Call) -> bool:
    """Whether products with the up projection have their columns by turns, of gate and of up."""
    return call.gated and call.gate_proj is None and is_interleaved(call.up_proj)


def _tile_rows(call: Call) -> int:
    """Those of the plan, or of the table that :func:`_rows` makes where a plan has none."""
    if call.tiles is not None and call.experts_by_load is not None:
        return call.tile_rows
    return preferred_tile_rows(call.row_to_token.shape[0], call.num_experts)


def subjects(*parts: str, before: int = 0) -> Callable[..., list[Subject]]:
    """What a call certifies: ``parts``, its own first. ``before`` arguments stand in front of the call's."""

    def of_call(*arguments: Any) -> list[Subject]:
        call = Call(*arguments[before:])
        if not _served(call):
            return []
        extra = (_tile_rows(call), precision())
        forms = {"moe_mlp": call, "moe_mlp_backward": call._replace(residual=None)}
        return [Subject(part, tuple(forms[part]), extra) for part in parts]

    return of_call


def _rows(call: Call) -> Rows:
    from dmoe.kernels.operands import Rows

    tiles, by_load, tile_rows = call.tiles, call.experts_by_load, _tile_rows(call)
    num_rows = call.row_to_token.shape[0]
    if tiles is None or by_load is None:  # a plan made for another device, or by hand
        tiles, by_load = tile_table(call.expert_offsets, num_rows, tile_rows)
    return Rows(
        tiles=tiles,
        experts_by_load=by_load,
        tile_rows=tile_rows,
        expert_offsets=call.expert_offsets,
        num_rows=num_rows,
        row_to_token=call.row_to_token,
        row_to_slot=call.row_to_slot,
        token_offsets=call.token_offsets,
        token_rows=call.token_rows,
    )


def _activated(call: Call, rows: Rows, *, with_pre: bool, with_hidden: bool) -> tuple[Tensor | None, Tensor | None]:
    """The pre-activation and the activation, as wanted."""
    from dmoe.kernels.moe_mlp import up
    from dmoe.kernels.operands import Dropout

    num_rows = rows.num_rows
    pre = call.x.new_empty((num_rows, call.pre_width)) if with_pre else None
    hidden = call.x.new_empty((num_rows, call.width)) if with_hidden else None
    up(
        call.x,
        matrices(call.up_proj, call.gate_proj, call.gated),
        None if call.up_bias is None else bias_beside(call.up_bias, call.up_proj),
        call.gate_weights,
        pre,
        hidden,
        rows,
        gated=call.gated,
        interleaved=_interleaved(call),
        activation=call.activation,
        gate_weight_on=call.gate_weight_on,
        dropout=Dropout(call.activation_dropout, call.seed),
    )
    return pre, hidden


def _forward(call: Call, *, with_pre: bool) -> tuple[Tensor, Tensor | None]:
    from dmoe.kernels.moe_mlp import multiply_rows
    from dmoe.kernels.moe_mlp_rows import combine
    from dmoe.kernels.operands import Dropout

    rows = _rows(call)
    pre, hidden = _activated(call, rows, with_pre=with_pre, with_hidden=True)
    assert hidden is not None
    out = call.x.new_empty((rows.num_rows, call.x.shape[1]))
    dropout = Dropout(call.expert_dropout, call.seed)
    multiply_rows("down", hidden, call.down_proj, out, rows, trans_b=True, bias=call.down_bias, dropout=dropout)
    y = torch.empty_like(call.x)
    combine(out, call.gate_weights if call.gate_weight_on == "output" else None, call.residual, y, rows)
    return y, pre


def moe_mlp_cuda(*arguments: Any) -> tuple[Tensor, Tensor]:
    """y and the pre-activation."""
    call = Call(*arguments)
    if not _served(call):
        return moe_mlp_torch(*arguments)
    y, pre = _forward(call, with_pre=True)
    assert pre is not None
    return y, pre


def moe_mlp_inference_cuda(*arguments: Any) -> Tensor:
    """y."""
    call = Call(*arguments)
    return _forward(call, with_pre=False)[0] if _served(call) else moe_mlp_torch(*arguments)[0]


def moe_mlp_pre_activation_cuda(*arguments: Any) -> Tensor:
    """The pre-activation alone."""
    call = Call(*arguments)
    if not _served(call):
        return pre_activation_torch(*arguments)
    pre, _ = _activated(call, _rows(call), with_pre=True, with_hidden=False)
    assert pre is not None
    return pre


def moe_mlp_backward_cuda(grad_y: Tensor, pre: Tensor, of_weights: bool, *arguments: Any) -> tuple[Tensor, ...]:
    """Gradients of x, gate weights, both projections and both biases; empty where there is none to give.

    The projections' are empty too where ``up_main_grad`` and ``down_main_grad`` took them.
    """
    call = Call(*arguments)
    if not _served(call):
        return add_to_main_grads(call, backward_torch(grad_y, pre, of_weights, *arguments))
    rows, nothing = _rows(call), [call.x.new_empty(0) for _ in range(5)]  # an operation's results do not share memory
    grad_out = _grad_out(call, rows, grad_y)
    grad_pre, hidden, row_grads = _through_down(call, rows, grad_out, pre, with_hidden=of_weights)
    grad_down, grad_down_bias = nothing[:2]
    if hidden is not None:
        grad_down, grad_down_bias = _down_grads(call, rows, grad_out, hidden)
        del hidden  # its memory may serve the rows that follow
    grad_x, grad_gate = _to_tokens(call, rows, grad_pre, row_grads)
    grad_up, grad_up_bias, grad_gate_proj = _up_grads(call, rows, grad_pre) if of_weights else nothing[2:]
    return grad_x, grad_gate, grad_up, grad_down, grad_up_bias, grad_down_bias, grad_gate_proj


def moe_mlp_backward_data_cuda(grad_y: Tensor, pre: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    """See :func:`dmoe.ops.moe_mlp_ref.moe_mlp_backward_data_ref`."""
    call = Call(*arguments)
    if not _served(call):
        return backward_data_torch(grad_y, pre, *arguments)
    rows = _rows(call)
    grad_pre, hidden, row_grads = _through_down(call, rows, _grad_out(call, rows, grad_y), pre, with_hidden=True)
    assert hidden is not None
    return *_to_tokens(call, rows, grad_pre, row_grads), grad_pre, hidden


def moe_mlp_backward_weights_cuda(
    grad_y: Tensor, grad_pre: Tensor, hidden: Tensor, *arguments: Any
) -> tuple[Tensor, ...]:
    """See :func:`dmoe.ops.moe_mlp_ref.moe_mlp_backward_weights_ref`; the buffers as in the whole backward."""
    call = Call(*arguments)
    if not _served(call):
        grads = backward_weights_torch(grad_y, grad_pre, hidden, *arguments)
        return add_to_main_grads(call, grads, first=0)
    rows = _rows(call)
    grad_down, grad_down_bias = _down_grads(call, rows, _grad_out(call, rows, grad_y), hidden)
    grad_up, grad_up_bias, grad_gate_proj = _up_grads(call, rows, grad_pre)
    return grad_up, grad_down, grad_up_bias, grad_down_bias, grad_gate_proj


class _GradOut(NamedTuple):
    """The gradient of the rows' outputs: grad_y itself, to be gathered, or a row each."""

    rows: Tensor
    gather: bool


def _grad_out(call: Call, rows: Rows, grad_y: Tensor) -> _GradOut:
    from dmoe.kernels.moe_mlp_rows import masked_rows
    from dmoe.kernels.operands import Dropout

    if not call.expert_dropout:
        return _GradOut(grad_y, True)
    masked = call.x.new_empty((rows.num_rows, call.x.shape[1]))
    masked_rows(grad_y, masked, rows, Dropout(call.expert_dropout, call.seed))
    return _GradOut(masked, False)


def _through_down(
    call: Call, rows: Rows, grad_out: _GradOut, pre: Tensor, *, with_hidden: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Through the down projection and the activation: grad_pre, the activation, the gate weights' gradient in parts.

    Each tile's columns give one part; with the gate weight on the input there are none yet.
    """
    from dmoe.kernels import moe_mlp as kernels
    from dmoe.kernels.moe_mlp_rows import bias_dots
    from dmoe.kernels.operands import Dropout

    x, num_rows, width = call.x, rows.num_rows, call.width
    on_input = call.gate_weight_on == "input"
    grad_pre = torch.empty_like(pre)
    hidden = x.new_empty((num_rows, width)) if with_hidden else None
    dropout = Dropout(call.activation_dropout, call.seed)
    kernel = kernels.hidden_grad_name(dropout, call.down_proj, call.activation, _interleaved(call), call.gated)
    parts = kernels.num_columns(kernel, x, rows, x.shape[1], width)
    with_bias = call.down_bias is not None and call.gate_weight_on == "output"
    row_grads = None if on_input else x.new_empty((parts + with_bias, num_rows), dtype=torch.float32)
    kernels.hidden_grad(
        grad_out.rows,
        call.down_proj,
        pre,
        call.gate_weights,
        grad_pre,
        hidden,
        row_grads,
        rows,
        gather=grad_out.gather,
        gated=call.gated,
        interleaved=_interleaved(call),
        activation=call.activation,
        weighed=not on_input,
        dropout=dropout,
    )
    if with_bias:
        assert call.down_bias is not None
        assert row_grads is not None
        bias_dots(grad_out.rows, call.down_bias, row_grads[parts], rows, gather=grad_out.gather)
    return grad_pre, hidden, row_grads


def _to_tokens(call: Call, rows: Rows, grad_pre: Tensor, row_grads: Tensor | None) -> tuple[Tensor, Tensor]:
    """Through the up projection, and back to the tokens: gradients of x and of the gate weights."""
    from dmoe.kernels import moe_mlp as kernels
    from dmoe.kernels.moe_mlp_rows import combine

    x, on_input = call.x, call.gate_weight_on == "input"
    grad_rows = x.new_empty((rows.num_rows, x.shape[1]))
    ups = matrices(call.up_proj, call.gate_proj, call.gated)
    dots = None
    if on_input:
        parts = kernels.num_columns("row_grad", x, rows, call.pre_width // len(ups), x.shape[1])
        dots = row_grads = x.new_empty((parts, rows.num_rows), dtype=torch.float32)
    kernels.multiply_rows("row_grad", grad_pre, ups, grad_rows, rows, trans_b=False, x=x, dots=dots)
    grad_x, grad_gate = torch.empty_like(x), torch.empty_like(call.gate_weights)
    weights = call.gate_weights if on_input else None
    combine(grad_rows, weights, None, grad_x, rows, row_grads=row_grads, gate_grads=grad_gate)
    return grad_x, grad_gate


def _down_grads(call: Call, rows: Rows, grad_out: _GradOut, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """Of the down projection and its bias; empty where the buffer took it."""
    from dmoe.kernels.moe_mlp import weight_grad
    from dmoe.kernels.moe_mlp_rows import expert_sums

    gather = grad_out.gather
    out = torch.empty_like(call.down_proj) if call.down_main_grad is None else call.down_main_grad
    weight_grad(grad_out.rows, hidden, out, rows, gather_a=gather, accumulate=call.down_main_grad is not None)
    grad = out if call.down_main_grad is None else call.x.new_empty(0)
    if call.down_bias is None:
        return grad, call.x.new_empty(0)
    grad_bias = torch.empty_like(call.down_bias)
    weights = call.gate_weights if call.gate_weight_on == "output" else None
    expert_sums(grad_out.rows, grad_bias, rows, gather=gather, gate_weights=weights)
    return grad, grad_bias


def _up_grads(call: Call, rows: Rows, grad_pre: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of the up projection, its bias and the gate projection."""
    from dmoe.kernels.moe_mlp import weight_grad
    from dmoe.kernels.moe_mlp_rows import expert_sums

    x, weights = call.x, call.gate_weights if call.gate_weight_on == "input" else None
    buffer, gate, interleaved = call.up_main_grad, call.gate_main_grad, _interleaved(call)
    if buffer is not None and is_interleaved(buffer) != interleaved and call.gate_proj is None and call.gated:
        buffer = None  # its rows are in another order than the columns of grad_pre: it is added to behind
    up = torch.empty_like(call.up_proj) if buffer is None else buffer
    if call.gate_proj is not None and gate is None:
        gate = torch.empty_like(call.gate_proj)
    places = matrices(up, gate, call.gated)
    for place, part in zip(places, grad_pre.split([place.shape[1] for place in places], 1), strict=True):
        added = call.gate_main_grad if place is gate else buffer
        weight_grad(part, x, place, rows, gather_b=True, gate_weights=weights, accumulate=added is not None)
    grad_bias = x.new_empty(0)
    if call.up_bias is not None:
        sums = x.new_empty((call.num_experts, call.pre_width))
        expert_sums(grad_pre, sums, rows, gather=False)
        if call.gated:
            sums = in_halves(sums, interleaved)
        grad_bias = in_layout_of(call.up_bias, sums)
    if call.up_main_grad is not None:
        if buffer is None:
            call.up_main_grad.add_(up)
        up = x.new_empty(0)
    return up, grad_bias, x.new_empty(0) if gate is None or call.gate_main_grad is not None else gate
