"""What :mod:`kernel_table` compiles: by name, calls of the operations' CUDA functions on ``meta`` tensors."""

from __future__ import annotations

from collections.abc import Callable

CASES: dict[str, Callable[[], None]] = {}


def case(name: str) -> Callable[[Callable[[], None]], Callable[[], None]]:
    """Register a case."""

    def register(run: Callable[[], None]) -> Callable[[], None]:
        assert name not in CASES, name
        CASES[name] = run
        return run

    return register
