"""The experts: MegaBlocks' parameters, read where they lie, and what it calls with them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dmoe.activations import ActivationName
from dmoe.compat._not_offered import attributes_of
from dmoe.compat.megablocks.layers import common
from dmoe.compat.megablocks.layers.arguments import Arguments
from dmoe.compat.megablocks.layers.overrides import steps
from dmoe.compat.megablocks.layers.shared_expert import SharedMLP
from dmoe.compat.megablocks.layers.weights import (
    ScaleGradient,
    create_dmoe_expert_weights,
    create_moe_expert_weights,
    resolve_dtensor,
    scale_gradient,
)
from dmoe.expert_weights import ExpertWeights
from dmoe.functional import run_experts
from dmoe.ops.cumsum import inclusive_cumsum
from dmoe.ops.grouped_gemm import grouped_gemm
from dmoe.ops.histogram import histogram
from dmoe.ops.permute import permute, unpermute
from dmoe.plan import RoutingPlan

__all__ = [
    "MLP",
    "GroupedMLP",
    "ScaleGradient",
    "SharedMLP",
    "SparseMLP",
    "create_dmoe_expert_weights",
    "create_moe_expert_weights",
    "resolve_dtensor",
    "scale_gradient",
]

__getattr__ = attributes_of(__name__)


def fused_activation(function: Callable[..., Any] | None) -> ActivationName | None:
    """dmoe's name of an activation function or module; None for one that its fused operation does not have."""
    approximate: str | None = None
    if isinstance(function, partial):
        if function.func is F.gelu and not function.args and set(function.keywords) <= {"approximate"}:
            approximate = function.keywords.get("approximate", "none")
    elif type(function) is nn.GELU:
        approximate = function.approximate
    elif function is F.gelu:
        approximate = "none"
    if approximate is not None:
        return "gelu_tanh" if approximate == "tanh" else "gelu"
    if function is F.silu or type(function) is nn.SiLU:
        return "silu"
    return "relu" if function in (F.relu, torch.relu) or type(function) is nn.ReLU else None


@steps("weights", "scale_grad")
class ExpertParameters(nn.Module):
    """Weights of E experts; what the MLP classes below share.

    ``w1``, ``w2`` and, where gated, ``v1`` are parameters, each in the shape that :meth:`_stored` says.

    Args:
        args: sizes, dtype, device, initialisation, activation.
    """

    names: tuple[str, ...] = ("w1", "w2")
    w1: nn.Parameter
    w2: nn.Parameter

    def __init__(self, args: Arguments) -> None:
        super().__init__()
        self.args = args
        shape = (args.moe_num_experts, args.ffn_hidden_size, args.hidden_size)
        for name in self.names:
            shape_there = self._stored(name, torch.empty(shape, device="meta")).shape
            weight = torch.empty(shape_there, device=args.device, dtype=common.dtype(args))
            self.register_parameter(name, nn.Parameter(weight))
        self.gradient_scale: float | None = None  # there: 1 / ranks of expert parallelism
        # Subclasses make more weights with these, as MegaBlocks' own do.
        self._num_rows_per_rank = args.moe_num_experts * args.ffn_hidden_size
        self._should_set_parallelism_attribute = args.moe_expert_model_parallelism
        self._mark()
        self.reset_parameters()

    def _stored(self, name: str, weight: Tensor) -> Tensor:
        """A view of ``(E, F, H)`` in the parameter's shape: ``(E * F, H)``."""
        return weight.view(-1, weight.shape[-1])

    def _by_expert(self, name: str, weight: Tensor) -> Tensor:
        """A view of a parameter as ``(E, F, H)``."""
        return weight.view(self.args.moe_num_experts, -1, weight.shape[-1])

    def _mark(self) -> None:
        for param in self.parameters():
            param.expert = True  # type: ignore[attr-defined]
            param.expert_model_parallel = self._should_set_parallelism_attribute  # type: ignore[attr-defined]

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Marks again: a deep copy of a parameter is without its attributes."""
        super().__setstate__(state)
        self._mark()

    def _apply(self, fn: Any, recurse: bool = True) -> ExpertParameters:
        super()._apply(fn, recurse)
        self._mark()  # to("meta"), to_empty() make parameters of their own
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._mark()  # load_state_dict(assign=True) brings parameters of its own

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Fresh values, from the user's functions, which see each weight as ``(E, F, H)``."""
        if self.w2.is_meta:
            return
        for name in self.names:
            weight = self._by_expert(name, getattr(self, name))
            fresh = torch.empty_like(weight, memory_format=torch.contiguous_format)
            (self.args.output_layer_init_method if name == "w2" else self.args.init_method)(fresh)
            weight.copy_(fresh)

    def scale_grad(self, w: Tensor) -> Tensor:
        """A weight whose gradient is to be scaled by ``gradient_scale``; as it is where that is None."""
        return w if self.gradient_scale is None else scale_gradient(w, self.gradient_scale)

    def weights(self) -> dict[str, Tensor]:
        """The weights that are here, under their names, as views ``(E, F, H)``.

        Raises:
            ValueError: a weight of another shape, such as one rank's part of all experts.
        """
        args, here = self.args, {}
        expert = torch.empty(args.moe_num_experts, args.ffn_hidden_size, args.hidden_size, device="meta")
        for name in self.names:
            weight = resolve_dtensor(self.scale_grad(getattr(self, name)))
            expected = self._stored(name, expert).shape
            if weight.shape != expected:
                raise ValueError(
                    f"{type(self).__name__}: {name}: expected shape {tuple(expected)} of all {args.moe_num_experts} "
                    f"experts for these Arguments, got {tuple(weight.shape)}"
                )
            here[name] = self._by_expert(name, weight)
        return here

    def route(self, x: Tensor, plan: RoutingPlan, gate_weights: Tensor) -> Tensor:
        """Tokens ``(T, H)`` through the experts that a plan sends them to, weighted and summed."""
        activation = fused_activation(self.args.activation_fn)
        if activation is None:
            tokens = (plan.token_offsets, plan.token_rows)
            out = self.grouped(permute(x, plan.row_to_token, *tokens), plan.expert_offsets)
            return unpermute(out, gate_weights, plan.row_to_token, plan.row_to_slot, *tokens)
        return run_experts(x, plan, gate_weights, as_dmoe(**self.weights()), activation=activation)

    def grouped(self, rows: Tensor, expert_offsets: Tensor) -> Tensor:
        """Rows ``(R, H)``, sorted by expert, through the experts; 0 in rows behind ``expert_offsets[-1]``."""
        weights, activation = self.weights(), self.args.activation_fn
        assert activation is not None  # Arguments.check
        pre = grouped_gemm(rows, weights["w1"], expert_offsets)
        hidden = activation(pre)
        if "v1" in weights:
            hidden = hidden * grouped_gemm(rows, weights["v1"], expert_offsets)
        return grouped_gemm(hidden.to(pre.dtype), weights["w2"], expert_offsets, trans_b=False)

    def extra_repr(self) -> str:
        """Sizes for ``print(model)``."""
        a = self.args
        return f"num_experts={a.moe_num_experts}, hidden_size={a.hidden_size}, ffn_hidden_size={a.ffn_hidden_size}"


def as_dmoe(w1: Tensor, w2: Tensor, v1: Tensor | None = None) -> ExpertWeights:
    """Weights ``(E, F, H)`` under MegaBlocks' names as dmoe's operations read them, in place."""
    down_proj = w2.transpose(1, 2)
    if v1 is None:
        return ExpertWeights(w1, down_proj, gated=False)
    return ExpertWeights(v1, down_proj, gate_proj=w1)


@steps("forward")
class MLP(ExpertParameters):
    """Plain experts of :class:`~dmoe.compat.megablocks.MoE`: w1 is ``(E, H, F)``, w2 ``(E, F, H)``."""

    def _stored(self, name: str, weight: Tensor) -> Tensor:
        return weight.transpose(1, 2) if name == "w1" else weight

    def _by_expert(self, name: str, weight: Tensor) -> Tensor:
        return self._stored(name, weight)

    def forward(self, x: Tensor) -> Tensor:
        """Bins ``(E, C, H)`` through their experts."""
        weights, activation = self.weights(), self.args.activation_fn
        assert activation is not None  # Arguments.check
        pre = grouped_gemm(x, weights["w1"])
        return grouped_gemm(activation(pre).to(pre.dtype), weights["w2"], trans_b=False)


@steps("forward")
class SparseMLP(ExpertParameters):
    """Plain experts of :class:`~dmoe.compat.megablocks.dMoE`: w1 and w2 are ``(E * F, H)``."""

    def forward(self, x: Tensor, topo: Any) -> Tensor:
        """Rows in the layout of ``padded_gather`` through their experts.

        Args:
            x: ``(R, H)``, R a multiple of the block size.
            topo: a block-sparse matrix whose ``offsets`` and ``column_indices`` are those of MegaBlocks' topology: in
                each row block, all columns of one expert, and experts in order.

        Returns:
            ``(R, H)``.

        Raises:
            ValueError: sizes that do not fit the topology; one of another structure, on the CPU.
        """
        blocks = topo.offsets.shape[0] - 1
        block_size = x.shape[0] // max(blocks, 1)
        if blocks * block_size != x.shape[0] or (block_size and self.args.ffn_hidden_size % block_size):
            raise ValueError(
                f"{type(self).__name__}: expected rows and ffn_hidden_size {self.args.ffn_hidden_size} in whole "
                f"blocks, got {x.shape[0]} rows in {blocks} row blocks"
            )
        columns = self.args.ffn_hidden_size // max(block_size, 1)
        found = topo.column_indices.int()
        first = found[topo.offsets[:-1].long()]
        expert = torch.div(first, columns, rounding_mode="floor")
        if x.device.type == "cpu":
            regular = (expert * columns).unsqueeze(1) + torch.arange(columns, dtype=torch.int32)
            if not torch.equal(regular.flatten(), found) or (expert[1:] < expert[:-1]).any():
                raise ValueError(
                    f"{type(self).__name__}: topo: expected all {columns} block columns of one expert in each row "
                    "block, and experts in order, as ParallelDroplessMLP.topology makes it; for another structure "
                    "use dmoe.ops.sdd and dsd"
                )
        return self.grouped(x, _offsets(histogram(expert, self.args.moe_num_experts) * block_size))


@steps("forward")
class GroupedMLP(SparseMLP):
    """:class:`SparseMLP` on rows without padding."""

    def forward(self, x: Tensor, tokens_per_expert: Tensor) -> Tensor:
        """Rows ``(R, H)``, sorted by expert, through their experts.

        Args:
            x: ``(R, H)``.
            tokens_per_expert: ``(E,)`` int32 or int64, on any device.
        """
        return self.grouped(x, _offsets(tokens_per_expert.to(device=x.device, dtype=torch.int32)))


def _offsets(tokens_per_expert: Tensor) -> Tensor:
    return torch.cat([tokens_per_expert.new_zeros(1), inclusive_cumsum(tokens_per_expert, 0)])
