"""What the ranks do for the model of expert parallelism: move real tokens, and count what really crosses the wire."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from rank_jobs import Wire

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

from _ep_movement import naive_all_to_all

from dmoe.parallel import AllToAllDispatcher


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
