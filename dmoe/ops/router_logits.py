"""``router_logits``: the router's linear, computed in its own precision while x is saved in x's.

``logits = (x * jitter) @ weight.T + bias``. Plain autograd over ``x.float()`` would save a float32 copy of x; here
backward converts (and jitters) x again. On CUDA, tokens in bfloat16 are not converted at all, see
:mod:`dmoe.kernels.router_logits`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dmoe.ops._checks import check_floating
from dmoe.ops._library import count_flops, define, refuse_double_backward, register_autograd
from dmoe.ops._trust import Subject
from dmoe.ops.grouped_gemm_invariant import linear_invariant
from dmoe.ops.philox import jitter_scale
from dmoe.sums import add_to_tokens, sum_tokens


def _router_input(x: Tensor, dtype: torch.dtype, jitter: float, seed: Tensor | None) -> Tensor:
    x = x.to(dtype)
    return x if seed is None else x * jitter_scale(seed, x.shape[0], x.shape[1], jitter, dtype)


def router_logits_ref(
    x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype, jitter: float, seed: Tensor | None
) -> Tensor:
    """The plain-PyTorch meaning of :func:`router_logits`."""
    out = _router_input(x, dtype, jitter, seed) @ weight.to(dtype).t()
    return out if bias is None else out + bias.to(dtype)


def router_logits_backward_ref(
    grad: Tensor, x: Tensor, weight: Tensor, jitter: float, seed: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Gradients of x and weight; the bias's is ``grad.sum(0)``."""
    grad_weight = grad.t() @ _router_input(x, grad.dtype, jitter, seed)
    grad_x = grad @ weight.to(grad.dtype)
    if seed is not None:
        grad_x = grad_x * jitter_scale(seed, x.shape[0], x.shape[1], jitter, grad.dtype)
    return grad_x.to(x.dtype), grad_weight.to(weight.dtype)


def router_logits_cpu(
    x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype, jitter: float, seed: Tensor | None
) -> Tensor:
    """:func:`router_logits_ref` with the same bits for any number of threads."""
    if seed is not None:
        x = _router_input(x, dtype, jitter, seed)
    return _product(x, weight, bias, dtype)


def router_logits_backward_cpu(
    grad: Tensor, x: Tensor, weight: Tensor, jitter: float, seed: Tensor | None
) -> tuple[Tensor, Tensor]:
    """:func:`router_logits_backward_ref` with the same bits for any number of threads."""
    rows = x if seed is None else _router_input(x, grad.dtype, jitter, seed)
    grad_x, grad_weight = _product_backward(grad, rows, weight)
    if seed is not None:
        grad_x = (grad_x * jitter_scale(seed, x.shape[0], x.shape[1], jitter, grad.dtype)).to(x.dtype)
    return grad_x, grad_weight


def cut(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """``(P, E, H)`` in ``dtype`` whose sum over P is ``weight``: itself, or three pieces of a float32 one."""
    from dmoe.kernels.router_logits import launch_cut

    if weight.dtype == dtype:
        return weight.contiguous().unsqueeze(0)
    pieces = weight.new_empty((3, *weight.shape), dtype=dtype)
    launch_cut(weight.contiguous(), pieces)
    return pieces


def router_logits_pieces(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """:func:`router_logits` in float32 without a float32 copy of x, on tensor cores."""
    from dmoe.kernels.router_logits import launch_logits

    logits = x.new_empty((x.shape[0], weight.shape[0]), dtype=torch.float32)
    launch_logits(x.contiguous(), cut(weight, x.dtype), None if bias is None else bias.contiguous(), logits)
    return logits


def router_logits_pieces_backward(grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Its gradients of x and weight; the weight's is added up from partial sums in a fixed order."""
    from dmoe.kernels.router_logits import grad_weight_parts, launch_grad_weight, launch_grad_x

    grad, x = grad.contiguous(), x.contiguous()
    grad_x = torch.empty_like(x)
    launch_grad_x(grad, cut(weight, x.dtype), grad_x)
    num_parts = grad_weight_parts(x.shape[0], x.shape[1], weight.shape[0], x.device)
    parts = grad.new_empty((num_parts, *weight.shape))
    launch_grad_weight(grad, x, parts, num_pieces=2 if weight.dtype == x.dtype else 3)  # a half-precision sum: 2 do
    return grad_x, parts.sum(0).to(weight.dtype)


def _in_pieces(x: Tensor, weight: Tensor, dtype: torch.dtype, seed: Tensor | None) -> bool:
    """Jittered tokens are no bfloat16 numbers; half precision has too few exponents for small pieces."""
    fits = weight.dtype in (torch.bfloat16, torch.float32) and dtype == torch.float32
    return x.dtype == torch.bfloat16 and fits and seed is None


def _subjects(x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype, *rest: Any) -> list[Subject]:
    served = _in_pieces(x, weight, dtype, rest[1]) and bool(x.numel())
    return [Subject("router_logits", (x, weight, bias, dtype, *rest))] if served else []


def _subjects_backward(grad: Tensor, x: Tensor, weight: Tensor, *rest: Any) -> list[Subject]:
    served = _in_pieces(x, weight, grad.dtype, rest[1]) and bool(x.numel())
    return [Subject("router_logits_backward", (grad, x, weight, *rest))] if served else []


def router_logits_cuda(
    x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype, jitter: float, seed: Tensor | None
) -> Tensor:
    """On tensor cores where that loses nothing, else the reference."""
    if _in_pieces(x, weight, dtype, seed):
        return router_logits_pieces(x, weight, bias)
    return router_logits_ref(x, weight, bias, dtype, jitter, seed)


def router_logits_backward_cuda(
    grad: Tensor, x: Tensor, weight: Tensor, jitter: float, seed: Tensor | None
) -> tuple[Tensor, Tensor]:
    """On tensor cores where that loses nothing, else the reference."""
    if _in_pieces(x, weight, grad.dtype, seed):
        return router_logits_pieces_backward(grad, x, weight)
    return router_logits_backward_ref(grad, x, weight, jitter, seed)


_product = define(
    "router_product(Tensor x, Tensor weight, Tensor? bias, ScalarType dtype) -> Tensor",
    lambda x, weight, bias, dtype: router_logits_ref(x, weight, bias, dtype, 0.0, None),
    fake=lambda x, weight, bias, dtype: x.new_empty((x.shape[0], weight.shape[0]), dtype=dtype),
)
_product_backward = define(
    "router_product_backward(Tensor grad, Tensor x, Tensor weight) -> (Tensor, Tensor)",
    lambda grad, x, weight: router_logits_backward_ref(grad, x, weight, 0.0, None),
    fake=lambda grad, x, weight: (x.new_empty(x.shape), weight.new_empty(weight.shape)),
)
_forward = define(
    "router_logits(Tensor x, Tensor weight, Tensor? bias, ScalarType dtype, float jitter, Tensor? seed) -> Tensor",
    router_logits_cpu,
    fake=lambda x, weight, bias, dtype, jitter, seed: x.new_empty((x.shape[0], weight.shape[0]), dtype=dtype),
    cuda=router_logits_cuda,
    composition=router_logits_ref,
    subjects=_subjects,
)
_backward = define(
    "router_logits_backward(Tensor grad, Tensor x, Tensor weight, float jitter, Tensor? seed) -> (Tensor, Tensor)",
    router_logits_backward_cpu,
    fake=lambda grad, x, weight, jitter, seed: (x.new_empty(x.shape), weight.new_empty(weight.shape)),
    cuda=router_logits_backward_cuda,
    composition=router_logits_backward_ref,
    subjects=_subjects_backward,
)
refuse_double_backward(_backward)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, _dtype, jitter, seed = inputs
    ctx.save_for_backward(x, weight, seed)
    ctx.jitter, ctx.bias_dtype = jitter, None if bias is None else bias.dtype


def _autograd(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, seed = ctx.saved_tensors
    grad_x, grad_weight = _backward(grad, x, weight, ctx.jitter, seed)
    grad_bias = None if ctx.bias_dtype is None else sum_tokens(grad).to(ctx.bias_dtype)
    return grad_x, grad_weight, grad_bias, None, None, None


register_autograd(_forward, _autograd, _setup_context)


def router_logits(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    dtype: torch.dtype | None = None,
    jitter: float = 0.0,
    seed: Tensor | None = None,
    backend: str | None = None,
    batch_invariant: bool = False,
) -> Tensor:
    """Router logits ``x @ weight.T + bias`` in ``dtype``; saves x as it is.

    Args:
        x: ``(T, H)`` floating point.
        weight: ``(E, H)``.
        bias: ``(E,)`` or None.
        dtype: of the arithmetic and the result; None takes x's.
        jitter: half width j of the multiplicative noise U(1 - j, 1 + j) on x; needs ``seed``.
        seed: scalar int64; None for no jitter.
        backend: ``reference`` for plain PyTorch under its own autograd.
        batch_invariant: a token's logits, and the gradient of its x, have the same bits in any batch; without jitter,
            and on the CPU alone. Saves x in ``dtype``.

    Returns:
        ``(T, E)`` in ``dtype``.

    Raises:
        TypeError: an operand is not floating point.
        ValueError: the last dimensions differ.
    """
    count_flops()
    check_floating("router_logits", x=x, weight=weight, bias=bias)
    if x.dim() != 2 or weight.dim() != 2 or x.shape[1] != weight.shape[1]:
        raise ValueError(
            f"router_logits: expected x (T, H) and weight (E, H), got {tuple(x.shape)} and {tuple(weight.shape)}"
        )
    if batch_invariant:
        kind = dtype or x.dtype
        with torch.autocast(x.device.type, enabled=False):
            out = linear_invariant(x.to(kind), weight.to(kind))
            return out if bias is None else add_to_tokens(out, bias.to(kind))
    run = router_logits_ref if backend == "reference" else _forward
    return run(x, weight, bias, dtype or x.dtype, jitter, seed)
