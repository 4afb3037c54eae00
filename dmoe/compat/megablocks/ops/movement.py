"""Gather and scatter: tokens to rows sorted by expert and back, packed, padded to blocks, or in bins of one size.

MegaBlocks describes a plan by ``indices`` (the assignment ``token * top_k + choice`` at each sorted position),
``bin_ids`` (its expert) and ``bins`` (where each expert's positions end). Every layout is a rule from the sorted
position to a row; :class:`_Plan` holds the result as the index tensors of :func:`dmoe.ops.permute`, so a gather is a
``permute``, a scatter an ``unpermute``, and each is the other's gradient. Nothing but the size of a padded result
reaches the host.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dmoe.ops._checks import autocast_is_on
from dmoe.ops.permute import permute, unpermute


class _Plan(NamedTuple):
    """Index tensors as in :class:`dmoe.RoutingPlan`."""

    row_to_token: Tensor
    row_to_slot: Tensor
    token_offsets: Tensor
    token_rows: Tensor


def gather(x: Tensor, indices: Tensor, bin_ids: Tensor, bins: Tensor, top_k: int) -> Tensor:
    """Copy tokens into expert order: ``out[i] = x[indices[i] // top_k]``. Differentiable in ``x``.

    Args:
        x: ``(T, H)``, any dtype; autocast's under autocast.
        indices: ``(T * top_k,)`` integer, a permutation of the assignments, sorted by expert.
        bin_ids: ``(T * top_k,)`` integer, the expert of each; not needed here.
        bins: ``(E,)`` integer, where each expert's positions end; not needed here.
        top_k: assignments of a token.

    Returns:
        ``(T * top_k, H)``.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not fit.
    """
    _check("gather", indices, top_k, bin_ids, bins)
    _check_tokens("gather", x, indices, top_k)
    return _permute(x, _plan(indices, top_k, None, indices.shape[0]))


def scatter(
    x: Tensor, indices: Tensor, bin_ids: Tensor, weights: Tensor | None, bins: Tensor, top_k: int, num_bits: int = -1
) -> Tensor:
    """Sum each token's rows, weighted: the inverse of :func:`gather`. Differentiable in ``x`` and ``weights``.

    Args:
        x: ``(T * top_k, H)`` floating point; autocast's dtype under autocast.
        indices, bin_ids, bins, top_k: as for :func:`gather`.
        weights: ``(T * top_k,)`` floating point, by assignment; None for a plain sum.
        num_bits: of what MegaBlocks 0.5 saved; -1, as it is, alone.

    Returns:
        ``(T, H)`` of x's dtype, accumulated in float32 or wider and rounded once.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not fit.
        NotImplementedError: another ``num_bits``.
    """
    _check_bits("scatter", num_bits)
    _check("scatter", indices, top_k, bin_ids, bins)
    return _unpermute("scatter", x, weights, _plan(indices, top_k, None, x.shape[0]))


def padded_gather(
    x: Tensor,
    indices: Tensor,
    bin_ids: Tensor,
    bins: Tensor,
    padded_bins: Tensor,
    top_k: int,
    *,
    output_rows: int | None = None,
) -> Tensor:
    """:func:`gather` into a layout where each expert's rows begin at a multiple of the block size.

    Args:
        x, indices, bin_ids, bins, top_k: as for :func:`gather`.
        padded_bins: ``(E,)`` integer, where each expert's padded rows end.
        output_rows: rows of the result, at least ``padded_bins[-1]``. None reads that number, so the host waits for
            the device; give a bound to avoid it.

    Returns:
        ``(padded_bins[-1], H)``, or ``(output_rows, H)``; 0 in padding.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not fit; too few ``output_rows``, on the CPU. On CUDA
            what finds no row counts as dropped.
    """
    _check("padded_gather", indices, top_k, bin_ids, bins, padded_bins)
    _check_tokens("padded_gather", x, indices, top_k)
    num_rows = int(padded_bins[-1]) if output_rows is None else output_rows
    rows = _padded_rows("padded_gather", indices, bin_ids, bins, padded_bins, num_rows)
    return _permute(x, _plan(indices, top_k, rows, num_rows))


def padded_scatter(
    x: Tensor,
    indices: Tensor,
    bin_ids: Tensor,
    weights: Tensor | None,
    bins: Tensor,
    padded_bins: Tensor,
    top_k: int,
    num_bits: int = -1,
) -> Tensor:
    """:func:`scatter` from the layout of :func:`padded_gather`, whose padding is not read.

    Args:
        x: ``(rows, H)``, at least ``padded_bins[-1]`` rows.
        indices, bin_ids, weights, bins, top_k, num_bits: as for :func:`scatter`.
        padded_bins: ``(E,)`` integer, where each expert's padded rows end.

    Returns:
        ``(T, H)`` of x's dtype.
    """
    _check_bits("padded_scatter", num_bits)
    _check("padded_scatter", indices, top_k, bin_ids, bins, padded_bins)
    rows = _padded_rows("padded_scatter", indices, bin_ids, bins, padded_bins, x.shape[0])
    return _unpermute("padded_scatter", x, weights, _plan(indices, top_k, rows, x.shape[0]))


def binned_gather(x: Tensor, indices: Tensor, bins: Tensor, bin_size: int, top_k: int) -> Tensor:
    """:func:`gather` into bins of one size: expert e keeps its first ``bin_size`` assignments, the others are dropped.

    Args:
        x, indices, bins, top_k: as for :func:`gather`.
        bin_size: rows of each expert.

    Returns:
        ``(E, bin_size, H)``; 0 in places that no assignment takes.
    """
    _check("binned_gather", indices, top_k, None, bins)
    _check_tokens("binned_gather", x, indices, top_k)
    rows = bins.shape[0] * bin_size
    y = _permute(x, _plan(indices, top_k, _binned_rows(indices, bins, bin_size), rows))
    return y.view(bins.shape[0], bin_size, x.shape[1])


def binned_scatter(x: Tensor, indices: Tensor, weights: Tensor | None, bins: Tensor, top_k: int) -> Tensor:
    """:func:`scatter` from the layout of :func:`binned_gather`; a dropped assignment adds nothing.

    Args:
        x: ``(E, bin_size, H)``.
        indices, weights, bins, top_k: as for :func:`scatter`.

    Returns:
        ``(T, H)`` of x's dtype.
    """
    _check("binned_scatter", indices, top_k, None, bins)
    if x.dim() != 3 or x.shape[0] != bins.shape[0]:
        raise ValueError(f"binned_scatter: x: expected shape (E = {bins.shape[0]}, bin_size, H), got {tuple(x.shape)}")
    experts, bin_size, hidden = x.shape
    plan = _plan(indices, top_k, _binned_rows(indices, bins, bin_size), experts * bin_size)
    return _unpermute("binned_scatter", x.reshape(experts * bin_size, hidden), weights, plan)


def _check_bits(op: str, num_bits: int) -> None:
    if num_bits != -1:
        raise NotImplementedError(f"{op}: num_bits: expected -1 (dmoe does not quantize what it saves), got {num_bits}")


def _padded_rows(op: str, indices: Tensor, bin_ids: Tensor, bins: Tensor, padded_bins: Tensor, num_rows: int) -> Tensor:
    """The row of each sorted position: moved by the padding of the experts before its own."""
    shift = torch.cat([bins.new_zeros(1), (padded_bins - bins)[:-1]])
    rows = torch.arange(indices.shape[0], device=indices.device) + shift.index_select(0, bin_ids.int())
    outside = rows >= num_rows
    if outside.device.type == "cpu" and outside.any():
        raise ValueError(f"{op}: expected at least {int(rows.max()) + 1} rows for these bins, got {num_rows}")
    return rows.masked_fill(outside, -1)


def _binned_rows(indices: Tensor, bins: Tensor, bin_size: int) -> Tensor:
    """The row of each sorted position, -1 for those that find their bin full."""
    position = torch.arange(indices.shape[0], device=indices.device)
    expert = torch.searchsorted(bins.long().contiguous(), position, right=True)
    inside = expert < bins.shape[0]
    expert = expert.clamp(max=bins.shape[0] - 1)
    rank = position - torch.cat([bins.new_zeros(1), bins[:-1]]).index_select(0, expert)
    return torch.where(inside & (rank < bin_size), expert * bin_size + rank, -1)


def _plan(indices: Tensor, top_k: int, rows: Tensor | None, num_rows: int) -> _Plan:
    """Index tensors from the row of each sorted position (-1: dropped); None: position i is row i."""
    device, assignments = indices.device, indices.shape[0]
    indices = indices.long()
    token_rows = torch.full((assignments,), -1, dtype=torch.int32, device=device)
    if rows is None:
        row_to_assignment = indices
        token_rows[indices] = torch.arange(assignments, dtype=torch.int32, device=device)
        hole = None
    else:
        rows = rows.long()
        token_rows[indices] = rows.int()
        row_to_assignment = torch.full((num_rows + 1,), -1, dtype=torch.int64, device=device)
        # One row more takes what is dropped, and is cut off: a mask would have to come to the host.
        row_to_assignment[torch.where(rows < 0, num_rows, rows)] = indices
        row_to_assignment = row_to_assignment[:-1]
        hole = row_to_assignment < 0
    token = torch.div(row_to_assignment, top_k, rounding_mode="floor")
    slot = row_to_assignment - token * top_k
    if hole is not None:
        token, slot = token.masked_fill(hole, -1), slot.masked_fill(hole, -1)
    token_offsets = torch.arange(0, assignments + 1, top_k, dtype=torch.int32, device=device)
    return _Plan(token.int(), slot.int(), token_offsets, token_rows)


def _permute(x: Tensor, plan: _Plan) -> Tensor:
    return permute(cast_if_autocast_enabled(x), plan.row_to_token, plan.token_offsets, plan.token_rows)


def _unpermute(op: str, x: Tensor, weights: Tensor | None, plan: _Plan) -> Tensor:
    assignments = plan.token_rows.shape[0]
    if x.dim() != 2:
        raise ValueError(f"{op}: x: expected shape (rows, H), got {tuple(x.shape)}")
    if weights is not None and tuple(weights.shape) != (assignments,):
        raise ValueError(
            f"{op}: weights: expected one for each of {assignments} assignments, got shape {tuple(weights.shape)}"
        )
    if plan.row_to_token.shape[0] != x.shape[0]:
        raise ValueError(f"{op}: x: expected {plan.row_to_token.shape[0]} rows, got {x.shape[0]}")
    return unpermute(cast_if_autocast_enabled(x), weights, *plan)


def cast_if_autocast_enabled(x: Tensor) -> Tensor:
    """In autocast's dtype under autocast of the tensor's device, as MegaBlocks moves data; float64 and others stay."""
    if x.is_floating_point() and x.dtype != torch.float64 and autocast_is_on(x.device.type):
        return x.to(torch.get_autocast_dtype(x.device.type))
    return x


def _check(
    op: str, indices: Tensor, top_k: int, bin_ids: Tensor | None, bins: Tensor, padded_bins: Tensor | None = None
) -> None:
    if top_k < 1:
        raise ValueError(f"{op}: top_k: expected at least 1, got {top_k}")
    named = {"indices": indices, "bin_ids": bin_ids, "bins": bins, "padded_bins": padded_bins}
    for name, tensor in named.items():
        if tensor is None:
            continue
        if tensor.dtype not in (torch.int16, torch.int32, torch.int64):
            raise TypeError(f"{op}: {name}: expected int16, int32 or int64, got {tensor.dtype}")
        if tensor.dim() != 1:
            raise ValueError(f"{op}: {name}: expected one dimension, got shape {tuple(tensor.shape)}")
        if tensor.device != indices.device:
            raise ValueError(f"{op}: {name}: expected on {indices.device} like indices, got {tensor.device}")
    if indices.shape[0] % top_k:
        raise ValueError(f"{op}: indices: expected a multiple of top_k = {top_k} of them, got {indices.shape[0]}")
    if bin_ids is not None and bin_ids.shape != indices.shape:
        raise ValueError(f"{op}: bin_ids: expected shape {tuple(indices.shape)}, got {tuple(bin_ids.shape)}")
    if bins.shape[0] < 1:
        raise ValueError(f"{op}: bins: expected at least one, got shape {tuple(bins.shape)}")
    if padded_bins is not None and padded_bins.shape != bins.shape:
        raise ValueError(f"{op}: padded_bins: expected shape {tuple(bins.shape)}, got {tuple(padded_bins.shape)}")


def _check_tokens(op: str, x: Tensor, indices: Tensor, top_k: int) -> None:
    if x.dim() != 2:
        raise ValueError(f"{op}: x: expected shape (T, H), got {tuple(x.shape)}")
    if indices.shape[0] != x.shape[0] * top_k:
        raise ValueError(
            f"{op}: indices: expected {x.shape[0]} tokens * top_k {top_k} of them, got shape {tuple(indices.shape)}"
        )
