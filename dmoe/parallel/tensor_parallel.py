"""Tensor parallelism of each expert: ranks that hold slices of the same experts' F share all their rows.

::

    rows of this rank (R', H) --> those of every rank (R'', H) --> experts, a slice of F --> (R'', H)
    sums of all slices (R', H) <-- one summand from each rank  <--------------------------------+
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch.distributed as dist
from torch import Tensor

from dmoe.parallel.collectives import Exchange

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class TensorParallel:
    """The ranks that hold slices of the same experts.

    Args:
        group: these ranks, in the order of their slices. Its ranks need not have equally many rows.
    """

    def __init__(self, group: ProcessGroup) -> None:
        self.group, self.size, self.rank = group, dist.get_world_size(group), dist.get_rank(group)

    def start_gather(self, rows: Tensor, counts: Sequence[int], what: str) -> tuple[Exchange, Tensor]:
        """Begin to bring together the rows of all ranks; ``exchange.finish(under_way)`` has them.

        The gradient of a row is the sum of what it gets on all ranks, rounded once where they meet.

        Args:
            rows: ``(counts[rank], C)``, any dtype.
            counts: rows of each rank; they will stand in this order.
            what: a name for the rows in error messages.

        Returns:
            The exchange, and what its ``finish`` takes; that returns ``(sum(counts), C)``.
        """
        copies = rows.expand(self.size, *rows.shape).reshape(self.size * rows.shape[0], rows.shape[1])
        exchange = Exchange((rows.shape[0],) * self.size, counts, self.group, what)
        return exchange, exchange.start(copies)

    def summed(self, y: Tensor, counts: Sequence[int]) -> Tensor:
        """Partial results to the ranks that the rows are from, and their sums over the slices.

        Args:
            y: ``(sum(counts), H)``, this rank's summand of each row.
            counts: as in :meth:`start_gather`.

        Returns:
            ``(counts[rank], H)`` in y's dtype: summands travel in it, and are added in float32 if it is narrower.
        """
        own = counts[self.rank]
        exchange = Exchange(counts, (own,) * self.size, self.group, "partial results")
        return exchange.finish(exchange.start(y)).view(self.size, own, y.shape[1]).sum(0)
