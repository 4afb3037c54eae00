"""Copies the tokens into expert order: one row for each kept assignment, zeros where no token belongs."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from dmoe.ops._checks import check_index_tensors
from dmoe.ops._library import define, register_autograd
from dmoe.ops.unpermute import unpermute_op


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


def _setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:])


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
    row_to_token, token_offsets, token_rows = ctx.saved_tensors
    # dx[t] is the sum over the rows that hold t. Every token gathers its own rows, so no two threads add to one place.
    return unpermute_op(grad, None, row_to_token, None, token_offsets, token_rows), None, None, None


register_autograd(permute_op, _backward, _setup_context)


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
