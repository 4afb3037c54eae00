"""Small things that the layers share."""

from __future__ import annotations

import torch
from torch import Tensor

from dmoe.compat.megablocks.layers.arguments import Arguments


def dtype(args: Arguments) -> torch.dtype | None:
    """The parameters' dtype; None is torch's default."""
    if args.fp16:
        return torch.float16
    return torch.bfloat16 if args.bf16 else None


def cast_if_autocast_enabled(tensor: Tensor) -> Tensor:
    """In autocast's dtype under autocast of the tensor's device, else as it is; float64 always."""
    if torch.is_autocast_enabled(tensor.device.type) and tensor.dtype != torch.float64:
        return tensor.to(torch.get_autocast_dtype(tensor.device.type))
    return tensor
