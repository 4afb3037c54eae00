"""``sinkhorn``: scale rows and columns of ``exp(logits)`` until every token and every expert has its share.

One operation, so that the loop is no part of a compiled graph. How often it runs is decided on the device: a step
behind the last one that was needed changes nothing, and the host asks only on the CPU, where asking is free.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dmoe.ops._library import define

_EPS = 1e-8


def sinkhorn_ref(logits: Tensor, tolerance: float, max_iterations: int) -> Tensor:
    """The plain-PyTorch meaning of :func:`sinkhorn`."""
    num_tokens, num_experts = logits.shape
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if num_tokens == 0:
        return wide.clone()
    # A row's factor takes in whatever the row is multiplied by: its largest entry is 1 here, and nothing overflows.
    largest = wide.amax(1, keepdim=True)
    there = largest.isfinite()
    cost = torch.where(there, (wide - largest).exp(), 0)
    tokens = there.sum().clamp(min=1)
    rows, columns = torch.ones_like(cost[:, 0]), torch.ones_like(cost[0])
    going = torch.ones((), dtype=torch.bool, device=cost.device)
    for _ in range(max_iterations):
        new_rows = 1 / (tokens * ((cost * columns).sum(1) + _EPS))
        new_columns = 1 / (num_experts * ((new_rows.unsqueeze(1) * cost).sum(0) + _EPS))
        error = (columns - new_columns).abs().mean()
        rows, columns = torch.where(going, new_rows, rows), torch.where(going, new_columns, columns)
        going = going & (error > tolerance)
        if cost.device.type == "cpu" and not going:
            break
    return columns * cost * rows.unsqueeze(1)


_sinkhorn = define(
    "sinkhorn(Tensor logits, float tolerance, int max_iterations) -> Tensor",
    sinkhorn_ref,
    fake=lambda logits, *_: logits.new_empty(logits.shape, dtype=torch.promote_types(logits.dtype, torch.float32)),
)


def sinkhorn(logits: Tensor, tolerance: float = 1e-4, max_iterations: int = 200) -> Tensor:
    """The matrix ``diag(d0) exp(logits) diag(d1)`` whose rows sum to 1/T and whose columns sum to 1/E, nearly.

    Rows whose largest logit is not finite are absent: 0 in the result, not counted in T, and felt by no other row.

    d0 and d1 are computed from each other in turn until d1's mean absolute change is at most ``tolerance`` (Sinkhorn
    1967; the order and the stopping rule are Megatron-Core's). The result has no gradient.

    Args:
        logits: ``(T, E)`` floating point.
        tolerance: see above.
        max_iterations: the most steps.

    Returns:
        ``(T, E)`` float32, float64 for float64.

    Raises:
        ValueError: logits of another shape or type.
    """
    if logits.dim() != 2 or not logits.is_floating_point():
        raise ValueError(f"sinkhorn: logits: expected (T, E) floating point, got {tuple(logits.shape)} {logits.dtype}")
    return _sinkhorn(logits.detach(), tolerance, max_iterations)
