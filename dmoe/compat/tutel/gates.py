"""Tutel's two gates: dmoe's routers with Tutel's parameters, and the options that a forward may change."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dmoe.compat._layers import LinearGate
from dmoe.compat.tutel.arguments import GateOptions
from dmoe.config import MoEConfig
from dmoe.routing import Cosine, CosineRouter, TopK, TopKRouter
from dmoe.routing.rules import rule_of


class Call(NamedTuple):
    """What one forward asks of a gate: K, its capacity factor and what that is rounded up to, or rows instead."""

    top_k: int
    capacity_factor: float
    alignment: int
    capacity: int | None = None


class _Changeable(TopKRouter):
    """A router whose options may be set between forwards, as users of Tutel do with its gates'.

    Attributes:
        top_k, capacity_factor, gate_noise, fp32_gate: Tutel's.
    """

    top_k: int
    capacity_factor: float
    gate_noise: float
    fp32_gate: bool
    normalize: bool
    _call: Any = None

    def take(self, options: GateOptions, num_experts: int, normalize: bool) -> None:
        """Begin with the options of a dictionary."""
        self.top_k, self.capacity_factor = min(int(options.k), num_experts), float(options.capacity_factor)
        self.gate_noise, self.fp32_gate = float(options.gate_noise), bool(options.fp32_gate)
        self.normalize = normalize

    def configure(self, call: Call) -> None:
        """Route as a call asks, from now on."""
        key = (call, self.gate_noise)
        if key == self._call:
            return
        capacity: dict[str, Any] = {"capacity_factor": call.capacity_factor, "capacity": None}
        if call.capacity is not None:
            capacity = {"capacity_factor": None, "capacity": call.capacity}
        self.config = replace(
            self.config,
            top_k=call.top_k,
            router=replace(self.options, **noise_of(self.gate_noise)),
            gate_normalization=1.0 if self.normalize and call.top_k > 1 else None,
            capacity_multiple_of=call.alignment,
            **capacity,
        )
        self.options, self.rule, self._call = self.config.family, rule_of(self.config), key  # type: ignore[assignment]

    def logits(self, x: Tensor) -> Tensor:
        """Router logits ``(T, E)``: in float32 with ``fp32_gate``, else in the weights' dtype."""
        return super().logits(x if self.fp32_gate else x.to(self.weight.dtype))


class TopGate(_Changeable, LinearGate):
    """``top``: a linear, ``wg``."""


class CosineGate(_Changeable, CosineRouter):
    """``cosine_top``: ``cosine_projector``, ``sim_matrix (proj_dim, E)`` and ``temperature (1,)``, a logarithm."""

    def _make_parameters(self, config: MoEConfig, **where: Any) -> None:
        dim = self.options.dim
        self.temperature = nn.Parameter(torch.empty(1, **where))
        self.cosine_projector = nn.Linear(config.hidden_size, dim, **where)
        self.sim_matrix = nn.Parameter(torch.empty(dim, config.num_experts, **where))
        self.bias = None

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """``(E, proj_dim)``."""
        return self.sim_matrix.t()

    @property
    def projection(self) -> Tensor:  # type: ignore[override]
        """``(proj_dim, H)``."""
        return self.cosine_projector.weight

    @property
    def projection_bias(self) -> Tensor:  # type: ignore[override]
        """``(proj_dim,)``."""
        return self.cosine_projector.bias

    @property
    def log_scale(self) -> Tensor:  # type: ignore[override]
        """Scalar."""
        return self.temperature[0]


def noise_of(gate_noise: float) -> dict[str, Any]:
    """The family's options for Tutel's noise."""
    return {"logit_noise": "gaussian", "noise_std": gate_noise} if gate_noise > 0 else {"logit_noise": "none"}


def family_for(options: GateOptions) -> TopK:
    """The family of routers that a gate is."""
    if options.type == "top":
        return TopK(**noise_of(options.gate_noise))
    return Cosine(dim=options.proj_dim, temperature=options.init_t, **noise_of(options.gate_noise))


def build_gate(options: GateOptions, config: MoEConfig, *, normalize: bool) -> _Changeable:
    """The gate of a dictionary."""
    config = replace(
        config,
        router=family_for(options),
        router_dtype="float32" if options.fp32_gate else "input",
        top_k=min(int(options.k), config.num_experts),
    )
    dtype = torch.float32 if options.fp32_gate and options.type == "top" else options.dtype
    gate = (TopGate if options.type == "top" else CosineGate)(config, device=options.device, dtype=dtype)
    gate.take(options, config.num_experts, normalize)
    return gate
