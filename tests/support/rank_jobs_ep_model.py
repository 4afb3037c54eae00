"""What the ranks do for the model of expert parallelism: move real tokens, and count what really crosses the wire."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from unittest.mock import patch

import torch
import torch.distributed as dist
from wire_counter import Wire

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

from parts.ep_movement import naive_all_to_all

from dmoe.parallel import AllToAllDispatcher, NodeDispatcher


def moved(group, choices_by_rank, num_experts, hidden, dtype, options):
    """Bytes of dmoe's dispatcher and of the naive all-to-all, forward and backward, on the wire and in the metrics."""
    ids = choices_by_rank[dist.get_rank(group)]
    x = torch.randn(len(ids), hidden, dtype=torch.float64).to(dtype).requires_grad_()
    gates = torch.rand(ids.shape, dtype=torch.float64).to(dtype).requires_grad_()
    dispatcher = AllToAllDispatcher(group, num_experts, **options)
    with Wire(group) as wire:
        arrived = dispatcher.dispatch(x, ids, gates)
        y = dispatcher.combine(arrived.x * arrived.gate_weights.sum(1, keepdim=True).to(dtype), arrived)
        forward = wire.bytes_sent
        y.sum().backward()
        found = {"forward": forward, "backward": wire.bytes_sent - forward}
    found |= {"metrics": arrived.traffic.bytes_sent, "naive_metrics": arrived.traffic.naive_bytes_sent}
    if num_experts % dist.get_world_size(group) == 0:  # the naive one knows no experts in pieces
        with Wire(group) as wire:
            y = naive_all_to_all(x, ids, gates, num_experts, lambda rows, expert: rows * 2, group)
            forward = wire.bytes_sent
            y.sum().backward()
        found |= {"naive_forward": forward, "naive_backward": wire.bytes_sent - forward}
    return found


def moved_in_two_levels(group, choices_by_rank, num_experts, hidden, size, by_node=False):
    """Bytes by hop over nodes of ``size`` ranks, counts apart: on the wire by group, and in the metrics."""
    from dmoe.parallel import TwoLevel

    world, me = dist.get_world_size(group), dist.get_rank(group)
    inner = [dist.new_group(list(range(n, n + size))) for n in range(0, world, size)]
    outer = [dist.new_group(list(range(place, world, size))) for place in range(size)]
    two_level = TwoLevel(inner=inner[me // size], outer=outer[me % size])
    kinds = {two_level.inner: "inside", two_level.outer: "between"}
    sent, real = {"inside": 0, "between": 0, "calls": 0}, dist.all_to_all_single

    def counting(output, input, output_splits=None, input_splits=None, group=None, async_op=False):
        if input.dtype == torch.uint8:  # rows travel as bytes, counts as integers
            splits = input_splits or [input.shape[0] // dist.get_world_size(group)] * dist.get_world_size(group)
            sent[kinds[group]] += input.shape[1] * (sum(splits) - splits[dist.get_rank(group)])
            sent["calls"] += 1
        return real(output, input, output_splits, input_splits, group=group, async_op=async_op)

    ids = choices_by_rank[me]
    dispatcher = (NodeDispatcher if by_node else AllToAllDispatcher)(group, num_experts, two_level=two_level)
    with patch.object(dist, "all_to_all_single", counting):
        arrived = dispatcher.dispatch(torch.randn(len(ids), hidden), ids, torch.rand(ids.shape))
        dispatcher.combine(arrived.x, arrived)
    return sent, arrived.traffic


class Fragile:
    """A rank for the benchmark's own processes: it raises, ends, or answers."""

    def __init__(self, rank, world, folder):
        self.rank, self.world = rank, world

    def fine(self):
        return self.rank, self.world

    def raises_on(self, rank):
        if self.rank == rank:
            raise ValueError("no such tokens")

    def ends_on(self, rank):
        if self.rank == rank:
            os._exit(3)
