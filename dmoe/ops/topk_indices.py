"""The k largest scores of every row, ties to the lowest id: which experts a token chooses."""

from __future__ import annotations

import torch
from torch import Tensor

from dmoe.ops._checks import check_floating, known
from dmoe.ops._library import define


def topk_indices_ref(scores: Tensor, k: int) -> Tensor:
    """Plain-PyTorch meaning of :func:`topk_indices`; ``torch.topk`` itself promises nothing about ties."""
    # A stable sort keeps equal scores in order of their ids, and holds NaN for larger than every number.
    return torch.sort(scores, dim=1, descending=True, stable=True).indices[:, :k].contiguous()


_topk_indices = define(
    "topk_indices(Tensor scores, SymInt k) -> Tensor",
    topk_indices_ref,
    fake=lambda scores, k: scores.new_empty((scores.shape[0], k), dtype=torch.int64),
)


def topk_indices(scores: Tensor, k: int) -> Tensor:
    """Ids of the ``k`` largest scores of each row, the largest first.

    Equal scores (-0 and +0 are equal) rank by id, the lowest first, on every device. NaN ranks above every number,
    again the lowest id first, so the result holds valid ids whatever the scores are. The result has no gradient: gather
    the scores with it to get one.

    Args:
        scores: ``(T, E)`` float32, float64, bfloat16 or float16, any strides.
        k: how many, 1 to E.

    Returns:
        ``(T, k)`` int64; the ids in a row are distinct, 0 to E - 1.

    Raises:
        TypeError: ``scores`` is not floating point.
        ValueError: ``scores`` is not two-dimensional, or ``k`` is not in 1 to E.
    """
    check_floating("topk_indices", scores=scores)
    if scores.ndim != 2:
        raise ValueError(f"topk_indices: scores: expected shape (T, E), got {tuple(scores.shape)}")
    if known(k < 1) or known(k > scores.shape[1]):
        raise ValueError(f"topk_indices: k: expected 1 to E = {scores.shape[1]}, got {k}")
    return _topk_indices(scores, k)
