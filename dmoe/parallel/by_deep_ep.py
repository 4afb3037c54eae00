"""Tokens to their experts and back by DeepEP, which plans, counts, deduplicates and adds up by itself.

::

    x (T, H), choices, weights --> DeepEP's dispatch --> x (R', H), plan over the local experts, gate weights
    y (T, H)                   <-- DeepEP's combine  <-- y (R', H)

The gradient of a dispatch is a combine, of tokens and of gate weights in one; that of a combine is a dispatch the same
way again. Both come in halves, so that what is computed between them overlaps, forward and backward.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dmoe.parallel.collectives import outside_graphs, tied
from dmoe.parallel.copies import Copies
from dmoe.parallel.deep_ep import DTYPE, MOST_CHOICES, ROW_MULTIPLE, DeepEP, Sent, wait_for
from dmoe.parallel.dispatch import AllToAllDispatcher
from dmoe.parallel.interface import Dispatched
from dmoe.parallel.levelling import LevelPlan
from dmoe.parallel.traffic import Traffic
from dmoe.plan import RoutingPlan

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_CHOICE_BYTES = 8 + 4  # an expert's number and its weight, as DeepEP sends them


class DeepEPDispatcher(AllToAllDispatcher):
    """:class:`AllToAllDispatcher` whose rows travel by the package deep_ep.

    Tokens are bfloat16 (autocast's are), H a multiple of 16 (below 8192 for its Hopper kernels), K at most 32. Ranks
    are compared, once for each kind of rows, in width, K, and whether they need a gradient. :class:`Traffic` counts a
    row for each rank that a token goes to; between nodes DeepEP sends one for each node. DeepEP 2.1.0 does not run
    under ``torch.use_deterministic_algorithms`` unless ``torch.utils.deterministic.fill_uninitialized_memory`` is off.

    Args:
        group: the ranks: as many as DeepEP has kernels for (2, 4, 8, 16, ...).
        num_experts: E of all ranks, a multiple of these.
        **options: of :class:`AllToAllDispatcher`: ``levelling`` alone.

    Raises:
        ValueError: as there; options that are the all-to-all's, experts of which ranks hold slices, or a number of
            ranks that DeepEP does not know.
        ImportError: there is no deep_ep.
    """

    def __init__(self, group: ProcessGroup, num_experts: int, *args: Any, **options: Any) -> None:
        super().__init__(group, num_experts, *args, **options)
        alone = {
            "expert_tp_group": (self.tp_group, "DeepEP knows one group of ranks"),
            "ep_levels": (self.two_level, "DeepEP goes between nodes and inside them by itself"),
            "max_rows_received": (self.max_rows_received, "it is the all-to-all's static mode"),
            "wire_dtype": (self.wire_dtype, "DeepEP's combine adds bfloat16"),
            "join_choices": (self.join_choices, "choices always travel with their tokens"),
        }
        for name, (given, why) in alone.items():
            if given is not None:
                shown = given if isinstance(given, int | str) else type(given).__name__
                raise ValueError(f"MoE: {name}: expected None with transport='deep_ep', got {shown}: {why}")
        if self._shards > 1:
            raise ValueError(
                f"MoE: num_experts: expected a multiple of the {self.world_size} ranks with transport='deep_ep', got "
                f"{num_experts}: each expert lives on one rank there"
            )
        self._deep_ep = DeepEP.of(group)

    def _checked(
        self, x: Tensor, expert_indices: Tensor | None, gate_weights: Tensor, plan: RoutingPlan | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As :meth:`AllToAllDispatcher._checked`, of what DeepEP carries."""
        x, choices, gates = super()._checked(x, expert_indices, gate_weights, plan)
        hidden, top_k = x.shape[1], choices.shape[1]
        if x.dtype != DTYPE:
            raise TypeError(
                f"dispatch: x: expected {DTYPE} with transport='deep_ep', whose combine adds no other, got {x.dtype}"
            )
        if hidden % ROW_MULTIPLE or not hidden:
            raise ValueError(
                f"dispatch: x: expected a multiple of {ROW_MULTIPLE} columns with transport='deep_ep', got {hidden}"
            )
        if top_k > MOST_CHOICES:
            raise ValueError(
                f"dispatch: expert_indices: expected at most {MOST_CHOICES} choices of each token with "
                f"transport='deep_ep', got {top_k}"
            )
        needs = torch.is_grad_enabled() and (x.requires_grad or gates.requires_grad)
        self._deep_ep.agree({"H": hidden, "K": top_k, "needs a gradient": needs})
        return x, choices, gates

    @outside_graphs
    def prepare_dispatch(
        self, x: Tensor, expert_indices: Tensor | None, gate_weights: Tensor, plan: RoutingPlan | None = None
    ) -> Any:
        """See :meth:`AllToAllDispatcher.prepare_dispatch`: no counts travel before the rows."""
        return _Numbered(*self._renumbered(x, expert_indices, gate_weights, plan))

    @outside_graphs
    def launch_dispatch(self, prepared: Any) -> Any:
        """See :meth:`AllToAllDispatcher.launch_dispatch`: the host waits in here, for the number of rows that come."""
        x, choices, levels = prepared.x, prepared.choices, prepared.levels
        trip = _Trip(self._deep_ep, self._places * self.num_owners)
        under_way = _StartDispatch.apply(x, prepared.gates, choices, trip)
        sent, each = trip.sent, self.num_local_experts
        copies = None
        if levels is not None:
            counting = SimpleNamespace(beside=(levels.slots, levels.slot_rows))
            copies = self._copies(replace(prepared, counting=counting))
        traffic = Traffic(
            rows_sent=sum(sent.rows_sent) - sent.rows_sent[self.rank],
            rows_kept=sent.rows_sent[self.rank],
            rows_received=under_way[0].shape[0] - sent.rows_sent[self.rank],
            naive_rows_sent=None,
            naive_rows_kept=None,
            naive_rows_received=None,
            row_bytes=x.shape[1] * x.element_size(),
            choice_bytes=choices.shape[1] * _CHOICE_BYTES,
            count_bytes=0 if levels is None else levels.bytes_sent,
            joined=True,
        )
        of_copies = sum(sent.per_expert[each:])
        arriving = _Arriving(trip, under_way, self._places)
        return _UnderWay(arriving, (sum(sent.per_expert) - of_copies, of_copies), traffic, copies, levels, sent.handle)

    @outside_graphs
    def finish_dispatch(self, under_way: Any) -> Dispatched:
        """Wait for the rows; on a GPU it is the stream that waits, not the host."""
        return replace(self._dispatched(under_way.arriving, under_way), handle=under_way.handle)

    @outside_graphs
    def start_combine(self, y: Tensor, dispatched: Dispatched) -> Any:
        """As :meth:`combine`, until the results are on their way to the ranks that the tokens are from.

        Raises:
            ValueError: ``dispatched`` is not of such a dispatcher, or y has another shape or dtype.
            RuntimeError: the exchange failed.
        """
        if dispatched.handle is None:
            raise ValueError("combine: expected what a DeepEPDispatcher dispatched, got what another one did")
        if y.shape != dispatched.x.shape or y.dtype != DTYPE:
            raise ValueError(
                f"combine: expected y of shape {tuple(dispatched.x.shape)} and {DTYPE}, as the tokens that came, got "
                f"{tuple(y.shape)} and {y.dtype}"
            )
        y = tied(y, dispatched.x, dispatched.gate_weights)
        home = _Home(self._deep_ep, dispatched.handle)
        return home, _StartCombine.apply(y, home)

    @outside_graphs
    def finish_combine(self, returning: Any) -> Tensor:
        """Wait for the sums of each token's ranks, ``(T, H)``."""
        home, under_way = returning
        return _FinishCombine.apply(under_way, home)


@dataclass(frozen=True)
class _Numbered:
    """What :class:`dmoe.parallel.interface.Prepared` is elsewhere."""

    x: Tensor
    choices: Tensor
    gates: Tensor
    levels: LevelPlan | None
    counting: Any = None


@dataclass(frozen=True)
class _UnderWay:
    """What :class:`dmoe.parallel.UnderWay` is elsewhere."""

    arriving: _Arriving
    assignments: tuple[int, int]
    traffic: Traffic
    copies: Copies | None
    levels: LevelPlan | None
    handle: Any
    way_back: None = None
    kept_per_expert: None = None
    rows_dropped: None = None


class _Arriving:
    """Tokens and their choices under way together, as :class:`dmoe.parallel.joined.Arriving`."""

    def __init__(self, trip: _Trip, under_way: tuple[Tensor, Tensor], places: int) -> None:
        self._trip, self._under_way, self._places = trip, under_way, places
        self._rows: Tensor | None = None

    def choices(self) -> Tensor:
        """Wait for both; ids as :func:`dmoe.parallel.destinations.choices_of_rows` gives them."""
        self._rows, weights = _FinishDispatch.apply(*self._under_way, self._trip)
        ids = self._trip.sent.choices
        return torch.cat([weights, ids.masked_fill(ids < 0, self._places).to(weights.dtype)], 1)

    def rows(self) -> Tensor:
        """The tokens, which came with the choices."""
        assert self._rows is not None
        return self._rows


class _Trip:
    """One dispatch, and what its backward has under way."""

    sent: Sent

    def __init__(self, deep_ep: DeepEP, num_experts: int) -> None:
        self.deep_ep, self.num_experts = deep_ep, num_experts
        self.needs = (False, False)
        self.gradient: tuple[Tensor, Tensor | None, Any] | None = None


class _StartDispatch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gates: Tensor, choices: Tensor, trip: _Trip) -> tuple[Tensor, Tensor]:
        ctx.trip, trip.needs = trip, (ctx.needs_input_grad[0], ctx.needs_input_grad[1])
        # The trip, which the graph holds, must not hold the rows: they hold the graph.
        rows, weights, trip.sent = trip.deep_ep.dispatch(x, choices, gates, trip.num_experts)
        return rows, weights

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        trip = ctx.trip
        (grad_x, grad_gates, event), trip.gradient = trip.gradient, None
        wait_for(event)
        return grad_x if trip.needs[0] else None, grad_gates if trip.needs[1] else None, None, None


class _FinishDispatch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, weights: Tensor, trip: _Trip) -> tuple[Tensor, Tensor]:
        ctx.trip = trip
        wait_for(trip.sent.event)
        landed = rows.view_as(rows), weights.view_as(weights)
        ctx.mark_non_differentiable(*(part for part, need in zip(landed, trip.needs, strict=True) if not need))
        return landed

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_rows: Tensor, grad_weights: Tensor) -> tuple[Tensor, Tensor, None]:
        # Both travel whichever is needed: what is sent must not depend on a rank's own needs.
        ctx.trip.gradient = ctx.trip.deep_ep.combine(grad_rows, ctx.trip.sent.handle, grad_weights)
        return grad_rows, grad_weights, None  # which _StartDispatch does not read


class _Home:
    """One combine, and what its backward has under way."""

    def __init__(self, deep_ep: DeepEP, handle: Any) -> None:
        self.deep_ep, self.handle = deep_ep, handle
        self.event: Any = None
        self.gradient: tuple[Tensor, Any] | None = None


class _StartCombine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, home: _Home) -> Tensor:
        ctx.home = home
        sums, _, home.event = home.deep_ep.combine(y, home.handle)
        return sums

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor, None]:
        (rows, event), ctx.home.gradient = ctx.home.gradient, None
        wait_for(event)
        return rows, None


class _FinishCombine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, under_way: Tensor, home: _Home) -> Tensor:
        ctx.home = home
        wait_for(home.event)
        ctx.save_for_backward(under_way.new_empty(0))
        return under_way.view_as(under_way)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        # Reading them makes activation checkpointing compute the forward again now, on every rank before anything
        # travels, not where this rank happens to need a value.
        _ = ctx.saved_tensors
        ctx.home.gradient = ctx.home.deep_ep.dispatch_again(grad, ctx.home.handle)
        return grad, None  # which _StartCombine does not read
