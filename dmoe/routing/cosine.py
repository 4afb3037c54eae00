"""Cosine scores: how well a token's projection points along each expert's vector, sharpened by a learned factor."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dmoe.config import MoEConfig
from dmoe.ops._checks import check_plain
from dmoe.ops.activation import accumulate_dtype
from dmoe.router_family import register
from dmoe.routing.base import router_dtype
from dmoe.routing.token_choice import TopK, TopKRouter


@register("cosine")
@dataclass(frozen=True)
class Cosine(TopK):
    """Token choice by cosine logits (Chi et al. 2022; Tutel's ``cosine_top``, Swin-MoE, GMoE); see :class:`TopK`.

    ``logits = normalize(W x + b) . normalize(C_e) * exp(min(log_scale, ln(max_scale)))``.

    Args:
        dim: width of the projection.
        temperature: what cosines are divided by at first: ``log_scale`` begins at ``ln(1 / temperature)``.
        max_scale: the most that cosines are multiplied by; a scale beyond gets no gradient.
    """

    dim: int = 256
    temperature: float = 0.5
    max_scale: float = 100.0

    def _check_fields(self) -> None:
        super()._check_fields()
        self.require(self.dim >= 1, "dim", "at least 1")
        self.require(0 < self.temperature < math.inf, "temperature", "a positive number")
        self.require(0 < self.max_scale < math.inf, "max_scale", "a positive number")

    def check(self, config: MoEConfig) -> None:
        """See :class:`dmoe.router_family.RouterFamily`."""
        super().check(config)
        for name in ("router_bias", "input_jitter"):
            if getattr(config, name):
                raise ValueError(
                    f"MoEConfig: {name}: expected none with router='cosine', got {getattr(config, name)!r}"
                )

    def build(self, config: MoEConfig, *, ranks: Any = None, device: Any = None, dtype: Any = None) -> nn.Module:
        """See :class:`dmoe.router_family.RouterFamily`."""
        return CosineRouter(config, self, ranks=ranks, device=device, dtype=dtype)


class CosineRouter(TopKRouter):
    """The router of :class:`Cosine`. Its logits are computed in the router's dtype, outside of autocast.

    Attributes:
        weight: the experts' vectors, ``(E, dim)``.
        projection, projection_bias: ``(dim, H)`` and ``(dim,)``.
        log_scale: scalar.
    """

    options: Cosine

    def _make_parameters(self, config: MoEConfig, **where: Any) -> None:
        assert isinstance(self.options, Cosine)
        dim = self.options.dim
        self.weight = nn.Parameter(torch.empty(config.num_experts, dim, **where))
        self.projection = nn.Parameter(torch.empty(dim, config.hidden_size, **where))
        self.projection_bias = nn.Parameter(torch.empty(dim, **where))
        self.log_scale = nn.Parameter(torch.empty((), **where))
        self.bias = None

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Fresh values as Tutel's: ``nn.Linear``'s for the projection, normal of std 0.01 for the experts' vectors."""
        super().reset_parameters()
        bound = 1 / math.sqrt(self.projection.shape[1])
        self.projection.uniform_(-bound, bound)
        self.projection_bias.uniform_(-bound, bound)
        self.weight.normal_(0, 0.01)
        self.log_scale.fill_(math.log(1 / self.options.temperature))

    def logits(self, x: Tensor) -> Tensor:
        """Router logits ``(T, E)`` in the router's dtype."""
        check_plain("MoE.router", weight=self.weight)
        if x.device != self.weight.device:
            raise ValueError(f"MoE: expected x on the weights' device {self.weight.device}, got {x.device}")
        dtype = router_dtype(self.config, x)
        with torch.autocast(x.device.type, enabled=False):
            projected = F.linear(x.to(dtype), self.projection.to(dtype), self.projection_bias.to(dtype))
            scale = self.log_scale.to(accumulate_dtype(dtype)).clamp(max=math.log(self.options.max_scale)).exp()
            cosine = F.normalize(projected, dim=1) @ F.normalize(self.weight.to(dtype), dim=1).t()
            return cosine * scale.to(dtype)
