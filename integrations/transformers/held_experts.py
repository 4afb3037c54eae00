"""What :mod:`dmoe.lora` and :mod:`dmoe.quant` need to know of Transformers' experts modules."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import dmoe
from dmoe.integrations.transformers.attached import computed_by_dmoe, guard
from dmoe.integrations.transformers.experts import as_expert_weights, names_of, projections_of
from dmoe.integrations.transformers.fp8 import codes_of
from dmoe.integrations.transformers.gates import gate_of
from dmoe.integrations.transformers.versions import layout_of, on_interface


class HeldExperts:
    """A :class:`dmoe.OtherExperts`.

    Args:
        module: the experts, whose gate dmoe computes.
        interleaved: rows of gate and up take turns.
    """

    def __init__(self, module: nn.Module, interleaved: bool) -> None:
        self.module, self.interleaved, self.layout = module, interleaved, layout_of(module)
        self.up_name = names_of(self.layout)[0]

    def weights(self) -> dmoe.ExpertWeights:
        """Views of the parameters, or their codes."""
        projections = codes_of(self.module) if is_fp8(self.module) else projections_of(self.module, self.layout)
        assert projections is not None
        return as_expert_weights(projections, self.layout, self.interleaved)

    def as_parameter(self, field: str, weight: Tensor) -> Tensor:
        """As the module keeps it, contiguous."""
        if field != "down_proj" and self.layout.gated:
            weight = (weight.transpose(1, 2) if self.interleaved else weight).flatten(1, 2)
        return (weight.mT if self.layout.transposed else weight).contiguous()


def is_fp8(module: Any) -> bool:
    """Whether weights are Transformers' in fp8."""
    held = getattr(module, names_of(layout_of(module))[0], None)
    return isinstance(held, Tensor) and held.dtype == torch.float8_e4m3fn


def held_experts(module: Any) -> HeldExperts | None:
    """What is known of a module; None where it is no experts' on Transformers' interface, or dmoe's gate is another.

    Who asks may put something into it, so that from then on nobody else may compute it without a word.

    Raises:
        ValueError: experts that Transformers would compute, without what is put beside them.
    """
    if not isinstance(module, nn.Module) or not on_interface(module):
        return None
    gate, layout = gate_of(module), layout_of(module)
    if gate is None or layout.post_norm:
        return None
    if is_fp8(module) and codes_of(module) is None:
        return None
    if not computed_by_dmoe(module):
        implementation = getattr(module.config, "_experts_implementation", None)
        raise ValueError(
            f"dmoe: {type(module).__name__}: expected experts that dmoe computes, as after "
            f"dmoe.integrations.transformers.use(model), got experts_implementation={implementation!r}"
        )
    guard(module)
    return HeldExperts(module, gate.interleaved)
