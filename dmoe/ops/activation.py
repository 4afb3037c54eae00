"""The expert's activation and its derivative, in plain PyTorch; ``csrc/activation.h`` is the compiled twin.

Every activation of experts with a gate is ``gate_factor(gate) * up_factor(up)``; ``up_factor`` is the identity but for
those of :mod:`dmoe.activations` that have numbers. Low-precision input is computed in float32 and rounded once. A
function of a tensor may stand for a name here: compositions take one, operations do not.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from dmoe.activations import kind_and_numbers


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


class _Factor(NamedTuple):
    """A function of one number, and its derivative."""

    value: Callable[[Tensor], Tensor]
    slope: Callable[[Tensor], Tensor]

    def both(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Value and slope."""
        return self.value(x), self.slope(x)


def _clamped_silu(limit: float, alpha: float) -> _Factor:
    def slope(x: Tensor) -> Tensor:
        z = alpha * x.clamp(max=limit)
        return _silu_slope(z).masked_fill(x > limit, 0)  # NaN stays NaN

    return _Factor(lambda x: x.clamp(max=limit) * torch.sigmoid(alpha * x.clamp(max=limit)), slope)


def _clamped(limit: float, offset: float) -> _Factor:
    return _Factor(lambda x: x.clamp(-limit, limit) + offset, lambda x: 1 - (x.abs() > limit).to(x.dtype))


def _softcapped(cap: float) -> _Factor:
    return _Factor(lambda x: cap * torch.tanh(x / cap), lambda x: 1 - torch.tanh(x / cap).square())


def _softcapped_silu(cap: float) -> _Factor:
    def slope(x: Tensor) -> Tensor:
        t, s = torch.tanh(x / cap), torch.sigmoid(x)
        return (1 - t * t) * s + cap * t * s * torch.sigmoid(-x)

    return _Factor(lambda x: cap * torch.tanh(x / cap) * torch.sigmoid(x), slope)


_TABLE: dict[str, _Factor] = {
    "gelu": _Factor(torch.nn.functional.gelu, _gelu_slope),
    "gelu_tanh": _Factor(lambda x: torch.nn.functional.gelu(x, approximate="tanh"), _gelu_tanh_slope),
    "relu": _Factor(torch.relu, lambda x: (x > 0).to(x.dtype)),
    "relu_squared": _Factor(lambda x: torch.relu(x).square(), lambda x: 2 * torch.relu(x)),
    "sigmoid": _Factor(torch.sigmoid, lambda x: torch.sigmoid(x) * torch.sigmoid(-x)),
    "silu": _Factor(torch.nn.functional.silu, _silu_slope),
}


class _OfFunction:
    """A function of a tensor that somebody gave, and autograd's derivative."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        self.function = function

    def value(self, x: Tensor) -> Tensor:
        """Of x, into which the function may write."""
        return self.function(x)

    def both(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """In one run of the function; x stays as it is."""
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            value = self.function(leaf.clone())
            (slope,) = torch.autograd.grad(value, leaf, torch.ones_like(value))
        return value.detach(), slope


Activated = str | Callable[[Tensor], Tensor]  # an activation as operations take it, or a function of a tensor


def _factors(activation: Activated) -> tuple[_Factor | _OfFunction, _Factor | None]:
    """Of the gate and of up, where that is not up itself."""
    return _factors_of_text(activation) if isinstance(activation, str) else (_OfFunction(activation), None)


@functools.lru_cache(maxsize=64)
def _factors_of_text(activation: str) -> tuple[_Factor, _Factor | None]:
    kind, numbers = kind_and_numbers(activation)
    if kind == "clamped_swiglu":
        limit, alpha, offset = numbers
        return _clamped_silu(limit, alpha), _clamped(limit, offset)
    if kind == "softcapped_swiglu":
        return _softcapped_silu(numbers[0]), _softcapped(numbers[1])
    return _TABLE[kind], None


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, float32 for everything narrower."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def activate(pre: Tensor, activation: Activated, gated: bool, outside: Tensor | None = None) -> Tensor:
    """``act(pre)``, or ``act(gate) * up`` with the halves of the last dimension; accumulation dtype.

    ``outside (R, F or 1)``: numbers that belong to no expert, which come out as 0. A function need not be finite there.
    """
    of_gate, of_up = _factors(activation)
    gate, up = _halves(pre, gated, outside)
    if outside is None and not isinstance(activation, str):
        gate = gate.clone()
    value = of_gate.value(gate)
    if up is not None:
        value = value * (up if of_up is None else of_up.value(up))
    return value if outside is None else value.masked_fill(outside, 0)


def activate_backward(
    grad: Tensor, pre: Tensor, activation: Activated, gated: bool, outside: Tensor | None = None
) -> Tensor:
    """Gradient of ``pre``, given the gradient of :func:`activate`'s result; accumulation dtype."""
    of_gate, of_up = _factors(activation)
    gate, up = _halves(pre, gated, outside)
    if up is None:
        grads = [grad * of_gate.both(gate)[1]]
    else:
        value, slope = of_gate.both(gate)
        factor, grad_up = up if of_up is None else of_up.value(up), grad * value
        grads = [grad * factor * slope, grad_up if of_up is None else grad_up * of_up.slope(up)]
    if outside is not None:
        grads = [each.masked_fill(outside, 0) for each in grads]
    return torch.cat(grads, -1) if len(grads) > 1 else grads[0]


def _halves(pre: Tensor, gated: bool, outside: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Gate and up, or what takes the gate's place and None, in the accumulation dtype."""
    pre = pre.to(accumulate_dtype(pre.dtype))
    gate, up = pre.chunk(2, dim=-1) if gated else (pre, None)
    # Most functions are finite of 1/2, and so are their derivatives: under autograd 0 times infinity would be NaN.
    return gate if outside is None else gate.masked_fill(outside, 0.5), up
