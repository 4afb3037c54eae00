"""The expert's activation and its derivative, in plain PyTorch; ``csrc/activation.h`` is the compiled twin.

Low-precision input is computed in float32 and rounded once.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

ACTIVATIONS = ("gelu", "gelu_tanh", "relu", "silu")


def _gelu_slope(x: Tensor) -> Tensor:
    cdf = 0.5 * (1 + torch.erf(x * math.sqrt(0.5)))
    return cdf + x * torch.exp(-0.5 * x * x) * (1 / math.sqrt(2 * math.pi))


def _gelu_tanh_slope(x: Tensor) -> Tensor:
    beta, kappa = math.sqrt(2 / math.pi), 0.044715
    t = torch.tanh(beta * (x + kappa * x**3))
    return 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * beta * (1 + 3 * kappa * x * x)


def _silu_slope(x: Tensor) -> Tensor:
    s = torch.sigmoid(x)
    return s * (1 + x * (1 - s))


_TABLE: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "gelu": (torch.nn.functional.gelu, _gelu_slope),
    "gelu_tanh": (lambda x: torch.nn.functional.gelu(x, approximate="tanh"), _gelu_tanh_slope),
    "relu": (torch.relu, lambda x: (x > 0).to(x.dtype)),
    "silu": (torch.nn.functional.silu, _silu_slope),
}


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, float32 for everything narrower."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def activate(pre: Tensor, activation: str, gated: bool) -> Tensor:
    """``act(pre)``, or ``act(gate) * up`` with the halves of the last dimension; accumulation dtype."""
    function = _TABLE[activation][0]
    pre = pre.to(accumulate_dtype(pre.dtype))
    if not gated:
        return function(pre)
    gate, up = pre.chunk(2, dim=-1)
    return function(gate) * up


def activate_backward(grad: Tensor, pre: Tensor, activation: str, gated: bool) -> Tensor:
    """Gradient of ``pre``, given the gradient of :func:`activate`'s result; accumulation dtype."""
    function, slope = _TABLE[activation]
    pre = pre.to(accumulate_dtype(pre.dtype))
    if not gated:
        return grad * slope(pre)
    gate, up = pre.chunk(2, dim=-1)
    return torch.cat((grad * up * slope(gate), grad * function(gate)), dim=-1)
