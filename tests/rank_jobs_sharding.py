"""Jobs of a :class:`rank_pool.RankPool` in which each rank holds a slice of its experts' F."""

from __future__ import annotations

from unittest.mock import patch

import torch
import torch.distributed as dist

from dmoe.experts import ExpertWeights, run_experts
from dmoe.parallel import AllToAllDispatcher

_GROUPS = {}


def make_groups(group):
    """All groups that grids of up to 4 ranks consist of, once; a job for all ranks, members or not."""
    members = [(0,), (1,), (2,), (3,), (0, 1), (2, 3), (0, 2), (1, 3), (0, 1, 2, 3)]
    if not _GROUPS:
        _GROUPS.update({ranks: dist.new_group(list(ranks)) for ranks in members})


class Wire:
    """Counts the bytes that really go to other ranks inside, in whichever group, and the calls."""

    def __init__(self):
        self.bytes_sent, self.calls = 0, []

    def __enter__(self):
        exchange, gather = dist.all_to_all_single, dist.all_gather_into_tensor

        def exchanging(output, input, output_splits=None, input_splits=None, group=None, async_op=False):
            ranks, me = dist.get_world_size(group), dist.get_rank(group)
            splits = input_splits or [input.shape[0] // ranks] * ranks
            row = input[:1].numel() * input.element_size() if input.shape[0] else 0
            self.bytes_sent += row * (sum(splits) - splits[me])
            self.calls.append("exchange")
            return exchange(output, input, output_splits, input_splits, group=group, async_op=async_op)

        def gathering(output, input, group=None, async_op=False):
            self.bytes_sent += input.numel() * input.element_size() * (dist.get_world_size(group) - 1)
            self.calls.append("gather")
            return gather(output, input, group=group, async_op=async_op)

        self._patch = patch.multiple(dist, all_to_all_single=exchanging, all_gather_into_tensor=gathering)
        self._patch.__enter__()
        return self

    def __exit__(self, *error):
        self._patch.__exit__(*error)


def dispatcher_of(num_experts, grid, max_rows_received=None):
    """The dispatcher of this rank, ``ep * tp_size + tp`` of the grid."""
    ep_size, _ = grid
    return AllToAllDispatcher(_GROUPS[tuple(range(ep_size))], num_experts, max_rows_received=max_rows_received)


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
        "traffic": arrived.traffic,
        "bytes_sent": arrived.traffic.bytes_sent,
        "naive_bytes_sent": arrived.traffic.naive_bytes_sent,
        "wire": wire.bytes_sent,
        "calls": wire.calls,
        "kept": arrived.kept_per_expert,
        "place": (list(dispatcher.local_experts), dispatcher.ffn_shard),
    }
