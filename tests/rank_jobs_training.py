"""Training on ranks: whole steps of a small model, its checkpoints, and gradients over replicas."""

from __future__ import annotations

import contextlib

import torch
import torch.distributed as dist
from rank_jobs import plain
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from dmoe import MoE, aux_loss
from dmoe.parallel import clip_grad_norm, data_parallel, grad_norm

GRIDS: dict[tuple[int, int], object] = {}


def grid(replicas, ep):
    """A mesh of all ranks, made once: every new group costs time."""
    if (replicas, ep) not in GRIDS:
        GRIDS[replicas, ep] = init_device_mesh("cpu", (replicas, ep), mesh_dim_names=("replicas", "ep"))
    return GRIDS[replicas, ep]


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


def train(group, fields, replicas, batches, max_norm, micro=False):
    """``batches[step][rank]`` are lists of micro batches. What this rank ends with."""
    ep = dist.get_world_size(group) // replicas
    mesh = grid(replicas, ep)
    inner = Net(fields, ep_group=mesh["ep"])
    model = data_parallel(inner, expert_replicas=mesh["replicas"].get_group() if replicas > 1 else None)
    optimizer = torch.optim.AdamW(inner.parameters(), lr=1e-3)
    mine = [step[dist.get_rank(group)] for step in batches]
    norms, _ = take_steps(model, inner, optimizer, mine, max_norm, clip_grad_norm, micro)
    values = {name: plain(value) for name, value in inner.state_dict().items()}
    return values, norms, grad_norm(inner, float("inf")), inner.moe.experts.owned.experts


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
