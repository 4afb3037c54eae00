"""Rows exchanged between ranks, with a gradient."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def _exchange(x: Tensor, receive: Sequence[int], send: Sequence[int], group: Any, async_op: bool) -> tuple[Tensor, Any]:
    out = x.new_empty(sum(receive), *x.shape[1:])
    handle = dist.all_to_all_single(out, x.contiguous(), list(receive), list(send), group=group, async_op=async_op)
    return out, handle


class AllToAllOp(torch.autograd.Function):
    """See :func:`all_to_all`; the gradient goes the way back."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, receive: Sequence[int], send: Sequence[int], group: Any, async_op: bool
    ) -> tuple[Tensor, Any]:
        """The rows, and the handle."""
        ctx.sizes, ctx.group = (receive, send), group
        return _exchange(x, receive, send, group, async_op)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor, None, None, None, None]:
        """The gradient's rows, back where they came from."""
        receive, send = ctx.sizes
        return _exchange(grad, send, receive, ctx.group, False)[0], None, None, None, None


def all_to_all(
    x: Tensor,
    output_split_sizes: Sequence[int],
    input_split_sizes: Sequence[int],
    group: Any,
    async_op: bool = False,
) -> tuple[Tensor, Any]:
    """Send rows to every rank of a group and receive theirs; differentiable in ``x``.

    Args:
        x: ``(R, ...)``, rows in the order of the ranks that they go to.
        output_split_sizes: rows that come from each rank.
        input_split_sizes: rows that go to each rank, R in sum.
        group: the ranks; None is all.
        async_op: return before the rows are here.

    Returns:
        ``(sum(output_split_sizes), ...)``, and with ``async_op`` what to wait for before reading it, else None.
    """
    return AllToAllOp.apply(x, output_split_sizes, input_split_sizes, group, async_op)
