"""The experts: parameters in dmoe's layout, checkpoints in MegaBlocks', and the shared expert."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dmoe.compat.megablocks.layers import common
from dmoe.compat.megablocks.layers.arguments import Arguments
from dmoe.config import Activation
from dmoe.expert_weights import ExpertWeights
from dmoe.experts import run_experts
from dmoe.ops.cumsum import inclusive_cumsum
from dmoe.ops.grouped_gemm import grouped_gemm
from dmoe.ops.histogram import histogram
from dmoe.ops.permute import permute
from dmoe.ops.unpermute import unpermute
from dmoe.plan import RoutingPlan


def fused_activation(function: Callable[..., Any] | None) -> Activation | None:
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


class ExpertParameters(nn.Module):
    """Weights of E experts; what the MLP classes below share.

    ``up_proj (E, F, H)``, or ``gate_up_proj (E, 2, F, H)`` where gated, and ``down_proj (E, H, F)`` are parameters, as
    dmoe's operations take them. ``w1``, ``w2`` and, where gated, ``v1`` are views of them: fill them in place, under
    ``no_grad``. Their gradients are the parameters'.

    ``state_dict()`` holds ``w1``, ``w2`` and ``v1`` in the shapes of MegaBlocks' checkpoints instead of the parameters,
    contiguous and so, but for an ungated ``w1``, copies; ``load_state_dict()`` takes them.

    Args:
        args: sizes, dtype, device, initialisation, activation.
    """

    gated = False
    down_proj: nn.Parameter

    def __init__(self, args: Arguments) -> None:
        super().__init__()
        self.args = args
        self.activation = fused_activation(args.activation_fn)
        experts, width, hidden = args.moe_num_experts, args.ffn_hidden_size, args.hidden_size
        where: dict[str, Any] = {"device": args.device, "dtype": common.dtype(args)}
        halves = (2,) if self.gated else ()
        self.up_name = "gate_up_proj" if self.gated else "up_proj"
        self.register_parameter(self.up_name, nn.Parameter(torch.empty(experts, *halves, width, hidden, **where)))
        self.down_proj = nn.Parameter(torch.empty(experts, hidden, width, **where))
        self._mark()
        self.reset_parameters()

    def _mark(self) -> None:
        for param in self.parameters():
            param.expert = True  # type: ignore[attr-defined]
            param.expert_model_parallel = False  # type: ignore[attr-defined]

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Marks again: a deep copy of a parameter is without its attributes."""
        super().__setstate__(state)
        self._mark()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Fresh values, from the user's functions, which see each weight as ``(E, F, H)``."""
        if self.down_proj.is_meta:
            return
        for name, part in self._parts().items():
            fresh = torch.empty_like(part, memory_format=torch.contiguous_format)
            (self.args.output_layer_init_method if name == "w2" else self.args.init_method)(fresh)
            part.copy_(fresh)

    def _parts(self) -> dict[str, Tensor]:
        """Views of the parameters under MegaBlocks' names, each ``(E, F, H)``."""
        up = getattr(self, self.up_name)
        ups = {"w1": up[:, 0], "v1": up[:, 1]} if self.gated else {"w1": up}
        return ups | {"w2": self.down_proj.transpose(1, 2)}

    @property
    def w1(self) -> Tensor:
        """The projection under the activation: a view, ``(E, F, H)``."""
        return self._parts()["w1"]

    @property
    def w2(self) -> Tensor:
        """The projection back to H: a view, ``(E, F, H)``."""
        return self._parts()["w2"]

    def weights(self) -> ExpertWeights:
        """The parameters as one value."""
        return ExpertWeights(getattr(self, self.up_name), self.down_proj, gated=self.gated)

    def route(self, x: Tensor, plan: RoutingPlan, gate_weights: Tensor) -> Tensor:
        """Tokens ``(T, H)`` through the experts that a plan sends them to, weighted and summed."""
        if self.activation is not None:
            return run_experts(x, plan, gate_weights, self.weights(), activation=self.activation)
        index = (plan.row_to_token, plan.token_offsets, plan.token_rows)
        out = self.grouped(permute(x, *index), plan.expert_offsets)
        return unpermute(out, gate_weights, plan.row_to_token, plan.row_to_slot, plan.token_offsets, plan.token_rows)

    def grouped(self, rows: Tensor, expert_offsets: Tensor) -> Tensor:
        """Rows ``(R, H)``, sorted by expert, through the experts; 0 in rows behind ``expert_offsets[-1]``."""
        weights, activation = self.weights(), self.args.activation_fn
        assert activation is not None  # Arguments.check
        pre = grouped_gemm(rows, weights.up_proj.flatten(1, -2), expert_offsets)
        if self.gated:
            gate, value = pre.chunk(2, -1)
            hidden = activation(gate) * value
        else:
            hidden = activation(pre)
        return grouped_gemm(hidden.to(pre.dtype), weights.down_proj, expert_offsets)

    def _to_checkpoint(self, name: str, part: Tensor) -> Tensor:
        """``(E, F, H)`` in the shape of MegaBlocks' dropless experts."""
        return part.reshape(-1, part.shape[-1])

    def _from_checkpoint(self, name: str, tensor: Tensor) -> Tensor:
        return tensor.view(self.args.moe_num_experts, self.args.ffn_hidden_size, self.args.hidden_size)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        for name, part in self._parts().items():
            tensor = self._to_checkpoint(name, part).contiguous()
            destination[prefix + name] = tensor if keep_vars else tensor.detach()

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        parts, found = self._parts(), {}
        for name, part in parts.items():
            tensor = state_dict.get(prefix + name)
            expected = tuple(self._to_checkpoint(name, torch.empty_like(part, device="meta")).shape)
            if tensor is None:
                missing_keys.append(prefix + name)
            elif tuple(tensor.shape) != expected:
                error_msgs.append(
                    f"size mismatch for {prefix + name}: expected {expected} for these Arguments, got "
                    f"{tuple(tensor.shape)} (a checkpoint of expert-parallel ranks is to be merged first)"
                )
            else:
                found[name] = self._from_checkpoint(name, tensor.contiguous())
        unexpected_keys += [key for key in state_dict if key.startswith(prefix) and key[len(prefix) :] not in parts]

        ours = {}
        if "w2" in found:
            ours[prefix + "down_proj"] = found["w2"].transpose(1, 2).contiguous()
        if not self.gated and "w1" in found:
            ours[prefix + "up_proj"] = found["w1"].contiguous()
        elif "w1" in found or "v1" in found:
            halves = [found.get(name, parts[name].detach()) for name in ("w1", "v1")]
            ours[prefix + "gate_up_proj"] = torch.stack(halves, 1)
        super()._load_from_state_dict(ours, prefix, local_metadata, False, [], [], error_msgs)
        self._mark()  # with assign=True these are new parameters

    def extra_repr(self) -> str:
        """Sizes for ``print(model)``."""
        a = self.args
        return f"num_experts={a.moe_num_experts}, hidden_size={a.hidden_size}, ffn_hidden_size={a.ffn_hidden_size}"


class MLP(ExpertParameters):
    """Plain experts of :class:`~dmoe.compat.megablocks.MoE`; in checkpoints w1 is ``(E, H, F)``, w2 ``(E, F, H)``."""

    @property
    def w1(self) -> Tensor:
        """The first projection: a view, ``(E, H, F)``."""
        return super().w1.transpose(1, 2)

    def _to_checkpoint(self, name: str, part: Tensor) -> Tensor:
        return part.transpose(1, 2) if name == "w1" else part

    def _from_checkpoint(self, name: str, tensor: Tensor) -> Tensor:
        return tensor.transpose(1, 2) if name == "w1" else tensor

    def forward(self, x: Tensor) -> Tensor:
        """Bins ``(E, C, H)`` through their experts."""
        assert self.args.activation_fn is not None  # Arguments.check
        pre = grouped_gemm(x, self.up_proj)
        return grouped_gemm(self.args.activation_fn(pre).to(pre.dtype), self.down_proj)


class SparseMLP(ExpertParameters):
    """Plain experts of :class:`~dmoe.compat.megablocks.dMoE`; in checkpoints w1 and w2 are ``(E * F, H)``."""

    def forward(self, x: Tensor, topo: Any) -> Tensor:
        """Rows in the layout of ``padded_gather`` through their experts.

        Args:
            x: ``(R, H)``, R a multiple of the block size.
            topo: a block-sparse matrix whose ``offsets`` and ``column_indices`` are those of MegaBlocks' topology: in
                each row block, all columns of one expert, and experts in order.

        Returns:
            ``(R, H)``.
        """
        blocks = topo.offsets.shape[0] - 1
        block_size = x.shape[0] // max(blocks, 1)
        if blocks * block_size != x.shape[0] or (block_size and self.args.ffn_hidden_size % block_size):
            raise ValueError(
                f"SparseMLP: expected rows and ffn_hidden_size {self.args.ffn_hidden_size} in whole blocks, got "
                f"{x.shape[0]} rows in {blocks} row blocks"
            )
        columns = self.args.ffn_hidden_size // max(block_size, 1)
        first = topo.column_indices[topo.offsets[:-1].long()].int()
        expert = torch.div(first, columns, rounding_mode="floor")
        return self.grouped(x, _offsets(histogram(expert, self.args.moe_num_experts) * block_size))


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


class SharedMLP(nn.Module):
    """One plain expert that every token takes.

    Args:
        args: the shared expert's options, and sizes, bias, activation. With ``nn.Linear`` its parameters have the
            dtype of the others.
    """

    def __init__(self, args: Arguments) -> None:
        super().__init__()
        self.args = args
        self.fc_kwargs: dict[str, Any] = {"bias": args.bias, "device": args.device}
        if args.fc_cls is nn.Linear:
            self.fc_kwargs["dtype"] = common.dtype(args)
        self.fc_kwargs.update(args.fc_kwargs)
        width = args.shared_expert_hidden_size
        self.up_proj = args.fc_cls(args.hidden_size, width, **self.fc_kwargs)
        self.act = args.activation_fn
        self.down_proj = args.fc_cls(width, args.hidden_size, **self.fc_kwargs)
        self.down_proj._is_residual = True  # llm-foundry's initialisation looks for it

    def forward(self, x: Tensor) -> Tensor:
        """``(..., H)`` to ``(..., H)``."""
        assert self.act is not None  # Arguments.check
        return self.down_proj(self.act(self.up_proj(x)))

    def add_experts_sharedexpert(
        self, shared_expert_out: Tensor, expert_out: Tensor | tuple[Tensor, Tensor]
    ) -> Tensor | tuple[Tensor, Tensor]:
        """The sum of both, or ``shared / (K + 1) + expert * K / (K + 1)`` with ``shared_expert_weighted_sum``.

        Args:
            shared_expert_out: ``(..., H)``.
            expert_out: the same, or a pair of it and a bias to be added later: then so is the result, and its bias
                weighs as much as the experts.
        """
        if isinstance(expert_out, tuple):
            out, bias = expert_out
            share = self.args.moe_top_k / (self.args.moe_top_k + 1) if self.args.shared_expert_weighted_sum else 1
            combined = self.add_experts_sharedexpert(shared_expert_out, out)
            assert isinstance(combined, Tensor)
            return combined, bias if share == 1 else bias * share
        if not self.args.shared_expert_weighted_sum:
            return shared_expert_out + expert_out
        terms = self.args.moe_top_k + 1
        return (shared_expert_out / terms).add(expert_out, alpha=self.args.moe_top_k / terms)
