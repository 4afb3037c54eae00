"""Two hops, with each token once to each node: first between nodes, then inside the node to the ranks of its experts.

::

    x (T, H) == once per (token, node), to the rank in this one's place ==> x (R1, H)
                == once per (row, rank), inside the node ==> x (R, H), plan over the local experts, gate weights
    y (T, H) <== sums over a token's nodes == y (R1, H) <== sums over a row's ranks inside the node == y (R, H)

Each hop is a dispatch of its own, in which nodes, then ranks, own experts. Between nodes travels what
:class:`TwoLevelExchange` sends there once for every rank; the price is a second exchange of counts, for which the host
waits, and in half precision a sum that is rounded once more, where a node's results meet.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dmoe.parallel.collectives import outside_graphs
from dmoe.parallel.dispatch import AllToAllDispatcher
from dmoe.parallel.interface import Dispatched, Prepared, Returning, UnderWay
from dmoe.parallel.traffic import Traffic
from dmoe.plan import RoutingPlan

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from dmoe.parallel.two_level import TwoLevel


class NodeDispatcher(AllToAllDispatcher):
    """:class:`AllToAllDispatcher` in two hops, whose rows between nodes are deduplicated by node.

    Args:
        group: the ranks, in the order of the nodes.
        num_experts: E of all ranks, a multiple of the nodes.
        two_level: the nodes.
        **options: of :class:`AllToAllDispatcher`, but the static mode, whose bound is of one hop.

    Raises:
        ValueError: as there; experts that nodes share, or the static mode.
    """

    def __init__(self, group: ProcessGroup, num_experts: int, *args: Any, two_level: TwoLevel, **options: Any) -> None:
        super().__init__(group, num_experts, *args, two_level=two_level, **options)
        nodes = two_level.num_nodes
        if num_experts % nodes:
            raise ValueError(
                f"NodeDispatcher: num_experts: expected a multiple of the {nodes} nodes, so that none is shared by two "
                f"of them, got {num_experts}"
            )
        if self.max_rows_received is not None:
            raise ValueError(
                f"NodeDispatcher: max_rows_received: expected None, got {self.max_rows_received}: a token may be short "
                "of room in either hop"
            )
        how: dict[str, Any] = {"wire_dtype": self.wire_dtype, "wire_backward": self.wire_backward}
        how |= {"join_choices": self.join_choices}
        self._between = AllToAllDispatcher(two_level.outer, self._places * self.num_owners, **how)
        # It plans no copies, but has to know how many places each of its ranks has.
        how["levelling"] = self.levelling
        self._inside = AllToAllDispatcher(two_level.inner, num_experts // nodes, self.tp_group, **how)

    @outside_graphs
    def prepare_dispatch(
        self, x: Tensor, expert_indices: Tensor | None, gate_weights: Tensor, plan: RoutingPlan | None = None
    ) -> Prepared:
        """See :meth:`AllToAllDispatcher.prepare_dispatch`: the counts of the hop between nodes are on their way."""
        self._between.mode = self._inside.mode = self.mode
        return self._between._prepared(*self._renumbered(x, expert_indices, gate_weights, plan))

    @outside_graphs
    def launch_dispatch(self, prepared: Prepared) -> UnderWay:
        """See :meth:`AllToAllDispatcher.launch_dispatch`: rows are on their way between nodes."""
        under_way = self._between.launch_dispatch(replace(prepared, levels=None))
        of_copies, copies, levels = self._rows_of_copies(prepared), self._copies(prepared), prepared.levels
        told = 0 if levels is None else levels.bytes_sent
        traffic = replace(under_way.traffic, count_bytes=under_way.traffic.count_bytes + told)
        return replace(under_way, assignments=(0, of_copies), copies=copies, levels=levels, traffic=traffic)

    @outside_graphs
    def advance_dispatch(self, under_way: UnderWay) -> UnderWay:
        """Wait for the rows between nodes, and send them on inside; the host waits for the counts of that hop.

        Raises:
            RuntimeError: an exchange failed.
        """
        chosen = under_way.arriving.choices()
        weights, ids = chosen.chunk(2, 1)
        x = under_way.arriving.rows()
        second = self._inside.launch_dispatch(self._inside._prepared(x, ids.to(torch.int32), weights, None))
        (own, _), (_, of_copies) = second.assignments, under_way.assignments
        return replace(
            second,
            assignments=(own - of_copies, of_copies),
            copies=under_way.copies,
            levels=under_way.levels,
            traffic=_both(under_way.traffic, second.traffic),
            before=(x, weights, under_way.way_back),
        )

    @outside_graphs
    def finish_dispatch(self, under_way: UnderWay) -> Dispatched:
        """Wait for the rows of the last hop.

        Raises:
            RuntimeError: an exchange failed.
        """
        if under_way.before is None:
            under_way = self.advance_dispatch(under_way)
        dispatched = self._dispatched(self._inside._all_slices(under_way), under_way)
        assert under_way.before is not None
        x, weights, way_back = under_way.before
        return replace(dispatched, before=replace(dispatched, x=x, gate_weights=weights, way_back=way_back))

    @outside_graphs
    def start_combine(self, y: Tensor, dispatched: Dispatched) -> Returning:
        """As :meth:`combine`, until the sums of this node are on their way to the nodes that the tokens are from.

        Raises:
            ValueError: ``dispatched`` is not of such a dispatcher, or y has another number of rows.
            RuntimeError: the exchange failed.
        """
        if dispatched.before is None:
            raise ValueError("combine: expected what a NodeDispatcher dispatched, got what another one did")
        return self._between.start_combine(self._inside.combine(y, dispatched), dispatched.before)

    @outside_graphs
    def finish_combine(self, returning: Returning) -> Tensor:
        """Wait for the results, and sum those of each token's nodes, ``(T, H)``.

        Raises:
            RuntimeError: the exchange failed.
        """
        return self._between.finish_combine(returning)


def _both(between: Traffic, inside: Traffic) -> Traffic:
    """What both hops put on the wire. Nobody has counted what a row for each choice would have been."""
    return replace(
        inside,
        rows_sent=between.rows_sent + inside.rows_sent,
        rows_received=between.rows_received + inside.rows_received,
        naive_rows_sent=None,
        naive_rows_kept=None,
        naive_rows_received=None,
        count_bytes=between.count_bytes + inside.count_bytes,
        hops=(*between.hops, *inside.hops),
        joined=between.joined and inside.joined,
    )
