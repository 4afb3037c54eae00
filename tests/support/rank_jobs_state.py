"""Layers on ranks whose state has to stay alike: selection biases, scalers, FSDP's ways of loading and gathering."""

from __future__ import annotations

import functools

import torch
import torch.distributed as dist
from rank_jobs import plain
from rank_jobs_training import GRIDS, grid
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.utils.checkpoint import checkpoint

import dmoe
from dmoe import MoE
from dmoe.parallel import clip_grad_norm, data_parallel, fully_shard_experts


def all_ranks():
    """The mesh of all ranks, made once."""
    if "all" not in GRIDS:
        GRIDS["all"] = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("all",))
    return GRIDS["all"]


def build(fields, **options):
    torch.manual_seed(0)
    return MoE(**fields, **options)


# ----------------------------------------------------------------------------------------------------- selection bias


def wrap(layer, how):
    """The layer as a framework has it, and the group that ``update_selection_bias`` is told; None where it knows."""
    if how == "ddp":
        return nn.parallel.DistributedDataParallel(layer), dist.group.WORLD
    if how == "fsdp2":
        from torch.distributed.fsdp import fully_shard

        return fully_shard(layer, mesh=all_ranks()), dist.group.WORLD
    fully_shard_experts(layer, grid(2, 2)["replicas"])
    return layer, None


def biases(group, fields, how, tokens):
    """Two micro batches and an update, twice: loads counted here, and the biases."""
    options = {"ep_group": grid(2, 2)["ep"]} if how == "experts" else {}
    layer = build(fields, **options)
    model, told = wrap(layer, how)
    loads, told_of = [], []
    for micro_batches in tokens[dist.get_rank(group)]:
        load = torch.zeros(layer.config.num_experts, dtype=torch.int64)
        for x in micro_batches:
            (model(x).sum() + dmoe.aux_loss(layer)).backward()
            load += layer.last_metrics.tokens_per_expert
        dmoe.update_selection_bias(layer, told)
        loads.append(load)
        told_of.append(layer.router.selection_bias.clone())
    return loads, told_of


def untold(group, fields, how):
    """What the first update, or the first forward, says when nobody told which ranks train the layer."""
    layer = build(fields, **({"ep_group": grid(2, 2)["ep"]} if how == "experts" else {}))
    try:
        layer(torch.ones(3, layer.config.hidden_size)).sum().backward()
        dmoe.update_selection_bias(layer)
    except ValueError as error:
        return str(error)
    return "nothing"


# --------------------------------------------------------------------------------------------------------------- FSDP2


class Net(nn.Module):
    def __init__(self, fields, **options):
        super().__init__()
        self.first = nn.Linear(fields["hidden_size"], fields["hidden_size"], device=options.get("device"))
        self.moe = MoE(**fields, **options)

    def forward(self, x):
        return self.moe(self.first(x))


def loaded_under_fsdp(group, fields, state, x):
    """Built on meta, sharded, emptied, and loaded from rank 0's values: gradients of one step, and the scale."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
    from torch.distributed.fsdp import fully_shard

    model = Net(fields, device="meta")
    fully_shard(model.moe, mesh=all_ranks())
    fully_shard(model, mesh=all_ranks())
    model.to_empty(device="cpu")
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(model, state if dist.get_rank(group) == 0 else {}, options=options)
    model(x).square().sum().backward()
    gradients = {name: parameter.grad.full_tensor() for name, parameter in model.named_parameters()}
    return gradients, model.moe.aux_loss_scale.clone(), model.moe.router.load_since_update.clone()


def checkpointed_under_fsdp(group, fields, x):
    """FSDP2 around a checkpointed mixture, its loss read by the caller: the gradients."""
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    model = Net(fields)
    inner = model.moe
    inner.forward = functools.partial(checkpoint, inner.forward, use_reentrant=False)
    fully_shard(inner, mesh=all_ranks())
    fully_shard(model, mesh=all_ranks())
    (model(x).square().sum() + dmoe.aux_loss(model)).backward()
    return {name: parameter.grad.full_tensor() for name, parameter in model.named_parameters()}


# ------------------------------------------------------------------------------------------------------------ adapters


class Adapter(nn.Module):
    """Stands in the experts' place, none of whose attributes it has, and adds a matrix of this rank's own."""

    def __init__(self, experts, marked):
        super().__init__()
        self.inner, self.own = experts, nn.Parameter(torch.zeros(experts.config.hidden_size))
        if marked:
            self.own.expert, self.own.allreduce = True, False

    def forward(self, *args, **kwargs):
        return self.inner(*args, **kwargs) + self.own


def adapted(group, fields, marked, x):
    """A layer whose experts stand in an adapter, beside a plain one: what comes out, gradients, their norm."""
    plain_layer = build(fields, ep_group=group)
    layer = build(fields, ep_group=group)
    layer.experts = Adapter(layer.experts, marked)
    told = []
    for each in (plain_layer, layer):
        model = data_parallel(each)
        y = model(x)
        y.square().sum().backward()
        told.append((y.detach(), each.router.weight.grad))
    norm = clip_grad_norm(layer, 1e9)
    return told, norm, plain(layer.experts.own.grad)


# ------------------------------------------------------------------------------------------------------------- scalers


def scaled_steps(group, fields, options, kind, wrapped, victim):
    """Three steps under a scaler, in the second of which one rank's experts overflow: parameters and scale by step."""
    layer = build(fields, ep_group=group, **options)
    model = data_parallel(layer) if wrapped else layer
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    scaler_of = dmoe.parallel.GradScaler if kind == "dmoe" else torch.amp.GradScaler
    scaler = scaler_of("cpu", init_scale=64.0, growth_interval=1000)
    torch.manual_seed(1 + dist.get_rank(group))
    told = []
    for step in range(3):
        optimizer.zero_grad()
        x = torch.randn(5, layer.config.hidden_size)
        if step == 1 and dist.get_rank(group) == victim:
            handle = layer.experts.down_proj.register_hook(_overflow)
        loss = model(x).square().mean()
        scaler.scale(loss).backward()
        if step == 1 and dist.get_rank(group) == victim:
            handle.remove()
        if not wrapped:
            for parameter in layer.router.parameters():
                dist.all_reduce(parameter.grad, group=group)
        if step == 2:
            scaler.unscale_(optimizer)
            clip_grad_norm(layer, 100.0)
        scaler.step(optimizer)
        scaler.update()
        told.append((layer.router.weight.detach().clone(), plain(layer.experts.down_proj.detach()).clone()))
        told[-1] += (scaler.get_scale(),)
    return told


def half_steps(group, fields, options, victim, compiled):
    """Two steps of PyTorch's own scaler under autocast to float16, data parallel by hand: router and scale by step.

    All tokens of all ranks go to one expert of the victim: the sum over them, its weights' gradient, leaves float16 in
    the first step, and nothing else does. Before each step: whether the router's and the experts' gradients are finite.
    """
    layer = build(fields, ep_group=group, **options)
    with torch.no_grad():
        layer.router.weight.zero_()
        for parameter in layer.experts.parameters():
            parameter.fill_(0.02)
    model = torch.compile(layer, backend="aot_eager") if compiled else layer
    optimizer = torch.optim.SGD(layer.parameters(), lr=1e-3)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20, backoff_factor=2.0**-10, growth_interval=1000)
    x = torch.full((64, layer.config.hidden_size), 64.0)
    chosen = torch.tensor(layer.experts.owned.experts.start)
    dist.broadcast(chosen, victim, group=group)
    told = []
    for _ in range(2):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.float16):
            y = model(x, expert_indices=chosen.expand(64, 1))
        scaler.scale(y.float().mean()).backward()
        for parameter in layer.router.parameters():
            dist.all_reduce(parameter.grad, group=group)
        finite = [all(p.grad.isfinite().all() for p in part.parameters()) for part in (layer.router, layer.experts)]
        scaler.step(optimizer)
        scaler.update()
        told.append((finite, layer.router.weight.detach().clone(), scaler.get_scale()))
    return told


def _overflow(grad):
    bad = torch.zeros_like(plain(grad))
    bad.view(-1)[3] = torch.inf
    if hasattr(grad, "to_local"):
        from torch.distributed.tensor import DTensor

        bad = DTensor.from_local(bad, grad.device_mesh, grad.placements, run_check=False)
    return grad + bad
