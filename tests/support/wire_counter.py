"""What really goes to other ranks: all-to-all and all-gather, watched."""

from __future__ import annotations

from unittest.mock import patch

import torch.distributed as dist

from dmoe.parallel.collectives import _GATHER as GATHER


class Wire:
    """Counts calls, messages and bytes to other ranks inside, by the group that they went over.

    Args:
        group: the only one that anything may go over; None allows every group.
    """

    def __init__(self, group=None):
        self.group, self.by_group = group, {}

    def __enter__(self):
        real = dist.all_to_all_single

        def counting(output, input, output_splits=None, input_splits=None, group=None, async_op=False):
            assert self.group is None or group is self.group
            ranks, me = dist.get_world_size(group), dist.get_rank(group)
            splits = input_splits or [input.shape[0] // ranks] * ranks
            row = input[:1].numel() * input.element_size() if input.shape[0] else 0
            entry = self.by_group.setdefault(group, {"calls": 0, "messages": 0, "bytes": 0})
            entry["calls"] += 1
            entry["messages"] += ranks - 1
            entry["bytes"] += row * (sum(splits) - splits[me])
            return real(output, input, output_splits, input_splits, group=group, async_op=async_op)

        gather = getattr(dist, GATHER)

        def counting_gather(output, input, group=None, async_op=False):
            assert self.group is None or group is self.group
            ranks = dist.get_world_size(group)
            entry = self.by_group.setdefault(group, {"calls": 0, "messages": 0, "bytes": 0})
            entry["calls"] += 1
            entry["messages"] += ranks - 1
            entry["bytes"] += input.nbytes * (ranks - 1)
            return gather(output, input, group=group, async_op=async_op)

        self._patches = [
            patch.object(dist, "all_to_all_single", counting),
            patch.object(dist, GATHER, counting_gather),
        ]
        for each in self._patches:
            each.__enter__()
        return self

    def __exit__(self, *error):
        for each in self._patches:
            each.__exit__(*error)

    def sum(self, name):
        return sum(entry[name] for entry in self.by_group.values())

    @property
    def bytes_sent(self):
        return self.sum("bytes")

    @property
    def calls(self):
        return self.sum("calls")
