"""Jobs of a :class:`rank_pool.RankPool` in which work lies between the halves of dispatch and combine."""

from __future__ import annotations

from unittest.mock import patch

import torch
import torch.distributed as dist
from rank_jobs_sharding import dispatcher_of, own_weights
from wire_counter import Wire

from dmoe import ExpertWeights, MoE, run_experts
from dmoe.ops import moe_mlp_deferred
from dmoe.parallel import run_overlapped


class Noted:
    """A collective's work whose wait is written down."""

    def __init__(self, order, work, what):
        self._order, self._work, self._what = order, work, what

    def wait(self):
        self._order.append(f"wait for {self._what}")
        return self._work.wait()


def noting(order, hidden, top_k):
    """Write down every exchange, and what waits for it; float64 rows and choices are told apart by their bytes."""
    real = dist.all_to_all_single

    def noted(output, input, *args, **kwargs):
        width = input.shape[1] if input.dtype == torch.uint8 else 0
        what = {hidden * 8: "rows", 2 * top_k * 8: "choices", 0: "counts"}[width]
        order.append(f"start {what}")
        work = real(output, input, *args, **kwargs)
        return Noted(order, work, what) if kwargs.get("async_op") else work

    return patch.object(dist, "all_to_all_single", noted)


def noting_weights(order):
    """Write down where backward computes the gradients of deferred weights."""
    real = moe_mlp_deferred._weights

    def noted(*arguments):
        order.append("weights")
        return real(*arguments)

    return patch.object(moe_mlp_deferred, "_weights", noted)


def in_halves(group, grid, share, weights, options):
    """What happens in which order when a caller works between the halves: in forward, in backward; y and x's gradient.

    Between the halves of dispatch x goes through ``3 x``, between those of combine through ``5 x``.
    """
    x, ids, gates, grad_y = share[dist.get_rank(group)]
    dispatcher = dispatcher_of(weights[1].shape[0], grid)
    _, own = own_weights(weights, dispatcher, options["gated"])
    x, gates = x.clone().requires_grad_(), gates.clone().requires_grad_()
    order = []

    def work(factor, what):
        order.append(what)
        y = x * factor
        y.register_hook(lambda grad: order.append(what))
        return y

    with noting(order, x.shape[1], ids.shape[1]), noting_weights(order):
        under_way = dispatcher.start_dispatch(x, ids, gates)
        one = work(3, "work in dispatch")
        own = own.deferred()
        arrived = dispatcher.finish_dispatch(under_way)
        y = run_experts(arrived.x, arrived.plan, arrived.gate_weights, own, **options["run"])
        y.register_hook(lambda grad: order.append("experts"))
        order.append("experts")
        returning = dispatcher.start_combine(y, arrived)
        other = work(5, "work in combine")
        y = dispatcher.finish_combine(returning) + one + other
        forward = order.copy()
        order.clear()
        (y * grad_y).sum().backward()
    return forward, order, y.detach(), x.grad


@torch.backends.mkldnn.flags(enabled=False)
def chunked(group, grid, shares, weights, options, degree, max_rows_received=None):
    """:func:`run_overlapped`, forward and backward, with the order of what happens in both."""
    x, ids, gates, grad_y = shares[dist.get_rank(group)]
    dispatcher = dispatcher_of(weights[1].shape[0], grid, max_rows_received)
    leaves, own = own_weights(weights, dispatcher, options["gated"])
    x, gates = x.clone().requires_grad_(), gates.clone().requires_grad_()
    order, whole = [], (own.up_proj, own.down_proj, own.up_bias, own.down_bias)
    parts = list(zip(*([None] * degree if w is None else w.chunk(degree) for w in whole), strict=True))
    deferred = {}

    def on_the_way(chunk):
        order.append(f"on the way {chunk}")
        deferred[chunk] = ExpertWeights(*parts[chunk], gated=own.gated).deferred()

    def experts(chunk, arrived):
        order.append(f"experts {chunk}")
        y = run_experts(arrived.x, arrived.plan, arrived.gate_weights, deferred[chunk], **options["run"])
        if y.requires_grad:
            y.register_hook(lambda grad: order.append(f"experts {chunk}"))
        return y

    with Wire() as wire, noting(order, x.shape[1], ids.shape[1]), noting_weights(order):
        result = run_overlapped(dispatcher, experts, x, ids, gates, degree=degree, on_the_way=on_the_way)
        sent, forward = wire.bytes_sent, order.copy()
        order.clear()
        (result.y * grad_y).sum().backward()
    traffic = [chunk.traffic for chunk in result.chunks]
    return {
        "y": result.y.detach(),
        "x": x.grad,
        "gates": gates.grad,
        "weights": [None if w is None else w.grad for w in leaves],
        "kept": result.kept_per_expert,
        "bytes_sent": sum(one.bytes_sent for one in traffic),
        "naive_rows_sent": None if max_rows_received is not None else sum(one.naive_rows_sent for one in traffic),
        "wire": sent,
        "forward": forward,
        "backward": order,
        "place": (list(dispatcher.local_experts), dispatcher.ffn_shard),
    }


def layer(group, fields):
    """In which order a layer's backward sends, waits and computes its experts' weight gradients."""
    torch.manual_seed(0)
    moe = MoE(**fields, ep_group=group, dtype=torch.float64)
    x, order = torch.randn(5, fields["hidden_size"], dtype=torch.float64, requires_grad=True), []
    with noting(order, fields["hidden_size"], fields["top_k"]), noting_weights(order):
        y = moe(x)
        order.clear()
        y.sum().backward()
    return order
