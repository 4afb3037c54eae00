"""What ranks are told to do about Megatron's routers: route the same logits by its own and by dmoe's."""

from __future__ import annotations

import sys

import rank_jobs_megatron as jobs
import torch
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.moe.router import TopKRouter
from megatron_cases import Case

from dmoe.integrations.megatron.layer import DmoeLayer

# The name of the module is that of a function in its package.
finalize = sys.modules["megatron.core.distributed.finalize_model_grads"]
CALLS = 3  # the third by biases that have moved twice


def routed(group, ranks, configs, store, shape):
    """Weights ``(T, E)``, theirs and ours, of a few calls in a row: ``{(name of the config, training): calls}``."""
    jobs.connect(ranks, store)
    configs = {name: jobs.config_of(Case(ranks, fields)) for name, fields in configs.items()}
    modes = (True, False)
    return {(name, mode): _routed(config, mode, shape) for name, config in configs.items() for mode in modes}


def _routed(config, training, shape):
    """Between the calls Megatron moves both biases."""
    theirs = TopKRouter(config, pg_collection=moe_utils.get_default_pg_collection()).train(training)
    ours = DmoeLayer(config).train(training)
    model = [torch.nn.ModuleList([theirs, ours])]
    found = []
    for call in range(CALLS):
        logits = jobs.values((*shape, config.num_moe_experts), call) * 2
        logits[..., 0] += 2  # a favourite, so that balance and capacities have something to do
        probs, _ = theirs.routing(logits)
        routing = ours.moe.router.route(logits.flatten(0, 1).requires_grad_())
        kept = torch.where(routing.plan.token_to_rows >= 0, routing.gate_weights, 0)
        weights = torch.zeros_like(probs).scatter(1, routing.expert_indices, kept)
        found.append((probs.detach(), weights.detach()))
        if not training:
            continue
        weights.sum().backward()  # where dmoe counts
        if config.moe_router_enable_expert_bias:
            finalize._update_router_expert_bias(model, config)
        if config.moe_router_load_balancing_type == "quantile_balancing":
            finalize._update_router_qb_beta(model, config)
        finalize.reset_model_temporary_tensors(config, model)
    return found
