"""Sums over tokens whose bits do not depend on the number of threads on the CPU.

PyTorch shares a long sum among its threads: one result by parts of the sum, several by columns, where the columns at a
thread's edge are added up in another order than those in its middle. Here the last dimension is summed, a row of
``_PART`` numbers to one thread, which PyTorch never cuts. (Compiled code makes sums of its own.)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_PART = 1024  # numbers of a row; the partial sums are cut again only from 2**25 numbers on


def sum_tokens(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """``x.sum(-2, dtype=dtype)``: ``(..., T, E)`` to ``(..., E)``, in x's dtype where none is given."""
    if x.device.type != "cpu" or torch.compiler.is_compiling() or x.shape[-2] == 0:
        return x.sum(-2, dtype=dtype)
    length = x.shape[-2]
    rows = x.transpose(-1, -2).contiguous()
    if length <= _PART:
        return rows.sum(-1, dtype=dtype)
    rows = torch.nn.functional.pad(rows, (0, -length % _PART))
    return rows.unflatten(-1, (-1, _PART)).sum(-1, dtype=dtype).sum(-1)


class _AddToTokens(torch.autograd.Function):
    """``y + bias``, whose gradient of the bias is :func:`sum_tokens`."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, bias: Tensor) -> Tensor:
        return y + bias

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        return grad, sum_tokens(grad.reshape(-1, grad.shape[-1]))


def add_to_tokens(y: Tensor, bias: Tensor) -> Tensor:
    """``y + bias`` for y ``(..., H)`` and bias ``(H,)`` of one dtype."""
    return _AddToTokens.apply(y, bias)
