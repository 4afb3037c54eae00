"""What ranks are told to do about replayed routings and batch-invariant layers."""

from __future__ import annotations

import torch
import torch.distributed as dist
from rank_jobs import plain
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from dmoe import MoE, moe_layers, record_routing, replay_routing


def run_replayed(layer, record, x, grad_y, mask, recompute):
    """Forward and backward of a layer with a record's choices: what each token gets, and the weights."""
    x = x.clone().requires_grad_()

    def forward(x):
        y, routing = layer(x, token_mask=mask, return_routing=True)
        return y, routing.gate_weights

    with record_routing(layer, layers=["moe"]) as taken, replay_routing(layer, record, layers=["moe"]):
        y, gates = forward(x) if recompute is None else checkpoint(forward, x, use_reentrant=recompute == "reentrant")
        gates.retain_grad()
        y.backward(grad_y)
    return {
        "record": taken,
        "y": y.detach(),
        "x": x.grad,
        "gates": gates.detach(),
        "parameters": {name: plain(p.grad) for name, p in layer.named_parameters()},
    }


def replayed(group, fields, seed, dtype, shares, recompute=None):
    """:func:`run_replayed` on this rank's (record, x, dy, mask) of the shares."""
    torch.manual_seed(seed)
    layer = MoE(**fields, ep_group=group, dtype=dtype)
    return run_replayed(layer, *shares[dist.get_rank(group)], recompute)


def recorded(group, fields, seed, dtype, shares):
    """The record of this rank's tokens, by its own choices."""
    torch.manual_seed(seed)
    layer = MoE(**fields, ep_group=group, dtype=dtype)
    with record_routing(layer, layers=["moe"]) as record, torch.no_grad():
        layer(shares[dist.get_rank(group)])
    return record


def constructed(group, fields):
    """What the constructor says of options that it refuses on several ranks."""
    try:
        MoE(**fields, ep_group=group)
    except ValueError as error:
        return str(error)


class _Block(torch.nn.Module):
    def __init__(self, fields):
        super().__init__()
        self.moe = MoE(**fields)

    def forward(self, x):
        return x + self.moe(x)


def wrapped(group, how, fields, xs):
    """A wrapped model's layers by name, its record, that of another's replay of it, and the router's gradient there."""
    found = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        model = torch.nn.Sequential(MoE(**fields), _Block(fields))
        names = list(moe_layers(model))
        if how == "ddp":
            model = DistributedDataParallel(model, process_group=group)
        else:
            mesh = DeviceMesh.from_group(group, "cpu")
            for part in model:
                fully_shard(part, mesh=mesh)
            fully_shard(model, mesh=mesh)
        x = xs[dist.get_rank(group)]
        if seed == 0:
            with record_routing(model) as record, torch.no_grad():
                model(x)
        else:
            with record_routing(model) as again, replay_routing(model, record):
                model(x).square().sum().backward()
            router = next(p for name, p in model.named_parameters() if name.endswith("1.moe.router.weight"))
            found = [names, record, again, float(plain(router.grad).abs().sum())]
    return found
