"""Experts that are somebody else's modules, computed by dmoe: what :mod:`dmoe.lora` and :mod:`dmoe.quant` need to know.

An integration says how to recognise them (:func:`register_experts`); this package imports none.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor, nn

from dmoe.expert_slice import ExpertSlice
from dmoe.expert_weights import ExpertWeights
from dmoe.experts import Experts


class OtherExperts(Protocol):
    """Experts in a module that keeps its weights in a way of its own.

    Attributes:
        up_name: of the parameter of the up projection, with its gate if there is one. The other is ``down_proj``.
        interleaved: rows of gate and up take turns in the parameter.
    """

    @property
    def up_name(self) -> str: ...  # noqa: D102
    @property
    def interleaved(self) -> bool: ...  # noqa: D102

    def weights(self) -> ExpertWeights:
        """Views of the parameters as dmoe has them, or their codes."""
        ...

    def as_parameter(self, field: str, weight: Tensor) -> Tensor:
        """A weight in :class:`ExpertWeights`' shape in that of the parameter of this name; the way back of the view."""
        ...


Recognise = Callable[[nn.Module], "OtherExperts | None"]
_KNOWN: list[Recognise] = []  # and no dict by name: nobody names one, all are asked about a module


def register_experts(recognise: Recognise) -> None:
    """Let ``recognise`` be asked about modules: it returns None for what is not experts of its kind.

    It may raise ValueError where experts are of its kind, and cannot be adapted as they are. Telling again changes
    nothing.
    """
    if recognise not in _KNOWN:
        _KNOWN.append(recognise)


def slice_of(experts: Any) -> ExpertSlice:
    """Which experts :func:`experts_in` has found; of somebody else's module all of them."""
    if isinstance(experts, Experts):
        return experts.owned
    count = experts.weights().num_experts
    return ExpertSlice(range(count), count)


def experts_in(module: Any) -> Any:
    """A module's experts: itself, if it is :class:`dmoe.experts.Experts`, else what somebody knows; or None."""
    if isinstance(module, Experts):
        return module
    return next((found for recognise in _KNOWN if (found := recognise(module)) is not None), None)
