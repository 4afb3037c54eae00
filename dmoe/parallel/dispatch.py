"""Tokens to the ranks whose experts they chose, and results back: ``dispatch`` and ``combine``.

::

    x (T, H) --> one row per (token, rank) --> all-to-all --> x (R', H), plan over the local experts, gate weights
                                                                            experts: weighted and summed per row
    y (T, H) <-- sum over a token's ranks  <-- all-to-all <-- y (R', H)  <--+

A token travels once to each rank that holds any of its experts, however many: with choices spread evenly that is
``W * (1 - C(E - E/W, K) / C(E, K))`` copies instead of K. It is expanded to its experts on arrival, by the plan, and
one row per copy returns.

With more ranks than experts (``W = E * S``) S ranks share each expert, each a slice of its F. A token goes to all S,
and what they return are terms of one sum, as the results of different experts are: ``combine`` adds them all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from dmoe.ops.activation import accumulate_dtype
from dmoe.ops.histogram import histogram
from dmoe.ops.permute import permute
from dmoe.ops.unpermute import unpermute
from dmoe.parallel.agreement import raise_unless_equal
from dmoe.parallel.collectives import Exchange, RowExchange
from dmoe.parallel.counting import Counting
from dmoe.parallel.destinations import choices_of_rows, destinations_of, kept_per_expert, shortened
from dmoe.parallel.placement import ffn_shard, local_experts
from dmoe.parallel.traffic import Hop, Traffic
from dmoe.parallel.two_level import TwoLevel, TwoLevelExchange
from dmoe.parallel.wire import SCALE_BYTES, WIRE_DTYPES, NarrowExchange, check_wire_dtype
from dmoe.plan import RoutingPlan, device_tile_rows, plan_token_choice

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_WIRES = (None, *((kind, narrow_gradients) for kind in WIRE_DTYPES for narrow_gradients in (False, True)))


@dataclass(frozen=True)
class WayBack:
    """Where the rows that were sent belong: the plan of the tokens, with ranks as experts, and the counts.

    Attributes:
        row_to_token, row_to_slot: of each row sent, ``(S,)`` int32, -1 in holes.
        token_offsets: ``(T + 1,)`` int32, where a token's rows start in ``token_rows``.
        token_rows: a token's rows in the order of the ranks, -1 where none was sent.
        send_counts, recv_counts: rows to and from each rank.
        held_counts: rows that passed this rank between two hops, see
            :class:`dmoe.parallel.two_level.TwoLevelExchange`; not looked at otherwise.
    """

    row_to_token: Tensor
    row_to_slot: Tensor
    token_offsets: Tensor
    token_rows: Tensor
    send_counts: tuple[int, ...]
    recv_counts: tuple[int, ...]
    held_counts: tuple[int, ...]


@dataclass(frozen=True)
class Dispatched:
    """The tokens that this rank's experts work on, as :func:`dmoe.experts.run_experts` takes them.

    Attributes:
        x: rows received, ``(R', H)``: those of rank 0 first, each rank's in token order.
        plan: which row goes to which local expert.
        gate_weights: one per assignment of ``plan``, ``(R', K)``. Carries the gradient.
        way_back: for :meth:`Dispatcher.combine`; None when nothing moved.
        traffic: what was sent; None when nothing moved.
        kept_per_expert: assignments of this rank's own tokens that were sent, for all experts, ``(E,)`` integer; None
            when none was dropped here.
    """

    x: Tensor
    plan: RoutingPlan
    gate_weights: Tensor
    way_back: WayBack | None = None
    traffic: Traffic | None = None
    kept_per_expert: Tensor | None = None


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


class AllToAllDispatcher:
    """Experts in contiguous blocks over the ranks of a group; rows travel by ``all_to_all_single``.

    Every rank of the group has to call ``dispatch``, ``combine`` and, where any rank does, their backward, in the same
    order; ranks may hold any number of tokens, none included. In half precision a token's sum over its experts is
    rounded once on every rank that holds any, and once more where these sums are added.

    Args:
        group: the ranks, of which this process is one.
        num_experts: E, of all ranks together; a multiple of the ranks, or the ranks are a multiple of them.
        max_rows_received: the static mode: no shape depends on data and the host waits for nothing, at the price of
            padding. Every pair of ranks exchanges ``ceil(max_rows_received / W)`` rows; a token beyond that on its way
            to a rank is not sent there, and adds nothing from there (its gate weights are not renormalised). ``W``
            times the most tokens of any rank is enough for every routing. None: as many rows as there are.
        wire_dtype: ``"fp8"`` or ``"int8"``: tokens travel to the experts as one byte per number and a float32 scale per
            row (see :mod:`dmoe.parallel.wire`), those that stay on this rank rounded like the others. Their gate
            weights, and the results, keep their dtype. None: so do the tokens.
        wire_backward: whether the tokens' gradients travel back like that, too.
        two_level: rows travel in two hops, inside a node and between nodes, over these groups: the ranks of ``group``
            in the order of the nodes. The results are the same. None: straight to each rank.

    Attributes:
        local_experts: the experts that live here, whole or in part.
        ffn_shard: which slice of them, and of how many: ``(index, count)`` is columns ``[index * F / count,
            (index + 1) * F / count)`` of each one's F. What ``combine`` gets is then their part of the sum over F.

    Raises:
        ValueError: experts that cannot be divided evenly, a negative bound, an unknown ``wire_dtype``, or groups that
            are not those of the nodes of ``group``.
    """

    def __init__(
        self,
        group: ProcessGroup,
        num_experts: int,
        *,
        max_rows_received: int | None = None,
        wire_dtype: str | None = None,
        wire_backward: bool = False,
        two_level: TwoLevel | None = None,
    ) -> None:
        check_wire_dtype(wire_dtype, wire_backward)
        self.group, self.num_experts, self.max_rows_received = group, num_experts, max_rows_received
        self.wire_dtype, self.wire_backward, self.two_level = wire_dtype, wire_backward, two_level
        if two_level is not None:
            two_level.check_against(group)
        self.world_size, self.rank = dist.get_world_size(group), dist.get_rank(group)
        self.local_experts = local_experts(num_experts, self.world_size, self.rank)
        self.ffn_shard = ffn_shard(num_experts, self.world_size, self.rank)
        self._shards = self.ffn_shard[1]
        if max_rows_received is not None and max_rows_received < 0:
            raise ValueError(
                f"AllToAllDispatcher: max_rows_received: expected at least 0, or None, got {max_rows_received}"
            )

    def __deepcopy__(self, memo: Any) -> AllToAllDispatcher:
        """The same group: a copy of a layer talks to the same ranks."""
        return AllToAllDispatcher(
            self.group,
            self.num_experts,
            max_rows_received=self.max_rows_received,
            wire_dtype=self.wire_dtype,
            wire_backward=self.wire_backward,
            two_level=self.two_level,
        )

    def __reduce__(self) -> Any:
        raise TypeError(
            "AllToAllDispatcher: a process group cannot be written to a file or sent to another process; save the "
            "layer's state_dict(), and give a new layer its ep_group"
        )

    @property
    def groups(self) -> tuple[ProcessGroup, ...]:
        """The groups over which sums go that are to reach all ranks that share the experts."""
        return (self.group,)

    @property
    def ranks(self) -> list[int]:
        """The ranks that share the experts, as the whole run counts them."""
        return dist.get_process_group_ranks(self.group)

    @property
    def num_local_experts(self) -> int:
        """E / W, at least 1."""
        return len(self.local_experts)

    def dispatch(
        self, x: Tensor, expert_indices: Tensor | None, gate_weights: Tensor, plan: RoutingPlan | None = None
    ) -> Dispatched:
        """Send each token to the ranks of its experts; see :class:`Dispatcher`.

        The host waits once, for the counts, while the rows are gathered (not at all in the static mode). Under
        autocast x is sent in autocast's dtype.

        Raises:
            ValueError: shapes that do not fit; or, on every rank, rows that differ between ranks in width, dtype,
                number of choices, or in whether they need a gradient (not looked at in the static mode).
            RuntimeError: an exchange failed.
        """
        x, choices, gates = self._checked(x, expert_indices, gate_weights, plan)
        top_k, each, ranks = choices.shape[1], self.num_local_experts, self.world_size
        bound = None if self.max_rows_received is None else -(-self.max_rows_received // ranks)
        destinations = destinations_of(choices, each, ranks, self._shards)
        way = plan_token_choice(destinations, ranks, capacity=bound, binned=bound is not None)
        counting = None if bound is not None else self._start_counting(x, choices, gates, way)

        # While counts travel: a row for each (token, rank), and a row with that rank's choices and their weights.
        rows = permute(x, way.row_to_token, way.token_offsets, way.token_rows)
        chosen = choices_of_rows(choices, gates, way, each, self._shards)

        if counting is None:
            assert bound is not None
            send_counts = recv_counts = held_counts = (bound,) * ranks
            traffic = self._static_traffic(x, chosen, bound)
            kept = kept_per_expert(choices, destinations, way, each, self._shards)
            used, assignments = bound * ranks, bound * ranks * top_k
        else:
            send_counts, recv_counts, assignments, traffic = self._counted(counting, x, chosen)
            used, kept = sum(send_counts), None
            held_counts = () if counting.held is None else tuple(count[0] for count in counting.held)

        # The choices first: the plan is made while the rows are still under way.
        of_choices = self._exchange(send_counts, recv_counts, held_counts, "expert choices")
        of_rows = self._exchange(send_counts, recv_counts, held_counts, "token rows", narrow=True)
        choices_under_way, rows_under_way = of_choices.start(chosen), of_rows.start(rows)
        arrived = of_choices.finish(choices_under_way)
        tile_rows = device_tile_rows(x.device, assignments, each)
        ids = arrived[:, top_k:].to(torch.int32)
        return Dispatched(
            x=of_rows.finish(rows_under_way),
            plan=shortened(plan_token_choice(ids, each, tile_rows=tile_rows), assignments),
            gate_weights=arrived[:, :top_k],
            way_back=WayBack(
                way.row_to_token[:used],
                way.row_to_slot[:used],
                way.token_offsets,
                way.token_rows,
                send_counts,
                recv_counts,
                held_counts,
            ),
            traffic=replace(traffic, wire_row_bytes=self._wire_row_bytes(x), hops=_hops(of_rows)),
            kept_per_expert=kept,
        )

    def combine(self, y: Tensor, dispatched: Dispatched) -> Tensor:
        """Results back to where their tokens came from, ``(R', H)`` to ``(T, H)``; see :class:`Dispatcher`.

        Raises:
            ValueError: ``dispatched`` is not of such a dispatcher, or y has another number of rows.
            RuntimeError: the exchange failed.
        """
        way = dispatched.way_back
        if way is None or y.shape[0] != sum(way.recv_counts):
            expected = "what dispatch returned" if way is None else f"{sum(way.recv_counts)} rows"
            raise ValueError(f"combine: expected {expected}, got y of shape {tuple(y.shape)}")
        y = _Tied.apply(y, dispatched.x, dispatched.gate_weights)
        back = self._exchange(way.recv_counts, way.send_counts, way.held_counts, "results", back=True)
        rows = back.finish(back.start(y))
        return unpermute(rows, None, way.row_to_token, way.row_to_slot, way.token_offsets, way.token_rows)

    def _exchange(
        self,
        send_counts: Sequence[int],
        recv_counts: Sequence[int],
        held_counts: Sequence[int],
        what: str,
        *,
        narrow: bool = False,
        back: bool = False,
    ) -> RowExchange:
        """How rows of one kind travel; ``narrow``: those that ``wire_dtype`` is about; ``back``: from the experts."""
        exchange: RowExchange
        if self.two_level is None:
            exchange = Exchange(send_counts, recv_counts, self.group, what)
        else:
            exchange = TwoLevelExchange(send_counts, recv_counts, held_counts, self.two_level, what, back=back)
        if not narrow or self.wire_dtype is None:
            return exchange
        return NarrowExchange(exchange, self.wire_dtype, self.wire_backward)

    def _wire_row_bytes(self, x: Tensor) -> int:
        """Bytes of one token on its way to its experts."""
        return x.shape[1] * x.element_size() if self.wire_dtype is None else x.shape[1] + SCALE_BYTES

    def _checked(
        self, x: Tensor, expert_indices: Tensor | None, gate_weights: Tensor, plan: RoutingPlan | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x in the dtype of the wire, the choices with those that the plan dropped marked E, the weights as summed."""
        if expert_indices is None:
            raise ValueError(
                "dispatch: expected expert_indices (T, K), got None: experts that choose tokens stay local"
            )
        if x.dim() != 2 or expert_indices.dim() != 2 or expert_indices.shape[0] != x.shape[0]:
            raise ValueError(
                f"dispatch: expected x (T, H) and expert_indices (T, K), got {tuple(x.shape)} and "
                f"{tuple(expert_indices.shape)}"
            )
        if gate_weights.shape != expert_indices.shape:
            raise ValueError(
                f"dispatch: gate_weights: expected shape {tuple(expert_indices.shape)} as expert_indices, got "
                f"{tuple(gate_weights.shape)}"
            )
        kind = x.device.type
        if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind) and x.dtype != torch.float64:
            x = x.to(torch.get_autocast_dtype(kind))
        if x.dtype not in _DTYPES:
            raise TypeError(f"dispatch: x: expected one of {_DTYPES}, got {x.dtype}")
        choices = expert_indices.to(torch.int32)
        if plan is not None and plan.capacity is not None:
            choices = choices.masked_fill(plan.token_to_rows < 0, self.num_experts)
        return x, choices, gate_weights.to(accumulate_dtype(x.dtype))

    def _start_counting(self, x: Tensor, choices: Tensor, gates: Tensor, way: RoutingPlan) -> Counting:
        """Tell every rank how many rows and assignments it will get, and what kind of rows."""
        owners = self.world_size // self._shards
        assignments = histogram((choices // self.num_local_experts).flatten(), owners + 1)[:owners]
        assignments = assignments.repeat_interleave(self._shards, output_size=self.world_size)
        wire = _WIRES.index(None if self.wire_dtype is None else (self.wire_dtype, self.wire_backward))
        dtype = _DTYPES.index(x.dtype) + len(_DTYPES) * wire
        kind = [x.shape[1], choices.shape[1], dtype, _needs_gradient(x, gates)]
        kinds = torch.tensor(kind, device="cpu").expand(self.world_size, -1)
        if x.is_cuda:
            kinds = kinds.contiguous().pin_memory().to(x.device, non_blocking=True)
        counts = torch.stack([way.tokens_per_expert, assignments], 1).long()
        return Counting(torch.cat([counts, kinds], 1), self.group, self.two_level)

    def _counted(
        self, counting: Counting, x: Tensor, chosen: Tensor
    ) -> tuple[tuple[int, ...], tuple[int, ...], int, Traffic]:
        """Rows to and from each rank, how many assignments arrive, and what that amounts to in bytes."""
        sent, received = counting.read()
        _check_kinds(received)
        send_counts, recv_counts = (tuple(count[0] for count in counts) for counts in (sent, received))
        send_choices, recv_choices = (tuple(count[1] for count in counts) for counts in (sent, received))
        me = self.rank
        traffic = Traffic(
            rows_sent=sum(send_counts) - send_counts[me],
            rows_kept=send_counts[me],
            rows_received=sum(recv_counts) - recv_counts[me],
            naive_rows_sent=sum(send_choices) - send_choices[me],
            naive_rows_kept=send_choices[me],
            naive_rows_received=sum(recv_choices) - recv_choices[me],
            row_bytes=x.shape[1] * x.element_size(),
            choice_bytes=chosen.shape[1] * chosen.element_size(),
            count_bytes=counting.bytes_sent,
        )
        return send_counts, recv_counts, sum(recv_choices), traffic

    def _static_traffic(self, x: Tensor, chosen: Tensor, bound: int) -> Traffic:
        """What the static mode sends, whatever the routing."""
        others = bound * (self.world_size - 1)
        return Traffic(
            rows_sent=others,
            rows_kept=bound,
            rows_received=others,
            naive_rows_sent=None,
            naive_rows_kept=None,
            naive_rows_received=None,
            row_bytes=x.shape[1] * x.element_size(),
            choice_bytes=chosen.shape[1] * chosen.element_size(),
            count_bytes=0,
        )


class _Tied(torch.autograd.Function):
    """Identity on the first input, whose backward reaches the others whatever lies between.

    A rank without a row may compute its (0, H) results from nothing. Its backward would then not come to the exchanges
    of dispatch, where the other ranks wait for it.
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor, *others: Tensor) -> Tensor:
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return (grad, *(None for _ in ctx.needs_input_grad[1:]))


def _hops(exchange: RowExchange) -> tuple[Hop, ...]:
    return tuple(Hop(len(hop.send_counts) - 1, hop.rows_sent, hop.rows_received) for hop in exchange.hops)


def _needs_gradient(x: Tensor, gates: Tensor) -> int:
    """Bit 0: x's backward will exchange gradients; bit 1: the gate weights' will."""
    return (x.requires_grad + 2 * gates.requires_grad) if torch.is_grad_enabled() else 0


def _check_kinds(received: list[list[int]]) -> None:
    """Ranks whose rows differ would wait for each other in the exchange to come, or in backward's."""
    needs = ("none", "x", "gate_weights", "x and gate_weights")
    kinds = [
        {
            "H": str(hidden),
            "K": str(top_k),
            "dtype": str(_DTYPES[dtype % len(_DTYPES)]),
            "wire_dtype, wire_backward": str(_WIRES[dtype // len(_DTYPES)]),
            "requires_grad": needs[gradient],
        }
        for _, _, hidden, top_k, dtype, gradient in received
    ]
    raise_unless_equal("dispatch", kinds, {})
