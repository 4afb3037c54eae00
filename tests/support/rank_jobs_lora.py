"""Adapters of expert-parallel layers, and under FSDP2: jobs of a :class:`rank_pool.RankPool`."""

from __future__ import annotations

import copy

import torch
import torch.distributed as dist
from lora_cases import randomise
from rank_jobs import plain
from rank_jobs_state import all_ranks, build
from rank_jobs_training import grid
from torch import nn
from torch.utils.checkpoint import checkpoint

import dmoe
from dmoe.parallel import clip_grad_norm, data_parallel, fully_shard_experts

OPTIONS = {"rank": 3, "alpha": 2.0, "targets": ("*",)}


def adapted(fields, options=OPTIONS, values=None, **groups):
    """A layer with an adapter, and what it trains; ``values`` of all experts, by name, instead of the initial ones."""
    layer = build(fields, **groups)
    torch.manual_seed(5)
    trained = dmoe.lora.add(layer, **options)
    if values is not None:
        layer.load_state_dict({**layer.state_dict(), **values})
    return layer, trained


def parallel(group, fields, values, share, dtensor, autocast=None):
    """One step of an expert-parallel layer: initial values, output, gradients, marks, norm; by names of parameters."""
    layer, trained = adapted(fields, ep_group=group, dtensor=dtensor)
    initial = {name: plain(p.detach()).clone() for name, p in trained.items()}
    layer.load_state_dict({**layer.state_dict(), **values})
    x = share[dist.get_rank(group)].clone().requires_grad_()
    model = data_parallel(layer, process_group=group)
    with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
        y = model(x)
    y.float().square().sum().backward() if autocast else y.square().sum().backward()
    return {
        "initial": initial,
        "y": y.detach(),
        "x": x.grad,
        "gradients": {name: plain(p.grad) for name, p in layer.named_parameters() if p.grad is not None},
        "marks": {name: (getattr(p, "expert", None), getattr(p, "allreduce", None)) for name, p in trained.items()},
        "kinds": {type(p).__name__ for name, p in layer.named_parameters() if name.startswith("experts.lora")}
        | {type(p.data).__name__ for name, p in layer.named_parameters() if name.startswith("experts.lora")},
        "norm": clip_grad_norm(layer, 1e9),
    }


def replicated(group, fields, values, share, recompute):
    """Replicas of expert-parallel halves under FSDP2, experts over their replicas and the rest over all."""
    from torch.distributed.fsdp import fully_shard

    mesh = grid(2, 2)
    layer, _ = adapted(fields, values=values, ep_group=mesh["ep"])
    model = nn.Sequential(layer)
    fully_shard_experts(model, mesh["replicas"])
    fully_shard(model, mesh=all_ranks())
    x = share[dist.get_rank(group)]
    y = checkpoint(model, x, use_reentrant=False) if recompute else model(x)
    y.square().sum().backward()
    marks = {(p.expert, p.allreduce) for name, p in layer.named_parameters() if name.startswith("experts.lora")}
    grads = {name: p.grad.full_tensor() for name, p in layer.named_parameters() if p.grad is not None}
    return y.detach(), grads, marks, clip_grad_norm(model, 1e9)


def sharded(group, fields, values, x):
    """Plain FSDP2 of a layer without groups: every rank has the same tokens. Gradients; what merging and adding say."""
    from torch.distributed.fsdp import fully_shard

    layer, _ = adapted(fields, values=values)
    fully_shard(layer, mesh=all_ranks())
    layer(x).square().sum().backward()
    grads = {name: p.grad.full_tensor() for name, p in layer.named_parameters() if p.grad is not None}
    told = []
    for action in (lambda: dmoe.lora.merge(layer), lambda: dmoe.lora.add(layer, name="late")):
        try:
            action()
        except ValueError as error:
            told.append(str(error))
    return grads, told


def written(group, fields, values, folder):
    """A checkpoint of the adapter alone, by torch.distributed.checkpoint, each rank its part; and merged weights."""
    import torch.distributed.checkpoint as dcp

    layer, _ = adapted(fields, values=values, ep_group=group)
    dcp.save(dmoe.lora.state_dict(layer)["tensors"], checkpoint_id=folder, process_group=group)
    dmoe.lora.merge(layer)
    weights = {name: plain(p.detach()).clone() for name, p in layer.named_parameters()}
    dmoe.lora.unmerge(layer)
    return weights


def read(group, fields, folder, config):
    """That checkpoint into a layer on another number of ranks, that has no adapter before."""
    import torch.distributed.checkpoint as dcp

    layer = build(fields, **({} if dist.get_world_size(group) == 1 else {"ep_group": group}))
    torch.manual_seed(9)
    dmoe.lora.add(layer, **OPTIONS, name="read")
    state = dmoe.lora.state_dict(layer, "read")
    dcp.load(state["tensors"], checkpoint_id=folder, process_group=group)
    dmoe.lora.load_state_dict(layer, {"config": config, "tensors": state["tensors"]}, "read")
    return {name: plain(p.detach()) for name, p in state["tensors"].items()}


def whole_loaded(group, fields, state):
    """An adapter of all experts into ranks that hold some: their part of it."""
    layer = build(fields, ep_group=group)
    dmoe.lora.load_state_dict(layer, state)
    return {name: plain(p.detach()) for name, p in dmoe.lora.state_dict(layer)["tensors"].items()}


def half_steps(group, fields, dtensor, victim):
    """Two steps of PyTorch's scaler under float16, in the first of which one rank's adapters alone overflow."""
    layer, trained = adapted(fields, {"rank": 2}, ep_group=group, dtensor=dtensor)
    randomise(trained.values(), std=0.05)
    optimizer = torch.optim.SGD(trained.values(), lr=1e-3, foreach=False)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**4, backoff_factor=2.0**-2, growth_interval=1000)
    chosen = torch.tensor(layer.experts.owned.experts.start)
    dist.broadcast(chosen, victim, group=group)
    told = []
    for step in range(2):
        optimizer.zero_grad()
        x = torch.full((64, layer.config.hidden_size), 1.0)
        with torch.autocast("cpu", dtype=torch.float16):
            y = layer(x, expert_indices=chosen.expand(64, 1))
        scaler.scale(y.float().mean() * (1e7 if step == 0 else 1.0)).backward()
        finite = all(bool(plain(p.grad).isfinite().all()) for p in trained.values())
        scaler.step(optimizer)
        scaler.update()
        told.append((finite, scaler.get_scale()))
    return told


def said(group, fields, options, groups, then=None):
    """What is said to an adapter here."""
    try:
        layer = build(fields, **({"ep_group": group} if groups == "ep" else grids(groups)))
        if then == "other seeds":
            torch.manual_seed(dist.get_rank(group))
        if then != "on one rank" or dist.get_rank(group) == 0:
            dmoe.lora.add(layer, **options)
        if then == "use":
            with dmoe.lora.use(layer, torch.zeros(5, dtype=torch.int64)):
                pass
        layer(torch.ones(5, layer.config.hidden_size, dtype=fields["dtype"]))
    except ValueError as error:
        return str(error)
    return "nothing"


def grids(kind):
    mesh = grid(2, 2)
    return {"ep_group": mesh["replicas"], "expert_tp_group": mesh["ep"]}


def copied(group, fields):
    """A deep copy of an expert-parallel layer with adapters: same output, marks of its own."""
    layer, trained = adapted(fields, ep_group=group)
    randomise(trained.values())
    twin = copy.deepcopy(layer)
    x = torch.ones(3, layer.config.hidden_size, dtype=fields["dtype"])
    marks = {(p.expert, p.allreduce) for name, p in twin.named_parameters() if name.startswith("experts.")}
    return layer(x), twin(x), marks
