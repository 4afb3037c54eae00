"""``inclusive_cumsum`` and ``exclusive_cumsum``: running sums of integers, in their own dtype."""

from __future__ import annotations

import torch
from torch import Tensor

from dmoe.ops._library import define

_DTYPES = (torch.int16, torch.int32, torch.int64)


def inclusive_cumsum_ref(x: Tensor, dim: int) -> Tensor:
    """What :func:`inclusive_cumsum` computes, in plain PyTorch."""
    return torch.cumsum(x, dim, dtype=x.dtype)


def exclusive_cumsum_ref(x: Tensor, dim: int) -> Tensor:
    """What :func:`exclusive_cumsum` computes, in plain PyTorch."""
    return torch.cumsum(x, dim, dtype=x.dtype) - x  # exact also where it wraps


def _fake(x: Tensor, dim: int) -> Tensor:
    return x.new_empty(x.shape)


_inclusive_cumsum = define("inclusive_cumsum(Tensor x, int dim) -> Tensor", inclusive_cumsum_ref, fake=_fake)
_exclusive_cumsum = define("exclusive_cumsum(Tensor x, int dim) -> Tensor", exclusive_cumsum_ref, fake=_fake)


def inclusive_cumsum(x: Tensor, dim: int = -1) -> Tensor:
    """Sum of everything up to and including each position: ``out[i] = x[0] + ... + x[i]``.

    Args:
        x: ``(N,)`` or ``(N, M)``, int16, int32 or int64.
        dim: the dimension to sum along; negative ones count from the end.

    Returns:
        the shape and dtype of ``x``; sums wrap around like any sum of that dtype.

    Raises:
        TypeError: another dtype.
        ValueError: ``x`` has neither one nor two dimensions, or has no dimension ``dim``.
    """
    return _inclusive_cumsum(x, _checked_dim("inclusive_cumsum", x, dim))


def exclusive_cumsum(x: Tensor, dim: int = -1) -> Tensor:
    """Sum of everything before each position: ``out[0] = 0``, ``out[i] = x[0] + ... + x[i - 1]``.

    Arguments, result and errors as for :func:`inclusive_cumsum`.
    """
    return _exclusive_cumsum(x, _checked_dim("exclusive_cumsum", x, dim))


def _checked_dim(name: str, x: Tensor, dim: int) -> int:
    if x.dtype not in _DTYPES:
        raise TypeError(f"{name}: x: expected dtype int16, int32 or int64, got {x.dtype}")
    if x.dim() not in (1, 2):
        raise ValueError(f"{name}: x: expected one or two dimensions, got shape {tuple(x.shape)}")
    if not -x.dim() <= dim < x.dim():
        raise ValueError(f"{name}: dim: expected {-x.dim()} .. {x.dim() - 1}, got {dim}")
    return dim % x.dim()
