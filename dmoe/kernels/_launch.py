"""The one place where kernels are started: every launch of every kernel goes through :func:`launch`."""

from __future__ import annotations

import functools
from typing import Any

import torch

_H100_MULTIPROCESSORS = 132


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
    """Start ``kernel[grid](*arguments, **options)``, or nothing for an empty grid.

    Args:
        kernel: a ``@triton.jit`` function.
        grid: numbers of programs, known to the host.
        *arguments: tensors, descriptors and numbers, as the kernel declares them.
        **options: constexpr arguments by name, ``num_warps`` and ``num_stages``.
    """
    if all(grid):
        kernel[grid](*arguments, enable_fp_fusion=True, **options)


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
