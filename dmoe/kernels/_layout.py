"""In which order a matrix lies in memory. Needs no Triton."""

from __future__ import annotations

from torch import Tensor


def is_transposed(weight: Tensor) -> bool:
    """Whether the columns of ``(..., rows, columns)`` are contiguous, and the rows are not."""
    return weight.stride(-1) != 1 and weight.stride(-2) == 1
