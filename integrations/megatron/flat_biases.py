"""The experts' biases as Megatron's optimizers want biases: of one dimension.

Megatron tells what a parameter is by its shape and its name: no weight decay, no Muon, no learning rate of a matrix's
for what has one dimension or ends in ``.bias``. Its own experts' biases are that, and dmoe's, of all experts together,
are ``(E, H)`` and more. So they are kept flat, and the experts see views of them; ``state_dict()`` and
``load_state_dict()`` speak of them in dmoe's names and shapes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize


class _OfShape(nn.Module):
    def __init__(self, shape: torch.Size) -> None:
        super().__init__()
        self.shape = shape

    def forward(self, flat: Tensor) -> Tensor:
        return flat.view(self.shape)

    def right_inverse(self, bias: Tensor) -> Tensor:
        return bias.flatten()


def flatten_biases(experts: nn.Module) -> None:
    """Keep the experts' biases flat from here on; the parameters stay the same objects."""
    names = [name for name, _ in experts.named_parameters() if name.endswith("_bias")]
    for name in names:
        parametrize.register_parametrization(experts, name, _OfShape(getattr(experts, name).shape))
    if names:
        experts.register_state_dict_post_hook(_as_dmoe_has_them)
        experts.register_load_state_dict_pre_hook(_as_they_are_kept)


def parameters_by_name(experts: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The experts' parameters with dmoe's names; biases flat."""
    for name, parameter in experts.named_parameters():
        yield _own(name), parameter


def names_in_states(module: nn.Module) -> list[str]:
    """How a module's parameters, experts among them, are named in its ``state_dict()``."""
    return [_own(name) for name, _ in module.named_parameters()]


def axis_of_width(name: str) -> int | None:
    """Which axis of a parameter, in dmoe's shape, is F."""
    return None if name == "down_bias" else 2 if name == "down_proj" or "gate" in name else 1


def _own(name: str) -> str:
    return name.replace("parametrizations.", "").removesuffix(".original")


def _kept(name: str) -> str:
    return f"parametrizations.{name}.original"


def _flat_names(experts: nn.Module) -> list[str]:
    return [name for name, _ in parameters_by_name(experts) if name.endswith("_bias")]


def _as_dmoe_has_them(experts: nn.Module, state_dict: dict[str, Any], prefix: str, _: Any) -> None:
    for name in _flat_names(experts):
        state_dict[prefix + name] = state_dict.pop(prefix + _kept(name)).view(getattr(experts, name).shape)


def _as_they_are_kept(experts: Any, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    for name in _flat_names(experts):
        value = state_dict.pop(prefix + name, None)
        if value is None:
            continue
        bias = getattr(experts, name)
        if value.dim() > 1:  # distributed checkpoints come as they are kept
            value = experts.owned.part_of(value, bias, axis_of_width(name))
            value = value.flatten() if value.shape == bias.shape else value  # another shape is torch's to refuse
        state_dict[prefix + _kept(name)] = value
