"""What ranks are told to do about families of routers."""

from __future__ import annotations

import torch
import torch.distributed as dist
from router_cases import config_of

from dmoe import MoE, aux_loss


def family(group, name, fields, shares):
    """Forward and backward of a case's layer, float64, on this rank's share: results, gradients, what was kept.

    ``shares``: x and ids by rank. Random numbers are seeded by rank, as one process does for each share.
    """
    me = dist.get_rank(group)
    torch.manual_seed(0)
    layer = MoE(config_of(name, **fields), ep_group=group, dtype=torch.float64)
    x, ids = shares[me]
    x = x.clone().requires_grad_()
    torch.manual_seed(100 + me)
    y = layer(x, token_ids=ids)
    loss = aux_loss(layer)
    (y.square().sum() + loss).backward()
    metrics = layer.last_metrics
    layer.update_selection_bias(group)
    return {
        "y": y.detach(),
        "x": x.grad,
        "loss": loss.detach(),
        "router": {name: p.grad for name, p in layer.router.named_parameters()},
        "bias": getattr(layer.router, "selection_bias", None),
        "tokens_per_expert": metrics.tokens_per_expert,
        "kept_per_expert": metrics.kept_per_expert,
    }


def chosen(group, name, fields, shares):
    """Experts that this rank's tokens have, and which of the choices got a row."""
    torch.manual_seed(0)
    layer = MoE(config_of(name, **fields), ep_group=group, dtype=torch.float64)
    tokens = shares[dist.get_rank(group)].reshape(-1, layer.config.hidden_size)
    routing = layer.router(tokens)
    return routing.expert_indices, routing.plan.token_to_rows >= 0, routing.plan.kept_per_expert
