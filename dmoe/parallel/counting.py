"""The exchange that comes before the rows: how many of them there will be, and of what kind."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from dmoe.parallel.collectives import explained

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class Counting:
    """The exchange of counts, one row of integers for each rank, and its one way to the host."""

    def __init__(self, counts: Tensor, group: ProcessGroup) -> None:
        self.bytes_sent = counts[0].numel() * counts.element_size() * (counts.shape[0] - 1)
        self._group = group
        received = torch.empty_like(counts)
        start = lambda: dist.all_to_all_single(received, counts, group=group, async_op=True)  # noqa: E731
        work = explained(start, "the exchange of counts", group)
        self._both: Tensor | tuple[Tensor, Tensor] = (counts, received)
        self._ready: Any = work
        if counts.is_cuda:  # a stream of its own waits and copies, so that this one can go on with the rows
            side = torch.cuda.Stream(counts.device)
            side.wait_stream(torch.cuda.current_stream(counts.device))
            with torch.cuda.stream(side):
                work.wait()
                both = torch.stack([counts, received])
                self._both = torch.empty(both.shape, dtype=both.dtype, pin_memory=True)
                self._both.copy_(both, non_blocking=True)
                self._ready = torch.cuda.Event()
                self._ready.record(side)
            for tensor in (counts, received):
                tensor.record_stream(side)

    def read(self) -> tuple[list[list[int]], list[list[int]]]:
        """Wait for the counts: those sent and those received, by rank."""
        if isinstance(self._both, Tensor):
            self._ready.synchronize()
            both = self._both
        else:
            explained(self._ready.wait, "the exchange of counts", self._group)
            both = torch.stack(self._both)
        sent, received = both.tolist()
        return sent, received
