"""What a layer returns: results in the shape of its input, that a caller may change in place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class _NoView(torch.autograd.Function):
    """Identity that shares memory, and the count of changes in place, and is no view: see ``as_output``."""

    @staticmethod
    def forward(ctx: Any, y: Tensor) -> Tensor:
        return y.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


def as_output(y: Tensor, shape: Sequence[int]) -> Tensor:
    """``y`` in another shape, without a copy, and with a graph as a node of its own instead of a view.

    FSDP2 hooks the output of the module that it wraps. What is done in place to a view goes into the graph below that
    hook, which then never runs: parameters are not gathered for backward. (While a compiler traces, a view: it decides
    itself what its function returns, and its tracing of a node of ours gives a deprecation warning.)
    """
    y = y.view(*shape)
    apart = torch.is_grad_enabled() and y.requires_grad and not torch.compiler.is_compiling()
    return _NoView.apply(y) if apart else y
