"""What the ranks of a :class:`rank_pool.RankPool` are told to do; arguments hold every rank's share, by rank."""

from __future__ import annotations

import datetime
import os
from unittest.mock import patch

import torch
import torch.distributed as dist
from patience import MOMENT, PATIENCE
from wire_counter import Wire

from dmoe import ExpertWeights, MoE, aux_loss, run_experts
from dmoe.parallel import AllToAllDispatcher, Exchange, all_to_all_rows


def exchange(group, rows, counts):
    """Rows of every rank to every rank; ``counts[i][j]`` of them from rank i to j. Returns what arrived."""
    me = dist.get_rank(group)
    return all_to_all_rows(rows[me], counts[me], [sent[me] for sent in counts], group)


def exchange_gradients(group, rows, counts, factors):
    """Gradients of ``sum(factor * received ** 3)``, and those of the sum of these gradients."""
    me = dist.get_rank(group)
    recv = [sent[me] for sent in counts]
    x = rows[me].requires_grad_()
    y = all_to_all_rows(x, counts[me], recv, group)
    loss = (y**3 * factors[me]).sum()
    (once,) = torch.autograd.grad(loss, x, retain_graph=True)
    (again,) = torch.autograd.grad(loss, x, create_graph=True)
    (twice,) = torch.autograd.grad(again.sum(), x)
    return once, again.detach(), twice


def overlapped(group, rows, counts):
    """Two exchanges under way at once, finished in the other order, with work between; in backward, too."""
    me = dist.get_rank(group)
    recv = [sent[me] for sent in counts]
    x = rows[me].requires_grad_()
    first, second = (Exchange(counts[me], recv, group) for _ in range(2))
    order, real = [], dist.all_to_all_single

    def noting(*args, **kwargs):
        order.append("exchange")
        return real(*args, **kwargs)

    with patch.object(dist, "all_to_all_single", noting):
        one, two = first.start(x), second.start(2 * x)
        between = x * 3
        between.register_hook(lambda grad: order.append("between"))
        y2, y1 = second.finish(two), first.finish(one)
        order.clear()
        loss = y1.sum() + y2.square().sum() + between.sum()
        loss.backward()
    return y1.detach(), y2.detach(), x.grad, order


def experts(group, shares, weights, options, max_rows_received=None):
    """Dispatch, experts and combine, forward and backward. Weights are all experts', a share is (x, ids, gates, dy)."""
    x, ids, gates, grad_y = shares[dist.get_rank(group)]
    num_experts = weights[1].shape[0]
    dispatcher = AllToAllDispatcher(group, num_experts, max_rows_received=max_rows_received)
    mine = slice(dispatcher.local_experts.start, dispatcher.local_experts.stop)
    own = [None if w is None else w[mine].clone().requires_grad_() for w in weights]
    x, gates = x.clone().requires_grad_(), gates.clone().requires_grad_()
    with Wire(group) as wire:
        arrived = dispatcher.dispatch(x, ids, gates)
        calls = wire.calls
        y = run_experts(
            arrived.x, arrived.plan, arrived.gate_weights, ExpertWeights(*own, gated=options["gated"]), **options["run"]
        )
        y = dispatcher.combine(y, arrived)
    (y * grad_y).sum().backward()
    return {
        "y": y.detach(),
        "x": x.grad,
        "gates": gates.grad,
        "weights": [None if w is None else w.grad for w in own],
        "arrived": arrived.x.detach(),
        "rows": arrived.plan.num_rows,
        "traffic": arrived.traffic,
        "bytes_sent": arrived.traffic.bytes_sent,
        "naive_bytes_sent": arrived.traffic.naive_bytes_sent,
        "wire": wire.bytes_sent,
        "dispatch_calls": calls,
        "kept": arrived.kept_per_expert,
    }


def mismatched(group, by_rank):
    """Dispatch rows that differ between ranks in width, dtype, K or the need of a gradient."""
    hidden, top_k, dtype, needs = by_rank[dist.get_rank(group)]
    x = torch.zeros(3, hidden, dtype=dtype, requires_grad=needs)
    ids = torch.zeros(3, top_k, dtype=torch.int64)
    AllToAllDispatcher(group, 4).dispatch(x, ids, torch.zeros(3, top_k))


def plain(tensor):
    """What this rank has of a parameter or its gradient."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


_MESHES = {}


def mesh_of(world, columns):
    """A mesh of (world / columns, columns) ranks, made once: every new group costs time."""
    from torch.distributed.device_mesh import init_device_mesh

    if (world, columns) not in _MESHES:
        shape = (world // columns, columns)
        _MESHES[world, columns] = init_device_mesh("cpu", shape, mesh_dim_names=("rows", "columns"))
    return _MESHES[world, columns]


def groups_of(group, arrangement):
    """Arguments of the layer: experts over all ranks, or in a grid with tensor parallelism, or in two hops."""
    if arrangement == "flat":
        return {"ep_group": group}
    kind, columns = arrangement
    mesh = mesh_of(dist.get_world_size(group), columns)
    if kind == "levels":
        return {"ep_levels": mesh}
    return {"ep_group": mesh["rows"], "expert_tp_group": mesh["columns"]}


def _layer(group, fields, seed, dtype=torch.float64, arrangement="flat"):
    torch.manual_seed(seed)
    return MoE(**fields, **groups_of(group, arrangement), dtype=dtype)


def layer(group, fields, seed, dtype, shares, autocast=None, arrangement="flat"):
    """A layer's forward and backward on this rank's share (x, dy, mask): results, gradients, metrics."""
    module = _layer(group, fields, seed, dtype, arrangement)
    group = group if arrangement == "flat" else None
    x, grad_y, mask = shares[dist.get_rank()]
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None), Wire(group) as wire:
        y = module(x, token_mask=mask)
        sent = wire.bytes_sent
    loss = aux_loss(module)
    ((y * grad_y).sum() + loss).backward()
    metrics = module.last_metrics
    return {
        "y": y.detach(),
        "x": x.grad,
        "loss": loss.detach(),
        "parameters": {name: plain(p.detach()) for name, p in module.named_parameters()},
        "gradients": {name: plain(p.grad) for name, p in module.named_parameters()},
        "marks": {name: (p.expert, p.allreduce) for name, p in module.experts.named_parameters()},
        "wire": sent,
        "bytes_sent": metrics.bytes_sent,
        "naive_bytes_sent": metrics.naive_bytes_sent,
        "tokens_per_expert": metrics.tokens_per_expert,
        "kept_per_expert": metrics.kept_per_expert,
        "rank_rows": (metrics.rank_rows_unbalanced, metrics.rank_rows),
        "rows_dropped": metrics.rows_dropped,
    }


def train(group, fields, seed, batches, steps):
    """Optimizer steps on this rank's batches, the other parameters' gradients averaged by hand; the parameters."""
    module = _layer(group, fields, seed)
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.05)
    for step in range(steps):
        x = batches[step][dist.get_rank(group)]
        optimizer.zero_grad()
        (module(x).square().sum() + aux_loss(module)).backward()
        for parameter in module.parameters():
            if getattr(parameter, "allreduce", True):
                dist.all_reduce(parameter.grad, group=group)
                parameter.grad /= dist.get_world_size(group)
        optimizer.step()
        module.update_selection_bias()
    return {name: plain(value) for name, value in module.state_dict().items()}


def disagree(group, fields_by_rank, seeds, dtypes):
    """A first forward of layers that differ between ranks, with this rank's own width of x."""
    me = dist.get_rank(group)
    module = _layer(group, fields_by_rank[me], seeds[me], dtypes[me])
    module(torch.zeros(2, module.config.hidden_size, dtype=dtypes[me]))


def loaded_alike(group, fields):
    """Ranks that seeded differently, and then load the same router: no disagreement any more."""
    module = _layer(group, fields, dist.get_rank(group))
    state = module.state_dict()
    torch.manual_seed(0)
    state["router.weight"] = torch.randn_like(state["router.weight"])
    module.load_state_dict(state)
    return module(torch.ones(2, module.config.hidden_size, dtype=torch.float64)).shape


def constructor_error(group, fields, as_group=None):
    """What the constructor says."""
    try:
        MoE(**fields, ep_group=group if as_group is None else as_group)
    except (ValueError, TypeError) as error:
        return f"{type(error).__name__}: {error}"
    return "built"


def by_mesh(group, fields, seed, x):
    """A layer on the one-dimensional mesh of all ranks, and what a two-dimensional one is told; a copy of the layer."""
    import copy
    import pickle

    from torch.distributed.device_mesh import init_device_mesh

    world = dist.get_world_size()
    mesh = init_device_mesh("cpu", (world,), mesh_dim_names=("ep",))
    square = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("dp", "ep"))
    module = _layer(mesh, fields, seed)
    twin = copy.deepcopy(module)
    try:
        pickle.dumps(module)
    except TypeError as error:
        told = str(error)
    share = x[dist.get_rank()]
    inner = _layer(square["ep"], fields, seed)
    sizes = len(inner.experts.owned.experts)
    return module(share), twin(share), inner(share), sizes, told, constructor_error(None, fields, square)


def die(group, fields, where, victim):
    """One healthy step; then the victim's process ends at some point of the second, and the others notice."""
    module = _layer(group, fields, 0)
    x = torch.randn(4, module.config.hidden_size, dtype=torch.float64, requires_grad=True)
    module(x).sum().backward()
    me = dist.get_rank(group)
    if me == victim and where == "before":
        os._exit(1)
    store = dist.distributed_c10d._get_default_store()
    if where == "absent":
        dist.distributed_c10d._set_pg_timeout(datetime.timedelta(seconds=MOMENT), group)
        if me == victim:  # the others wait for it, and give up
            others = [f"rank {rank} gave up" for rank in range(dist.get_world_size(group)) if rank != victim]
            store.wait(others, datetime.timedelta(seconds=PATIENCE))
    if me == victim and where == "experts":
        module.experts.register_forward_pre_hook(lambda *_: os._exit(1))
    try:
        y = module(x)
    except RuntimeError:
        store.set(f"rank {me} gave up", "")
        raise
    if me == victim and where == "backward":
        os._exit(1)
    y.sum().backward()
