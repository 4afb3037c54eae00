"""What routers draw: each kind of random number in one place, on the device, never read by the host."""

from __future__ import annotations

import torch
from torch import Tensor


def gaussian(like: Tensor) -> Tensor:
    """Standard normal numbers in the shape, dtype and place of ``like``."""
    return torch.randn_like(like)


def gumbel(like: Tensor) -> Tensor:
    """Gumbel(0, 1) numbers: the largest of ``logits + gumbel`` is a draw from their softmax (Gumbel 1954)."""
    return -torch.empty_like(like).exponential_().log()


def uniform(like: Tensor) -> Tensor:
    """Numbers in [0, 1)."""
    return torch.rand_like(like)
