"""Each choice of a token travels by itself, and its results meet at home: sums that do not depend on the ranks.

A dispatcher sends a token once to each rank that holds any of its experts, which returns their sum: where the sum is
cut, and rounded, then depends on which experts live together. Here a token is K rows with one expert each, what comes
back is one weighted result for each slot, and they are added in the order of the slots, as ``moe_mlp`` does it for a
batch-invariant layer on one rank: the same bits for any number of ranks. It costs K rows where a dispatcher sends at
most ``min(K, W)``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dmoe.ops.activation import accumulate_dtype
from dmoe.parallel.dispatch import AllToAllDispatcher
from dmoe.parallel.interface import Dispatched
from dmoe.plan import plan_token_choice


def _sum_of_slots(rows: Tensor, top_k: int, residual: Tensor | None) -> Tensor:
    """``(T * K, H)`` to ``(T, H)``, slot by slot and then the residual, rounded once: ``moe_mlp``'s own order."""
    slots = rows.view(-1, top_k, rows.shape[1])
    total = torch.zeros_like(slots[:, 0], dtype=accumulate_dtype(rows.dtype))
    for slot in range(top_k):
        total += slots[:, slot]
    if residual is not None:
        total += residual
    return total.to(rows.dtype)


class _Apart(torch.autograd.Function):
    """A token as K rows."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, top_k: int) -> Tensor:
        ctx.top_k = top_k
        return tokens.repeat_interleave(top_k, 0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _sum_of_slots(grad.contiguous(), ctx.top_k, None), None


class _Together(torch.autograd.Function):
    """K rows as a token."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, residual: Tensor | None, top_k: int) -> Tensor:
        ctx.top_k = top_k
        return _sum_of_slots(rows, top_k, residual)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        return grad.repeat_interleave(ctx.top_k, 0), grad if ctx.needs_input_grad[1] else None, None


def run_by_slots(
    dispatcher: AllToAllDispatcher,
    experts: Callable[[Dispatched], Tensor],
    shared_expert: Callable[[Tensor], Tensor] | None,
    tokens: Tensor,
    expert_indices: Tensor,
    gate_weights: Tensor,
) -> tuple[Tensor, Dispatched]:
    """The shared expert, then dispatch, experts and combine, choice by choice.

    Backward adds to a token's gradient in the opposite order, as it does where one operation holds all experts.

    Args:
        dispatcher: of the experts' ranks.
        experts: of the rows that arrive.
        shared_expert: of ``(T, H)``, or None.
        tokens: ``(T, H)``.
        expert_indices, gate_weights: ``(T, K)``; E takes no expert. Nothing is dropped.

    Returns:
        ``(T, H)``, and what was dispatched.
    """
    top_k = expert_indices.shape[1]
    choices, gates = expert_indices.reshape(-1, 1), gate_weights.reshape(-1, 1)
    plan = plan_token_choice(choices, dispatcher.num_experts)
    shared = None if shared_expert is None else shared_expert(tokens)
    arrived = dispatcher.dispatch(_Apart.apply(tokens, top_k), choices, gates, plan)
    rows = dispatcher.combine(experts(arrived), arrived)
    return _Together.apply(rows, shared, top_k), arrived
