"""The expert MLP as three block-sparse products, after MegaBlocks (Gale et al. 2022).

Rows are padded to whole blocks for each expert. The hidden activation of all experts is one block-sparse matrix of
``rows x (sum of all widths)``: expert e has blocks where its rows cross its own columns, and nowhere else. So experts
of different widths cost what they are wide, and nothing is padded to the widest::

    pre    = sdd(rows, W_up^T)         only where the expert's rows cross its columns; gate and up blocks side by side
    hidden = act(pre)                  block by block
    out    = dsd(hidden, W_down^T)     y = the rows of each token, weighted and summed

The weights are read where they lie, in every layout of :class:`dmoe.ExpertWeights`. Backward is the same three
products with their factors exchanged, and like :mod:`dmoe.ops.moe_mlp` it needs x, pre and the plan's indices only:
padded plan, structure, gathered rows and activation are made again.

Every length is a bound known from shapes: row blocks for the worst routing, times the widest expert. Blocks behind the
ones in use are never computed, read or written; they cost memory of ``pre`` only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dmoe.ops._library import count_flops, define, refuse_double_backward, register_autograd
from dmoe.ops._trust import on_its_own_arguments
from dmoe.ops.activation import accumulate_dtype
from dmoe.ops.block_activation import block_activation_ref, block_row_sums_ref, finish_rows_ref, row_experts
from dmoe.ops.block_sparse import block_size_for, sdd_cuda, sdd_ref, spmm_cuda, spmm_ref
from dmoe.ops.grouped_gemm import grouped_gemm_weight
from dmoe.ops.pad_plan import PaddedPlan, pad_plan_cuda, pad_plan_ref, padded_row_blocks
from dmoe.ops.permute import permute, unpermute
from dmoe.ops.topology import BlockTopology, expert_topology_cuda, expert_topology_ref, topology_arguments


class _Kernels(NamedTuple):
    """Who computes: plain PyTorch, or Triton."""

    pad_plan: Callable[..., PaddedPlan]
    expert_topology: Callable[..., BlockTopology]
    sdd: Callable[..., Tensor]
    spmm: Callable[..., None]
    block_activation: Callable[..., tuple[Tensor, Tensor, Tensor]]
    block_row_sums: Callable[..., Tensor]
    finish_rows: Callable[..., None]


_REFERENCE = _Kernels(
    pad_plan_ref,
    expert_topology_ref,
    sdd_ref,
    spmm_ref,
    block_activation_ref,
    block_row_sums_ref,
    finish_rows_ref,
)


def _triton() -> _Kernels:
    from dmoe.kernels import block_activation as kernels

    return _Kernels(
        pad_plan_cuda,
        expert_topology_cuda,
        sdd_cuda,
        spmm_cuda,
        kernels.block_activation,
        kernels.block_row_sums,
        kernels.finish_rows,
    )


class _Call(NamedTuple):
    """The arguments of one call, by name: the schema's order, which is ``moe_mlp``'s."""

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
    ffn_sizes: Sequence[int] | None
    activation: str
    gated: bool
    gate_weight_on: str
    activation_dropout: float
    expert_dropout: float

    @property
    def sizes(self) -> Sequence[int]:
        """Widths in features: one for all, or one for each expert."""
        return self.ffn_sizes or (self.down_proj.shape[-1],)

    @property
    def block_size(self) -> int:
        """B."""
        size = block_size_for(self.sizes)
        if size is None:
            raise ValueError(
                f"block_sparse_mlp: expected every expert's width to be a multiple of 16, got {list(self.sizes)}; use "
                "another backend"
            )
        return size

    @property
    def num_experts(self) -> int:
        """E."""
        return self.expert_offsets.shape[0] - 1

    @property
    def halves(self) -> int:
        """Blocks of the pre-activation for each block of the activation."""
        return 2 if self.gated else 1

    @property
    def row_blocks(self) -> int:
        """Block rows reserved."""
        return padded_row_blocks(self.row_to_token.shape[0], self.num_experts, self.block_size)

    @property
    def pre_shape(self) -> tuple[int, int, int]:
        """Shape of the pre-activation's blocks."""
        size = self.block_size
        return self.row_blocks * (max(self.sizes) // size) * self.halves, size, size

    def stack_up(self, up: Tensor) -> Tensor:
        """An up projection or its gradient as ``(1, all columns, H)``."""
        return up.reshape(1, -1, up.shape[-1])

    def stack_down(self, down: Tensor) -> Tensor:
        """A down projection or its gradient as ``(G, columns / G, H)``: a view, whatever the layout."""
        return down.t().unsqueeze(0) if self.ffn_sizes else down.transpose(1, 2)


class _Layout(NamedTuple):
    """What one call's forward and backward both make from the plan."""

    plan: PaddedPlan
    hidden: BlockTopology
    pre: BlockTopology
    gates: Tensor  # weight of each row, (R',), 0 in padding


def _layout(on: _Kernels, call: _Call) -> _Layout:
    size = call.block_size
    plan = on.pad_plan(
        call.expert_offsets,
        call.row_to_token,
        call.row_to_slot,
        call.token_offsets,
        call.token_rows,
        size,
        call.row_blocks,
    )
    table = topology_arguments(call.sizes, call.num_experts, size, call.x.device)
    hidden = pre = on.expert_topology(plan.expert_offsets, *table, size, call.row_blocks, 1, False)
    if call.gated:
        pre = on.expert_topology(plan.expert_offsets, *table, size, call.row_blocks, 2, bool(call.ffn_sizes))
    weights = call.gate_weights.flatten()
    if not weights.shape[0]:  # no assignment at all
        weights = weights.new_zeros(1)
    assignment = plan.row_to_assignment
    gates = weights[assignment.clamp(min=0).long()].masked_fill(assignment < 0, 0)
    return _Layout(plan, hidden, pre, gates)


def _rows(call: _Call, plan: PaddedPlan, x: Tensor) -> Tensor:
    return permute(x, plan.row_to_token, call.token_offsets, plan.token_rows)


def _activation(
    on: _Kernels, call: _Call, layout: _Layout, pre: Tensor, grad_hidden: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    weighted = call.gate_weight_on == "activation" or (grad_hidden is not None and call.gate_weight_on == "output")
    return on.block_activation(
        pre,
        call.up_bias,
        layout.gates if weighted else None,
        grad_hidden,
        layout.hidden.row_indices,
        layout.pre.column_indices,
        layout.hidden.offsets,
        layout.plan.row_to_assignment,
        call.seed,
        call.activation_dropout,
        call.activation,
        call.gated,
    )


def _forward(on: _Kernels, *arguments: Any) -> tuple[Tensor, Tensor]:
    call = _Call(*arguments)
    layout = _layout(on, call)
    plan, hidden = layout.plan, layout.hidden
    rows = _rows(call, plan, call.x)
    if call.gate_weight_on == "input":
        rows.mul_(layout.gates.unsqueeze(1))
    up, size = call.stack_up(call.up_proj), call.block_size
    pre = on.sdd(rows, up, layout.pre.row_indices, layout.pre.column_indices, size, False)
    activated, _, _ = _activation(on, call, layout, pre, None)
    out = rows  # of the same shape, and no longer needed
    on.spmm(
        activated, False, hidden.offsets, hidden.column_indices, None, call.stack_down(call.down_proj), out.unsqueeze(0)
    )
    if call.down_bias is not None or call.expert_dropout:
        on.finish_rows(out, call.down_bias, plan.expert_offsets, plan.row_to_assignment, call.seed, call.expert_dropout)
    combine = call.gate_weights if call.gate_weight_on == "output" else None
    y = unpermute(out, combine, plan.row_to_token, plan.row_to_slot, call.token_offsets, plan.token_rows)
    return y, pre


def _backward(on: _Kernels, grad_y: Tensor, pre: Tensor, of_weights: bool, *arguments: Any) -> tuple[Tensor, ...]:
    call = _Call(*arguments)
    layout = _layout(on, call)
    plan, hidden, size = layout.plan, layout.hidden, call.block_size
    dtype, wide = call.x.dtype, accumulate_dtype(call.x.dtype)

    # Through the combine and the down projection, without the gate weight: its own gradient needs the bare value.
    grad_out = _rows(call, plan, grad_y)
    if call.expert_dropout:
        on.finish_rows(grad_out, None, plan.expert_offsets, plan.row_to_assignment, call.seed, call.expert_dropout)
    down = call.stack_down(call.down_proj)
    grad_hidden = on.sdd(grad_out, down, hidden.row_indices, hidden.column_indices, size, False)
    activated, grad_pre, partial = _activation(on, call, layout, pre, grad_hidden)
    rows = _rows(call, plan, call.x)
    up = call.stack_up(call.up_proj)
    grad_rows = torch.empty_like(rows)
    on.spmm(grad_pre, False, layout.pre.offsets, layout.pre.column_indices, None, up, grad_rows.unsqueeze(0))

    if call.gate_weight_on == "input":
        grad_gate = (rows.to(wide) * grad_rows).sum(1)
        rows.mul_(layout.gates.unsqueeze(1))
    else:
        grad_gate = on.block_row_sums(partial, hidden.offsets)
    if call.down_bias is not None and call.gate_weight_on == "output":
        bias = call.down_bias[row_experts(plan.expert_offsets, grad_out.shape[0])]
        grad_gate = grad_gate + (bias.to(wide) * grad_out).sum(1)
    to_tokens = call.gate_weights if call.gate_weight_on == "input" else None
    grad_x = unpermute(grad_rows, to_tokens, plan.row_to_token, plan.row_to_slot, call.token_offsets, plan.token_rows)
    if grad_gate.shape[0]:
        grad_gate = grad_gate[plan.token_rows.clamp(min=0).long()].masked_fill(plan.token_rows < 0, 0)
    else:
        grad_gate = grad_gate.new_zeros(plan.token_rows.shape)
    grad_gate = grad_gate.to(call.gate_weights.dtype).view(call.gate_weights.shape)
    if not of_weights:
        return grad_x, grad_gate, *(call.x.new_empty(0) for _ in range(4))

    grad_up, grad_down = torch.empty_like(call.up_proj), torch.empty_like(call.down_proj)
    by_columns = (layout.pre.offsets_t, layout.pre.column_indices_t, layout.pre.block_offsets_t)
    on.spmm(grad_pre, True, *by_columns, rows.unsqueeze(0), call.stack_up(grad_up))
    grad_up_bias = grad_down_bias = call.x.new_empty(0)
    if call.up_bias is not None:
        ones = rows.new_ones(rows.shape[0], 1)
        grad_up_bias = torch.empty_like(call.up_bias)
        on.spmm(grad_pre, True, *by_columns, ones.unsqueeze(0), grad_up_bias.view(1, -1, 1))
    by_columns = (hidden.offsets_t, hidden.column_indices_t, hidden.block_offsets_t)
    on.spmm(activated, True, *by_columns, grad_out.unsqueeze(0), call.stack_down(grad_down))
    if call.down_bias is not None:
        if call.gate_weight_on == "output":
            grad_out.mul_(layout.gates.unsqueeze(1))
        ones = grad_out.new_ones(grad_out.shape[0], 1)
        sums = grouped_gemm_weight(ones, grad_out, plan.expert_offsets, call.num_experts)
        grad_down_bias = sums.squeeze(1).to(dtype)
    return grad_x, grad_gate, grad_up, grad_down, grad_up_bias, grad_down_bias


def block_sparse_mlp_ref(*arguments: Any) -> tuple[Tensor, Tensor]:
    """The operation in plain PyTorch: y and the pre-activation's blocks. It serves the CPU."""
    return _forward(_REFERENCE, *arguments)


def block_sparse_mlp_cuda(*arguments: Any) -> tuple[Tensor, Tensor]:
    """The operation by Triton kernels."""
    return _forward(_triton(), *arguments)


def block_sparse_mlp_backward_ref(*arguments: Any) -> tuple[Tensor, ...]:
    """Gradients of x, gate weights, projections and biases; empty tensors stand for what does not exist."""
    return _backward(_REFERENCE, *arguments)


def block_sparse_mlp_backward_cuda(*arguments: Any) -> tuple[Tensor, ...]:
    """:func:`block_sparse_mlp_backward_ref` by Triton kernels."""
    return _backward(_triton(), *arguments)


def _fake_forward(*arguments: Any) -> tuple[Tensor, Tensor]:
    call = _Call(*arguments)
    return call.x.new_empty(call.x.shape), call.x.new_empty(call.pre_shape)


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
    "Tensor? seed, int[]? ffn_sizes, str activation, bool gated, str gate_weight_on, float activation_dropout, "
    "float expert_dropout"
)
_forward_op = define(
    f"block_sparse_mlp({_ARGUMENTS}) -> (Tensor, Tensor)",
    block_sparse_mlp_ref,
    fake=_fake_forward,
    cuda=block_sparse_mlp_cuda,
    subjects=on_its_own_arguments("block_sparse_mlp"),
    autocast=_autocast,
)
_inference_op = define(
    f"block_sparse_mlp_inference({_ARGUMENTS}) -> Tensor",
    lambda *arguments: block_sparse_mlp_ref(*arguments)[0],
    fake=lambda *arguments: _fake_forward(*arguments)[0],
    cuda=lambda *arguments: block_sparse_mlp_cuda(*arguments)[0],
    subjects=on_its_own_arguments("block_sparse_mlp_inference"),
    autocast=_autocast,
)
_backward_op = define(
    f"block_sparse_mlp_backward(Tensor grad_y, Tensor pre_activation, bool of_weights, {_ARGUMENTS})"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    block_sparse_mlp_backward_ref,
    fake=_fake_backward,
    cuda=block_sparse_mlp_backward_cuda,
    subjects=on_its_own_arguments("block_sparse_mlp_backward"),
)
refuse_double_backward(_backward_op)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(output[1], *inputs[:12])
    ctx.options = inputs[12:]
    ctx.set_materialize_grads(False)


def _autograd(ctx: Any, grad_y: Tensor | None, grad_pre: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad_y is None:
        return (None,) * (12 + len(ctx.options))
    pre, *tensors = ctx.saved_tensors
    wanted = ctx.needs_input_grad[:6]
    grads = _backward_op(grad_y.contiguous(), pre, any(wanted[2:]), *tensors, *ctx.options)
    given = [grad if want else None for grad, want in zip(grads, wanted, strict=True)]
    return (*given, *(None,) * (6 + len(ctx.options)))


register_autograd(_forward_op, _autograd, _setup_context)


def block_sparse_mlp(*arguments: Any) -> Tensor:
    """Run the operation on ``moe_mlp``'s arguments; see :func:`dmoe.functional.moe_mlp` for the public form.

    Args:
        *arguments: in the schema's order, tensors contiguous; ``ffn_sizes`` empty for one common width.

    Returns:
        ``(T, H)`` in x's dtype (autocast's under autocast).

    Raises:
        ValueError: a width that is no multiple of 16.
        TypeError: on CUDA, another dtype than bfloat16, float16 and float32.
    """
    count_flops()
    assert _Call(*arguments).block_size  # refuse widths before anything runs
    differentiable = any(isinstance(value, Tensor) and value.requires_grad for value in arguments[:6])
    if torch.is_grad_enabled() and differentiable:
        return _forward_op(*arguments)[0]
    return _inference_op(*arguments)
