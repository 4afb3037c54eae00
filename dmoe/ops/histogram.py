"""``histogram``: how often each integer of a range occurs."""

from __future__ import annotations

import torch
from torch import Tensor

from dmoe.ops._checks import known
from dmoe.ops._library import define

_DTYPES = (torch.int16, torch.int32, torch.int64)


def histogram_ref(values: Tensor, num_bins: int) -> Tensor:
    """What :func:`histogram` computes, in plain PyTorch (``bincount`` would wait for the device)."""
    bad = (values < 0) | (values >= num_bins)
    if values.device.type == "cpu" and bad.any():
        position = int(bad.nonzero()[0])
        raise RuntimeError(
            f"dmoe::histogram: values[{position}]: expected 0 .. {num_bins - 1}, got {int(values[position])}"
        )
    ordered = torch.where(bad, num_bins, values.long()).sort().values
    return torch.searchsorted(ordered, torch.arange(num_bins + 1, device=values.device)).diff().int()


def _fake(values: Tensor, num_bins: int) -> Tensor:
    return values.new_empty((num_bins,), dtype=torch.int32)


_histogram = define("histogram(Tensor values, SymInt num_bins) -> Tensor", histogram_ref, fake=_fake)


def histogram(values: Tensor, num_bins: int) -> Tensor:
    """Count how often each of 0 .. num_bins - 1 occurs.

    Args:
        values: ``(N,)`` int16, int32 or int64, in [0, num_bins), N below 2**31.
        num_bins: at least 1.

    Returns:
        ``(num_bins,)`` int32 counts.

    Raises:
        TypeError: another dtype.
        ValueError: ``values`` is not 1-D or too long, or ``num_bins`` is below 1.
        RuntimeError: a value outside the bins, on the CPU. On CUDA it is not counted.
    """
    if values.dtype not in _DTYPES:
        raise TypeError(f"histogram: values: expected dtype int16, int32 or int64, got {values.dtype}")
    if values.dim() != 1:
        raise ValueError(f"histogram: values: expected one dimension, got shape {tuple(values.shape)}")
    if known(values.shape[0] >= 2**31):
        raise ValueError(f"histogram: values: expected fewer than 2**31 (counts are int32), got {values.shape[0]}")
    if known(num_bins < 1):
        raise ValueError(f"histogram: num_bins: expected at least 1, got {num_bins}")
    return _histogram(values, num_bins)
