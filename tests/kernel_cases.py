"""What :mod:`kernel_table` compiles: by name, calls of the operations' CUDA functions on ``meta`` tensors."""

from __future__ import annotations

from collections.abc import Callable

import torch

from dmoe.ops.tile_table import tile_table_cuda

CASES: dict[str, Callable[[], None]] = {}


def case(name: str) -> Callable[[Callable[[], None]], Callable[[], None]]:
    """Register a case."""

    def register(run: Callable[[], None]) -> Callable[[], None]:
        assert name not in CASES, name
        CASES[name] = run
        return run

    return register


@case("tile_table")
def _() -> None:
    tile_table_cuda(torch.empty(129, dtype=torch.int32, device="meta"), 65536, 128)
    tile_table_cuda(torch.empty(1501, dtype=torch.int32, device="meta"), 65536, 16)
