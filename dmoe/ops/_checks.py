"""Checks of arguments that several operations share; they look at shapes, dtypes and devices, never at values."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


def known(condition: bool) -> bool:
    """Whether a condition on lengths holds; while a compiler traces with symbolic lengths, whether it does for all.

    Asking a symbol outright would tie the traced program to the answer.
    """
    if not torch.compiler.is_compiling():
        return bool(condition)
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return statically_known_true(condition)


def check_tensors(op: str, **values: Any) -> None:
    """Each is a tensor; the keyword is the name that errors use.

    Raises:
        TypeError: something else.
    """
    for name, value in values.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{op}: {name}: expected a tensor, got {type(value).__name__}")


def check_floating(op: str, **tensors: Tensor | None) -> None:
    """Each is a floating-point tensor, or None; the keyword is the name that errors use.

    Raises:
        TypeError: another dtype.
    """
    for name, tensor in tensors.items():
        if tensor is not None and not tensor.is_floating_point():
            raise TypeError(f"{op}: {name}: expected a floating-point tensor, got {tensor.dtype}")


def check_integer(op: str, **tensors: Tensor) -> None:
    """Each is an int32 or int64 tensor; the keyword is the name that errors use.

    Raises:
        TypeError: another dtype.
    """
    for name, tensor in tensors.items():
        if tensor.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"{op}: {name}: expected dtype int32 or int64, got {tensor.dtype}")


def check_plain(op: str, **tensors: Tensor) -> None:
    """None is a tensor made of other tensors, such as torchao's quantised weights, which no operation of ours takes.

    Raises:
        TypeError: one is.
    """
    for name, tensor in tensors.items():
        if type(tensor) in (Tensor, torch.nn.Parameter) or not is_traceable_wrapper_subclass(tensor):
            continue
        if type(tensor).__name__ != "AsyncCollectiveTensor":  # a plain one on its way, that a DTensor's part may be
            raise TypeError(
                f"{op}: {name}: expected a plain tensor, got {type(tensor).__name__}; leave this module out of what "
                "makes its weights so (a filter_fn, say)"
            )


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


def autocast_is_on(device_type: str) -> bool:
    """Whether autocast is on for a kind of device; False for one that has none."""
    # PyTorch 2.11's compiler cannot trace the first question; what it compiles for has autocast.
    there = torch.compiler.is_dynamo_compiling() or torch.amp.is_autocast_available(device_type)
    return there and torch.is_autocast_enabled(device_type)
