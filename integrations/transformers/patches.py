"""Models that Transformers' switch does not reach: a forward in dmoe's words for each of their modules.

Only ``forward`` is replaced, on the module itself. Parameters, their names and what is returned stay Transformers', and
modules go on calling each other, so that hooks on them (offloading, PEFT, FSDP, recorded router logits) see what they
saw before. Not here are experts whose weights lie in no common tensor, or are no such experts: nllb_moe and
switch_transformers (a module for each expert), doge (two vectors an expert), vitpose (a linear for each data set).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import dmoe
from dmoe.integrations.transformers.experts import (
    Projections,
    as_expert_weights,
    as_one_operation,
    dmoe_experts,
    in_dtype_of,
    projections_of,
    weight_of,
)
from dmoe.integrations.transformers.gates import Gate, gate_of
from dmoe.integrations.transformers.versions import layout_of


def llama4_block(self: Any, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
    """Llama 4's block, ``(..., H)`` to ``(T, H)`` and router logits ``(T, E)``: each token through its own experts.

    Transformers' own multiplies every token by its score for every expert, 0 where it did not choose it, and computes
    all experts for all of these: without biases, experts make 0 of 0.
    """
    hidden_states = hidden_states.reshape(-1, self.hidden_dim)
    scores, logits = self.router(hidden_states)  # (T, E), 0 where not chosen
    chosen = logits.topk(self.top_k, dim=1).indices  # as the router itself chose
    routed = self.experts(hidden_states, chosen, scores.gather(1, chosen))
    return self.shared_expert(hidden_states) + routed, logits


def llama4_experts(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Experts with weights ``(E, H, 2 F)`` and ``(E, F, H)``, whose inputs the scores multiply."""
    layout = layout_of(self)._replace(transposed=True)
    weights = as_expert_weights(projections_of(self, layout), layout)
    return _run(self, hidden_states, top_k_index, top_k_weights, weights, gate_of(self), gate_weight_on="input")


def longcat_experts(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Experts of which those from ``num_routed_experts`` on hand on what they are given."""
    computed = top_k_index < self.num_routed_experts
    handed_on = top_k_weights.masked_fill(computed, 0).sum(-1, keepdim=True) * hidden_states
    if not self.num_routed_experts:
        return handed_on.to(hidden_states.dtype)
    up = weight_of(self, "gate_up_proj")[: self.num_routed_experts]  # it has rows for the others, too
    weights = as_expert_weights(Projections(up, weight_of(self, "down_proj")), layout_of(self))
    index = top_k_index.clamp(max=self.num_routed_experts)
    routed = _run(self, hidden_states, index, top_k_weights, weights, gate_of(self))
    return (routed + handed_on).to(hidden_states.dtype)


def dbrx_experts(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Experts ``(B, S, H)`` with weights ``(E * F, H)``, as in MegaBlocks: ``w1`` gate, ``v1`` up, ``w2`` down."""
    rows = -1, self.ffn_hidden_size, self.hidden_size
    gate, up, down = (weight_of(self.mlp, name).view(rows) for name in ("w1", "v1", "w2"))
    weights = dmoe.ExpertWeights(up, down.mT, gate_proj=gate)
    x = hidden_states.reshape(-1, self.hidden_size)
    y = _run(self, x, top_k_index, top_k_weights, weights, gate_of(self.mlp, "activation_fn"))
    return y.view(hidden_states.shape[0], -1, self.hidden_size)


def jetmoe_block(self: Any, layer_input: Tensor) -> Tensor:
    """JetMoE's block of ``(B, S, H)``, as one operation where its linears are only linears."""
    if any(_is_looked_at(linear) for linear in (self.input_linear, self.output_linear)):
        return type(self).forward(self, layer_input)
    x = layer_input.reshape(-1, layer_input.shape[-1])
    by_expert, _, gates_by_expert, tokens_per_expert, _ = self.router(x)  # assignments in the order of their experts
    counts = torch.tensor(tokens_per_expert, device=x.device)
    experts = torch.arange(len(tokens_per_expert), device=x.device).repeat_interleave(counts)
    index = torch.empty_like(by_expert).scatter(0, by_expert, experts).view(x.shape[0], -1)
    gates = torch.zeros_like(gates_by_expert).scatter(0, by_expert, gates_by_expert).view(index.shape)
    up = weight_of(self.input_linear, "weight").unflatten(1, (2, -1))
    weights = dmoe.ExpertWeights(up, weight_of(self.output_linear, "weight"))
    y = _run(self, x, index, gates, weights, gate_of(self, "activation"))
    return y.view(layer_input.shape) + self.bias


def jetmoe_linear(self: Any, inputs: Tensor, expert_size: Sequence[int]) -> Tensor:
    """One linear of each expert over rows that are sorted by expert, ``(R, in)`` to ``(R, out)``."""
    offsets = torch.tensor([0, *expert_size], device=inputs.device).cumsum(0).int()
    weight = weight_of(self, "weight")
    return dmoe.ops.grouped_gemm(in_dtype_of(weight.dtype, inputs), weight, offsets)


# Class -> its forward. Those of one model belong together: a block calls its experts in another way than its own did.
FORWARDS: dict[str, Callable[..., Any]] = {
    "llama4.Llama4TextMoe": llama4_block,
    "llama4.Llama4TextExperts": llama4_experts,
    "longcat_flash.LongcatFlashExperts": longcat_experts,
    "dbrx.DbrxExperts": dbrx_experts,
    "jetmoe.JetMoeMoE": jetmoe_block,
    "jetmoe.JetMoeParallelExperts": jetmoe_linear,
    "step3p7.Step3p7Experts": dmoe_experts,
}


def forward_for(module: nn.Module) -> Callable[..., Any] | None:
    """What to call instead of a module's forward; None where there is nothing, or something else is computed."""
    for kind in type(module).__mro__:
        package, _, name = kind.__module__.removeprefix("transformers.models.").partition(".")
        forward = FORWARDS.get(f"{package}.{kind.__qualname__}") if name == f"modeling_{package}" else None
        if forward is not None:
            return forward if _computes_that(module, forward) else None
    return None


def _computes_that(module: Any, forward: Callable[..., Any]) -> bool:
    """Whether the activation is one of dmoe's, where the forward relies on it."""
    if forward in (llama4_experts, longcat_experts):
        return gate_of(module) is not None
    if forward is llama4_block:
        return gate_of(unwrapped(module.experts)) is not None
    if forward is jetmoe_block:
        return gate_of(module, "activation") is not None
    return forward is not dbrx_experts or (gate_of(module.mlp, "activation_fn") is not None and _dbrx_is_mended(module))


def _dbrx_is_mended(experts: Any) -> bool:
    """Early releases multiplied by DBRX's matrices in the other order: they run only where F = H, and wrongly."""
    x, w = torch.ones(1, 2, device="cpu"), torch.ones(3, 2, device="cpu")
    try:
        type(experts.mlp).forward(experts.mlp, x, w, w, w)
    except RuntimeError:
        return False
    return True


def unwrapped(module: nn.Module) -> nn.Module:
    """The module itself, where PEFT has put an adapter of its parameters around it."""
    while isinstance(inside := getattr(module, "base_layer", None), nn.Module):
        module = inside
    return module


def _is_looked_at(linear: nn.Module) -> bool:
    """Whether somebody expects that it is called: an adapter around it, a hook, accelerate."""
    return (
        not hasattr(linear, "weight")
        or hasattr(linear, "base_layer")
        or hasattr(linear, "_hf_hook")
        or bool(linear._forward_hooks or linear._forward_pre_hooks)
    )


def _run(
    experts: nn.Module,
    x: Tensor,
    index: Tensor,
    gate_weights: Tensor,
    weights: dmoe.ExpertWeights,
    gate: Gate | None,
    **options: Any,
) -> Tensor:
    """As one operation, whose activation has been looked at before."""
    if gate is None:
        raise ValueError(f"dmoe: {type(experts).__name__}: expected the activation it had in use(), got another one")
    return as_one_operation(x, index, gate_weights, weights, gate, **options)
