"""The arguments of ``moe_mlp``, by name: the schema's order, for everything that implements the operation."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

SCHEMA = (
    "Tensor x, Tensor gate_weights, Tensor up_proj, Tensor down_proj, Tensor? up_bias, Tensor? down_bias, "
    "Tensor expert_offsets, Tensor row_to_token, Tensor row_to_slot, Tensor token_offsets, Tensor token_rows, "
    "Tensor? seed, int[]? ffn_sizes, str activation, bool gated, str gate_weight_on, float activation_dropout, "
    "float expert_dropout, Tensor? residual=None, Tensor? tiles=None, Tensor? experts_by_load=None, int tile_rows=0, "
    "Tensor? up_main_grad=None, Tensor? down_main_grad=None, Tensor? gate_proj=None, Tensor? gate_main_grad=None"
)
WEIGHTS = ("up_proj", "down_proj", "up_bias", "down_bias", "gate_proj")  # as backward returns their gradients
PROJECTIONS = ("up_proj", "down_proj", "gate_proj")
MAIN_GRADS = ("up_main_grad", "down_main_grad", "gate_main_grad")  # of the projections
# The same for an operation that writes into the buffers.
SCHEMA_INTO = functools.reduce(
    lambda schema, name: schema.replace(f"Tensor? {name}", f"Tensor({name[0]}!)? {name}"), MAIN_GRADS, SCHEMA
)


class Call(NamedTuple):
    """One call.

    What :class:`dmoe.ExpertWeights` and :class:`dmoe.plan.RoutingPlan` hold, and the options. ``residual`` is added to
    y. ``up_main_grad``, ``down_main_grad`` and ``gate_main_grad`` are float32 buffers in the shapes of the projections
    that backward adds their gradients to, instead of returning them. Projections may have any strides; their gradients
    come in the same memory order, as ``torch.empty_like`` has it.
    """

    x: Tensor
    gate_weights: Tensor
    up_proj: Tensor
    down_proj: Tensor
    up_bias: Tensor | None
    down_bias: Tensor | None
    expert_offsets: Tensor
    row_to_token: Tensor
    row_to_slot: Tensor
    token_offsets: Tensor
    token_rows: Tensor
    seed: Tensor | None
    ffn_sizes: Sequence[int] | None
    activation: Any  # text; for compositions also a function of a tensor
    gated: bool
    gate_weight_on: str
    activation_dropout: float
    expert_dropout: float
    residual: Tensor | None = None
    tiles: Tensor | None = None
    experts_by_load: Tensor | None = None
    tile_rows: int = 0
    up_main_grad: Tensor | None = None
    down_main_grad: Tensor | None = None
    gate_proj: Tensor | None = None
    gate_main_grad: Tensor | None = None

    @property
    def buffers(self) -> tuple[Tensor | None, ...]:
        """The projections' main gradients."""
        return self.up_main_grad, self.down_main_grad, self.gate_main_grad

    def with_buffers(self, buffers: Sequence[Tensor | None]) -> Call:
        """The same with these for the main gradients of the projections; of the gate, if it is left out, None."""
        up, down, gate = (*buffers, None)[:3]
        return self._replace(up_main_grad=up, down_main_grad=down, gate_main_grad=gate)

    @property
    def num_experts(self) -> int:
        """E."""
        return self.expert_offsets.shape[0] - 1

    @property
    def width(self) -> int:
        """The widest expert's F."""
        return max(self.ffn_sizes) if self.ffn_sizes else self.down_proj.shape[-1]

    @property
    def pre_width(self) -> int:
        """Columns of the pre-activation."""
        return self.width * (2 if self.gated else 1)
