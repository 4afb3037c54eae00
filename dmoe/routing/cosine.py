"""Cosine scores: how well a token's projection points along each expert's vector, sharpened by a learned factor."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dmoe.config import MoEConfig
from dmoe.ops.activation import accumulate_dtype
from dmoe.ops.router_logits import router_logits
from dmoe.router_family import register
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
        if config.router_bias:
            raise ValueError("MoEConfig: router_bias: expected False with router='cosine', whose projection has one")

    def build(self, config: MoEConfig, *, ranks: Any = None, device: Any = None, dtype: Any = None) -> nn.Module:
        """See :class:`dmoe.router_family.RouterFamily`."""
        return CosineRouter(config, self, ranks=ranks, device=device, dtype=dtype)


class CosineRouter(TopKRouter):
    """The router of :class:`Cosine`.

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
        dtype, backend = self.dtype_of(x), self.config.backend
        tokens = F.normalize(self.project(x, self.projection, self.projection_bias), dim=1).to(dtype)
        experts = F.normalize(self.weight.to(dtype), dim=1).to(dtype)
        scale = self.log_scale.to(accumulate_dtype(dtype)).clamp(max=math.log(self.options.max_scale)).exp()
        cosine = router_logits(tokens, experts, None, dtype=dtype, backend=backend)
        return self.capped(cosine * scale.to(dtype))
