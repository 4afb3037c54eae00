"""``grouped_gemm_invariant``: one product per expert, a row of which depends on that row and its expert alone.

:func:`dmoe.ops.grouped_gemm` may add up a row in another order where there are more rows, as libraries' products do.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dmoe.ops._library import define, register_autograd
from dmoe.ops.batch_invariance import refuse
from dmoe.ops.grouped_gemm import outer_sums
from dmoe.strides import is_transposed

_op = define(
    "grouped_gemm_invariant(Tensor a, Tensor b, Tensor expert_offsets, bool trans_b) -> Tensor",
    refuse,
    fake=lambda a, b, expert_offsets, trans_b: a.new_empty(a.shape[0], b.shape[1 if trans_b else 2]),
)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    a, b, expert_offsets, ctx.trans_b = inputs
    ctx.columns_first = is_transposed(b)
    needs_a, needs_b = ctx.needs_input_grad[:2]
    ctx.save_for_backward(a if needs_b else None, b if needs_a else None, expert_offsets)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
    a, b, expert_offsets = ctx.saved_tensors
    grad_a = _op(grad, b, expert_offsets, not ctx.trans_b) if b is not None else None
    grad_b = None
    if a is not None:  # a sum over the batch
        left, right = (grad, a) if ctx.trans_b else (a, grad)
        grad_b = outer_sums(left, right, expert_offsets, columns_first=ctx.columns_first)
    return grad_a, grad_b, None, None


register_autograd(_op, _backward, _save)


def linear_invariant(x: Tensor, weight: Tensor) -> Tensor:
    """``x @ weight.T`` whose rows, and their gradients, have the same bits in any batch.

    Args:
        x: ``(T, H)`` float32, float64, bfloat16 or float16.
        weight: ``(E, H)`` in x's dtype. Its gradient is a sum over the batch.

    Returns:
        ``(T, E)``.

    Raises:
        NotImplementedError: not on the CPU, or without the compiled library.
    """
    rows = torch.full((1,), x.shape[0], dtype=torch.int32, device=x.device)  # a number that may be a symbol
    everyone = torch.nn.functional.pad(rows, (1, 0))
    return _op(x, weight.unsqueeze(0), everyone, True)
