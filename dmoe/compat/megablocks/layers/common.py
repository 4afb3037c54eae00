"""Small things that the layers share."""

from __future__ import annotations

import torch

from dmoe.compat.megablocks.layers.arguments import Arguments
from dmoe.compat.megablocks.ops.movement import cast_if_autocast_enabled
from dmoe.ops._checks import autocast_is_on

__all__ = ["autocast_is_on", "cast_if_autocast_enabled", "dtype"]


def dtype(args: Arguments) -> torch.dtype | None:
    """The parameters' dtype; None is torch's default."""
    if args.fp16:
        return torch.float16
    return torch.bfloat16 if args.bf16 else None
