"""``moe_mlp`` with a backward in two halves: that of the data at once, that of the weights where the caller says.

Between ranks the gradient of x has far to go, and nobody waits for those of the weights. So backward computes the
data's first, and the weights' while that travels. Autograd runs what is ready in the reverse order of forward, which is
how the caller says when: :func:`defer` makes a node of its own, and its backward is the weights' half::

    under_way = dispatcher.start_dispatch(...)       backward: 4. wait for the gradient of x
    weights, later = defer(weights)                            3. gradients of the weights
    x = dispatcher.finish_dispatch(under_way)                  2. send the gradient of x
    y = moe_mlp_deferred(later, ...)                           1. gradients of x and the gate weights

Between the halves the pre-activation's gradient and the activation are kept: ``R * F`` numbers (gated: ``R * 3 F``),
which one backward in a piece holds too, though not both of them to its end.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dmoe.ops._library import count_flops, define, refuse_double_backward
from dmoe.ops._moe_mlp_call import SCHEMA, SCHEMA_INTO, WEIGHTS, Call
from dmoe.ops._moe_mlp_parts import add_to_main_grads
from dmoe.ops.moe_mlp import (
    BY_DEVICE,
    as_wanted,
    fake_backward,
    save,
    saved,
    under_autocast,
)
from dmoe.ops.moe_mlp_cuda import moe_mlp_backward_data_cuda, moe_mlp_backward_weights_cuda, subjects
from dmoe.ops.moe_mlp_ref import moe_mlp_backward_data_ref, moe_mlp_backward_weights_ref
from dmoe.ops.moe_mlp_torch import backward_data_torch, backward_weights_torch


def _fake_weights(grad_y: Tensor, grad_pre: Tensor, hidden: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    return fake_backward(grad_y, grad_pre, True, *arguments)[2:]


def _fake_data(grad_y: Tensor, pre: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    call = Call(*arguments)
    like = [tensor.new_empty(tensor.shape) for tensor in (call.x, call.gate_weights, pre)]
    return *like, call.x.new_empty((pre.shape[0], call.width))


_data = define(
    f"moe_mlp_backward_data(Tensor grad_y, Tensor pre_activation, {SCHEMA}) -> (Tensor, Tensor, Tensor, Tensor)",
    moe_mlp_backward_data_ref,
    fake=_fake_data,
    cuda=moe_mlp_backward_data_cuda,
    composition=backward_data_torch,
    subjects=subjects("moe_mlp_backward", before=2),
)
_weights = define(
    f"moe_mlp_backward_weights(Tensor grad_y, Tensor grad_pre, Tensor hidden, {SCHEMA})"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    moe_mlp_backward_weights_ref,
    fake=_fake_weights,
    cuda=moe_mlp_backward_weights_cuda,
    composition=backward_weights_torch,
    subjects=subjects("moe_mlp_backward", before=3),
)
refuse_double_backward(_data)
refuse_double_backward(_weights)


def _weights_into_ref(grad_y: Tensor, grad_pre: Tensor, hidden: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    """:func:`moe_mlp_backward_weights_ref`, and then the additions."""
    call = Call(*arguments)
    grads = _weights(grad_y, grad_pre, hidden, *call.with_buffers((None, None)))
    return add_to_main_grads(call, grads, first=0)[2:4]


_weights_into = define(
    f"moe_mlp_backward_weights_into(Tensor grad_y, Tensor grad_pre, Tensor hidden, {SCHEMA_INTO}) -> (Tensor, Tensor)",
    _weights_into_ref,
    fake=lambda *arguments: _fake_weights(*arguments)[2:4],
    cuda=lambda *arguments: moe_mlp_backward_weights_cuda(*arguments)[2:4],
    subjects=subjects("moe_mlp_backward", before=3),
)


@dataclass(frozen=True)
class _Work:
    """What the data's half leaves for that of the weights."""

    grad_y: Tensor
    grad_pre: Tensor
    hidden: Tensor
    call: Call

    def grads(self) -> list[Tensor | None]:
        """Of the weights; None where a buffer took it, or there is no such weight."""
        half = (self.grad_y, self.grad_pre, self.hidden, *self.call)
        grads: list[Tensor | None]
        if all(buffer is None for buffer in self.call.buffers):
            grads = list(_weights(*half))
        else:
            grads = [None, None, *_weights_into(*half), None]
        given = (getattr(self.call, name) for name in WEIGHTS)
        return [None if weight is None else grad for weight, grad in zip(given, grads, strict=True)]


class Later:
    """Where the data's halves of a backward put what the weights' half of it takes: of one call, or of several.

    A backward that wants no weight's gradient ends before their half, so what it left must not count in the next one.
    """

    def __init__(self) -> None:
        self._backward, self._work = -1, list[_Work]()

    def put(self, work: _Work) -> None:
        """Leave work for this backward."""
        self._work = [*self.take(), work]
        self._backward = torch._C._current_graph_task_id()

    def take(self) -> list[_Work]:
        """What this backward has left, once."""
        work, self._work = self._work, []
        return work if self._backward == torch._C._current_graph_task_id() else []


class _WeightsHalf(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, later: Later, *weights: Tensor | None) -> tuple[Tensor | None, ...]:
        ctx.later, ctx.dtypes = later, [None if weight is None else weight.dtype for weight in weights]
        ctx.set_materialize_grads(False)
        return tuple(None if weight is None else weight.detach() for weight in weights)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        total = list(grads)  # of calls that did not defer
        for work in ctx.later.take():
            for index, grad in enumerate(work.grads()):
                if grad is not None and ctx.needs_input_grad[1 + index]:
                    before, grad = total[index], grad.to(ctx.dtypes[index])
                    total[index] = grad if before is None else before + grad
        return None, *total


class _DataHalf(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, later: Later, recompute: bool, *arguments: Any) -> Tensor:
        y, pre = (BY_DEVICE.inference(*arguments), None) if recompute else BY_DEVICE.forward(*arguments)
        ctx.later = later
        save(ctx, arguments, pre)
        return y

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor | None) -> tuple[Any, ...]:
        if grad_y is None:
            return (None,) * (2 + ctx.num_inputs)
        kept, grad_y = saved(ctx, ctx.needs_input_grad[2:], BY_DEVICE), grad_y.contiguous()
        if kept.of_weights:
            grad_x, grad_gate, grad_pre, hidden = _data(grad_y, kept.pre, *kept.call)
            ctx.later.put(_Work(grad_y, grad_pre, hidden, kept.call.with_buffers(kept.buffers)))
        else:
            grad_x, grad_gate, *_ = BY_DEVICE.backward(grad_y, kept.pre, False, *kept.call)
        return None, None, *as_wanted(ctx, kept.wanted, grad_y, {"x": grad_x, "gate_weights": grad_gate})


def defer(*weights: Tensor | None) -> tuple[tuple[Tensor | None, ...], Later | None]:
    """The same weights, whose gradients are computed where backward comes to this call; for :func:`moe_mlp_deferred`.

    Args:
        *weights: projections and biases, in the order of ``WEIGHTS``.

    Returns:
        Them, and what ties the halves together; None where there is nothing to defer: no gradient is wanted, or the
        call is being compiled, whose backward is in one piece. Operations that know nothing of halves may take these
        weights too.
    """
    wanted = torch.is_grad_enabled() and any(weight is not None and weight.requires_grad for weight in weights)
    if not wanted or torch.compiler.is_compiling():
        return weights, None
    later = Later()
    return _WeightsHalf.apply(later, *weights), later


def moe_mlp_deferred(later: Later, *arguments: Any, recompute: bool = False) -> Tensor:
    """:func:`dmoe.ops.moe_mlp.moe_mlp` on weights that :func:`defer` returned, with what ties the halves together."""
    count_flops()
    return under_autocast(lambda *cast: _DataHalf.apply(later, recompute, *cast), *arguments)
