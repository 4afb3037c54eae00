"""Whole models on ranks by one call, and what trains them: jobs of a :class:`rank_pool.RankPool`."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

import dmoe
from dmoe.parallel import clip_grad_norm, parallelize, split_parameters

MAX_NORM = 0.2
MESHES: dict[tuple, object] = {}
FIELDS = {
    "hidden_size": 6, "ffn_hidden_size": 4, "num_experts": 4, "top_k": 2, "bias": "expert",
    "load_balancing_coefficient": 0.1, "load_balancing_over": "global", "router_z_loss_coefficient": 0.01,
}  # fmt: skip


def mesh_of(**sizes):
    """A mesh of all ranks, made once: every new group costs time."""
    key = tuple(sizes.items())
    if key not in MESHES:
        MESHES[key] = init_device_mesh("cpu", tuple(sizes.values()), mesh_dim_names=tuple(sizes))
    return MESHES[key]


class Block(nn.Module):
    """A dense layer and a mixture, beside the stream."""

    def __init__(self, fields, where):
        super().__init__()
        H = fields["hidden_size"]
        self.dense = nn.Linear(H, H, **where)
        self.moe = dmoe.MoE(**fields, **where)

    def forward(self, x):
        x = x + torch.tanh(self.dense(x))
        return x + self.moe(x)


class Model(nn.Module):
    """Two blocks between an embedding and a head; built as for one process."""

    def __init__(self, fields=FIELDS, dtype=torch.float64, device=None):
        super().__init__()
        torch.manual_seed(3)
        where, H = {"dtype": dtype, "device": device}, fields["hidden_size"]
        self.embedding = nn.Embedding(12, H, **where)
        self.blocks = nn.ModuleList(Block(fields, where) for _ in range(2))
        self.head = nn.Linear(H, 12, **where)

    def forward(self, ids):
        x = self.embedding(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def loss_of(model, ids):
    """Of the next id, and the balance."""
    logits = model(ids[:, :-1])
    task = nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
    return task + dmoe.aux_loss(model)


def take_steps(model, optimizer, steps, clip, loss=loss_of):
    """``steps[step]`` are a rank's micro-batches. Norms and mean losses of steps."""
    norms, losses = [], []
    for micro in steps:
        optimizer.zero_grad()
        total = 0.0
        for ids in micro:
            part = loss(model, ids) / len(micro)
            part.backward()
            total += part.detach()
        norms.append(clip(model, MAX_NORM))
        optimizer.step()
        losses.append(total)
    return torch.stack(losses), torch.stack(norms)


def whole(value):
    """All of a value, on every rank; of experts cut by tensor parallelism, whose mesh has no groups, what lies here."""
    if not hasattr(value, "full_tensor"):
        return value
    return value.to_local() if value.device_mesh.mesh_dim_names == ("experts", "expert_shards") else value.full_tensor()


def values_of(model):
    """The state of a model, wrapped or not, whole where it is a DTensor."""
    inner = model.module if hasattr(model, "module") else model
    return {name: whole(value).detach().clone() for name, value in inner.state_dict().items()}


def adamw(model, **options):
    """As the README has it."""
    return torch.optim.AdamW([{"params": group} for group in split_parameters(model)], lr=1e-2, **options)


def train(group, sizes, data, batches, options):
    """``batches[step][rank]`` are lists of micro-batches."""
    model = parallelize(Model(), mesh_of(**sizes), data=data)
    mine = [step[dist.get_rank(group)] for step in batches]
    losses, norms = take_steps(model, adamw(model, **options), mine, clip_grad_norm)
    dist.all_reduce(losses)
    marks = {name: (p.expert, getattr(p, "allreduce", True)) for name, p in model.named_parameters() if ".experts." in name}
    return losses / dist.get_world_size(group), norms, values_of(model), marks
