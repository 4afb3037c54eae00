"""Training on ranks: whole steps of a small model, its checkpoints, and gradients over replicas."""

from __future__ import annotations

import contextlib

import torch
import torch.distributed as dist
from rank_jobs import plain
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from dmoe import MoE, aux_loss
from dmoe.parallel import average_in_backward, clip_grad_norm, data_parallel, grad_norm

GRIDS: dict[tuple[int, int], object] = {}


def grid(replicas, ep, tp=1):
    """A mesh of all ranks, made once: every new group costs time."""
    if (replicas, ep, tp) not in GRIDS:
        names = ("replicas", "ep", "expert_tp") if tp > 1 else ("replicas", "ep")
        GRIDS[replicas, ep, tp] = init_device_mesh("cpu", (replicas, ep, tp)[: len(names)], mesh_dim_names=names)
    return GRIDS[replicas, ep, tp]


def distributed(fields, world, replicas, tp=1, **options):
    """The model on this rank, plain and as DDP has it. ``replicas="nodes"``: rows in two hops, on two nodes."""
    if replicas == "nodes":
        inner = Net(fields, ep_levels=grid(2, world // 2), **options)
        return inner, data_parallel(inner)
    mesh = grid(replicas, world // replicas // tp, tp)
    inner = Net(fields, ep_group=mesh["ep"], expert_tp_group=mesh["expert_tp"] if tp > 1 else None, **options)
    return inner, data_parallel(inner, expert_replicas=mesh["replicas"].get_group() if replicas > 1 else None)


class Net(nn.Module):
    """Two dense layers around a mixture."""

    def __init__(self, fields, **options):
        super().__init__()
        torch.manual_seed(3)
        hidden = fields["hidden_size"]
        self.first = nn.Linear(hidden, hidden, dtype=torch.float64)
        self.moe = MoE(**fields, **options, dtype=torch.float64)
        self.last = nn.Linear(hidden, hidden, dtype=torch.float64)

    def forward(self, x):
        return self.last(self.moe(torch.tanh(self.first(x))))


def loss_of(model, inner, x):
    return model(x).square().sum() + aux_loss(inner)


def take_steps(model, inner, optimizer, batches, max_norm, clip, micro):
    """Optimizer steps; a batch is the list of its micro batches. The gradients' norms, and the losses."""
    norms, losses = [], []
    for batch in batches:
        optimizer.zero_grad()
        for position, x in enumerate(batch):
            silent = micro and position + 1 < len(batch)
            with model.no_sync() if silent else contextlib.nullcontext():
                loss = loss_of(model, inner, x)
                loss.backward()
            losses.append(loss.detach())
        norms.append(clip(inner, max_norm))
        optimizer.step()
    return torch.stack(norms), torch.stack(losses)


def train(group, fields, replicas, tp, batches, max_norm, micro=False):
    """``batches[step][rank]`` are lists of micro batches. What this rank ends with."""
    inner, model = distributed(fields, dist.get_world_size(group), replicas, tp)
    optimizer = torch.optim.AdamW(inner.parameters(), lr=1e-3)
    mine = [step[dist.get_rank(group)] for step in batches]
    norms, _ = take_steps(model, inner, optimizer, mine, max_norm, clip_grad_norm, micro)
    values = {name: plain(value) for name, value in inner.state_dict().items()}
    return values, norms, grad_norm(inner, float("inf")), inner.moe.experts.owned.experts


def train_unwrapped(group, fields, batches, max_norm):
    """As :func:`train`, by hooks on the parameters; one of them is used by nobody, and a backward breaks off first."""
    world = dist.get_world_size(group)
    inner = Net(fields, ep_group=grid(1, world)["ep"])
    inner.unused = nn.Parameter(torch.ones(2))
    average_in_backward(inner, group)
    y = inner.last(inner.first(batches[0][0][0][:1]))
    try:
        inner.first.weight.register_hook(_break_off)
        y.sum().backward()
    except ZeroDivisionError:
        inner.first.weight._backward_hooks.clear()
    optimizer = torch.optim.AdamW(inner.parameters(), lr=1e-3)
    mine = [step[dist.get_rank(group)] for step in batches]
    norms, _ = take_steps(inner, inner, optimizer, mine, max_norm, clip_grad_norm, micro=False)
    values = {name: plain(value) for name, value in inner.state_dict().items() if name != "unused"}
    return values, norms, inner.unused.grad


def _break_off(grad):
    raise ZeroDivisionError


def held_twice(group, fields):
    """What ``average_in_backward`` says about experts that it does not average."""
    try:
        average_in_backward(Net(fields, ep_group=grid(2, 2)["ep"]), group)
    except ValueError as error:
        return str(error)


def wrongly_wrapped(group, fields, replicas):
    """What ``data_parallel`` says about replicas that do not fit."""
    world = dist.get_world_size(group)
    mesh = grid(2, world // 2)
    told = []
    for wrong in {"none": (None,), "the other way": (mesh["ep"].get_group(),)}[replicas]:
        try:
            data_parallel(Net(fields, ep_group=mesh["ep"]), expert_replicas=wrong)
        except ValueError as error:
            told.append(str(error))
    return told


def save(group, fields, replicas, tp, batches, folder, dtensor=True):
    """Train, write a distributed checkpoint of model and optimizer, and take one more step: the loss of that step."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict

    inner, model = distributed(fields, dist.get_world_size(group), replicas, tp, dtensor=dtensor)
    optimizer = torch.optim.AdamW(inner.parameters(), lr=1e-3)
    mine = [step[dist.get_rank(group)] for step in batches]
    take_steps(model, inner, optimizer, mine[:-1], 0.5, clip_grad_norm, False)
    state, moments = get_state_dict(inner, optimizer)
    dcp.save({"model": state, "optimizer": moments}, checkpoint_id=folder, process_group=group)
    values = {name: plain(value).clone() for name, value in inner.state_dict().items()}
    _, losses = take_steps(model, inner, optimizer, mine[-1:], 0.5, clip_grad_norm, False)
    return values, losses, {name: plain(value) for name, value in inner.state_dict().items()}


def load(group, fields, replicas, tp, batches, folder, dtensor=True):
    """Read it into another grid, and take that step."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    inner, model = distributed(fields, dist.get_world_size(group), replicas, tp, dtensor=dtensor)
    optimizer = torch.optim.AdamW(inner.parameters(), lr=1e-3)
    with torch.no_grad():
        for parameter in inner.parameters():
            plain(parameter).fill_(torch.nan)
    state, moments = get_state_dict(inner, optimizer)
    whole = {"model": state, "optimizer": moments}
    dcp.load(whole, checkpoint_id=folder, process_group=group)
    set_state_dict(inner, optimizer, model_state_dict=whole["model"], optim_state_dict=whole["optimizer"])
    values = {name: plain(value).clone() for name, value in inner.state_dict().items()}
    mine = [step[dist.get_rank(group)] for step in batches]
    _, losses = take_steps(model, inner, optimizer, mine[-1:], 0.5, clip_grad_norm, False)
    return values, losses, {name: plain(value) for name, value in inner.state_dict().items()}


def train_with_fsdp(group, fields, replicas, batches, max_norm):
    """The same steps under FSDP2: experts over their replicas, the rest over all ranks. Whole values, norms."""
    from torch.distributed.fsdp import fully_shard

    from dmoe.parallel import fully_shard_experts

    world = dist.get_world_size(group)
    mesh = grid(replicas, world // replicas)
    model = Net(fields, ep_group=mesh["ep"])
    fully_shard_experts(model, mesh["replicas"])
    if "all" not in GRIDS:
        GRIDS["all"] = init_device_mesh("cpu", (world,), mesh_dim_names=("all",))
    fully_shard(model, mesh=GRIDS["all"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    mine = [step[dist.get_rank(group)] for step in batches]
    norms, _ = take_steps(model, model, optimizer, mine, max_norm, clip_grad_norm, False)
    cuts = {name: str(p.placements) for name, p in model.moe.experts.named_parameters()}
    marks = {(p.expert, p.allreduce) for p in model.moe.experts.parameters()}
    return {name: value.full_tensor() for name, value in model.state_dict().items()}, norms, cuts, marks


def train_with_zero(group, fields, batches, max_norm):
    """The same steps, with the optimizer's state of what every rank has spread over the ranks."""
    from torch.distributed.optim import ZeroRedundancyOptimizer

    from dmoe.parallel import split_parameters

    inner = Net(fields, ep_group=group)
    model = data_parallel(inner)
    replicated, experts = split_parameters(inner)
    optimizers = [ZeroRedundancyOptimizer(replicated, torch.optim.AdamW, lr=1e-3), torch.optim.AdamW(experts, lr=1e-3)]
    for step in batches:
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss_of(model, inner, step[dist.get_rank(group)][0]).backward()
        clip_grad_norm(inner, max_norm)
        for optimizer in optimizers:
            optimizer.step()
    return {name: plain(value) for name, value in inner.state_dict().items()}


def metrics(group, fields, shares):
    """Metrics over ranks beside this rank's own, and how many collectives that took."""
    from unittest.mock import patch

    import dmoe

    net = Net(fields, ep_group=group)
    assert dmoe.reduce_metrics(net, group) == {}
    net(shares[dist.get_rank(group)])
    own = net.moe.last_metrics
    with patch.object(dist, "all_reduce", wraps=dist.all_reduce) as calls:
        (reduced,) = dmoe.reduce_metrics(net, group).values()
    return own, reduced, calls.call_count
