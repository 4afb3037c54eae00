"""torchtitan's parameters of experts as dmoe reads them: views, whose gradients come in torchtitan's layout."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor
from torch.distributed.tensor import DTensor
from torchtitan.models.common.moe import GroupedExperts
from torchtitan.models.gpt_oss.moe import GptOssGroupedExperts

from dmoe import ClampedSwiGLU, ExpertWeights

# Exact classes: a subclass, as converters for fp8 make it, computes in a way of its own.
KNOWN = (GroupedExperts, GptOssGroupedExperts)


class Held(NamedTuple):
    """The experts of one rank, and what they compute between their projections."""

    weights: ExpertWeights
    activation: Any


def check_experts(config: Any) -> None:
    """Refuse the config of experts that compute in another way.

    Args:
        config: the ``Config`` of a module of experts.

    Raises:
        ValueError: it is none of those that dmoe computes.
    """
    owner = config._owner
    if owner not in KNOWN:
        known = " or ".join(kind.__name__ for kind in KNOWN)
        raise ValueError(
            f"dmoe.integrations.torchtitan: inner_experts: expected {known}, got {owner.__name__}, which computes in "
            "a way of its own: leave out its converter or override, or dmoe's"
        )


def held_experts(module: Any, bias_shares: int = 1) -> Held:
    """The experts that live on this rank.

    Args:
        module: one of ``KNOWN``, E experts with H (torchtitan's D) inputs and outputs, F wide.
        bias_shares: ranks that hold slices of the same experts' F, whose results are added: each adds its share of the
            bias of the output, whose gradient, equal on all of them, stays whole.
    """
    if type(module) is GroupedExperts:
        gate, down, up = (_here(p) for p in (module.w1_EFD, module.w2_EDF, module.w3_EFD))
        return Held(ExpertWeights(up_proj=up, down_proj=down, gate_proj=gate), "silu")
    names = ("mlp1_weight_EGD", "mlp1_bias_EG", "mlp2_weight_EDF", "mlp2_bias_ED")
    gate_up, gate_up_bias, down, down_bias = (_here(getattr(module, name)) for name in names)
    width = down.shape[-1]
    if bias_shares > 1:
        down_bias = down_bias - down_bias.detach() * (1 - 1 / bias_shares)
    weights = ExpertWeights(  # rows of gate and up take turns
        up_proj=gate_up.unflatten(1, (width, 2)).transpose(1, 2),
        down_proj=down,
        up_bias=gate_up_bias.unflatten(1, (width, 2)).transpose(1, 2),
        down_bias=down_bias,
    )
    return Held(weights, ClampedSwiGLU(module.swiglu_limit))


def _here(parameter: Any) -> Tensor:
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter
