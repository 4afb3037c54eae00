"""``moe_mlp``: every expert's MLP over the rows of a plan, and the weighted combine, as one differentiable operation.

With rows r of token t(r), expert e(r) and gate weight w(r) (here on the output)::

    pre_r = W_up[e] x_t + b_up[e]        a_r = act(pre_r), gated: act(gate_r) * up_r
    o_r   = W_down[e] a_r + b_down[e]    y_t = sum over rows of t: w_r o_r

Backward needs x, pre, the plan's indices and the gate weights, and nothing else: a_r is computed again from pre_r, and
the gate weight's gradient ``<o_r, dy_t>`` equals ``<a_r, W_down[e]^T dy_t> + <b_down[e], dy_t>``, so o is not kept.
``register_autograd`` saves only inputs and outputs, which is why pre is an output; :func:`moe_mlp` hides it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from dmoe.ops._library import define, refuse_double_backward, register_autograd
from dmoe.ops.activation import accumulate_dtype, activate, activate_backward
from dmoe.ops.grouped_gemm import grouped_gemm, grouped_gemm_weight
from dmoe.ops.permute import permute
from dmoe.ops.philox import ACTIVATION_DROPOUT, EXPERT_DROPOUT, dropout_scale
from dmoe.ops.unpermute import unpermute


class _Call(NamedTuple):
    """The arguments of one call, by name: the schema's order."""

    x: Tensor
    gate_weights: Tensor
    up_proj: Tensor
    down_proj: Tensor
    up_bias: Tensor | None
    down_bias: Tensor | None
    expert_offsets: Tensor
    row_to_token: Tensor
    row_to_slot: Tensor
    token_offsets: Tensor
    token_rows: Tensor
    seed: Tensor | None
    ffn_sizes: Sequence[int]
    activation: str
    gated: bool
    gate_weight_on: str
    activation_dropout: float
    expert_dropout: float

    @property
    def width(self) -> int:
        """The widest expert's F."""
        return max(self.ffn_sizes) if self.ffn_sizes else self.down_proj.shape[-1]

    @property
    def pre_width(self) -> int:
        """Columns of the pre-activation."""
        return self.width * (2 if self.gated else 1)


def _stack(packed: Tensor, sizes: Sequence[int], dim: int) -> Tensor:
    """Experts of different widths, side by side along ``dim``, to zero-padded ones stacked in front."""
    widest, parts = max(sizes), []
    for part in packed.split(list(sizes), dim=dim):
        padding = [0, 0] * (packed.dim() - dim % packed.dim())
        padding[-1] = widest - part.shape[dim]
        parts.append(F.pad(part, padding))
    return torch.stack(parts)


def _unstack(stacked: Tensor, sizes: Sequence[int], dim: int) -> Tensor:
    """The inverse of :func:`_stack`: drop the padding."""
    return torch.cat([part.narrow(dim, 0, size) for part, size in zip(stacked, sizes, strict=True)], dim=dim)


class _Stacked(NamedTuple):
    """Weights as grouped_gemm takes them: up (E, C, H) with C the pre-activation's width, down (E, H, F)."""

    up: Tensor
    down: Tensor
    up_bias: Tensor | None


def _stacked(call: _Call) -> _Stacked:
    up, down, up_bias = call.up_proj, call.down_proj, call.up_bias
    if call.ffn_sizes:
        up, down = _stack(up, call.ffn_sizes, -2), _stack(down, call.ffn_sizes, -1)
        up_bias = None if up_bias is None else _stack(up_bias, call.ffn_sizes, -1)
    num_experts = down.shape[0]
    bias = None if up_bias is None else up_bias.reshape(num_experts, -1)
    return _Stacked(up.reshape(num_experts, call.pre_width, up.shape[-1]), down, bias)


def _row_values(call: _Call) -> tuple[Tensor, Tensor, Tensor, Tensor]:
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


def _dropout(call: _Call, stream: int, p: float, assignment: Tensor, width: int, dtype: torch.dtype) -> Tensor | None:
    if p == 0 or call.seed is None:
        return None
    return dropout_scale(call.seed, assignment, width, stream, p, dtype)


def _bias_rows(bias: Tensor, expert: Tensor, real: Tensor) -> Tensor:
    return bias[expert.long()] * real.unsqueeze(1)


def moe_mlp_ref(*arguments: Any) -> tuple[Tensor, Tensor]:
    """The meaning of :func:`moe_mlp` in terms of permute, grouped_gemm and unpermute: y and the pre-activation.

    It serves CUDA, and the CPU where ``csrc/`` is not built.
    """
    out, _, pre = _expert_rows(*arguments)
    call = _Call(*arguments)
    combine = call.gate_weights if call.gate_weight_on == "output" else None
    return unpermute(out, combine, call.row_to_token, call.row_to_slot, call.token_offsets, call.token_rows), pre


def moe_mlp_twice_differentiable(*arguments: Any) -> Tensor:
    """y, through operations that autograd may differentiate again: the weights are multiplied in before the sum."""
    out, gate, _ = _expert_rows(*arguments)
    call = _Call(*arguments)
    if call.gate_weight_on == "output":
        out = out * gate
    y = unpermute(out, None, call.row_to_token, call.row_to_slot, call.token_offsets, call.token_rows)
    return y.to(call.x.dtype)


def _expert_rows(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Every row through its expert ``(R, H)``, the rows' gate weights ``(R, 1)``, and the pre-activation."""
    call = _Call(*arguments)
    weights = _stacked(call)
    dtype = call.x.dtype
    real, expert, assignment, gate = _row_values(call)

    rows = permute(call.x, call.row_to_token, call.token_offsets, call.token_rows)
    if call.gate_weight_on == "input":
        rows = (rows * gate).to(dtype)
    pre = grouped_gemm(rows, weights.up, call.expert_offsets)
    if weights.up_bias is not None:
        pre = pre + _bias_rows(weights.up_bias, expert, real)

    hidden = activate(pre, call.activation, call.gated)
    mask = _dropout(call, ACTIVATION_DROPOUT, call.activation_dropout, assignment, call.width, hidden.dtype)
    if mask is not None:
        hidden = hidden * mask
    if call.gate_weight_on == "activation":
        hidden = hidden * gate
    out = grouped_gemm(hidden.to(dtype), weights.down, call.expert_offsets)
    if call.down_bias is not None:
        out = out + _bias_rows(call.down_bias, expert, real)
    mask = _dropout(call, EXPERT_DROPOUT, call.expert_dropout, assignment, call.x.shape[1], accumulate_dtype(dtype))
    if mask is not None:
        out = (out * mask).to(dtype)
    return out, gate, pre


def moe_mlp_backward_ref(grad_y: Tensor, pre: Tensor, of_weights: bool, *arguments: Any) -> tuple[Tensor, ...]:
    """Gradients of x, gate weights, both projections and both biases.

    Empty tensors stand for biases that do not exist, and for all four without ``of_weights`` (frozen experts).
    """
    call = _Call(*arguments)
    weights = _stacked(call)
    dtype, wide = call.x.dtype, accumulate_dtype(call.x.dtype)
    real, expert, assignment, gate = _row_values(call)
    offsets, num_experts = call.expert_offsets, call.expert_offsets.shape[0] - 1

    def per_expert_sum(rows: Tensor) -> Tensor:
        ones = rows.new_ones(rows.shape[0], 1)
        return grouped_gemm_weight(ones, rows, offsets, num_experts).squeeze(1)

    # Through the combine and the down projection, without the gate weight: its own gradient needs the bare value.
    grad_out = permute(grad_y, call.row_to_token, call.token_offsets, call.token_rows)
    mask = _dropout(call, EXPERT_DROPOUT, call.expert_dropout, assignment, call.x.shape[1], wide)
    if mask is not None:
        grad_out = (grad_out * mask).to(dtype)
    grad_hidden = grouped_gemm(grad_out, weights.down, offsets, trans_b=False).to(wide)
    hidden = activate(pre, call.activation, call.gated)
    mask = _dropout(call, ACTIVATION_DROPOUT, call.activation_dropout, assignment, call.width, wide)
    grad_hidden = grad_hidden if mask is None else grad_hidden * mask
    grad_gate = (hidden * grad_hidden).sum(1)
    hidden = hidden if mask is None else hidden * mask
    if call.gate_weight_on != "input":
        hidden, grad_hidden = hidden * gate, grad_hidden * gate
    if call.down_bias is not None and call.gate_weight_on == "output":
        grad_gate = grad_gate + (_bias_rows(call.down_bias, expert, real).to(wide) * grad_out).sum(1)

    # Through the activation and the up projection.
    grad_pre = activate_backward(grad_hidden, pre, call.activation, call.gated).to(dtype)
    rows = permute(call.x, call.row_to_token, call.token_offsets, call.token_rows)
    grad_rows = grouped_gemm(grad_pre, weights.up, offsets, trans_b=False)
    if call.gate_weight_on == "input":
        grad_gate = (rows.to(wide) * grad_rows).sum(1)
        rows = (rows * gate).to(dtype)
    to_tokens = call.gate_weights if call.gate_weight_on == "input" else None
    grad_x = unpermute(grad_rows, to_tokens, call.row_to_token, call.row_to_slot, call.token_offsets, call.token_rows)

    kept = call.token_rows >= 0
    if grad_gate.numel():
        grad_gate = grad_gate[call.token_rows.clamp(min=0).long()]
    else:
        grad_gate = grad_gate.new_zeros(call.token_rows.shape)
    grad_gate = grad_gate.masked_fill(~kept, 0).to(call.gate_weights.dtype).view(call.gate_weights.shape)
    if not of_weights:
        return grad_x, grad_gate, *(call.x.new_empty(0) for _ in range(4))

    grad_up = grouped_gemm_weight(grad_pre, rows, offsets, num_experts)
    grad_down = grouped_gemm_weight(grad_out, hidden.to(dtype), offsets, num_experts)
    grad_up_bias = grad_down_bias = call.x.new_empty(0)
    if call.up_bias is not None:
        grad_up_bias = per_expert_sum(grad_pre)
    if call.down_bias is not None:
        grad_down_bias = per_expert_sum((grad_out * gate).to(dtype) if call.gate_weight_on == "output" else grad_out)
    return grad_x, grad_gate, *_as_given(call, grad_up, grad_down, grad_up_bias), grad_down_bias


def _as_given(call: _Call, up: Tensor, down: Tensor, up_bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Weight gradients in the shapes of the weights."""
    halves = (2, call.width) if call.gated else (call.width,)
    up = up.view(up.shape[0], *halves, up.shape[-1])
    up_bias = up_bias.view(-1, *halves) if call.up_bias is not None else up_bias
    if call.ffn_sizes:
        up, down = _unstack(up, call.ffn_sizes, -2), _unstack(down, call.ffn_sizes, -1)
        up_bias = _unstack(up_bias, call.ffn_sizes, -1) if call.up_bias is not None else up_bias
    return up, down, up_bias


def _fake_forward(*arguments: Any) -> tuple[Tensor, Tensor]:
    call = _Call(*arguments)
    return call.x.new_empty(call.x.shape), call.x.new_empty((call.row_to_token.shape[0], call.pre_width))


def _fake_backward(grad_y: Tensor, pre: Tensor, of_weights: bool, *arguments: Any) -> tuple[Tensor, ...]:
    call = _Call(*arguments)
    weights = (call.up_proj, call.down_proj, call.up_bias, call.down_bias) if of_weights else (None,) * 4
    given = (call.x, call.gate_weights, *weights)
    return tuple(call.x.new_empty(0) if tensor is None else tensor.new_empty(tensor.shape) for tensor in given)


def _autocast(op: Any, dtype: torch.dtype, *arguments: Any) -> Any:
    """x and the weights in autocast's dtype; gate weights stay as precise as the router made them."""

    def cast(value: Any) -> Any:
        eligible = isinstance(value, Tensor) and value.is_floating_point() and value.dtype != torch.float64
        return value.to(dtype) if eligible else value

    names = ("x", "up_proj", "down_proj", "up_bias", "down_bias")
    call = _Call(*arguments)
    return op(*call._replace(**{name: cast(getattr(call, name)) for name in names}))


_ARGUMENTS = (
    "Tensor x, Tensor gate_weights, Tensor up_proj, Tensor down_proj, Tensor? up_bias, Tensor? down_bias, "
    "Tensor expert_offsets, Tensor row_to_token, Tensor row_to_slot, Tensor token_offsets, Tensor token_rows, "
    "Tensor? seed, int[] ffn_sizes, str activation, bool gated, str gate_weight_on, float activation_dropout, "
    "float expert_dropout"
)
_forward = define(f"moe_mlp({_ARGUMENTS}) -> (Tensor, Tensor)", moe_mlp_ref, fake=_fake_forward, autocast=_autocast)
_inference = define(
    f"moe_mlp_inference({_ARGUMENTS}) -> Tensor",
    lambda *arguments: moe_mlp_ref(*arguments)[0],
    fake=lambda *arguments: _fake_forward(*arguments)[0],
    autocast=_autocast,
)
_backward = define(
    f"moe_mlp_backward(Tensor grad_y, Tensor pre_activation, bool of_weights, {_ARGUMENTS})"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    moe_mlp_backward_ref,
    fake=_fake_backward,
)
refuse_double_backward(_backward)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    tensors = inputs[:12]
    ctx.save_for_backward(output[1], *tensors)
    ctx.options = inputs[12:]
    ctx.set_materialize_grads(False)


def _autograd(ctx: Any, grad_y: Tensor | None, grad_pre: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad_y is None:
        return (None,) * (12 + len(ctx.options))
    pre, *tensors = ctx.saved_tensors
    wanted = ctx.needs_input_grad[:6]
    grads = _backward(grad_y.contiguous(), pre, any(wanted[2:]), *tensors, *ctx.options)
    given = [grad if want else None for grad, want in zip(grads, wanted, strict=True)]
    return (*given, *(None,) * (6 + len(ctx.options)))


register_autograd(_forward, _autograd, _setup_context)


def has_tangent(x: Tensor) -> bool:
    """Whether x is being differentiated in forward mode, which these operations would silently answer with zero."""
    if torch.compiler.is_compiling() or forward_ad._current_level < 0:
        return False
    return forward_ad.unpack_dual(x).tangent is not None


def moe_mlp(*arguments: Any, backend: str | None = None) -> Tensor:
    """Run the operation on the arguments of the schema; see :func:`dmoe.functional.moe_mlp` for the public form.

    Args:
        *arguments: in the schema's order.
        backend: ``reference`` runs the composition under autograd; otherwise the tensors' device decides.
    """
    if backend not in (None, "grouped", "reference"):
        raise ValueError(f"moe_mlp: backend: expected None, 'grouped' or 'reference', got {backend!r}")
    if backend == "reference":
        device_type = arguments[0].device.type
        if not torch.is_autocast_enabled(device_type):
            return moe_mlp_twice_differentiable(*arguments)
        dtype = torch.get_autocast_dtype(device_type)
        with torch.autocast(device_type, enabled=False):
            return _autocast(moe_mlp_twice_differentiable, dtype, *arguments)
    differentiable = any(isinstance(value, Tensor) and value.requires_grad for value in arguments[:6])
    if torch.is_grad_enabled() and differentiable:
        return _forward(*arguments)[0]
    return _inference(*arguments)
