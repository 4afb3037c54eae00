"""A forward in inference as one operation, where the layer is one that it knows and nobody looks in between.

What hooks, adapters, codes, wrappers, other ranks, capacities and drawing routers need is a forward in its steps; this
is for the rest, where calls from Python would cost more than the experts of a few tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as hooks_of_all

from dmoe.config import MoEConfig
from dmoe.experts import Experts
from dmoe.metrics import RoutingMetrics
from dmoe.ops.moe_inference import moe_inference, serves_cpu
from dmoe.parallel import LocalDispatcher
from dmoe.routing.token_choice import TopKRouter

_OF_ALL = (
    hooks_of_all._global_forward_hooks,
    hooks_of_all._global_forward_pre_hooks,
    hooks_of_all._global_backward_hooks,
    hooks_of_all._global_backward_pre_hooks,
)


def knows(config: MoEConfig, router: nn.Module) -> bool:
    """Whether the operation computes what such a layer does in evaluation, as far as that never changes."""
    if not serves_cpu or type(router) is not TopKRouter or config.ffn_hidden_size != max(config.ffn_sizes):
        return False
    options = router.options
    drawn = options.noise_in_eval and (options.logit_noise != "none" or options.second_expert != "all")
    without = (
        config.capacity,
        config.capacity_factor,
        config.eval_capacity_factor,
        config.eval_capacity_fraction,
        config.router_logit_softcap,
        config.expert_compute,
    )
    return (
        all(option is None for option in without)
        and not (drawn or config.batch_invariant or router.by_quantile or callable(config.activation))
        and config.score_function in ("softmax", "sigmoid")
        and config.selection_bias_on == "scores"
        and config.backend in (None, "grouped")
    )


def run_directly(layer: Any, x: Tensor) -> tuple[Tensor, RoutingMetrics] | None:
    """The layer's output for x, in x's shape and without an output bias, and its metrics; None where it takes steps.

    ``layer`` is a :class:`dmoe.MoE` in evaluation, x of the shape and kind that it expects.
    """
    if not _is_plain(layer, x):
        return None
    config, router, experts = layer.config, layer.router, layer.experts
    up, down = getattr(experts, experts.up_name), experts.down_proj
    weight, bias = router.weight, router.bias
    dtype = router.dtype_of(x)
    if not (type(up) is type(down) is type(weight) is nn.Parameter and x.dtype == up.dtype == down.dtype):
        return None
    if dtype not in (torch.float32, torch.float64):
        return None
    if not (up.is_cpu and down.is_cpu and weight.is_cpu and x.is_cpu):
        return None  # which is the steps' to do, or to refuse
    tokens = x.reshape(-1, x.shape[-1]).contiguous()
    residual = None if layer.shared_expert is None else layer.shared_expert(tokens)
    if residual is not None and (residual.dtype != x.dtype or not residual.is_contiguous()):
        return None
    y, counts, entropy = moe_inference(
        tokens,
        weight,
        bias,
        router._score_bias(x.device),
        dtype,
        *router.rule,
        up,
        down,
        getattr(experts, experts.up_bias_name),
        experts.down_bias,
        str(config.activation),
        config.gated,
        config.gate_weight_on,
        residual,
    )
    return y.view(x.shape), RoutingMetrics(counts, counts, entropy)


def _is_plain(layer: Any, x: Tensor) -> bool:
    """Whether nothing but the layer's own parameters takes part now, and nobody has to see the steps."""
    if layer.training or torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu"):
        return False
    if torch._C._len_torch_dispatch_stack() or torch._C._len_torch_function_stack() or any(_OF_ALL):
        return False
    experts, router = layer.experts, layer.router
    if (  # wrapped, or others in their place
        type(router) is not TopKRouter
        or type(experts) is not Experts
        or type(layer.dispatcher) is not LocalDispatcher
        or layer.auxiliary.attach is not None
    ):
        return False
    return all(
        part._modules.get("lora") is None
        and not (part._forward_hooks or part._forward_pre_hooks or part._backward_hooks or part._backward_pre_hooks)
        and "forward" not in part.__dict__
        for part in (experts, router)
    )
