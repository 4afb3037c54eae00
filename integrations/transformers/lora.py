"""PEFT's adapters of expert weights, read as factors: ``W + s B A`` is never formed.

PEFT adapts a parameter of the experts (``LoraConfig(target_parameters=...)``) by wrapping the module that holds it and,
while that runs, making the parameter a computed one. Its parametrization holds the two factors where one adapter is
active, and computes the sum when the parameter is read (PEFT 0.21, ``_LoraFactorsProxy``). Here the factors are taken
from it instead. Where there is something else, a second adapter say, the parameter is read like any other: then PEFT
itself makes the sum, and the result is the same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import dmoe

# Where a wrapper that hands its factors over leaves them while it runs, by parameter.
HANDED = "_dmoe_factors"


class Adapted(NamedTuple):
    """One projection of all experts as it lies in the module, or its codes, and what is added to it.

    ``lhs (E, rows, r)`` times ``rhs (E, r, columns)`` times ``scale`` has the weight's own order.
    """

    weight: Any
    lhs: Tensor | None = None
    rhs: Tensor | None = None
    scale: float = 1.0

    @property
    def total(self) -> Tensor:
        """The weight itself, or the sum, which is as large."""
        if self.lhs is None or self.rhs is None:
            return self.weight
        with torch.autocast(self.weight.device.type, enabled=False):  # a parameter keeps its dtype
            return torch.baddbmm(self.weight, self.lhs, self.rhs, alpha=self.scale)

    @property
    def transposed(self) -> Adapted:
        """The same of the transposed matrices: views."""
        lhs, rhs = (None if f is None else f.mT for f in (self.rhs, self.lhs))
        return Adapted(self.weight.mT, lhs, rhs, self.scale)

    def low_rank(self, as_shaped: Callable[[Tensor], Tensor]) -> dmoe.LowRank | None:
        """Of a weight whose rows are results, which ``as_shaped`` cuts into halves, say; None without an adapter."""
        if self.lhs is None or self.rhs is None:
            return None
        return dmoe.LowRank(self.rhs, as_shaped(self.lhs), self.scale)


def adapted(module: nn.Module, name: str) -> Adapted:
    """A parameter of the experts with its adapter's factors, if it has one whose factors are there.

    Args:
        module: the experts; a parameter may have been parametrized by PEFT.
        name: ``gate_up_proj``, say.
    """
    held = module._modules.get(name)
    if held is not None:  # what dmoe.quant has put in a parameter's place
        return Adapted(held.value())  # type: ignore[operator]
    handed = getattr(module, HANDED, None)
    if handed and name in handed:
        return Adapted(getattr(module, name), *handed[name])
    computed = getattr(module, "parametrizations", None)
    if computed is None or name not in computed:
        return Adapted(getattr(module, name))
    steps = computed[name]
    factors = _factors_of(steps[0]) if len(steps) == 1 else None
    if factors is None:
        return Adapted(getattr(module, name))
    return Adapted(steps.original, *factors)


def _factors_of(step: nn.Module) -> tuple[Tensor, Tensor, float] | None:
    lhs, rhs, scale = (getattr(step, field, None) for field in ("lhs", "rhs", "scaling"))
    if not isinstance(lhs, Tensor) or not isinstance(rhs, Tensor) or not isinstance(scale, int | float):
        return None
    return lhs, rhs, float(scale)


def has_own_adapters(module: nn.Module) -> bool:
    """Whether :func:`dmoe.lora.add` has put some beside the weights."""
    return module._modules.get("lora") is not None


def own_adapters(module: nn.Module, dtype: torch.dtype | None) -> tuple[Any, Tensor | None]:
    """What :func:`dmoe.lora.add` has put beside the weights, as ``moe_mlp`` takes it: adapters, and tokens' choice.

    Args:
        module: the experts.
        dtype: of the weights, to which factors are rounded; None where all are codes.
    """
    held: Any = module._modules.get("lora")
    return (None, None) if held is None else held.value(dtype)


def hand_over(model: nn.Module) -> None:
    """Let PEFT's wrappers of single parameters hand their factors over, without computing the sum to check its shape.

    Nothing where PEFT is not there, or too old to have factors.
    """
    _change_class(model, _wrapper_classes())


def take_back(model: nn.Module) -> None:
    """Undo :func:`hand_over`; nothing where it was not done."""
    _change_class(model, _wrapper_classes()[::-1])


def _change_class(model: nn.Module, classes: tuple[type, ...]) -> None:
    """Make those of the first class the second's. Not a method of theirs: copies and pickles of the model keep it."""
    for module in model.modules() if classes else ():
        if type(module) is classes[0]:
            module.__class__ = classes[1]


def _wrapper_classes() -> tuple[type, ...]:
    """PEFT's, and ours; none without PEFT's."""
    try:
        from dmoe.integrations.transformers.peft_wrapper import FactorsWrapper
    except ImportError:
        return ()
    plain = FactorsWrapper.__base__
    return (plain, FactorsWrapper) if hasattr(plain, "get_delta_factors") else ()
