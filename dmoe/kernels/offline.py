"""Compiles what the host code would launch, for a GPU that need not be there, and starts nothing.

The operations' own CUDA functions run on ``meta`` tensors; instead of starting a kernel, :func:`compiling` compiles it
with the very arguments it would have been started with. So whatever can be dispatched in a case is compiled, with the
specialisation that the launch would get, and nothing else; and what is compiled lies in Triton's cache afterwards,
where a process that has the GPU finds it.
"""

from __future__ import annotations

import contextlib
import itertools
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

import dmoe.kernels._launch as _launch

Launch = tuple[str, Any]  # a kernel's name, and what the compiler made of it


class NoGPU:
    """As much of Triton's driver as compiling asks for."""

    def __init__(self, arch: int) -> None:
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget("cuda", arch, 32)

    def get_current_target(self) -> Any:
        """What to compile for."""
        return self.target

    def get_current_device(self) -> int:
        """The key of what is kept in this process."""
        return 0

    def get_current_stream(self, device: Any = None) -> int:
        """Nothing is started on it."""
        return 0

    def get_device_interface(self) -> Any:
        """Asked for by the launcher, and not used."""
        return torch.cuda


@contextlib.contextmanager
def compiling(arch: int, share: tuple[int, int] = (0, 1)) -> Iterator[list[Launch]]:
    """Inside, launches compile for ``arch``, 90 for Hopper; yields what was compiled, in the order of the launches.

    Of ``share`` (i, n) the launches i, i + n, ... are compiled, and the others left to other processes.

    A process compiles for one architecture only: what uses Hopper's instructions can take the whole process down when
    it is compiled for another.
    """
    from triton.runtime import driver

    driver.set_active(NoGPU(arch))
    compiled: list[Launch] = []
    numbers = itertools.count()

    def compile_instead(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
        if all(grid) and next(numbers) % share[1] == share[0]:
            compiled.append((kernel.__name__, kernel.warmup(*arguments, grid=grid, enable_fp_fusion=True, **options)))

    with instead_of_launching(compile_instead), swapped(_launch.capability, lambda device: arch):
        yield compiled


def instead_of_launching(call: Callable[..., None]) -> contextlib.AbstractContextManager[None]:
    """Inside, ``call(kernel, grid, *arguments, **options)`` takes the place of every launch."""
    return swapped(_launch.launch, call)


@contextlib.contextmanager
def swapped(old: Any, new: Any) -> Iterator[None]:
    """Inside, a function is replaced under every name that a module of dmoe.kernels or dmoe.ops knows it by."""
    swap(old, new)
    try:
        yield
    finally:
        swap(new, old)


def swap(old: Any, new: Any) -> None:
    """See :func:`swapped`."""
    for name, module in list(sys.modules.items()):
        if name.startswith(("dmoe.kernels", "dmoe.ops")):
            for key, value in list(vars(module).items()):
                if value is old:
                    setattr(module, key, new)


@contextlib.contextmanager
def claiming(claim: Callable[[str], bool]) -> Iterator[None]:
    """Inside, a specialisation that this process has not seen is compiled, or found, only if it may be.

    Args:
        claim: asked once for each, by a name that is the same in every process; False leaves it to another process, and
            its launch gives None.
    """
    from triton import knobs

    def left_to_others(*, key: Any, repr: str, fn: Any, **_: Any) -> bool:
        return not claim(f"{fn.module}.{fn.name} {key} {repr}")

    before = knobs.runtime.jit_cache_hook
    knobs.runtime.jit_cache_hook = left_to_others
    try:
        yield
    finally:
        knobs.runtime.jit_cache_hook = before


@dataclass
class Compiled:
    """What Triton was asked for in this process: kernels that it compiled, and others that lay in its cache."""

    fresh: list[str] = field(default_factory=list)
    found: list[str] = field(default_factory=list)


@contextlib.contextmanager
def counting_compiles() -> Iterator[Compiled]:
    """Inside, counts what Triton compiles and what it finds in its cache."""
    from triton import knobs

    told, before = Compiled(), knobs.compilation.listener

    def listen(*, src: Any, cache_hit: bool, **others: Any) -> None:
        (told.found if cache_hit else told.fresh).append(src.name)
        if before is not None:
            before(src=src, cache_hit=cache_hit, **others)

    knobs.compilation.listener = listen
    try:
        yield told
    finally:
        knobs.compilation.listener = before
