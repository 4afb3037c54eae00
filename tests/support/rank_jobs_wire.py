"""Jobs of a :class:`rank_pool.RankPool` for rows that travel narrow or in two hops; arguments as in rank_jobs.py."""

from __future__ import annotations

import copy
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from wire_counter import Wire

from dmoe import ExpertWeights, run_experts
from dmoe.parallel import (
    AllToAllDispatcher,
    Exchange,
    NarrowExchange,
    NodeDispatcher,
    TwoLevel,
    TwoLevelExchange,
    mesh_group,
    run_overlapped,
)


def gradients(x, exchange, factor):
    """What arrives, the gradients of ``sum(factor * received ** 3)``, and those of the sum of these gradients."""
    x = x.clone().requires_grad_()
    y = exchange.finish(exchange.start(x))
    loss = (y**3 * factor).sum()
    (once,) = torch.autograd.grad(loss, x, retain_graph=True)
    (again,) = torch.autograd.grad(loss, x, create_graph=True)
    (twice,) = torch.autograd.grad(again.sum(), x)
    return y.detach(), once, again.detach(), twice


def narrow(group, rows, counts, factors, kind, narrow_gradients):
    """A narrow exchange and its gradients; the arguments as in rank_jobs.exchange_gradients."""
    me = dist.get_rank(group)
    exchange = NarrowExchange(Exchange(counts[me], [sent[me] for sent in counts], group), kind, narrow_gradients)
    return gradients(rows[me], exchange, factors[me])


_LEVELS = {}  # groups cost more than the jobs that use them


def levels_of(shape):
    """Groups of all ranks as so many nodes of so many ranks."""
    if shape not in _LEVELS:
        _LEVELS[shape] = TwoLevel.of_mesh(init_device_mesh("cpu", shape))
    return _LEVELS[shape]


def two_level(group, shape, rows, counts, held, factors, back):
    """An exchange in two hops and its gradients; and what is in the memory behind rows that need less than given."""
    me = dist.get_rank(group)
    sent, received = counts[me], [sent[me] for sent in counts]
    exchange = TwoLevelExchange(sent, received, held[me], levels_of(shape), back=back)
    results = gradients(rows[me], exchange, factors[me])
    home = exchange.reversed(len(rows[me]))
    return *results, home.finish(home.start(results[0]))


def two_level_copy(group, shape, rows, counts, held):
    """Rows of any dtype in two hops."""
    me = dist.get_rank(group)
    exchange = TwoLevelExchange(counts[me], [sent[me] for sent in counts], held[me], levels_of(shape))
    return exchange.finish(exchange.start(rows[me]))


def two_level_order(group, shape, rows, counts, held):
    """In which order the hops and the work between the halves happen, forward and backward."""
    me, levels = dist.get_rank(group), levels_of(shape)
    exchange = TwoLevelExchange(counts[me], [sent[me] for sent in counts], held[me], levels)
    x, order, real = rows[me].requires_grad_(), [], dist.all_to_all_single

    def noting(*args, group, **kwargs):
        order.append("inside" if group is levels.inner else "between")
        return real(*args, group=group, **kwargs)

    with patch.object(dist, "all_to_all_single", noting):
        under_way = exchange.start(x)
        order.append("work")
        work = x * 3
        work.register_hook(lambda grad: order.append("work"))
        y = exchange.finish(under_way)
        (y.sum() + work.sum()).backward()
    return order


def chunks_in_two_hops(group, by_node, wire):
    """In which order hops of rows begin, and chunks are computed; and how far y is from that of one hop, in chunks."""
    levels, order, real = levels_of((2, 2)), [], dist.all_to_all_single
    kind = NodeDispatcher if by_node else AllToAllDispatcher
    options = {"join_choices": True, **wire}
    torch.manual_seed(dist.get_rank(group))
    x, ids, gates = torch.randn(9, 4).double(), torch.rand(9, 8).topk(3).indices, torch.rand(9, 3).double()

    def noting(received, sent, *args, group, **kwargs):
        if sent.dtype == torch.uint8:  # rows; counts are integers
            order.append("inside" if group is levels.inner else "between")
        return real(received, sent, *args, group=group, **kwargs)

    def experts(chunk, arrived):
        order.append(f"experts {chunk}")
        return arrived.x * arrived.gate_weights.sum(1, keepdim=True)

    with patch.object(dist, "all_to_all_single", noting):
        y = run_overlapped(kind(group, 8, two_level=levels, **options), experts, x, ids, gates, degree=2).y
        hops = list(order)
        flat = run_overlapped(AllToAllDispatcher(group, 8, **options), experts, x, ids, gates, degree=2).y
    return hops, (y - flat).abs().max().item()


def two_level_refused(group, kind):
    """What is said to groups that do not fit."""
    levels = levels_of((2, 2))
    kinds = {
        "swapped": lambda: AllToAllDispatcher(group, 4, two_level=TwoLevel(inner=levels.outer, outer=levels.inner)),
        "outer": lambda: AllToAllDispatcher(group, 4, two_level=TwoLevel(inner=levels.inner, outer=levels.inner)),
        "mesh": lambda: TwoLevel.of_mesh(init_device_mesh("cpu", (4,))),
        "counts": lambda: TwoLevelExchange([1] * 4, [1] * 4, [1] * 3, levels, "tokens"),
        "negative": lambda: TwoLevelExchange([1] * 4, [1, 1, 1, -1], [1] * 4, levels, "tokens"),
        "few": lambda: TwoLevelExchange([1] * 4, [1] * 4, [1] * 4, levels, "tokens").start(torch.zeros(3, 2)),
    }
    try:
        kinds[kind]()
    except ValueError as error:
        return str(error)
    return "built"


def mesh_groups(group):
    """Global ranks of the group of a mesh of all ranks, and of a part of one."""
    whole = init_device_mesh("cpu", (2, 2))
    part = init_device_mesh("cpu", (2, 1, 2), mesh_dim_names=("dp", "node", "local"))["node", "local"]
    return mesh_group(whole) is dist.group.WORLD, dist.get_process_group_ranks(mesh_group(part))


def experts(group, shares, weights, options, dispatcher_options, shape=None, needs="both"):
    """Dispatch, experts and combine, forward and backward. Weights are all experts', a share is (x, ids, gates, dy).

    ``needs``: which of x and the gates has a gradient.
    """
    x, ids, gates, grad_y = shares[dist.get_rank(group)]
    levels = None if shape is None else levels_of(shape)
    kind = NodeDispatcher if dispatcher_options.pop("by_node", False) else AllToAllDispatcher
    dispatcher = kind(group, weights[1].shape[0], two_level=levels, **dispatcher_options)
    dispatcher = copy.deepcopy(dispatcher)  # the same options, and the same groups
    mine = slice(dispatcher.local_experts.start, dispatcher.local_experts.stop)
    own = [None if w is None else w[mine].clone().requires_grad_() for w in weights]
    x, gates = x.clone().requires_grad_(needs != "gates"), gates.clone().requires_grad_(needs != "x")
    with Wire() as wire:
        arrived = dispatcher.dispatch(x, ids, gates)
        y = run_experts(
            arrived.x, arrived.plan, arrived.gate_weights, ExpertWeights(*own, gated=options["gated"]), **options["run"]
        )
        y = dispatcher.combine(y, arrived)
    with Wire() as wire_back:
        (y * grad_y).sum().backward()
    return {
        "y": y.detach(),
        "x": x.grad,
        "gates": gates.grad,
        "weights": [None if w is None else w.grad for w in own],
        "arrived": arrived.x.detach(),
        "traffic": arrived.traffic,
        "kept": arrived.kept_per_expert,
        "bytes_sent": arrived.traffic.bytes_sent,
        "wire": [wire.by_group.get(g) for g in ((group,) if levels is None else (levels.inner, levels.outer))],
        "wire_bytes": wire.sum("bytes"),
        "wire_bytes_back": wire_back.sum("bytes"),
        "calls": wire.calls,
        "calls_back": wire_back.calls,
    }


def no_node_dispatcher(group):
    """What is said to experts that nodes share, and to a bound of rows."""
    told = []
    for experts, options in ((1, {}), (4, {"max_rows_received": 8})):
        try:
            NodeDispatcher(group, experts, two_level=levels_of((2, 2)), **options)
        except ValueError as error:
            told.append(str(error))
    return told


def joins(group, join_choices):
    """Whether choices travel with the tokens here, and would among 64 ranks."""
    dispatcher = AllToAllDispatcher(group, 4, join_choices=join_choices)
    here, dispatcher.world_size = dispatcher.joins, 64
    return here, dispatcher.joins


def differing_wires(group, by_rank):
    """Dispatch with another wire on some ranks."""
    wire_dtype, wire_backward = by_rank[dist.get_rank(group)]
    dispatcher = AllToAllDispatcher(group, 4, wire_dtype=wire_dtype, wire_backward=wire_backward)
    dispatcher.dispatch(torch.zeros(3, 2), torch.zeros(3, 1, dtype=torch.int64), torch.zeros(3, 1))
