"""An activation on the values of a block-sparse matrix."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dmoe.ops.stk_matrix import sparse_matrix
from dmoe.ops.topology import BlockTopology


def with_values(op: str, x: Any, values: Callable[[Tensor], Tensor]) -> Any:
    """An ``stk.Matrix`` of x's structure, whose values are made of x's.

    Raises:
        TypeError: x is none.
    """
    if isinstance(x, Tensor) or not hasattr(x, "block_offsets_t"):
        raise TypeError(f"{op}: x: expected an stk.Matrix, got {type(x).__name__}")
    structure = BlockTopology(*(getattr(x, name) for name in BlockTopology._fields))
    return sparse_matrix(tuple(x.size()), values(x.data), structure)


def act_fn(x: Any, function: Callable[..., Tensor], return_grad_fn: bool = False, **kwargs: Any) -> Any:
    """``function(values, **kwargs)`` on an ``stk.Matrix``.

    Args:
        x: the matrix.
        function: elementwise, on tensors.
        return_grad_fn: also return the backward of the result's values, which adds to ``x.data.grad``; autograd is on
            for it whatever it is outside.
        **kwargs: for the function.

    Returns:
        A matrix of the same structure; a pair of it and a function of the values' gradient.
    """
    with torch.set_grad_enabled(torch.is_grad_enabled() or return_grad_fn):
        if return_grad_fn:
            x.data.requires_grad_()
        y = with_values("act_fn", x, lambda values: function(values, **kwargs))
    return (y, y.data.backward) if return_grad_fn else y
