"""The one place where kernels are started: every launch of every kernel goes through :func:`launch`."""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import torch

_H100_MULTIPROCESSORS = 132


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
    """Start ``kernel[grid](*arguments, **options)`` where its tensors are, or nothing for an empty grid.

    Triton starts kernels on the current device and on that device's current stream, whatever their arguments are;
    PyTorch's own operations run where their tensors are. So does this.

    Args:
        kernel: a ``@triton.jit`` function.
        grid: numbers of programs, known to the host.
        *arguments: tensors, descriptors and numbers, as the kernel declares them.
        **options: constexpr arguments by name, ``num_warps`` and ``num_stages``.
    """
    if not all(grid):
        return
    elsewhere = _other_device(arguments)
    with contextlib.nullcontext() if elsewhere is None else torch.cuda.device(elsewhere):
        kernel[grid](*arguments, enable_fp_fusion=True, **options)


def _other_device(arguments: tuple[Any, ...]) -> int | None:
    """The number of the GPU that the tensors are on, where it is not the current one."""
    first = next((argument for argument in arguments if isinstance(argument, torch.Tensor)), None)
    if first is None or not first.is_cuda or first.device.index == torch.cuda.current_device():
        return None
    return first.device.index


@functools.cache
def _count(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def multiprocessors(device: torch.device) -> int:
    """How many programs of one a multiprocessor run at once; an H100's number where there is no GPU to ask."""
    if device.type != "cuda":
        return _H100_MULTIPROCESSORS
    return _count(torch.cuda.current_device() if device.index is None else device.index)


@functools.cache
def _capability(index: int) -> int:
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor


def capability(device: torch.device) -> int:
    """Compute capability, 90 for Hopper; Hopper's where there is no GPU to ask."""
    if device.type != "cuda":
        return 90
    return _capability(torch.cuda.current_device() if device.index is None else device.index)
