"""``gmm`` as models call it."""

from __future__ import annotations

from torch import Tensor

from dmoe.compat.grouped_gemm import backend


def gmm(a: Tensor, b: Tensor, batch_sizes: Tensor, trans_b: bool = False, *, trans_a: bool = False) -> Tensor:
    """One product per group of consecutive rows, differentiable; see :func:`dmoe.compat.grouped_gemm.backend.gmm`.

    ``trans_b`` is the fourth argument here, and ``trans_a`` is by keyword.
    """
    return backend.gmm(a, b, batch_sizes, trans_a=trans_a, trans_b=trans_b)
