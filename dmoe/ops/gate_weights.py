"""``gate_weights``: the scores of the chosen experts, normalised before or after a drop.

With scores g of a token's choices, m = 1 where the choice got a row, v the choices that the norm counts (all of them
``before_drop``, the kept ones ``after_drop``) and n = ||v g||_p::

    w_j = scale * m_j * g_j / n
    dL/dg_j = scale * m_j * dw_j / n  -  v_j * (sum_i dw_i w_i) / n * (g_j / n)**(p - 1)

The gradient is formed from scores and indices again, so nothing of size (T, K) is saved.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from dmoe.ops._checks import check_floating, check_integer
from dmoe.ops._library import define, refuse_double_backward, register_autograd


def _gather(
    scores: Tensor, expert_indices: Tensor, token_to_rows: Tensor | None, p: float, after_drop: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Safe indices, chosen scores, kept mask and, when p > 0, the norm (never 0)."""
    num_experts = scores.shape[1]
    chosen = (expert_indices >= 0) & (expert_indices < num_experts)
    index = expert_indices.clamp(0, max(num_experts - 1, 0)).long()
    picked = scores.gather(1, index).masked_fill(~chosen, 0)
    kept = chosen if token_to_rows is None else chosen & (token_to_rows >= 0)
    if p == 0:
        return index, picked, kept, None
    counted = picked.masked_fill(~kept, 0) if after_drop else picked
    tiny = torch.finfo(scores.dtype).tiny
    largest = counted.amax(1, keepdim=True).clamp(min=tiny)  # powers of small scores would underflow
    return (
        index,
        picked,
        kept,
        largest * torch.linalg.vector_norm(counted / largest, p, dim=1, keepdim=True).clamp(min=1),
    )


def gate_weights_ref(
    scores: Tensor, expert_indices: Tensor, token_to_rows: Tensor | None, p: float, after_drop: bool, scale: float
) -> Tensor:
    """The plain-PyTorch meaning of :func:`gate_weights`; p = 0 stands for no normalisation."""
    _, picked, kept, norm = _gather(scores, expert_indices, token_to_rows, p, after_drop)
    weights = picked.masked_fill(~kept, 0) * scale
    return weights if norm is None else weights / norm


def gate_weights_backward_ref(
    grad: Tensor,
    scores: Tensor,
    expert_indices: Tensor,
    token_to_rows: Tensor | None,
    p: float,
    after_drop: bool,
    scale: float,
) -> Tensor:
    """Gradient of the scores, ``(T, E)``."""
    index, picked, kept, norm = _gather(scores, expert_indices, token_to_rows, p, after_drop)
    grad_picked = grad.masked_fill(~kept, 0) * scale
    if norm is not None:
        counted = kept if after_drop else (expert_indices >= 0) & (expert_indices < scores.shape[1])
        share = (grad_picked * picked).sum(1, keepdim=True) / norm
        slope = (picked / norm).pow(p - 1).masked_fill(~counted, 0)
        grad_picked = (grad_picked - share * slope) / norm
    grad_picked = grad_picked.masked_fill((expert_indices < 0) | (expert_indices >= scores.shape[1]), 0)
    # A token's choices are distinct, except masked ones, which add zeros: no order can change the bits.
    return torch.zeros_like(scores).scatter_add_(1, index, grad_picked)


_forward = define(
    "gate_weights(Tensor scores, Tensor expert_indices, Tensor? token_to_rows, float p, bool after_drop, float scale)"
    " -> Tensor",
    gate_weights_ref,
    fake=lambda scores, expert_indices, *_: scores.new_empty(expert_indices.shape),
)
_backward = define(
    "gate_weights_backward(Tensor grad, Tensor scores, Tensor expert_indices, Tensor? token_to_rows, float p, "
    "bool after_drop, float scale) -> Tensor",
    gate_weights_backward_ref,
    fake=lambda grad, scores, *_: scores.new_empty(scores.shape),
)
refuse_double_backward(_backward)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:3])
    ctx.options = inputs[3:]


def _autograd(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return _backward(grad, *ctx.saved_tensors, *ctx.options), None, None, None, None, None


register_autograd(_forward, _autograd, _setup_context)


def gate_weights(
    scores: Tensor,
    expert_indices: Tensor,
    token_to_rows: Tensor | None = None,
    *,
    normalization: float | None = None,
    after_drop: bool = False,
    scale: float = 1.0,
    backend: str | None = None,
) -> Tensor:
    """Weights of each token's chosen experts; 0 where a choice was masked or dropped.

    A token whose counted scores are all 0 gets weights 0.

    Args:
        scores: ``(T, E)`` floating point, at least 0.
        expert_indices: ``(T, K)`` integer; ``E`` marks a masked choice. A token's other choices are distinct.
        token_to_rows: ``(T, K)`` of the plan, -1 where a choice was dropped; None when nothing was.
        normalization: p >= 1 of the p-norm the weights are divided by; None for none.
        after_drop: let the norm count the kept choices only.
        scale: factor applied last.
        backend: ``reference`` for plain PyTorch under its own autograd.

    Returns:
        ``(T, K)`` in the scores' dtype.

    Raises:
        TypeError: ``scores`` is not floating point, or ``expert_indices`` is not int32 or int64.
        ValueError: shapes that do not fit, or p < 1.
    """
    check_floating("gate_weights", scores=scores)
    check_integer("gate_weights", expert_indices=expert_indices)
    fits = scores.dim() == 2 and expert_indices.dim() == 2 and scores.shape[0] == expert_indices.shape[0]
    if not fits or (token_to_rows is not None and token_to_rows.shape != expert_indices.shape):
        raise ValueError(
            "gate_weights: expected scores (T, E), expert_indices (T, K) and token_to_rows (T, K) or None, got "
            f"{tuple(scores.shape)}, {tuple(expert_indices.shape)} and "
            f"{None if token_to_rows is None else tuple(token_to_rows.shape)}"
        )
    if normalization is not None and not 1 <= normalization < math.inf:
        raise ValueError(f"gate_weights: normalization: expected a finite p >= 1 or None, got {normalization}")
    run = gate_weights_ref if backend == "reference" else _forward
    return run(scores, expert_indices, token_to_rows, float(normalization or 0), after_drop, scale)
