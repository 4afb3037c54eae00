"""``moe_mlp``: every expert's MLP over the rows of a plan, and the weighted combine, as one differentiable operation.

With rows r of token t(r), expert e(r) and gate weight w(r) (here on the output)::

    pre_r = W_up[e] x_t + b_up[e]        a_r = act(pre_r), gated: act(gate_r) * up_r
    o_r   = W_down[e] a_r + b_down[e]    y_t = sum over rows of t: w_r o_r

Backward needs x, pre, the plan's indices and the gate weights, and nothing else: a_r is computed again from pre_r, and
the gate weight's gradient ``<o_r, dy_t>`` equals ``<a_r, W_down[e]^T dy_t> + <b_down[e], dy_t>``, so o is not kept.
``register_autograd`` saves only inputs and outputs, which is why pre is an output; :func:`moe_mlp` hides it. The lean
variant does not save pre either, and computes it again in backward: R * F numbers (gated: R * 2 F) less memory for one
more up projection, a sixth of a training step's products (gated: two of nine).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from dmoe.ops._library import count_flops, define, refuse_double_backward, register_autograd
from dmoe.ops._moe_mlp_call import PROJECTIONS, SCHEMA, SCHEMA_INTO, WEIGHTS, Call
from dmoe.ops._moe_mlp_parts import add_to_main_grads, save_values, saved_values
from dmoe.ops.batch_invariance import refuse
from dmoe.ops.moe_mlp_cuda import (
    moe_mlp_backward_cuda,
    moe_mlp_cuda,
    moe_mlp_inference_cuda,
    moe_mlp_pre_activation_cuda,
    subjects,
)
from dmoe.ops.moe_mlp_ref import moe_mlp_backward_ref, moe_mlp_ref, moe_mlp_twice_differentiable
from dmoe.ops.moe_mlp_torch import backward_torch, moe_mlp_torch, pre_activation_torch

GRADS = ("x", "gate_weights", *WEIGHTS)  # what backward returns


def _fake_forward(*arguments: Any) -> tuple[Tensor, Tensor]:
    call = Call(*arguments)
    return call.x.new_empty(call.x.shape), call.x.new_empty((call.row_to_token.shape[0], call.pre_width))


def fake_backward(grad_y: Tensor, pre: Tensor, of_weights: bool, *arguments: Any) -> tuple[Tensor, ...]:
    """What backward returns, without values."""
    call = Call(*arguments)
    weights = (getattr(call, name) if of_weights else None for name in WEIGHTS)
    given = (call.x, call.gate_weights, *weights)
    return tuple(call.x.new_empty(0) if tensor is None else torch.empty_like(tensor) for tensor in given)


def autocast(op: Any, dtype: torch.dtype, *arguments: Any) -> Any:
    """x and the weights in autocast's dtype; gate weights stay as precise as the router made them."""

    def cast(value: Any) -> Any:
        eligible = isinstance(value, Tensor) and value.is_floating_point() and value.dtype != torch.float64
        return value.to(dtype) if eligible else value

    names = ("x", *WEIGHTS, "residual")
    call = Call(*arguments)
    return op(*call._replace(**{name: cast(getattr(call, name)) for name in names}))


def under_autocast(function: Any, *arguments: Any) -> Any:
    """A function that is no operation on what autocast, if it is on, makes of the arguments; inside it is off."""
    kind = Call(*arguments).x.device.type
    if kind == "meta" or not torch.is_autocast_enabled(kind):
        return function(*arguments)
    dtype = torch.get_autocast_dtype(kind)
    with torch.autocast(kind, enabled=False):
        return autocast(function, dtype, *arguments)


class Operations(NamedTuple):
    """The operations of one way to compute: by the tensors' device, or by PyTorch's own operations."""

    forward: Any
    inference: Any
    lean: Any
    pre_activation: Any
    backward: Any
    backward_into: Any


class Implementation(NamedTuple):
    """What they run on the CPU without csrc/, and on devices that nobody wrote kernels for."""

    forward: Callable[..., tuple[Tensor, Tensor]]
    inference: Callable[..., Tensor]
    backward: Callable[..., tuple[Tensor, ...]]


def _operations(suffix: str, plain: Implementation, on_gpu: Mapping[str, Mapping[str, Any]]) -> Operations:
    """Declare them as ``moe_mlp<suffix>``, ``moe_mlp<suffix>_backward`` and so on; csrc/ may have the CPU's.

    ``on_gpu`` says, by field of :class:`Operations`, what serves there and what is certified before.
    """

    def declare(field: str, schema: str, reference: Any, fake: Any, **options: Any) -> Any:
        return define(f"moe_mlp{suffix}{schema}", reference, fake=fake, **on_gpu.get(field, {}), **options)

    def y_only(*arguments: Any) -> Tensor:
        return _fake_forward(*arguments)[0]

    forward = declare("forward", f"({SCHEMA}) -> (Tensor, Tensor)", plain.forward, _fake_forward, autocast=autocast)
    inference = declare("inference", f"_inference({SCHEMA}) -> Tensor", plain.inference, y_only, autocast=autocast)
    lean = declare("lean", f"_lean({SCHEMA}) -> Tensor", lambda *a: inference(*a), y_only, autocast=autocast)
    pre_activation = declare(
        "pre_activation",
        f"_pre_activation({SCHEMA}) -> Tensor",
        lambda *arguments: forward(*arguments)[1],
        lambda *arguments: _fake_forward(*arguments)[1],
    )
    backward = declare(
        "backward",
        f"_backward(Tensor grad_y, Tensor pre_activation, bool of_weights, {SCHEMA})"
        " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
        plain.backward,
        fake_backward,
    )
    refuse_double_backward(backward)

    def backward_into_plain(grad_y: Tensor, pre: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
        """The backward, and then the additions."""
        call = Call(*arguments)
        grads = backward(grad_y, pre, True, *call.with_buffers((None, None)))
        add_to_main_grads(call, grads)
        return _without_projections(grads)

    # An operation of its own, because it writes into its arguments, which autograd does not differentiate.
    backward_into = declare(
        "backward_into",
        f"_backward_into(Tensor grad_y, Tensor pre_activation, {SCHEMA_INTO}) -> (Tensor, Tensor, Tensor, Tensor)",
        backward_into_plain,
        lambda grad_y, pre, *arguments: _without_projections(fake_backward(grad_y, pre, True, *arguments)),
    )
    operations = Operations(forward, inference, lean, pre_activation, backward, backward_into)
    register_autograd(
        forward,
        lambda ctx, grad_y, grad_pre: _differentiate(operations, ctx, grad_y),
        lambda ctx, inputs, output: save(ctx, inputs, output[1]),
    )
    register_autograd(
        lean,
        lambda ctx, grad_y: _differentiate(operations, ctx, grad_y),
        lambda ctx, inputs, output: save(ctx, inputs, None),
    )
    return operations


def _without_projections(grads: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(grad for name, grad in zip(GRADS, grads, strict=True) if name not in PROJECTIONS)


def save(ctx: Any, inputs: tuple[Any, ...], pre: Tensor | None) -> None:
    """Keep what backward needs; ``pre`` is None where it is to be computed again."""
    call = Call(*inputs)
    # Neither residual nor buffers are read by backward as they are now: y is linear in the one, the others are sums.
    ctx.main_grads = call.buffers
    save_values(ctx, (pre, *call.with_buffers((None, None))._replace(residual=None)))
    ctx.num_inputs = len(inputs)
    ctx.set_materialize_grads(False)


@dataclass(frozen=True)
class Saved:
    """What :func:`save` kept.

    Attributes:
        pre: the pre-activation.
        call: the arguments, without residual and buffers.
        wanted: by argument, whether its gradient is.
        buffers: the main gradients' of the projections; a frozen one's stays as it is, and is None here.
    """

    pre: Tensor
    call: Call
    wanted: dict[str, bool]
    buffers: list[Tensor | None]

    @property
    def of_weights(self) -> bool:
        """Whether any weight's gradient is wanted."""
        return any(self.wanted.get(name) for name in WEIGHTS)


def saved(ctx: Any, needs_input_grad: Sequence[bool], operations: Operations) -> Saved:
    """What :func:`save` kept for this backward; ``operations`` make the pre-activation again where it was not."""
    pre, *arguments = saved_values(ctx)
    call = Call(*arguments)
    wanted = dict(zip(Call._fields, needs_input_grad, strict=False))
    buffers = [b if wanted.get(name) else None for name, b in zip(PROJECTIONS, ctx.main_grads, strict=True)]
    return Saved(operations.pre_activation(*call) if pre is None else pre, call, wanted, buffers)


def as_wanted(ctx: Any, wanted: dict[str, bool], grad_y: Tensor, grads: Mapping[str, Tensor]) -> tuple[Any, ...]:
    """One gradient for each argument: those given, by the argument's name, where they are wanted."""
    given: dict[str, Tensor | None] = {name: grad for name, grad in grads.items() if wanted.get(name)}
    given["residual"] = grad_y if wanted.get("residual") else None
    return tuple(given.get(name) for name in Call._fields[: ctx.num_inputs])


def _differentiate(operations: Operations, ctx: Any, grad_y: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad_y is None:
        return (None,) * ctx.num_inputs
    kept, grad_y = saved(ctx, ctx.needs_input_grad, operations), grad_y.contiguous()
    if any(buffer is not None for buffer in kept.buffers):
        grads = operations.backward_into(grad_y, kept.pre, *kept.call.with_buffers(kept.buffers))
        names = _without_projections(GRADS)
    else:
        grads, names = operations.backward(grad_y, kept.pre, kept.of_weights, *kept.call), GRADS
    return as_wanted(ctx, kept.wanted, grad_y, dict(zip(names, grads, strict=True)))


def _composed_inference(*arguments: Any) -> Tensor:
    return moe_mlp_torch(*arguments)[0]


_COMPOSED = Implementation(moe_mlp_torch, _composed_inference, backward_torch)
_INFERENCE = {"cuda": moe_mlp_inference_cuda, "composition": _composed_inference}
_ON_GPU: dict[str, dict[str, Any]] = {
    "forward": {
        "cuda": moe_mlp_cuda,
        "composition": moe_mlp_torch,
        "subjects": subjects("moe_mlp", "moe_mlp_backward"),
    },
    "inference": {**_INFERENCE, "subjects": subjects("moe_mlp")},
    "lean": {**_INFERENCE, "subjects": subjects("moe_mlp", "moe_mlp_backward")},
    "pre_activation": {
        "cuda": moe_mlp_pre_activation_cuda,
        "composition": pre_activation_torch,
        "subjects": subjects("moe_mlp"),
    },
    "backward": {
        "cuda": moe_mlp_backward_cuda,
        "composition": backward_torch,
        "subjects": subjects("moe_mlp_backward", before=3),
    },
    "backward_into": {
        "cuda": lambda grad_y, pre, *a: _without_projections(moe_mlp_backward_cuda(grad_y, pre, True, *a)),
        "subjects": subjects("moe_mlp_backward", before=2),
    },
}
BY_DEVICE = _operations("", Implementation(moe_mlp_ref, lambda *a: moe_mlp_ref(*a)[0], moe_mlp_backward_ref), _ON_GPU)
COMPOSED = _operations("_torch", _COMPOSED, {})
# A token's results are the same bits in any batch; a weighted row is rounded to x's dtype before it is added.
INVARIANT = _operations("_invariant", Implementation(refuse, refuse, refuse), {})


def has_tangent(x: Tensor) -> bool:
    """Whether x is being differentiated in forward mode, which these operations would silently answer with zero."""
    if torch.compiler.is_compiling() or forward_ad._current_level < 0:
        return False
    return forward_ad.unpack_dual(x).tangent is not None


def moe_mlp(
    *arguments: Any, backend: str | None = None, recompute: bool = False, batch_invariant: bool = False
) -> Tensor:
    """Run the operation on the arguments of the schema; see :func:`dmoe.functional.moe_mlp` for the public form.

    Args:
        *arguments: in the schema's order.
        backend: ``reference`` runs the composition under autograd, ``torch`` that of PyTorch's own operations;
            otherwise the tensors' device decides.
        recompute: save x only, and compute the pre-activation again in backward.
        batch_invariant: what a token gets does not depend on the others; only with the default backend.
    """
    count_flops()
    if backend == "reference":
        return under_autocast(moe_mlp_twice_differentiable, *arguments)
    operations = INVARIANT if batch_invariant else COMPOSED if backend == "torch" else BY_DEVICE
    if torch.is_grad_enabled() and any(isinstance(value, Tensor) and value.requires_grad for value in arguments):
        return operations.lean(*arguments) if recompute else operations.forward(*arguments)[0]
    return operations.inference(*arguments)
