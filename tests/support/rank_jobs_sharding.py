"""Jobs of a :class:`rank_pool.RankPool` in which each rank holds a slice of its experts' F."""

from __future__ import annotations

import torch
import torch.distributed as dist
from wire_counter import Wire

from dmoe import ExpertWeights, run_experts
from dmoe.parallel import AllToAllDispatcher
from dmoe.parallel.tensor_parallel import TensorParallel

_GROUPS = {}


def make_groups(group):
    """All groups that grids of up to 4 ranks consist of, once; a job for all ranks, members or not."""
    members = [(0,), (1,), (2,), (3,), (0, 1), (2, 3), (0, 2), (1, 3), (0, 1, 2, 3)]
    if not _GROUPS:
        _GROUPS.update({ranks: dist.new_group(list(ranks)) for ranks in members})


def dispatcher_of(num_experts, grid, max_rows_received=None):
    """The dispatcher of this rank, ``ep * tp_size + tp`` of the grid."""
    ep_size, tp_size = grid
    world, (ep, tp) = ep_size * tp_size, divmod(dist.get_rank(), tp_size)
    group = _GROUPS[tuple(range(tp, world, tp_size))]
    tp_group = _GROUPS[tuple(range(ep * tp_size, (ep + 1) * tp_size))] if tp_size > 1 else None
    return AllToAllDispatcher(group, num_experts, tp_group, max_rows_received=max_rows_received)


def own_weights(weights, dispatcher, gated):
    """This rank's part of all experts' weights, cut here by hand, as leaves; and how to run them."""
    up, down, up_bias, down_bias = weights
    (index, count), experts = dispatcher.ffn_shard, dispatcher.local_experts
    width = down.shape[2] // count
    mine, columns = slice(experts.start, experts.stop), slice(index * width, (index + 1) * width)
    leaves = [up[mine][..., columns, :], down[mine][..., columns]]
    leaves += [None if up_bias is None else up_bias[mine][..., columns], None if down_bias is None else down_bias[mine]]
    leaves = [None if leaf is None else leaf.clone().requires_grad_() for leaf in leaves]
    once = leaves[3] if index == 0 or leaves[3] is None else leaves[3] * 0  # one of the slices adds the bias
    return leaves, ExpertWeights(*leaves[:3], once, gated=gated)


# oneDNN writes code for every new shape: too long for many tiny products of all sizes.
@torch.backends.mkldnn.flags(enabled=False)
def sharded(group, grid, shares, weights, options, max_rows_received=None):
    """Dispatch, experts and combine, forward and backward. Weights are all experts', a share is (x, ids, gates, dy)."""
    x, ids, gates, grad_y = shares[dist.get_rank(group)]
    dispatcher = dispatcher_of(weights[1].shape[0], grid, max_rows_received)
    leaves, own = own_weights(weights, dispatcher, options["gated"])
    x, gates = x.clone().requires_grad_(), gates.clone().requires_grad_()
    with Wire() as wire:
        arrived = dispatcher.dispatch(x, ids, gates)
        y = dispatcher.combine(
            run_experts(arrived.x, arrived.plan, arrived.gate_weights, own, **options["run"]), arrived
        )
    (y * grad_y).sum().backward()
    return {
        "y": y.detach(),
        "x": x.grad,
        "gates": gates.grad,
        "weights": [None if w is None else w.grad for w in leaves],
        "arrived": arrived.x.detach(),
        "rows": arrived.plan.num_rows,
        "traffic": arrived.traffic,
        "bytes_sent": arrived.traffic.bytes_sent,
        "naive_bytes_sent": arrived.traffic.naive_bytes_sent,
        "wire": wire.bytes_sent,
        "calls": wire.calls,
        "kept": arrived.kept_per_expert,
        "place": (list(dispatcher.local_experts), dispatcher.ffn_shard),
    }


def mismatched(group, by_rank):
    """Dispatch rows that differ between the ranks of a 2 x 2 grid in width, dtype, K or the need of a gradient."""
    hidden, top_k, dtype, needs = by_rank[dist.get_rank(group)]
    x = torch.zeros(3, hidden, dtype=dtype, requires_grad=needs)
    ids = torch.zeros(3, top_k, dtype=torch.int64)
    dispatcher_of(4, (2, 2)).dispatch(x, ids, torch.zeros(3, top_k))


def no_grid(group):
    """What is said to groups that share more than one rank, or none but this."""
    try:
        AllToAllDispatcher(group, 4, group)
    except ValueError as error:
        return str(error)


def by_mesh(group, share, weights, options):
    """As :func:`sharded`, on the rows and columns of a mesh; and by a copy of the dispatcher."""
    import copy

    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("ep", "tp"))
    dispatcher = AllToAllDispatcher(mesh["ep"].get_group(), weights[1].shape[0], mesh["tp"].get_group())
    _, own = own_weights(weights, dispatcher, options["gated"])
    results = []
    for one in (dispatcher, copy.deepcopy(dispatcher)):
        x, ids, gates, _ = share[dist.get_rank(group)]
        arrived = one.dispatch(x, ids, gates)
        y = run_experts(arrived.x, arrived.plan, arrived.gate_weights, own, **options["run"])
        results.append(one.combine(y, arrived).detach())
    return results


def summed(group, parts):
    """Sums over slices that are each full of a number, and the gradient of rows that gets this number on each rank."""
    tensor, me = TensorParallel(group), dist.get_rank(group)
    counts = [2, 0, 1, 3]
    y = tensor.summed(torch.full((6, 3), parts[me], dtype=torch.bfloat16), counts)
    rows = torch.zeros(counts[me], 3, dtype=torch.bfloat16, requires_grad=True)
    exchange, under_way = tensor.start_gather(rows, counts, "rows")
    exchange.finish(under_way).backward(torch.full((6, 3), parts[me], dtype=torch.bfloat16))
    return y, rows.grad
