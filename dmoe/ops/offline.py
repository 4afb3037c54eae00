"""Programs without the GPU that they are for: what they would launch is compiled, and nothing runs.

A program that puts its tensors on ``meta`` does, inside :func:`offline`, what it would do on a GPU: its operations take
the way of CUDA, and every kernel is compiled with the specialisation that the launch would have had. What is compiled
lies in Triton's cache (``TRITON_CACHE_DIR``), where a process that has the GPU finds it.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dmoe.kernels import configs
from dmoe.kernels.offline import Launch, claiming, compiling, counting_compiles, swapped
from dmoe.ops._library import NAMESPACE, on_gpu, triton_calls

__all__ = ["counting_compiles", "launch_shapes", "offline"]


class _AsOnGPU(TorchDispatchMode):
    """Operations on ``meta`` tensors run what serves CUDA, where that is Python; other devices' are left alone."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == NAMESPACE and any(isinstance(a, torch.Tensor) and a.is_meta for a in args):
            call = triton_calls.get(func._schema.name.split("::")[1])
            if call is not None:
                with self, torch.no_grad():
                    return call(*args, *_defaults(func, args, kwargs))
        return func(*args, **kwargs)


def _defaults(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """The arguments behind those given by position: the dispatcher leaves out what equals its default."""
    rest = func._schema.arguments[len(args) :]
    return [kwargs.get(argument.name, argument.default_value) for argument in rest]


@contextlib.contextmanager
def offline(arch: int, claim: Callable[[str], bool] = lambda key: True) -> Iterator[list[Launch]]:
    """Inside, programs on ``meta`` tensors compile their kernels for ``arch``, 90 for Hopper.

    Args:
        arch: compute capability; one for each process, see :func:`dmoe.kernels.offline.compiling`.
        claim: asked once for each specialisation, by a name that is the same in every process; False leaves the kernel
            to another process.

    Yields:
        the launches so far: the kernel's name, and what was compiled, or None where it was left to another.
    """
    with (
        claiming(claim),
        compiling(arch) as launched,
        swapped(on_gpu, lambda tensor: tensor.is_cuda or tensor.is_meta),
        _AsOnGPU(),
    ):
        yield launched


@contextlib.contextmanager
def launch_shapes(path: str | Path) -> Iterator[None]:
    """Inside, kernels run with the launch shapes of a file that ``dmoe.tune`` could have written, and those alone.

    For comparing tables in one process. Whoever captures a CUDA graph needs this around the capture only.

    Raises:
        ValueError: see :func:`dmoe.kernels.configs.load`.
    """
    before = configs.measured()
    configs.replace_measured(_table(str(path)))
    try:
        yield
    finally:
        configs.replace_measured(before)


@functools.cache  # a context around every step is to cost the host little
def _table(path: str) -> dict[str, configs.Config]:
    before = configs.measured()
    try:
        configs.load(path, replace_all=True)
        return configs.measured()
    finally:
        configs.replace_measured(before)
