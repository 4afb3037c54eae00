"""Copies the tokens into expert order, and brings the rows back: the two are each other's gradient.

:func:`permute` makes one row for each kept assignment, zeros where no token belongs; in :func:`unpermute` each token
sums its rows, weighted by the router if asked.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dmoe.ops._checks import check_floating, check_index_tensors
from dmoe.ops._library import define, refuse_double_backward, register_autograd
from dmoe.ops.activation import accumulate_dtype


def permute_ref(x: Tensor, row_to_token: Tensor, token_offsets: Tensor, token_rows: Tensor) -> Tensor:
    """Plain-PyTorch meaning of :func:`permute`."""
    if x.shape[0] == 0:  # every row is a hole, and there is nothing to index
        return x.new_zeros(row_to_token.shape[0], x.shape[1])
    rows = x.index_select(0, row_to_token.clamp_min(0))
    return rows.masked_fill_((row_to_token < 0).unsqueeze(1), 0)


permute_op = define(
    "permute(Tensor x, Tensor row_to_token, Tensor token_offsets, Tensor token_rows) -> Tensor",
    permute_ref,
    fake=lambda x, row_to_token, token_offsets, token_rows: x.new_empty(row_to_token.shape[0], x.shape[1]),
)


def _setup_permute(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:])


def _backward_of_permute(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
    row_to_token, token_offsets, token_rows = ctx.saved_tensors
    # dx[t] is the sum over the rows that hold t. Every token gathers its own rows, so no two threads add to one place.
    return unpermute_op(grad, None, row_to_token, None, token_offsets, token_rows), None, None, None


register_autograd(permute_op, _backward_of_permute, _setup_permute)


def permute(x: Tensor, row_to_token: Tensor, token_offsets: Tensor, token_rows: Tensor) -> Tensor:
    """Copy each token to the rows that the plan gives it: ``rows[r] = x[row_to_token[r]]``, 0 where that is -1.

    The index tensors are those of one plan, and the layout of the result follows from it: packed (an expert's rows
    contiguous), padded (rows per expert rounded up to a block), or the capacity form, where the result viewed as
    ``(E, capacity, H)`` holds the rows of expert e in slice e.

    The gradient is ``dx[t] = sum of drows[r] over the rows r of t``, in slot order, accumulated in float32 (float64 for
    float64), without atomics.

    Args:
        x: tokens, ``(T, H)``, any dtype and strides; differentiable where the dtype is.
        row_to_token: ``(R,)`` int32, the token of each row, -1 in holes.
        token_offsets: ``(T + 1,)`` int32, where each token's assignments start in ``token_rows``; for the gradient.
        token_rows: ``(N,)`` int32, the row of each assignment, token by token, -1 where dropped; for the gradient.

    Returns:
        ``(R, H)`` contiguous, of the dtype of ``x``.

    Raises:
        TypeError: an index tensor is not int32.
        ValueError: shapes or devices disagree.
        RuntimeError: a token out of range, on the CPU. On CUDA, where looking would need a transfer to the host, such a
            row is zero.
    """
    if x.ndim != 2:
        raise ValueError(f"permute: x: expected shape (T, H), got {tuple(x.shape)}")
    check_index_tensors(
        "permute", x.device, row_to_token=row_to_token, token_offsets=token_offsets, token_rows=token_rows
    )
    if token_offsets.shape[0] != x.shape[0] + 1:
        raise ValueError(
            f"permute: token_offsets: expected shape ({x.shape[0] + 1},) for x of shape {tuple(x.shape)}, "
            f"got {tuple(token_offsets.shape)}"
        )
    return permute_op(x, row_to_token, token_offsets, token_rows)


def unpermute_ref(
    rows: Tensor,
    gate_weights: Tensor | None,
    row_to_token: Tensor,
    row_to_slot: Tensor | None,
    token_offsets: Tensor,
    token_rows: Tensor,
) -> Tensor:
    """Plain-PyTorch meaning of :func:`unpermute`, with ``gate_weights`` flat."""
    tokens, dtype = token_offsets.shape[0] - 1, accumulate_dtype(rows.dtype)
    if rows.shape[0] == 0 or tokens == 0 or token_rows.shape[0] == 0:
        return rows.new_zeros(tokens, rows.shape[1])
    terms = rows.index_select(0, token_rows.clamp_min(0)).to(dtype)
    if gate_weights is not None:
        terms = terms * gate_weights.to(dtype).unsqueeze(1)
    terms = terms.masked_fill_((token_rows < 0).unsqueeze(1), 0)
    # One token after the other, each in slot order; index_add_ would be atomic, in any order, on CUDA.
    sums = torch.segment_reduce(terms, "sum", offsets=token_offsets.long(), axis=0, unsafe=True, initial=0)
    return sums.to(rows.dtype)


def unpermute_backward_ref(
    grad: Tensor,
    rows: Tensor,
    gate_weights: Tensor,
    row_to_token: Tensor,
    row_to_slot: Tensor,
    token_offsets: Tensor,
    token_rows: Tensor,
) -> tuple[Tensor, Tensor]:
    """Gradients of :func:`unpermute` for ``rows`` and ``gate_weights``.

    For the row r of assignment j of token t: ``drows[r] = w[j] * dy[t]`` and ``dw[j] = <dy[t], rows[r]>``; 0 where a
    row holds no token, and where an assignment was dropped.
    """
    dtype = accumulate_dtype(rows.dtype)
    if grad.shape[0] == 0 or rows.shape[0] == 0 or token_rows.shape[0] == 0:
        return torch.zeros_like(rows, memory_format=torch.contiguous_format), torch.zeros_like(gate_weights)
    hole = row_to_token < 0
    token = row_to_token.clamp_min(0)
    assignment = token_offsets.index_select(0, token) + row_to_slot
    weight = gate_weights.to(dtype).index_select(0, assignment.masked_fill(hole, 0))
    dy = grad.index_select(0, token).to(dtype).masked_fill_(hole.unsqueeze(1), 0)
    grad_rows = (dy * weight.unsqueeze(1)).masked_fill_(hole.unsqueeze(1), 0).to(rows.dtype)
    dot = (dy * rows.to(dtype)).sum(1)
    kept = token_rows >= 0
    grad_weights = dot.index_select(0, token_rows.clamp_min(0)).masked_fill_(~kept, 0)
    return grad_rows, grad_weights.to(gate_weights.dtype)


unpermute_op = define(
    "unpermute(Tensor rows, Tensor? gate_weights, Tensor row_to_token, Tensor? row_to_slot, Tensor token_offsets, "
    "Tensor token_rows) -> Tensor",
    unpermute_ref,
    fake=lambda rows, gate_weights, row_to_token, row_to_slot, token_offsets, token_rows: rows.new_empty(
        token_offsets.shape[0] - 1, rows.shape[1]
    ),
)

_unpermute_backward = define(
    "unpermute_backward(Tensor grad, Tensor rows, Tensor gate_weights, Tensor row_to_token, Tensor row_to_slot, "
    "Tensor token_offsets, Tensor token_rows) -> (Tensor, Tensor)",
    unpermute_backward_ref,
    fake=lambda grad, rows, gate_weights, *plan: (
        rows.new_empty(rows.shape),
        gate_weights.new_empty(gate_weights.shape),
    ),
)
refuse_double_backward(_unpermute_backward)


def _setup_unpermute(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    rows, gate_weights, *plan = inputs
    ctx.weighted = gate_weights is not None
    # Without weights the gradient does not depend on the rows.
    ctx.save_for_backward(*((rows, gate_weights, *plan) if ctx.weighted else (plan[0], *plan[2:])))


def _backward_of_unpermute(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    if ctx.weighted:
        grad_rows, grad_weights = _unpermute_backward(grad, *ctx.saved_tensors)
        return grad_rows, grad_weights, None, None, None, None
    return permute_op(grad, *ctx.saved_tensors), None, None, None, None, None


register_autograd(unpermute_op, _backward_of_unpermute, _setup_unpermute)


def unpermute(
    rows: Tensor,
    gate_weights: Tensor | None,
    row_to_token: Tensor,
    row_to_slot: Tensor,
    token_offsets: Tensor,
    token_rows: Tensor,
) -> Tensor:
    """Sum each token's rows: ``y[t] = sum_j w[j] * rows[token_rows[j]]`` over its kept assignments j, in slot order.

    The inverse of :func:`permute` up to the sum; the index tensors are those of one plan. Sums and the
    dot products of the weights' gradient are accumulated in float32 (float64 for float64 rows), in a fixed order.
    A token without a kept assignment gets zeros. Rows that belong to no token are not read.

    Saved for the backward: the rows and the weights when there are weights, and index tensors.

    Args:
        rows: ``(R, H)`` float32, float64, bfloat16 or float16, any strides; of the capacity form, its
            view ``(E * capacity, H)``.
        gate_weights: ``(N,)`` or ``(T, K)`` floating point, in the order of ``token_rows``; None for a plain sum.
        row_to_token: ``(R,)`` int32, the token of each row, -1 in holes; for the gradient.
        row_to_slot: ``(R,)`` int32, which of its token's assignments the row is, -1 in holes; for the gradient.
        token_offsets: ``(T + 1,)`` int32, where each token's assignments start in ``token_rows``.
        token_rows: ``(N,)`` int32, the row of each assignment, token by token, -1 where dropped.

    Returns:
        ``(T, H)`` of the dtype of ``rows``.

    Raises:
        TypeError: ``rows`` or ``gate_weights`` is not floating point, or an index tensor is not int32.
        ValueError: shapes or devices disagree.
        RuntimeError: an index out of range, on the CPU. On CUDA, where looking would need a transfer to the host, such
            an assignment counts as dropped.
    """
    if rows.ndim != 2:
        raise ValueError(f"unpermute: rows: expected shape (R, H), got {tuple(rows.shape)}")
    check_floating("unpermute", rows=rows, gate_weights=gate_weights)
    check_index_tensors(
        "unpermute",
        rows.device,
        row_to_token=row_to_token,
        row_to_slot=row_to_slot,
        token_offsets=token_offsets,
        token_rows=token_rows,
    )
    for name, index in (("row_to_token", row_to_token), ("row_to_slot", row_to_slot)):
        if index.shape[0] != rows.shape[0]:
            raise ValueError(
                f"unpermute: {name}: expected shape ({rows.shape[0]},) for rows of shape {tuple(rows.shape)}, "
                f"got {tuple(index.shape)}"
            )
    if token_offsets.shape[0] == 0:
        raise ValueError("unpermute: token_offsets: expected shape (T + 1,) with a leading 0, got (0,)")
    if gate_weights is not None:
        if gate_weights.device != rows.device:
            raise ValueError(f"unpermute: gate_weights: expected on {rows.device}, got {gate_weights.device}")
        if gate_weights.numel() != token_rows.shape[0]:
            raise ValueError(
                f"unpermute: gate_weights: expected one for each of the {token_rows.shape[0]} assignments of "
                f"token_rows, got shape {tuple(gate_weights.shape)}"
            )
        gate_weights = gate_weights.reshape(-1)
    return unpermute_op(rows, gate_weights, row_to_token, row_to_slot, token_offsets, token_rows)
