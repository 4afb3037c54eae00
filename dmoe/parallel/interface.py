"""What a dispatcher is, what it hands from one call to the next, and the one that moves nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor

from dmoe.plan import RoutingPlan, device_tile_rows, plan_token_choice

if TYPE_CHECKING:
    from dmoe.parallel.collectives import RowExchange
    from dmoe.parallel.compaction import Compaction
    from dmoe.parallel.copies import Copies
    from dmoe.parallel.joined import Arriving
    from dmoe.parallel.levelling import LevelPlan
    from dmoe.parallel.traffic import Traffic


@dataclass(frozen=True)
class WayBack:
    """Where the rows that were sent belong: the plan of the tokens, with ranks as experts, and the counts.

    Attributes:
        row_to_token, row_to_slot: of each row sent, ``(S,)`` int32, -1 in holes.
        token_offsets: ``(T + 1,)`` int32, where a token's rows start in ``token_rows``.
        token_rows: a token's rows in the order of the ranks, -1 where none was sent.
        send_counts, recv_counts: rows to and from each rank.
        held_counts: rows that passed this rank between two hops, see
            :class:`dmoe.parallel.two_level.TwoLevelExchange`; the room of symmetric memory, see
            :class:`dmoe.parallel.SymmetricDispatcher`; not looked at otherwise.
        gathered: rows that came to each rank of the tensor-parallel group, all of which are here; one number without.
    """

    row_to_token: Tensor
    row_to_slot: Tensor
    token_offsets: Tensor
    token_rows: Tensor
    send_counts: tuple[int, ...]
    recv_counts: tuple[int, ...]
    held_counts: tuple[int, ...]
    gathered: tuple[int, ...]


@dataclass(frozen=True)
class Dispatched:
    """The tokens that this rank's experts work on, as :func:`dmoe.run_experts` takes them.

    Attributes:
        x: rows received, ``(R', H)``: those of rank 0 first, each rank's in token order; with tensor parallelism those
            that came to the group's rank 0 first, and then by the rank that they are from.
        plan: which row goes to which local expert.
        gate_weights: one per assignment of ``plan``, ``(R', K)``. Carries the gradient.
        way_back: for :meth:`Dispatcher.combine`; None when nothing moved, and where ``handle`` has it.
        traffic: what was sent; None when nothing moved.
        kept_per_expert: assignments of this rank's own tokens that were sent, for all experts, ``(E,)`` integer; None
            when none was dropped here.
        rows_dropped: rows of this rank's own tokens that the static mode had no room for, scalar int64; None outside.
        compaction: how the gaps between rows were closed; None where they were not, or there are none.
        copies: the experts that this rank lends to others and hosts for them; None where nobody does.
        copies_plan: which row goes to which hosted copy, beside ``plan``; None where none is hosted here.
        levels: who was to compute how much; None without :class:`dmoe.parallel.Levelling`.
        before: of a :class:`dmoe.parallel.NodeDispatcher`, what came to this rank in the hop before.
        handle: of a :class:`dmoe.parallel.DeepEPDispatcher`, what DeepEP knows of the way back.
    """

    x: Tensor
    plan: RoutingPlan
    gate_weights: Tensor
    way_back: WayBack | None = None
    traffic: Traffic | None = None
    kept_per_expert: Tensor | None = None
    rows_dropped: Tensor | None = None
    compaction: Compaction | None = None
    copies: Copies | None = None
    copies_plan: RoutingPlan | None = None
    levels: LevelPlan | None = None
    before: Dispatched | None = None
    handle: Any = None


@dataclass(frozen=True)
class Prepared:
    """Tokens that are about to leave, while the counts travel: for :meth:`AllToAllDispatcher.launch_dispatch`.

    Attributes:
        x, choices, gates: tokens ``(T, H)`` in the dtype of the wire, their experts ``(T, K)`` int32 and weights.
        destinations: the ranks of each token, ``(T, D)`` int32, W where there is none.
        way: the plan of the tokens, with ranks as experts.
        counting: what brings the counts to the host; None in the static mode.
        levels: who computes what, where experts are copied; ``choices`` are then of its numbers.
    """

    x: Tensor
    choices: Tensor
    gates: Tensor
    destinations: Tensor
    way: RoutingPlan
    counting: Any
    levels: LevelPlan | None = None


@dataclass(frozen=True)
class UnderWay:
    """Rows that are being sent to their experts: for :meth:`AllToAllDispatcher.finish_dispatch`, and for that once.

    Attributes:
        arriving: the tokens and their choices.
        assignments: how many assignments the rows here will have, at most: of this rank's experts, and of copies.
        way_back, traffic, kept_per_expert, rows_dropped, copies, levels: as in :class:`Dispatched`.
        before: of a :class:`dmoe.parallel.NodeDispatcher` on its second hop, tokens, gate weights and the way back of
            the first.
    """

    arriving: Arriving
    assignments: tuple[int, int]
    way_back: WayBack
    traffic: Traffic
    kept_per_expert: Tensor | None
    rows_dropped: Tensor | None = None
    copies: Copies | None = None
    levels: LevelPlan | None = None
    before: tuple[Tensor, Tensor, WayBack] | None = None


@dataclass(frozen=True)
class Returning:
    """Results that are being sent back: for :meth:`AllToAllDispatcher.finish_combine`, and for that once.

    Attributes:
        rows: the exchange that has started, with the buffer that is being filled.
        way_back: as in :class:`Dispatched`.
    """

    rows: tuple[RowExchange, Tensor]
    way_back: WayBack


class Dispatcher(Protocol):
    """How tokens reach their experts. What ``dispatch`` returns holds all that ``combine`` needs: no state between."""

    def dispatch(
        self, x: Tensor, expert_indices: Tensor | None, gate_weights: Tensor, plan: RoutingPlan | None = None
    ) -> Dispatched:
        """Send tokens to their experts.

        Args:
            x: ``(T, H)`` floating point.
            expert_indices: ``(T, K)`` int32 or int64 in [0, E]; E marks a choice that takes no expert.
            gate_weights: ``(T, K)`` floating point.
            plan: a plan already made of these choices: what it drops is dropped.
        """
        ...

    def combine(self, y: Tensor, dispatched: Dispatched) -> Tensor:
        """Bring results ``(R', H)`` back and sum each token's, ``(T, H)``, in the order of the ranks."""
        ...

    def start_dispatch(
        self, x: Tensor, expert_indices: Tensor | None, gate_weights: Tensor, plan: RoutingPlan | None = None
    ) -> Any:
        """The first half of ``dispatch``: rows are on their way when it returns what ``finish_dispatch`` takes."""
        ...

    def finish_dispatch(self, under_way: Any) -> Dispatched:
        """The second half of ``dispatch``: wait for the rows."""
        ...

    def start_combine(self, y: Tensor, dispatched: Dispatched) -> Any:
        """The first half of ``combine``: results are on their way when it returns what ``finish_combine`` takes."""
        ...

    def finish_combine(self, returning: Any) -> Tensor:
        """The second half of ``combine``: wait for the results, and sum them."""
        ...


class LocalDispatcher:
    """All experts live here: nothing moves.

    Args:
        num_experts: E.
    """

    def __init__(self, num_experts: int) -> None:
        self.num_experts = num_experts

    def dispatch(
        self, x: Tensor, expert_indices: Tensor | None, gate_weights: Tensor, plan: RoutingPlan | None = None
    ) -> Dispatched:
        """The same tokens; see :class:`Dispatcher`. With a plan ``expert_indices`` are not looked at."""
        if plan is None:
            if expert_indices is None:
                raise ValueError("dispatch: expected expert_indices or a plan, got neither")
            tile_rows = device_tile_rows(x.device, expert_indices.numel(), self.num_experts)
            plan = plan_token_choice(expert_indices, self.num_experts, tile_rows=tile_rows)
        return Dispatched(x, plan, gate_weights)

    def combine(self, y: Tensor, dispatched: Dispatched) -> Tensor:
        """``y`` as it is."""
        return y

    def start_dispatch(
        self, x: Tensor, expert_indices: Tensor | None, gate_weights: Tensor, plan: RoutingPlan | None = None
    ) -> Dispatched:
        """All of :meth:`dispatch`."""
        return self.dispatch(x, expert_indices, gate_weights, plan)

    def finish_dispatch(self, under_way: Dispatched) -> Dispatched:
        """What :meth:`start_dispatch` returned."""
        return under_way

    def start_combine(self, y: Tensor, dispatched: Dispatched) -> Tensor:
        """``y`` as it is."""
        return y

    def finish_combine(self, returning: Tensor) -> Tensor:
        """What :meth:`start_combine` returned."""
        return returning
