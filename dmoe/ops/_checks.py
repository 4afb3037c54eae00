"""Checks of arguments that several operations share; they look at shapes, dtypes and devices, never at values."""

from __future__ import annotations

import torch
from torch import Tensor


def check_index_tensors(op: str, device: torch.device, **tensors: Tensor) -> None:
    """Each is a one-dimensional int32 tensor on ``device``; the keyword is the name that errors use.

    Raises:
        TypeError: another dtype.
        ValueError: another number of dimensions, or another device.
    """
    for name, tensor in tensors.items():
        if tensor.dtype != torch.int32:
            raise TypeError(f"{op}: {name}: expected int32, got {tensor.dtype}")
        if tensor.ndim != 1:
            raise ValueError(f"{op}: {name}: expected one dimension, got shape {tuple(tensor.shape)}")
        if tensor.device != device:
            raise ValueError(f"{op}: {name}: expected on {device} like the data, got {tensor.device}")
