"""Tokens to the ranks whose experts they chose, and results back: ``dispatch`` and ``combine``.

::

    x (T, H) --> one row per (token, rank) --> all-to-all --> x (R', H), plan over the local experts, gate weights
                                                                            experts: weighted and summed per row
    y (T, H) <-- sum over a token's ranks  <-- all-to-all <-- y (R', H)  <--+

A token travels once to each rank that holds any of its experts, however many: with choices spread evenly that is
``W * (1 - C(E - E/W, K) / C(E, K))`` copies instead of K. It is expanded to its experts on arrival, by the plan, and
one row per copy returns.

With more ranks than experts (``W = E * S``) S ranks share each expert, each a slice of its F. A token goes to all S,
and what they return are terms of one sum, as the results of different experts are: ``combine`` adds them all. Tensor
parallelism cuts F over ranks of another group, each with tokens of its own: see ``tensor_parallel.py``.

With :class:`dmoe.parallel.Levelling` the experts of a rank that has too many rows are copied to others for this one
forward; choices are then of places where experts are, their own or a copy's: see ``levelling.py`` and ``copies.py``.

Both ways come in two halves as well, between which a caller can compute what needs no rows of other ranks. In backward
that is differentiated while gradients travel::

    under_way = dispatcher.start_dispatch(x, expert_indices, gate_weights)
    shared = shared_expert(x)
    arrived = dispatcher.finish_dispatch(under_way)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor

from dmoe.ops._checks import autocast_is_on
from dmoe.ops.activation import accumulate_dtype
from dmoe.ops.histogram import histogram
from dmoe.ops.permute import permute, unpermute
from dmoe.parallel.collectives import Exchange, RowExchange, outside_graphs, tied
from dmoe.parallel.compaction import Compaction
from dmoe.parallel.copies import Copies
from dmoe.parallel.counting import Counting
from dmoe.parallel.destinations import choices_of_plan, choices_of_rows, destinations_of, kept_per_expert, shortened
from dmoe.parallel.interface import Dispatched, Prepared, Returning, UnderWay, WayBack
from dmoe.parallel.joined import Apart, Arriving, Joined
from dmoe.parallel.levelling import Levelling, LevelPlan, plan_levels
from dmoe.parallel.overflow import Overflow
from dmoe.parallel.placement import ffn_shard, local_experts
from dmoe.parallel.row_kinds import DTYPES, check_kinds, kind_of
from dmoe.parallel.statistics import LoadOfRanks
from dmoe.parallel.tensor_parallel import TensorParallel
from dmoe.parallel.traffic import Hop, Traffic
from dmoe.parallel.two_level import TwoLevel, TwoLevelExchange
from dmoe.parallel.wire import SCALE_BYTES, NarrowExchange, check_wire_dtype
from dmoe.plan import RoutingPlan, device_tile_rows, plan_token_choice

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_Moved: TypeAlias = tuple[int, int, int]
_Counts: TypeAlias = tuple[Sequence[int], Sequence[int], Sequence[int]]  # of rows sent, received, and passed on
JOIN_FROM = 63  # other ranks from which on messages cost more than a copy of the rows


class AllToAllDispatcher:
    """Experts in contiguous blocks over the ranks of a group; rows travel by ``all_to_all_single``.

    Every rank of the group has to call ``dispatch``, ``combine``, or their halves, and, where any rank does, their
    backward, in the same order; ranks may hold any number of tokens, none included. In half precision a token's sum
    over its experts is rounded once on every rank that holds any, and once more wherever these sums are added.

    Args:
        group: the ranks, of which this process is one.
        num_experts: E, of all ranks together; a multiple of the ranks, or the ranks are a multiple of them.
        max_rows_received: the static mode: no shape depends on data and the host waits for nothing, at the price of
            padding. Every pair of ranks exchanges ``ceil(max_rows_received / W)`` rows; a token beyond that on its way
            to a rank is not sent there, and adds nothing from there (its gate weights are not renormalised). ``W``
            times the most tokens of any rank is enough for every routing. None: as many rows as there are.
        on_overflow: what becomes of tokens beyond ``max_rows_received``: ``"drop"``, as said there; ``"rerun"``: the
            static mode is left to :func:`dmoe.parallel.exact_step`, which does a step again where they were lost, and
            everywhere else as many rows travel as there are.
        wire_dtype: ``"fp8"`` or ``"int8"``: tokens travel to the experts as one byte per number and a float32 scale per
            row (see :mod:`dmoe.parallel.wire`), those that stay on this rank rounded like the others. Their gate
            weights, and the results, keep their dtype, as does the step between tensor-parallel ranks. None: so do the
            tokens.
        wire_backward: whether the tokens' gradients travel back like that, too.
        two_level: rows travel in two hops, inside a node and between nodes, over these groups: the ranks of ``group``
            in the order of the nodes. The results are the same. None: straight to each rank.
        join_choices: whether a token's choices travel with it, not in an exchange before: half the messages, for a copy
            of the rows on either side. None: where a rank has 63 others or more to talk to. Second derivatives need
            False.
        levelling: hosts copies of the hottest experts on the ranks with least to do, so that all compute about as many
            rows. :class:`Dispatched` then has ``copies`` and their plan, for whoever holds the weights. None: experts
            stay where they are.
        tp_group: tensor parallelism: ranks with the same experts, of which each holds a slice of their F, in the order
            of the ranks. The ranks form a grid of which ``group`` is this rank's row and ``tp_group`` its column. Each
            rank has tokens of its own; its experts see those that came to any rank of ``tp_group``, and
            ``max_rows_received`` bounds what comes to each of these.

    Attributes:
        mode: ``"training"`` or ``"evaluation"`` where that has to be the same on all ranks, which a layer sees to;
            ``"any"``: it does not matter. Exchanged with the counts, and so not in the static mode.
        local_experts: the experts that live here, whole or in part.
        ffn_shard: which slice of them, and of how many: ``(index, count)`` is columns ``[index * F / count,
            (index + 1) * F / count)`` of each one's F. What ``combine`` gets is then their part of the sum over F.

    Raises:
        ValueError: experts that cannot be divided evenly, a negative bound, an unknown ``wire_dtype``, groups that form
            no grid, or that are not those of the nodes of ``group``.
    """

    def __init__(
        self,
        group: ProcessGroup,
        num_experts: int,
        tp_group: ProcessGroup | None = None,
        *,
        max_rows_received: int | None = None,
        on_overflow: str = "drop",
        wire_dtype: str | None = None,
        wire_backward: bool = False,
        two_level: TwoLevel | None = None,
        join_choices: bool | None = None,
        levelling: Levelling | None = None,
    ) -> None:
        check_wire_dtype(wire_dtype, wire_backward)
        self.group, self.num_experts, self.max_rows_received = group, num_experts, max_rows_received
        self.wire_dtype, self.wire_backward, self.two_level = wire_dtype, wire_backward, two_level
        self.tp_group, self._tensor, self.levelling, self.join_choices = tp_group, None, levelling, join_choices
        self.overflow = Overflow(on_overflow)
        if two_level is not None:
            two_level.check_against(group)
        self.world_size, self.rank = dist.get_world_size(group), dist.get_rank(group)
        self.mode = "any"
        self.local_experts = local_experts(num_experts, self.world_size, self.rank)
        self.ffn_shard = ffn_shard(num_experts, self.world_size, self.rank)
        self._shards = self.ffn_shard[1]
        if tp_group is not None:
            by_group = [dist.get_process_group_ranks(each) for each in (group, tp_group)]
            if len(set(by_group[0]) & set(by_group[1])) != 1:
                raise ValueError(
                    "AllToAllDispatcher: tp_group: expected to share this rank, and no other, with group, got ranks "
                    f"{by_group[1]} with {by_group[0]} as group"
                )
            self._tensor = tensor = TensorParallel(tp_group)
            self.ffn_shard = (self.ffn_shard[0] * tensor.size + tensor.rank, self._shards * tensor.size)
        if max_rows_received is not None and max_rows_received < 0:
            raise ValueError(
                f"AllToAllDispatcher: max_rows_received: expected at least 0, or None, got {max_rows_received}"
            )

    def __deepcopy__(self, memo: Any) -> AllToAllDispatcher:
        """The same group: a copy of a layer talks to the same ranks, and counts for itself what it has no room for."""
        copied = self.for_experts(self.num_experts)
        copied.overflow = Overflow(self.overflow.on_overflow)
        return copied

    def for_experts(self, num_experts: int) -> AllToAllDispatcher:
        """One with the same groups and options, for so many experts."""
        made = type(self)(
            self.group,
            num_experts,
            self.tp_group,
            max_rows_received=self.max_rows_received,
            wire_dtype=self.wire_dtype,
            wire_backward=self.wire_backward,
            two_level=self.two_level,
            join_choices=self.join_choices,
            levelling=self.levelling,
        )
        made.overflow, made.mode = self.overflow, self.mode
        return made

    def __reduce__(self) -> Any:
        raise TypeError(
            "AllToAllDispatcher: a process group cannot be written to a file or sent to another process; save the "
            "layer's state_dict(), and give a new layer its ep_group"
        )

    @property
    def groups(self) -> tuple[ProcessGroup, ...]:
        """The groups over which sums go that are to reach all ranks that share the experts."""
        return (self.group,) if self.tp_group is None else (self.group, self.tp_group)

    @property
    def ranks(self) -> list[int]:
        """The ranks of ``group``, and of ``tp_group``, as the whole run counts them."""
        return sorted({rank for group in self.groups for rank in dist.get_process_group_ranks(group)})

    @property
    def num_ranks(self) -> int:
        """Ranks whose tokens the experts see, those of ``tp_group`` included."""
        return self.world_size * (1 if self._tensor is None else self._tensor.size)

    @property
    def num_local_experts(self) -> int:
        """E / W, at least 1."""
        return len(self.local_experts)

    @property
    def num_owners(self) -> int:
        """Ranks, those that share their experts counted once."""
        return self.world_size // self._shards

    @property
    def num_slots(self) -> int:
        """Places for copies on this rank."""
        if self.levelling is None:
            return 0
        if self._bound is None:
            return self.levelling.max_copies
        return min(self.levelling.max_copies, self.num_local_experts) * self.num_owners

    @property
    def _places(self) -> int:
        """Experts that this rank may compute: its own, and copies."""
        return self.num_local_experts + self.num_slots

    def dispatch(
        self, x: Tensor, expert_indices: Tensor | None, gate_weights: Tensor, plan: RoutingPlan | None = None
    ) -> Dispatched:
        """Send each token to the ranks of its experts; see :class:`dmoe.parallel.Dispatcher`.

        The host waits once, for the counts, while the rows are gathered (not at all in the static mode). Under
        autocast x is sent in autocast's dtype.

        Raises:
            ValueError: shapes that do not fit; or, on every rank, rows that differ between ranks in width, dtype,
                number of choices, or in whether they need a gradient, or ``mode`` (not looked at in the static mode).
            RuntimeError: an exchange failed.
        """
        return self.finish_dispatch(self.start_dispatch(x, expert_indices, gate_weights, plan))

    def start_dispatch(
        self, x: Tensor, expert_indices: Tensor | None, gate_weights: Tensor, plan: RoutingPlan | None = None
    ) -> UnderWay:
        """As :meth:`dispatch`, until the rows are on their way to the ranks of their experts.

        The host has waited for the counts when this returns. With tensor parallelism the step to the other slices
        follows in :meth:`finish_dispatch`.
        """
        return self.launch_dispatch(self.prepare_dispatch(x, expert_indices, gate_weights, plan))

    @outside_graphs
    def prepare_dispatch(
        self, x: Tensor, expert_indices: Tensor | None, gate_weights: Tensor, plan: RoutingPlan | None = None
    ) -> Prepared:
        """As :meth:`start_dispatch`, until the counts are on their way; :meth:`launch_dispatch` goes on from there.

        Of several dispatches the counts can thus travel together, so that the host, which waits for the first ones,
        finds the others there.
        """
        return self._prepared(*self._renumbered(x, expert_indices, gate_weights, plan))

    def _renumbered(
        self, x: Tensor, expert_indices: Tensor | None, gate_weights: Tensor, plan: RoutingPlan | None
    ) -> tuple[Tensor, Tensor, Tensor, LevelPlan | None]:
        """What :meth:`_checked` returns, with choices of places where experts are, and who decided on these."""
        x, choices, gates = self._checked(x, expert_indices, gate_weights, plan)
        if self.levelling is None:
            return x, choices, gates, None
        levels = self._levelled(choices, x)
        return x, levels.choices, gates, levels

    def _prepared(self, x: Tensor, choices: Tensor, gates: Tensor, levels: LevelPlan | None) -> Prepared:
        """A row for each rank that a token goes to is planned, and the counts are on their way."""
        bound, ranks = self._bound, self.world_size
        destinations = destinations_of(choices, self._places, ranks, self._shards)
        way = plan_token_choice(destinations, ranks, capacity=bound, binned=bound is not None)
        counting = None if bound is not None else self._start_counting(x, choices, gates, way, levels)
        return Prepared(x, choices, gates, destinations, way, counting, levels)

    def _levelled(self, choices: Tensor, x: Tensor) -> LevelPlan:
        """Ask all ranks how many rows they have for each expert, and plan who computes which."""
        assert self.levelling is not None
        experts, static = self.num_experts, self._bound is not None
        here = histogram(choices.flatten(), experts + 1)[:experts]
        everyone = LoadOfRanks(*self.groups)
        loads, source = everyone.gather(here)
        how = self.levelling.for_rows(x)
        levels = plan_levels(choices, experts, self.num_owners, loads, source, how, static=static)
        return replace(levels, bytes_sent=everyone.bytes_gathered(here))

    def _rows_of_copies(self, prepared: Prepared) -> int:
        """Assignments that the copies here take over; the counts have been read."""
        if prepared.levels is None:
            return 0
        return int(prepared.counting.beside[1][self.rank // self._shards].sum())

    def _copies(self, prepared: Prepared) -> Copies | None:
        """What this rank lends and hosts; the counts have been read."""
        levels, counting = prepared.levels, prepared.counting
        if levels is None:
            return None
        mine, each = self.rank // self._shards, self.num_local_experts
        if counting is None:
            lent = levels.slots[0].view(self.num_owners, -1)[mine] - mine * each
            return Copies.static(lent, self.rank, self._shards, self.group)
        slots = counting.beside[0].tolist()
        return Copies.of_slots(slots, each, self.rank, self._shards, self.group)

    @property
    def _bound(self) -> int | None:
        """Rows between two ranks in the static mode."""
        bounded = self.max_rows_received is not None and self.overflow.static
        return -(-self.max_rows_received // self.world_size) if bounded else None  # type: ignore[operator]

    @outside_graphs
    def launch_dispatch(self, prepared: Prepared) -> UnderWay:
        """The rest of :meth:`start_dispatch`."""
        x, choices, way, bound, levels = prepared.x, prepared.choices, prepared.way, self._bound, prepared.levels
        top_k, each, ranks = choices.shape[1], self._places, self.world_size

        # While counts travel: a row for each (token, rank), and a row with that rank's choices and their weights.
        rows = permute(x, way.row_to_token, way.token_offsets, way.token_rows)
        chosen = choices_of_rows(choices, prepared.gates, way, each, self._shards)

        if bound is not None:
            send_counts = recv_counts = held_counts = (bound,) * ranks
            gathered = (bound * ranks,) * (1 if self._tensor is None else self._tensor.size)
            traffic = self._traffic(x, chosen, self._moved(send_counts, recv_counts), gathered)
            kept = kept_per_expert(choices, prepared.destinations, way, each, self._shards)
            if levels is not None:
                kept = levels.of_experts(kept, self.num_experts)
            dropped: Tensor | None = self.overflow.count(way.tokens_per_expert, bound)
            used, assignments = bound * ranks, sum(gathered) * top_k
            of_copies = assignments
        else:
            send_counts, recv_counts, gathered, assignments, traffic = self._counted(prepared.counting, x, chosen)
            used, kept, dropped = sum(send_counts), None, None
            held = prepared.counting.held
            held_counts = () if held is None else tuple(count[0] for count in held)
            of_copies = self._rows_of_copies(prepared)
            assignments -= of_copies

        counts = send_counts, recv_counts, held_counts
        arriving, hops = self._joined(rows, chosen, counts) if self.joins else self._apart(rows, chosen, counts)
        return UnderWay(
            arriving=arriving,
            assignments=(assignments, of_copies),
            way_back=WayBack(
                way.row_to_token[:used],
                way.row_to_slot[:used],
                way.token_offsets,
                way.token_rows,
                send_counts,
                recv_counts,
                held_counts,
                gathered,
            ),
            traffic=replace(
                traffic,
                wire_row_bytes=self._wire_row_bytes(x),
                hops=hops,
                joined=self.joins,
                count_bytes=traffic.count_bytes + (0 if levels is None else levels.bytes_sent),
            ),
            kept_per_expert=kept,
            rows_dropped=dropped,
            copies=self._copies(prepared),
            levels=levels,
        )

    @outside_graphs
    def advance_dispatch(self, under_way: UnderWay) -> UnderWay:
        """Of two hops, wait for the first and begin the second, so that the caller may compute while that one travels.

        Not needed before :meth:`finish_dispatch`, which takes what this returns. With one hop nothing happens.

        Raises:
            RuntimeError: an exchange failed.
        """
        if self.two_level is not None:
            under_way.arriving.advance()
        return under_way

    @outside_graphs
    def finish_dispatch(self, under_way: UnderWay) -> Dispatched:
        """Wait for the rows; on a GPU it is the stream that waits, not the host.

        Raises:
            RuntimeError: an exchange failed.
        """
        return self._dispatched(self._all_slices(under_way), under_way)

    def _all_slices(self, under_way: UnderWay) -> Arriving:
        """Tokens on their last step: with tensor parallelism to those who hold the other slices."""
        arriving, gathered = under_way.arriving, under_way.way_back.gathered
        if self._tensor is None:
            return arriving
        # The choices go on while the rows are still on their first step.
        of_choices = self._tensor.start_gather(arriving.choices(), gathered, "expert choices")
        return Apart(of_choices, self._tensor.start_gather(arriving.rows(), gathered, "token rows"))

    def _dispatched(self, arriving: Arriving, under_way: UnderWay) -> Dispatched:
        """The plans are made when the choices are there, then the rows are waited for."""
        arrived = arriving.choices()
        top_k, each, compaction = arrived.shape[1] // 2, self.num_local_experts, None
        if under_way.rows_dropped is not None and self.overflow.compacts:
            compaction = Compaction((arrived[:, top_k:] < self._places).any(1))
            arrived = compaction.apply(arrived)
        ids, (own, of_copies) = arrived[:, top_k:].to(torch.int32), under_way.assignments
        plan, copies_plan = _plan_here(ids.clamp(max=each) if under_way.levels is not None else ids, each, own), None
        if under_way.copies is not None and (hosted := under_way.copies.num_hosted):
            ids = ids - each
            copies_plan = _plan_here(ids.masked_fill((ids < 0) | (ids > hosted), hosted), hosted, of_copies)
        x = arriving.rows()
        return Dispatched(
            x=x if compaction is None else compaction.apply(x),
            plan=plan,
            gate_weights=arrived[:, :top_k],
            way_back=under_way.way_back,
            traffic=under_way.traffic,
            kept_per_expert=under_way.kept_per_expert,
            rows_dropped=under_way.rows_dropped,
            compaction=compaction,
            copies=under_way.copies,
            copies_plan=copies_plan,
            levels=under_way.levels,
        )

    def combine(self, y: Tensor, dispatched: Dispatched) -> Tensor:
        """Results back to where their tokens came from, ``(R', H)`` to ``(T, H)``, as a Dispatcher does.

        Raises:
            ValueError: ``dispatched`` is not of such a dispatcher, or y has another number of rows.
            RuntimeError: the exchange failed.
        """
        return self.finish_combine(self.start_combine(y, dispatched))

    @outside_graphs
    def start_combine(self, y: Tensor, dispatched: Dispatched) -> Returning:
        """As :meth:`combine`, until the results are on their way to the ranks that the tokens are from.

        With tensor parallelism the partial results of the slices have met by then.
        """
        way = dispatched.way_back
        if way is None or y.shape[0] != sum(way.gathered):
            expected = "what dispatch returned" if way is None else f"{sum(way.gathered)} rows"
            raise ValueError(f"combine: expected {expected}, got y of shape {tuple(y.shape)}")
        y = tied(y, dispatched.x, dispatched.gate_weights)
        y = y if dispatched.compaction is None else dispatched.compaction.undo(y)
        if self._tensor is not None:
            y = self._tensor.summed(y, way.gathered)
        back = self._exchange(way.recv_counts, way.send_counts, way.held_counts, "results", back=True)
        return Returning((back, back.start(y)), way)

    @outside_graphs
    def finish_combine(self, returning: Returning) -> Tensor:
        """Wait for the results, and sum those of each token, ``(T, H)``.

        Raises:
            RuntimeError: the exchange failed.
        """
        (back, under_way), way = returning.rows, returning.way_back
        rows = back.finish(under_way)
        return unpermute(rows, None, way.row_to_token, way.row_to_slot, way.token_offsets, way.token_rows)

    def _apart(self, rows: Tensor, chosen: Tensor, counts: _Counts) -> tuple[Arriving, tuple[Hop, ...]]:
        """The choices first: the plan is made while the rows are still under way."""
        of_choices = self._exchange(*counts, "expert choices")
        of_rows: RowExchange = self._exchange(*counts, "token rows")
        if self.wire_dtype is not None:
            of_rows = NarrowExchange(of_rows, self.wire_dtype, self.wire_backward)
        return Apart((of_choices, of_choices.start(chosen)), (of_rows, of_rows.start(rows))), _hops(of_rows)

    def _joined(self, rows: Tensor, chosen: Tensor, counts: _Counts) -> tuple[Arriving, tuple[Hop, ...]]:
        """Both at once."""
        carrier = self._exchange(*counts, "token rows and choices")
        return Joined(rows, chosen, carrier, self.wire_dtype, self.wire_backward), _hops(carrier)

    @property
    def joins(self) -> bool:
        """Whether choices travel with the rows."""
        if self.join_choices is not None:
            return self.join_choices
        levels = self.two_level
        others = self.world_size - 1 if levels is None else levels.num_nodes + levels.ranks_per_node - 2
        return others >= JOIN_FROM

    def _exchange(
        self,
        send_counts: Sequence[int],
        recv_counts: Sequence[int],
        held_counts: Sequence[int],
        what: str,
        *,
        back: bool = False,
    ) -> RowExchange:
        """How rows of one kind travel; ``back``: from the experts."""
        if self.two_level is None:
            return Exchange(send_counts, recv_counts, self.group, what)
        return TwoLevelExchange(send_counts, recv_counts, held_counts, self.two_level, what, back=back)

    def _wire_row_bytes(self, x: Tensor) -> int:
        """Bytes of one token on its way to its experts."""
        return x.shape[1] * x.element_size() if self.wire_dtype is None else x.shape[1] + SCALE_BYTES

    def _checked(
        self, x: Tensor, expert_indices: Tensor | None, gate_weights: Tensor, plan: RoutingPlan | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x in the dtype of the wire, the choices with those that the plan dropped marked E, the weights as summed."""
        if expert_indices is None:
            (expert_indices, gate_weights), plan = choices_of_plan(plan, gate_weights), None
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
        if autocast_is_on(kind) and x.dtype != torch.float64:
            x = x.to(torch.get_autocast_dtype(kind))
        if x.dtype not in DTYPES:
            raise TypeError(f"dispatch: x: expected one of {DTYPES}, got {x.dtype}")
        choices = expert_indices.to(torch.int32)
        if plan is not None and plan.capacity is not None:
            choices = choices.masked_fill(plan.token_to_rows < 0, self.num_experts)
        return x, choices, gate_weights.to(accumulate_dtype(x.dtype))

    def _start_counting(
        self, x: Tensor, choices: Tensor, gates: Tensor, way: RoutingPlan, levels: LevelPlan | None
    ) -> Counting:
        """Tell every rank how many rows and assignments it will get, and what kind of rows."""
        owners = self.world_size // self._shards
        assignments = histogram((choices // self._places).flatten(), owners + 1)[:owners]
        assignments = assignments.repeat_interleave(self._shards, output_size=self.world_size)
        kind = kind_of(x, choices, gates, self.wire_dtype, self.wire_backward, self.mode)
        kinds = torch.tensor(kind, device="cpu").expand(self.world_size, -1)
        if x.is_cuda:
            kinds = kinds.contiguous().pin_memory().to(x.device, non_blocking=True)
        counts = torch.stack([way.tokens_per_expert, assignments], 1).long()
        beside = None if levels is None else torch.stack([levels.slots, levels.slot_rows])
        return Counting(torch.cat([counts, kinds], 1), self.group, self.two_level, self.tp_group, beside)

    def _counted(
        self, counting: Counting, x: Tensor, chosen: Tensor
    ) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], int, Traffic]:
        """Rows to and from each rank and in the end here, how many assignments these have, and all that in bytes."""
        sent, received = counting.read()
        check_kinds(received)
        here = received[0 if self._tensor is None else self._tensor.rank]
        (send_rows, send_choices), (recv_rows, recv_choices) = (
            tuple(tuple(count[n] for count in counts) for n in (0, 1)) for counts in (sent, here)
        )
        rows, choices = (tuple(sum(count[n] for count in counts) for counts in received) for n in (0, 1))
        naive_sent_on, naive_came_on = self._gathered(choices)
        naive_sent, naive_kept, naive_came = self._moved(send_choices, recv_choices)
        naive = naive_sent + naive_sent_on, naive_kept, naive_came + naive_came_on
        moved = self._moved(send_rows, recv_rows)
        traffic = self._traffic(x, chosen, moved, rows, naive, counting.bytes_sent)
        return send_rows, recv_rows, rows, sum(choices), traffic

    def _moved(self, sent: tuple[int, ...], received: tuple[int, ...]) -> _Moved:
        """Rows sent to others, kept and received from others."""
        me = self.rank
        return sum(sent) - sent[me], sent[me], sum(received) - received[me]

    def _gathered(self, gathered: tuple[int, ...]) -> tuple[int, int]:
        """Rows sent to others, and received from others, in the step between tensor-parallel ranks."""
        if self._tensor is None:
            return 0, 0
        own = gathered[self._tensor.rank]
        return own * (self._tensor.size - 1), sum(gathered) - own

    def _traffic(
        self,
        x: Tensor,
        chosen: Tensor,
        moved: _Moved,
        gathered: tuple[int, ...],
        naive: _Moved | tuple[None, None, None] = (None, None, None),
        count_bytes: int = 0,
    ) -> Traffic:
        (sent, kept, received), (naive_sent, naive_kept, naive_received) = moved, naive
        return Traffic(
            rows_sent=sent,
            rows_kept=kept,
            rows_received=received,
            naive_rows_sent=naive_sent,
            naive_rows_kept=naive_kept,
            naive_rows_received=naive_received,
            row_bytes=x.shape[1] * x.element_size(),
            choice_bytes=chosen.shape[1] * chosen.element_size(),
            count_bytes=count_bytes,
            tp_rows_sent=self._gathered(gathered)[0],
            tp_rows_received=self._gathered(gathered)[1],
        )


def _plan_here(ids: Tensor, num_experts: int, assignments: int) -> RoutingPlan:
    """Which row goes to which of the experts here, of which so many are chosen at most."""
    tile_rows = device_tile_rows(ids.device, assignments, num_experts)
    return shortened(plan_token_choice(ids, num_experts, tile_rows=tile_rows), assignments)


def _hops(exchange: RowExchange) -> tuple[Hop, ...]:
    return tuple(Hop(len(hop.send_counts) - 1, hop.rows_sent, hop.rows_received) for hop in exchange.hops)
