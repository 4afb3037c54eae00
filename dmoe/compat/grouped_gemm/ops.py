"""``gmm`` as models call it, and the ``permute``, ``unpermute`` and ``sinkhorn_kernel`` of the package's fork."""

from __future__ import annotations

import torch
from torch import Tensor

from dmoe.compat._not_offered import attributes_of
from dmoe.compat.grouped_gemm import backend
from dmoe.ops.permute import permute as _permute
from dmoe.ops.permute import unpermute as _unpermute

__getattr__ = attributes_of(__name__)


def gmm(a: Tensor, b: Tensor, batch_sizes: Tensor, trans_b: bool = False, *, trans_a: bool = False) -> Tensor:
    """One product per group of consecutive rows, differentiable; see :func:`dmoe.compat.grouped_gemm.backend.gmm`.

    ``trans_b`` is the fourth argument here, and ``trans_a`` is by keyword.
    """
    return backend.gmm(a, b, batch_sizes, trans_a=trans_a, trans_b=trans_b)


def permute(
    input_act: Tensor, indices: Tensor, num_out_tokens: int | None = None, max_token_num: int = 0
) -> tuple[Tensor, Tensor]:
    """Copy tokens into expert order, equal experts token by token; differentiable in ``input_act``.

    Args:
        input_act: ``(T, H)``, any dtype.
        indices: experts of each token, ``(T, K)``, or ``(T,)`` for one; int32 or int64.
        num_out_tokens: keep so many rows, the others are dropped; None or 0 keeps all.
        max_token_num: a size of buffers there; not needed here.

    Returns:
        ``(R, H)``, and the row of choice k of token t at ``k * T + t``, ``(K * T,)`` int32, -1 where it was dropped.

    Raises:
        ValueError, TypeError: shapes or dtypes that do not fit.
    """
    tokens = input_act.shape[0]
    if indices.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"permute: indices: expected int32 or int64, got {indices.dtype}")
    if indices.dim() not in (1, 2) or indices.shape[0] != tokens:
        raise ValueError(f"permute: indices: expected shape ({tokens},) or ({tokens}, K), got {tuple(indices.shape)}")
    top_k = 1 if indices.dim() == 1 else indices.shape[1]
    assignments = tokens * top_k
    if not 0 <= (num_out_tokens or 0) <= assignments:
        raise ValueError(f"permute: num_out_tokens: expected 0 to {assignments}, got {num_out_tokens}")
    order = torch.sort(indices.flatten(), stable=True).indices[: num_out_tokens or assignments]
    token_rows = torch.full((assignments,), -1, dtype=torch.int32, device=indices.device)
    token_rows[order] = torch.arange(order.shape[0], dtype=torch.int32, device=indices.device)
    token = torch.div(order, max(top_k, 1), rounding_mode="floor").int()
    rows = _permute(input_act, token, _token_offsets(tokens, top_k, indices.device), token_rows)
    return rows, token_rows.view(tokens, top_k).t().flatten()


def unpermute(input_act: Tensor, row_id_map: Tensor, probs: Tensor | None = None) -> Tensor:
    """Sum each token's rows, weighted: the inverse of :func:`permute`. Differentiable in ``input_act`` and ``probs``.

    Args:
        input_act: ``(R, H)`` floating point.
        row_id_map: what :func:`permute` returned, ``(K * T,)``.
        probs: weights ``(T, K)``; None for tokens with one row each.

    Returns:
        ``(T, H)`` of input_act's dtype, accumulated in float32 or wider.

    Raises:
        ValueError, TypeError: shapes or dtypes that do not fit.
    """
    if row_id_map.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"unpermute: row_id_map: expected int32 or int64, got {row_id_map.dtype}")
    assignments, device = row_id_map.numel(), row_id_map.device
    if probs is not None and (probs.dim() != 2 or probs.numel() != assignments):
        raise ValueError(f"unpermute: probs: expected (T, K) of {assignments} assignments, got {tuple(probs.shape)}")
    tokens, top_k = (assignments, 1) if probs is None else probs.shape
    rows = row_id_map.view(top_k, tokens).t().flatten()
    # One row more takes what was dropped, and is cut off: a mask would have to come to the host.
    place = torch.where(rows < 0, input_act.shape[0], rows).long()
    assignment = torch.full((input_act.shape[0] + 1,), -1, dtype=torch.int64, device=device)
    assignment = assignment.index_copy(0, place, torch.arange(assignments, device=device))[:-1]
    token = torch.div(assignment, max(top_k, 1), rounding_mode="floor")
    slot = torch.where(assignment < 0, -1, assignment - token * top_k)
    return _unpermute(input_act, probs, token.int(), slot.int(), _token_offsets(tokens, top_k, device), rows.int())


def sinkhorn_kernel(cost: Tensor, tol: float = 0.0001) -> Tensor:
    """See :func:`dmoe.compat.grouped_gemm.backend.sinkhorn`."""
    return backend.sinkhorn(cost, tol)


def _token_offsets(tokens: int, top_k: int, device: torch.device) -> Tensor:
    return torch.arange(tokens + 1, dtype=torch.int32, device=device) * top_k
