"""The exchange that comes before the rows: how many of them there will be, and of what kind."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from dmoe.parallel.collectives import explained

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from dmoe.parallel.two_level import TwoLevel


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all layers: each stream has memory of its own in PyTorch's allocator."""
    return torch.cuda.Stream(device)


class Counting:
    """The exchange of counts, one row of integers for each rank, and its one way to the host.

    Args:
        counts: ``(W, C)`` int64: what each rank is told.
        group: the ranks.
        levels: two hops instead of one.
        tp_group: ranks that then also tell each other what they received: on a GPU without the host between the two.
        beside: integers that come to the host with the counts, int64 of any shape; None for none.

    Attributes:
        held: with ``levels``, after :meth:`read`: what passed this rank, a row for each rank of its node and each node.
        beside: after :meth:`read`, on the host.
    """

    def __init__(
        self,
        counts: Tensor,
        group: ProcessGroup,
        levels: TwoLevel | None = None,
        tp_group: ProcessGroup | None = None,
        beside: Tensor | None = None,
    ) -> None:
        self._counts, self._group, self._levels, self._tp_group = counts, group, levels, tp_group
        self._copies = 1 if tp_group is None else dist.get_world_size(tp_group)
        self.held: list[list[int]] | None = None
        self.beside = beside
        first = counts
        if levels is not None:  # by (l', n'), as the rows will be
            self._group = levels.inner
            grid = counts.view(levels.num_nodes, levels.ranks_per_node, -1)
            first = grid.transpose(0, 1).reshape(levels.ranks_per_node, -1)
        self._arriving = torch.empty_like(first)
        self._work = self._exchange(self._arriving, first, self._group)
        self._on_host: Tensor | None = None
        self._ready: Any = None
        if counts.is_cuda:  # a stream of its own waits and copies, so that this one can go on with the rows
            side = _side_stream(counts.device)
            side.wait_stream(torch.cuda.current_stream(counts.device))
            with torch.cuda.stream(side):
                everything = self._rest()
                self._on_host = torch.empty(everything.shape, dtype=everything.dtype, pin_memory=True)
                self._on_host.copy_(everything, non_blocking=True)
                if beside is not None:
                    self.beside = torch.empty(beside.shape, dtype=beside.dtype, pin_memory=True)
                    self.beside.copy_(beside, non_blocking=True)
                    beside.record_stream(side)
                self._ready = torch.cuda.Event()
                self._ready.record(side)
            for tensor in (counts, first, self._arriving):
                tensor.record_stream(side)

    @property
    def bytes_sent(self) -> int:
        """Bytes of counts sent to other ranks, in all hops."""
        columns = self._counts.shape[1] * self._counts.element_size()
        gathered = (self._copies - 1) * self._counts.shape[0]
        if self._levels is None:
            return (self._counts.shape[0] - 1 + gathered) * columns
        nodes, each = self._levels.num_nodes, self._levels.ranks_per_node
        return ((each - 1) * nodes + (nodes - 1) * each + gathered) * columns

    def _exchange(self, received: Tensor, sent: Tensor, group: ProcessGroup) -> Any:
        start = lambda: dist.all_to_all_single(received, sent, group=group, async_op=True)  # noqa: E731
        return explained(start, "the exchange of counts", group)

    def _rest(self) -> Tensor:
        """Wait, and go what other steps there are: counts sent, received by each tensor-parallel rank, in between."""
        explained(self._work.wait, "the exchange of counts", self._group)
        if self._levels is None:
            return torch.cat([self._counts.unsqueeze(0), self._gathered(self._arriving)])
        nodes, each, group = self._levels.num_nodes, self._levels.ranks_per_node, self._levels.outer
        held = self._arriving.view(each, nodes, -1)
        second = held.transpose(0, 1).reshape(nodes, -1)
        received = torch.empty_like(second)
        work = self._exchange(received, second, group)
        explained(work.wait, "the exchange of counts", group)
        gathered = self._gathered(received.view_as(self._counts))
        return torch.cat([self._counts.unsqueeze(0), gathered, held.reshape(1, *self._counts.shape)])

    def _gathered(self, received: Tensor) -> Tensor:
        """Counts received by every rank of ``tp_group``, ``(P, W, C)``."""
        if self._tp_group is None:
            return received.unsqueeze(0)
        copies = received.repeat(self._copies, 1)  # one for each rank: torch 2.13 renames the collective that gathers
        everyone = torch.empty_like(copies)
        work = self._exchange(everyone, copies, self._tp_group)
        explained(work.wait, "the gather of counts", self._tp_group)
        return everyone.view(self._copies, *received.shape)

    def read(self) -> tuple[list[list[int]], list[list[list[int]]]]:
        """Wait for the counts: those sent, by rank, and those received, by tensor-parallel rank and rank.

        Then ``held`` is filled, too.
        """
        if self._on_host is None:
            everything = self._rest()
        else:
            self._ready.synchronize()
            everything = self._on_host
        sent, *others = everything.tolist()
        self.held = None if self._levels is None else others.pop()
        return sent, others
