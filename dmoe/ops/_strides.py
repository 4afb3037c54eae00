"""In which order a weight lies in memory: products read it as it is, and its gradient comes in the same order."""

from __future__ import annotations

import torch
from torch import Tensor


def is_transposed(weight: Tensor) -> bool:
    """Whether the columns of ``(..., rows, columns)`` are contiguous, and the rows are not."""
    return weight.stride(-1) != 1 and weight.stride(-2) == 1


def readable(weight: Tensor) -> Tensor:
    """``weight (..., rows, columns)`` itself where its rows or its columns are contiguous, else a contiguous copy."""
    return weight if weight.stride(-1) == 1 or is_transposed(weight) else weight.contiguous()


def in_layout_of(weight: Tensor, grad: Tensor) -> Tensor:
    """A gradient in the order of ``torch.empty_like(weight)``: itself where it is in it, else a copy."""
    if grad.stride() == weight.stride():
        return grad
    out = torch.empty_like(weight)
    return grad if grad.stride() == out.stride() else out.copy_(grad)
