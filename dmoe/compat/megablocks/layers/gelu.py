"""Gelu in its tanh form on the values of a block-sparse matrix, and its gradient."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dmoe.compat.megablocks.layers.activation_fn import act_fn, with_values


def gelu(x: Any) -> Any:
    """``F.gelu(values, approximate="tanh")`` of an ``stk.Matrix``."""
    return act_fn(x, F.gelu, approximate="tanh")


def gelu_backward_(grad: Any, x: Any) -> Any:
    """The gradient of :func:`gelu`'s input, written into ``grad``.

    Args:
        grad: gradient of the output: an ``stk.Matrix`` of x's structure, or a tensor of x's shape.
        x: the input, of the same kind.

    Returns:
        ``grad`` or, of a matrix, one that shares its values.
    """
    if isinstance(x, Tensor):
        return grad.copy_(torch.ops.aten.gelu_backward(grad, x, approximate="tanh"))
    return with_values("gelu_backward_", grad, lambda values: gelu_backward_(values, x.data))
