"""Jobs of a :class:`rank_pool.RankPool` with ranks that are made level by copies of experts."""

from __future__ import annotations

import contextlib

import torch
import torch.distributed as dist
from rank_jobs import groups_of, plain
from rank_jobs_training import grid
from torch.utils.checkpoint import checkpoint
from wire_counter import Wire

from dmoe import MoE
from dmoe.parallel import data_parallel, fully_shard_experts


def _layer(group, fields, seed, dtype, arrangement):
    torch.manual_seed(seed)
    return MoE(**fields, **groups_of(group, arrangement), dtype=dtype)


def layer(group, fields, seed, dtype, shares, arrangement="flat", how="plain"):
    """Forward and backward of this rank's share (x, dy, ids); ``how``: in what circumstances."""
    module = _layer(group, fields, seed, dtype, arrangement)
    x, grad_y, ids = shares[dist.get_rank()]
    x = x.clone().requires_grad_()
    if how == "frozen":
        module.experts.requires_grad_(False)
    if how == "main_grad":
        for parameter in module.experts.parameters():
            parameter.main_grad = torch.zeros_like(plain(parameter.detach()), dtype=torch.float32)
    cast = torch.autocast("cpu", torch.bfloat16) if how == "autocast" else contextlib.nullcontext()
    with cast, Wire() as wire:
        if how == "checkpoint":
            y = checkpoint(lambda x: module(x, expert_indices=ids), x, use_reentrant=False)
        else:
            y = module(x, expert_indices=ids)
        sent = wire.bytes_sent
    with Wire() as wire:
        (y * grad_y).sum().backward()
    metrics = module.last_metrics
    gradients = {name: plain(p.grad) for name, p in module.named_parameters() if p.grad is not None}
    if how == "main_grad":
        gradients = {f"experts.{name}": p.main_grad for name, p in module.experts.named_parameters()}
    return {
        "y": y.detach(),
        "x": x.grad,
        "gradients": gradients,
        "rank_rows": (metrics.rank_rows_unbalanced, metrics.rank_rows),
        "kept": metrics.kept_per_expert,
        "sent": (metrics.bytes_sent, sent),
        "sent_back": wire.bytes_sent,
        "hosted": metrics.copies_hosted,
    }


def train(group, fields, seed, batches, wrapper="ddp", replicas=1):
    """AdamW steps on this rank's batches, (x, ids) each: parameters, a state dict of all experts, and what was lent."""
    mesh = grid(replicas, dist.get_world_size(group) // replicas)
    torch.manual_seed(seed)
    module = MoE(**fields, ep_group=mesh["ep"], dtype=torch.float64)
    if wrapper == "fsdp":
        from torch.distributed.fsdp import fully_shard

        fully_shard_experts(module, mesh["replicas"])
        model = fully_shard(module, mesh=grid(1, dist.get_world_size(group))["ep"])
    else:
        held = mesh["replicas"].get_group() if replicas > 1 else None
        model = data_parallel(module, expert_replicas=held)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    levels = []
    for x, ids in (batch[dist.get_rank(group)] for batch in batches):
        optimizer.zero_grad()
        model(x, expert_indices=ids).square().sum().backward()
        optimizer.step()
        levels.append(module.last_metrics.rank_rows)
    return {name: full(value) for name, value in module.state_dict().items()}, levels


def full(tensor):
    """All of a parameter, wherever its parts are."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def refused(group, fields, prepare):
    """What a forward says after ``prepare`` did something to the layer, on this rank."""
    module = _layer(group, fields, 3, torch.float64, "flat")
    prepare(module)
    try:
        module(torch.zeros(2, fields["hidden_size"], dtype=torch.float64))
    except ValueError as error:
        return str(error)
