"""Initial values by the name of the system that begins with them."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

_Rule = Callable[[Tensor, int, int, "torch.Generator | None"], None]


def _uniform(weight: Tensor, fan_in: int, fan_out: int, generator: torch.Generator | None) -> None:
    bound = 1 / math.sqrt(fan_in)
    weight.uniform_(-bound, bound, generator=generator)


def _xavier(weight: Tensor, fan_in: int, fan_out: int, generator: torch.Generator | None) -> None:
    bound = math.sqrt(6 / (fan_in + fan_out))
    weight.uniform_(-bound, bound, generator=generator)


def _normal(std: float) -> _Rule:
    def rule(weight: Tensor, fan_in: int, fan_out: int, generator: torch.Generator | None) -> None:
        weight.normal_(0, std, generator=generator)

    return rule


def _truncated(scale: float) -> _Rule:
    """Normal of variance ``scale / fan_in``, cut at two standard deviations."""

    def rule(weight: Tensor, fan_in: int, fan_out: int, generator: torch.Generator | None) -> None:
        std = math.sqrt(scale / fan_in)
        torch.nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std, generator=generator)

    return rule


def _zero(bias: Tensor, fan_in: int, fan_out: int, generator: torch.Generator | None) -> None:
    bias.zero_()


_JAX = 0.87962566103423978**-2  # makes up for the variance that the cut takes away, as JAX's initialisers do
# Name -> projections and biases of experts, then the router's weights.
_RULES: dict[str, tuple[_Rule, _Rule, _Rule]] = {
    "linear": (_uniform, _uniform, _uniform),  # nn.Linear's, and Tutel's
    "switch": (_truncated(0.1), _zero, _truncated(0.1)),  # Fedus et al. 2021, section 2.4: scale 0.1 instead of 1
    "vmoe": (_xavier, _normal(1e-6), _truncated(_JAX)),  # the MLP of a ViT; flax's own for the router
    "gmoe": (_uniform, _uniform, _normal(0.02)),
    "swin_moe": (_normal(0.005), _zero, _normal(0.005)),  # timm's truncation is at +-2, which is 400 of these
    "xavier": (_xavier, _uniform, _xavier),  # the hash layers of ParlAI
}


@torch.no_grad()
def expert_weight(
    tensor: Tensor,
    init: str,
    std: float | None,
    *,
    is_bias: bool,
    fan_in: int,
    fan_out: int,
    generator: torch.Generator | None,
) -> None:
    """Fill one projection, or bias, of one expert.

    Args:
        tensor: float32 on the CPU, whole.
        init: a name of ``MoEConfig.init``.
        std: of a normal distribution, beside zero biases, instead; None for none.
        is_bias: whether it is a bias.
        fan_in, fan_out: width of the projection's input and output.
        generator: to draw from.
    """
    if std is None:
        _RULES[init][1 if is_bias else 0](tensor, fan_in, fan_out, generator)
    elif is_bias:
        tensor.zero_()
    else:
        tensor.normal_(0, std, generator=generator)


@torch.no_grad()
def router_weight(weight: Tensor, init: str, std: float | None) -> None:
    """Fill a router's ``(E, H)`` from PyTorch's default generator, by a name of ``MoEConfig.init``, or normal."""
    if std is None:
        _RULES[init][2](weight, weight.shape[1], weight.shape[0], None)
    else:
        weight.normal_(0, std)
