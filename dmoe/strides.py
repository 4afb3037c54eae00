"""In which order a weight lies in memory: products read it as it is, and its gradient comes in the same order."""

from __future__ import annotations

import torch
from torch import Tensor


def is_transposed(weight: Tensor) -> bool:
    """Whether the columns of ``(..., rows, columns)`` are contiguous, and the rows are not."""
    return weight.stride(-1) != 1 and weight.stride(-2) == 1


def readable(weight: Tensor, *, packed: bool = False) -> Tensor:
    """``weight (..., rows, columns)`` as products can read it: itself, or else a contiguous copy.

    Rows or columns are to be contiguous, and whole ones to lie between an expert and the next, unless they are packed.
    """
    between = weight.stride(-2 if weight.stride(-1) == 1 else -1)
    dense = weight.stride(-1) == 1 or is_transposed(weight)
    whole = packed or weight.stride(0) % max(between, 1) == 0
    return weight if weight.is_contiguous() or (dense and whole) else weight.contiguous()


def matrices(up: Tensor, gate: Tensor | None, gated: bool) -> tuple[Tensor, ...]:
    """An up projection of experts of one width as ``(E, C, H)``: of all columns, or of gate and up that lie apart."""
    if gate is not None:
        return gate, up
    if not gated:
        return (up,)
    in_one = up.stride(1) == up.shape[2] * up.stride(2)
    return (up.flatten(1, 2),) if in_one else up.unbind(1)


def in_layout_of(weight: Tensor, grad: Tensor) -> Tensor:
    """A gradient in the order of ``torch.empty_like(weight)``: itself where it is in it, else a copy."""
    if grad.stride() == weight.stride():
        return grad
    out = torch.empty_like(weight)
    return grad if grad.stride() == out.stride() else out.copy_(grad)
