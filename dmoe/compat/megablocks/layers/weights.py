"""Experts' weights: filled by the user's functions, local parts of a ``DTensor``, scaled gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from dmoe.compat.megablocks.layers import common
from dmoe.compat.megablocks.layers.arguments import Arguments, InitFn


def create_moe_expert_weights(
    args: Arguments, num_experts: int, ffn_hidden_size: int, hidden_size: int, init_method: InitFn
) -> Tensor:
    """Weights ``(E, F, H)`` on the arguments' device, of their dtype, that ``init_method`` has filled."""
    weights = torch.empty(num_experts, ffn_hidden_size, hidden_size, device=args.device, dtype=common.dtype(args))
    init_method(weights)
    return weights


def create_dmoe_expert_weights(
    args: Arguments, num_experts: int, rows: int, columns: int, init_method: InitFn
) -> Tensor:
    """The same as ``(E * rows, columns)``."""
    return create_moe_expert_weights(args, num_experts, rows, columns, init_method).view(-1, columns)


class ScaleGradient(torch.autograd.Function):
    """``x`` as it is, its gradient times ``scale``; called as ``scale_gradient(x, scale)``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float) -> Tensor:
        """A view of x."""
        ctx.scale = scale
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        """``grad * scale``."""
        return grad * ctx.scale, None


scale_gradient = ScaleGradient.apply


def resolve_dtensor(weight: Tensor) -> Tensor:
    """This rank's part of a ``DTensor``; any other tensor as it is."""
    return weight.to_local() if isinstance(weight, DTensor) else weight
