"""``gmm`` with all of its transpositions, and with an output to write into; ``sinkhorn`` of the package's fork."""

from __future__ import annotations

import torch
from torch import Tensor

from dmoe.compat._not_offered import attributes_of
from dmoe.ops.cumsum import inclusive_cumsum
from dmoe.ops.grouped_gemm import grouped_gemm, grouped_gemm_weight
from dmoe.ops.sinkhorn import sinkhorn as _sinkhorn

__getattr__ = attributes_of(__name__)


def gmm(
    a: Tensor,
    b: Tensor,
    batch_sizes: Tensor,
    trans_a: bool = False,
    trans_b: bool = False,
    c: Tensor | None = None,
) -> Tensor:
    """One product per group of consecutive rows.

    Differentiable in ``a`` and ``b`` unless ``c`` is given. Any strides, and every dtype that
    :func:`dmoe.ops.grouped_gemm` takes. Sizes on a CUDA device stay there: the host waits for nothing.

    Args:
        a: ``(R, Kd)``, rows sorted by group; with ``trans_a`` ``(R, M)``.
        b: ``(E, Kd, N)``; with ``trans_b`` ``(E, N, Kd)``; with ``trans_a`` ``(R, N)``.
        batch_sizes: rows of each group, ``(E,)`` int32 or int64 on any device, R in sum.
        trans_a: multiply each group's rows of ``a``, transposed, by its rows of ``b``: the weight gradient.
        trans_b: multiply by the transposed matrices. Not together with ``trans_a``.
        c: where to write the result; None allocates.

    Returns:
        ``(R, N)``, or ``(E, M, N)`` with ``trans_a`` (0 for a group without rows); ``c`` when it was given.

    Raises:
        TypeError: dtypes that are not supported, or disagree.
        ValueError: shapes or devices disagree, both transpositions, or an output of another shape or dtype.
        RuntimeError: sizes below 0, or more rows than ``a`` has, on the CPU.
    """
    if trans_a and trans_b:
        raise ValueError("gmm: expected at most one of trans_a and trans_b, got both")
    if batch_sizes.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"gmm: batch_sizes: expected dtype int32 or int64, got {batch_sizes.dtype}")
    if batch_sizes.dim() != 1:
        raise ValueError(f"gmm: batch_sizes: expected one dimension, got shape {tuple(batch_sizes.shape)}")
    sizes = batch_sizes.to(device=a.device, dtype=torch.int32, non_blocking=True)
    offsets = torch.cat([sizes.new_zeros(1), inclusive_cumsum(sizes, 0)])
    out = grouped_gemm_weight(a, b, offsets) if trans_a else grouped_gemm(a, b, offsets, trans_b=trans_b)
    if c is None:
        return out
    if c.shape != out.shape or c.dtype != out.dtype:
        raise ValueError(
            f"gmm: c: expected {out.dtype} of shape {tuple(out.shape)}, got {c.dtype} of shape {tuple(c.shape)}"
        )
    with torch.no_grad():
        return c.copy_(out)


def sinkhorn(cost: Tensor, tol: float = 0.0001) -> Tensor:
    """``exp(cost)`` with rows and columns scaled in turn until each has its even share; see :mod:`dmoe.ops.sinkhorn`.

    At most 200 times. The fork's kernel writes over ``cost``; here it stays as it is.

    Args:
        cost: ``(T, E)`` floating point, on any device, of any size.
        tol: enough is when the columns' factors change by less than this in the mean.

    Returns:
        ``(T, E)`` float32 (float64 for float64), without a gradient.

    Raises:
        ValueError: a cost of another shape or type.
    """
    return _sinkhorn(cost, tol)
