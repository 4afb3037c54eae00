"""Layers on ranks that are moved, compiled, loaded and frozen."""

from __future__ import annotations

import copy
import io

import torch
import torch.distributed as dist
from rank_jobs import plain
from rank_jobs_training import grid

import dmoe
from dmoe import MoE
from dmoe.parallel import data_parallel, grad_norm, split_parameters


def build(fields, **options):
    torch.manual_seed(0)
    return MoE(**fields, **options)


def moved(group, fields, dtensor):
    """Marks after changes of dtype and after ``to_empty``, and what depends on them."""
    layers = [build(fields, ep_group=group, dtensor=dtensor).to(torch.bfloat16).double()]
    layers.append(build(fields, ep_group=group, dtensor=dtensor, device="meta").to_empty(device="cpu"))
    torch.manual_seed(0)
    for module in layers[1].modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    told = []
    for layer in layers:
        dtype = layer.router.weight.dtype
        x = torch.randn(3 + dist.get_rank(group), layer.config.hidden_size, dtype=dtype)
        model = data_parallel(layer)  # has to live until backward is over
        model(x).sum().backward()
        marks = {(p.expert, p.allreduce) for p in layer.experts.parameters()}
        told.append((marks, [len(one) for one in split_parameters(layer)], grad_norm(layer)))
    return told


def filed(group, fields):
    """Plain experts through a file, and whether they are the same."""
    experts = build(fields, ep_group=group, dtensor=False).experts
    file = io.BytesIO()
    torch.save(experts, file)
    file.seek(0)
    again = torch.load(file, weights_only=False)
    return all(torch.equal(a, b) for a, b in zip(experts.parameters(), again.parameters(), strict=True))


def compiled(group, fields):
    """Differences between a layer and its compiled copy: outputs and gradients."""
    layer = build(fields, ep_group=group)
    twin = copy.deepcopy(layer)
    torch.manual_seed(dist.get_rank(group))
    x = torch.randn(5, layer.config.hidden_size)
    differences = []
    for function, module in ((layer, layer), (torch.compile(twin, backend="aot_eager"), twin)):
        leaf = x.clone().requires_grad_()
        y = function(leaf)
        (y.square().sum() + dmoe.aux_loss(module)).backward()
        differences.append([y.detach(), leaf.grad, *(plain(p.grad) for p in module.parameters())])
    return [(a - b).abs().max() for a, b in zip(*differences, strict=True)]


def biases(group, fields, tokens):
    """Two micro-batches under data parallelism, then the selection bias: the load counted here, and the bias."""
    mesh = grid(2, dist.get_world_size(group) // 2)
    layer = build(fields, ep_group=mesh["ep"])
    model = data_parallel(layer, expert_replicas=mesh["replicas"].get_group())
    loads = torch.zeros(layer.config.num_experts, dtype=torch.int64)
    for micro in tokens[dist.get_rank(group)]:
        model(micro).sum().backward()
        loads += layer.last_metrics.tokens_per_expert
    counted = layer.router.load_since_update.clone()
    dmoe.update_selection_bias(layer)
    return loads, counted, layer.router.selection_bias.clone()


def frozen(group, fields, where):
    """Experts frozen everywhere under data parallelism; or on one rank alone, and what the first forward says."""
    if where == "everywhere":
        mesh = grid(2, dist.get_world_size(group) // 2)
        layer = build(fields, ep_group=mesh["ep"])
        layer.experts.requires_grad_(False)
        model = data_parallel(layer, expert_replicas=mesh["replicas"].get_group())
        model(torch.ones(3, layer.config.hidden_size)).sum().backward()
        return all(p.grad is None for p in layer.experts.parameters())
    layer = build(fields, ep_group=group)
    layer.experts.requires_grad_(dist.get_rank(group) != 1)
    return layer(torch.ones(3, layer.config.hidden_size))


def norms_without_gradients(group, fields):
    """The norm when one rank has no gradient of its experts: every rank still gets the same."""
    layer = build(fields, ep_group=group)
    layer(torch.ones(3, layer.config.hidden_size)).sum().backward()
    if dist.get_rank(group) == 1:
        for parameter in layer.experts.parameters():
            parameter.grad = None
    return grad_norm(layer)


def loaded(group, fields, dtensor, state, x):
    """A layer on ranks with the values of a whole one."""
    layer = build(fields, ep_group=group, dtensor=dtensor)
    layer.load_state_dict(state)
    return layer(x).detach()


def without_loss_group(group, fields, where):
    """A first forward of layers of which one was not told its ``loss_group``."""
    pairs = [dist.new_group(ranks) for ranks in ([0, 1], [2, 3])]
    mine = None if dist.get_rank(group) == where else pairs[dist.get_rank(group) // 2]
    build(fields, ep_group=group, loss_group=mine)(torch.zeros(2, fields["hidden_size"]))


def chunks_under_fsdp(group, fields):
    """A forward in chunks of experts that FSDP shards."""
    from dmoe.parallel import fully_shard_experts

    mesh = grid(2, 2)
    layer = build({**fields, "overlap_degree": 2}, ep_group=mesh["ep"])
    fully_shard_experts(layer, mesh["replicas"])
    layer(torch.zeros(2, fields["hidden_size"]))
