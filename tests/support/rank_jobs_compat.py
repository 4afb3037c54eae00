"""What ranks do with DeepSpeed's and Tutel's layers, and with dmoe's residual one."""

from __future__ import annotations

import os
from unittest.mock import patch

import torch
import torch.distributed as dist
from compat_cases import Ffn

import dmoe
from dmoe.compat.deepspeed import MoE, expert_parallel_group
from dmoe.compat.tutel import moe_layer

H, WIDTH = 6, 10


def _message(function, *arguments, **options):
    """What a call says when it refuses."""
    try:
        function(*arguments, **options)
    except (ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "done"


def results_of(layer, share):
    """Forward and backward on a share (x, dy) of tokens, with the balance loss at one half."""
    x, grad_y = share
    x = x.clone().requires_grad_()
    y, l_aux, counts = layer(x)
    ((y * grad_y).sum() + l_aux / 2).backward()
    return {
        "y": y.detach(),
        "l_aux": l_aux.detach(),
        "counts": counts,
        "x": x.grad,
        "gradients": {name: parameter.grad for name, parameter in layer.named_parameters()},
    }


def deepspeed(group, options, state, shares, ep_size, layout=None):
    """A layer whose experts are spread, which loads all of them, and its results on this rank's share."""
    given = {"ep_group": group} if layout is None else {}
    layer = MoE(H, Ffn(H, WIDTH).double(), num_experts=4, ep_size=ep_size, **options, **given)
    if layout is not None:
        layer.set_deepspeed_parallelism(layout)
    layer.load_state_dict(state)
    experts = layer.deepspeed_moe.experts
    own = {name: value.clone() for name, value in layer.state_dict().items()}
    layer.load_state_dict(own)  # the names of this rank's experts alone
    return {
        **results_of(layer, shares[dist.get_rank()]),
        "ranks": dist.get_process_group_ranks(layer.deepspeed_moe.ep_group),
        "marks": {(p.expert, p.allreduce, p.group_name) for p in experts.parameters()},
        "unmarked": [n for n, p in layer.named_parameters() if getattr(p, "allreduce", True)],
        "state": own,
        "bytes_sent": layer.deepspeed_moe.last_metrics.bytes_sent,
    }


def deepspeed_groups(group):
    """One group for all layers, and what does not fit."""
    first, second = (MoE(H, Ffn(H, WIDTH), num_experts=4, ep_size=2) for _ in range(2))
    for layer in (first, second, first):
        layer.set_deepspeed_parallelism()
    same = first.deepspeed_moe.ep_group is second.deepspeed_moe.ep_group is expert_parallel_group(2)
    return (
        same,
        _message(first.set_deepspeed_parallelism, True),
        _message(MoE(H, Ffn(H, WIDTH), num_experts=6, ep_size=3).set_deepspeed_parallelism),
        _message(MoE, H, Ffn(H, WIDTH), num_experts=4, ep_size=2, ep_group=group),
    )


def deepspeed_trained(group, options, state, shares):
    """Gradients under data parallelism over all ranks, experts spread over pairs of them and held twice."""
    layer = MoE(H, Ffn(H, WIDTH).double(), num_experts=4, ep_size=2, **options)
    layer.set_deepspeed_parallelism()
    layer.load_state_dict(state)
    model = dmoe.parallel.data_parallel(layer, expert_replicas=expert_parallel_group(2, True))
    x, grad_y = shares[dist.get_rank()]
    y, l_aux, _ = model(x)
    ((y * grad_y).sum() + l_aux / 2).backward()
    return {name: parameter.grad for name, parameter in layer.named_parameters()}


def tutel_layer(gate, per_device, kind="ffn", **options):
    """A layer of so many experts on each rank, in float64."""
    experts = {"type": kind, "num_experts_per_device": per_device, "hidden_size_per_expert": WIDTH}
    return moe_layer(gate_type=gate, model_dim=H, experts=experts, **options).double()


def tutel(group, gate, options, state, shares, forward, nodes=None):
    """A layer whose experts are spread, which loads all of them, and its results on this rank's share."""
    node = {} if nodes is None else {"LOCAL_WORLD_SIZE": str(dist.get_world_size(group) // nodes)}
    with patch.dict(os.environ, node):
        layer = tutel_layer(gate, group=group, seeds=(0, dist.get_rank() + 1, 0), **options)
    layer.load_state_dict(state)
    x, grad_y = shares[dist.get_rank(group)]
    x = x.clone().requires_grad_()
    y = layer(x, **forward)
    ((y * grad_y).sum() + y.l_aux / 2).backward()
    levels = layer.dispatcher.two_level
    return {
        "y": y.detach(),
        "l_aux": y.l_aux.detach(),
        "count": layer.dispatch_count,
        "x": x.grad,
        "gradients": {name: parameter.grad for name, parameter in layer.named_parameters()},
        "state": layer.state_dict(),
        "experts": layer.num_global_experts,
        "marks": {(p.expert, p.allreduce, p._tutel_expert) for p in layer.experts.parameters()},
        "chunks": layer.config.overlap_degree,
        "hops": None if levels is None else (levels.num_nodes, levels.ranks_per_node),
    }


def tutel_messages(group):
    """What a rank is told when its arguments do not fit the others."""
    top, found = {"type": "top"}, []
    for options, environment in (
        ({"per_device": -3}, {}),
        ({"per_device": -2, "kind": "llama_ffn"}, {}),
        ({"per_device": -4, "parallel_type": "adaptive:3"}, {}),
        ({"per_device": 1, "use_2dh": True}, {}),
        ({"per_device": 1, "use_2dh": True}, {"LOCAL_WORLD_SIZE": "3"}),
    ):
        with patch.dict(os.environ, environment):
            found.append(_message(tutel_layer, top, group=group, **options))
    return found


def residual(group, seed, shares):
    """A residual layer under data parallelism, its experts spread: gradients of the mean of the ranks' losses."""
    torch.manual_seed(seed)
    moe = _moe(ep_group=group)
    layer = dmoe.ResidualMoE(moe, Ffn(H, WIDTH).double())
    model = dmoe.parallel.data_parallel(layer, process_group=group)
    x, grad_y = shares[dist.get_rank(group)]
    y = model(x)
    loss = dmoe.aux_loss(model)
    ((y * grad_y).sum() + loss).backward()
    metrics = dmoe.reduce_metrics(model, group)
    plain = {name: p.grad.to_local() if hasattr(p.grad, "to_local") else p.grad for name, p in layer.named_parameters()}
    return {"y": y.detach(), "gradients": plain, "counts": [m.tokens_per_expert for m in metrics.values()]}


def _moe(**groups):
    sizes = {"hidden_size": H, "ffn_hidden_size": WIDTH, "num_experts": 4, "top_k": 2}
    return dmoe.MoE(**sizes, load_balancing_coefficient=0.1, dtype=torch.float64, **groups)


def residual_here(seed):
    """The same layer on one rank."""
    torch.manual_seed(seed)
    moe = _moe()
    return dmoe.ResidualMoE(moe, Ffn(H, WIDTH).double())
