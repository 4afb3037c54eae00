"""The experts' parameters as MegaBlocks has them, a rank's part of them, and dmoe's operations on where they lie."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dmoe.activations import ActivationName
from dmoe.compat.megablocks.layers import common, mpu
from dmoe.compat.megablocks.layers.arguments import Arguments
from dmoe.compat.megablocks.layers.overrides import steps
from dmoe.compat.megablocks.layers.weights import (
    all_rows,
    part_of_experts,
    part_of_rows,
    resolve_dtensor,
    scale_gradient,
)
from dmoe.expert_slice import ExpertSlice
from dmoe.expert_weights import ExpertWeights
from dmoe.functional import run_experts
from dmoe.ops.grouped_gemm import grouped_gemm
from dmoe.ops.permute import permute, unpermute
from dmoe.plan import RoutingPlan


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
    """Weights of experts; what the MLP classes below share.

    ``w1``, ``w2`` and, where gated, ``v1`` are parameters, each in the shape that :meth:`_stored` says. In shapes E and
    F are what lives on this rank: all of them, or :func:`.mpu.experts_per_rank` and :func:`.mpu.features_per_rank`.

    Args:
        args: sizes, dtype, device, initialisation, activation, ranks.

    Attributes:
        num_experts, ffn_hidden_size: E and F of this rank.
        gradient_scale: what the weights' gradients are multiplied by, 1 / W under either parallelism: they are then
            means over ranks as data parallelism makes them; None is 1.
        owned: the same for :mod:`dmoe.parallel`.
    """

    names: tuple[str, ...] = ("w1", "w2")
    w1: nn.Parameter
    w2: nn.Parameter

    def __init__(self, args: Arguments) -> None:
        super().__init__()
        self.args = args
        self.num_experts, self.ffn_hidden_size = mpu.experts_per_rank(args), mpu.features_per_rank(args)
        self._weight_ranks = mpu.get_weight_parallel_world_size(args)
        ranks = mpu.get_expert_parallel_world_size(args)
        shard, block = divmod(mpu.get_expert_parallel_rank(args), mpu.expert_sharding_degree(args))
        first = block * self.num_experts
        self.owned = ExpertSlice(
            range(first, first + self.num_experts), args.moe_num_experts, shard, mpu.hidden_sharding_degree(args)
        )
        self._shapes = {name: self._shape(name) for name in self.names}
        for name, shape in self._shapes.items():
            weight = torch.empty(shape, device=args.device, dtype=common.dtype(args))
            self.register_parameter(name, nn.Parameter(weight))
        spread = args.moe_expert_model_parallelism or args.moe_weight_parallelism
        self.gradient_scale: float | None = 1 / max(ranks, self._weight_ranks) if spread else None
        # Subclasses make more weights with these, as MegaBlocks' own do.
        self._num_rows_per_rank = mpu.rows_per_rank(args)
        self._should_set_parallelism_attribute = spread
        self._differs = max(ranks, self._weight_ranks) > 1
        self.mark_parameters()
        self.reset_parameters()

    def _shape(self, name: str) -> torch.Size:
        """Of a parameter on this rank."""
        experts = torch.empty(self.num_experts, self.ffn_hidden_size, self.args.hidden_size, device="meta")
        stored = self._stored(name, experts)
        return (stored if self._weight_ranks == 1 else part_of_rows(self.args, stored)).shape

    def _stored(self, name: str, weight: Tensor) -> Tensor:
        """A view of ``(E, F, H)`` in the parameter's shape: ``(E * F, H)``."""
        return weight.view(-1, weight.shape[-1])

    def _by_expert(self, name: str, weight: Tensor) -> Tensor:
        """A view of a parameter as ``(E, F, H)``."""
        return weight.view(self.num_experts, -1, weight.shape[-1])

    def mark_parameters(self) -> None:
        """Set ``expert``, ``expert_model_parallel`` and, where ranks differ, ``allreduce`` on the parameters."""
        for param in self.parameters():
            param.expert = True  # type: ignore[attr-defined]
            if self._differs:
                param.allreduce = False  # type: ignore[attr-defined]
            param.expert_model_parallel = self._should_set_parallelism_attribute  # type: ignore[attr-defined]

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Marks again: a deep copy of a parameter is without its attributes."""
        super().__setstate__(state)
        self.mark_parameters()

    def _apply(self, fn: Any, recurse: bool = True) -> ExpertParameters:
        super()._apply(fn, recurse)
        self.mark_parameters()  # to("meta"), to_empty() make parameters of their own
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.mark_parameters()  # load_state_dict(assign=True) brings parameters of its own

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Fresh values, from the user's functions, which see each weight as ``(E, F, H)``."""
        if self.w2.is_meta:
            return
        args = self.args
        for name in self.names:
            init_method = args.output_layer_init_method if name == "w2" else args.init_method
            parameter = getattr(self, name)
            if not self._differs:
                weight = self._by_expert(name, parameter)
                fresh = torch.empty_like(weight, memory_format=torch.contiguous_format)
                init_method(fresh)
                weight.copy_(fresh)
                continue
            if resolve_dtensor(parameter) is not parameter:
                raise ValueError(
                    f"{type(self).__name__}: reset_parameters: expected plain parameters over several ranks, got "
                    f"{name} as a DTensor: fill the weights before they are sharded"
                )
            everything = parameter.new_empty(args.moe_num_experts, args.ffn_hidden_size, args.hidden_size)
            init_method(everything)
            mine = self._stored(name, part_of_experts(args, everything).contiguous())
            parameter.copy_(mine if self._weight_ranks == 1 else part_of_rows(args, mine))

    def scale_grad(self, w: Tensor) -> Tensor:
        """A weight whose gradient is to be scaled by ``gradient_scale``; as it is where that is None."""
        return w if self.gradient_scale is None else scale_gradient(w, self.gradient_scale)

    def weights(self) -> dict[str, Tensor]:
        """The weights that are here, under their names, as views ``(E, F, H)``.

        Raises:
            ValueError: a weight of another shape, such as another number of ranks' part of all experts.
        """
        here = {}
        for name in self.names:
            weight, expected = resolve_dtensor(self.scale_grad(getattr(self, name))), self._shapes[name]
            if weight.shape != expected:
                whose = f"all {self.num_experts} experts"
                if self._differs:
                    whose = f"this rank's part of {self.args.moe_num_experts} experts"
                raise ValueError(
                    f"{type(self).__name__}: {name}: expected shape {tuple(expected)} of {whose} for these Arguments, "
                    f"got {tuple(weight.shape)}"
                )
            if self._weight_ranks > 1:
                weight = all_rows(self.args, weight)
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
        a, o = self.args, self.owned
        here = f" (here {o.experts.start} to {o.experts.stop - 1}" if self._differs and self._weight_ranks == 1 else ""
        if here:
            here += f", part {o.shard} of {o.num_shards} of F)" if o.num_shards > 1 else ")"
        sizes = f"hidden_size={a.hidden_size}, ffn_hidden_size={a.ffn_hidden_size}"
        return f"num_experts={a.moe_num_experts}{here}, {sizes}"


def as_dmoe(w1: Tensor, w2: Tensor, v1: Tensor | None = None) -> ExpertWeights:
    """Weights ``(E, F, H)`` under MegaBlocks' names as dmoe's operations read them, in place."""
    down_proj = w2.transpose(1, 2)
    if v1 is None:
        return ExpertWeights(w1, down_proj, gated=False)
    return ExpertWeights(v1, down_proj, gate_proj=w1)
