"""Which experts are copied to which ranks, so that no rank computes many more rows than the mean.

Every rank knows how many rows each rank has for each expert (:meth:`LoadOfRanks.gather`), and makes the same plan of
it, on the device, without the host waiting::

    rows of each expert --> ranks above the limit lend their hottest experts --> ranks below it host copies
                            (1 + slack) * mean                                   and take a share of the rows

A copy is one more expert of its host, for one forward and backward. Experts are numbered anew, owner by owner: first
those that live there, then its slots for copies. Everything behind this sees choices of these numbers only.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dmoe.plan import plan_token_choice


@dataclass(frozen=True)
class Levelling:
    """How ranks are made level.

    Attributes:
        slack: no rank is to compute more than ``(1 + slack)`` times the mean of all ranks, rounded up.
        max_copies: experts that a rank hosts beside its own, at most. In the static mode: that it lends, at most.
        min_rows: rows below which no copy is made; None: that do not pay for it, by :func:`rows_that_pay`, which then
            needs the rest.
        ffn: F, the part of it that a rank holds.
        projections: an expert's, 3 with a gate.
        across_nodes: whether weights go from node to node.
    """

    slack: float
    max_copies: int
    min_rows: int | None = None
    ffn: int = 1
    projections: int = 3
    across_nodes: bool = False

    def for_rows(self, x: Tensor) -> Levelling:
        """The same with :attr:`min_rows` a number, for tokens and weights of x's kind, ``(T, H)``."""
        if self.min_rows is not None:
            return self
        machine = _MACHINES["cuda" if x.is_cuda else "cpu", self.across_nodes and x.is_cuda]
        rows = rows_that_pay(x.shape[1], self.ffn, x.element_size(), *machine, projections=self.projections)
        return replace(self, min_rows=rows)


@dataclass(frozen=True)
class LevelPlan:
    """One forward's copies. All ranks have the same tensors, but for :attr:`choices`.

    Attributes:
        slots: the expert in each slot of each owner, ``(O, C)`` int64; E where there is none.
        slot_rows: rows that each slot takes over, ``(O, C)`` int64.
        rows_before, rows: rows that each owner would have computed, and computes, ``(O,)`` int64.
        choices: this rank's choices of the new numbers, ``(T, K)`` int32 in [0, O * (E / O + C)], the last for none.
        expert_of: the expert of each new number, ``(O * (E / O + C),)`` int64; E for an empty slot.
        bytes_sent: of loads, from this rank to others, so that all could plan.
    """

    slots: Tensor
    slot_rows: Tensor
    rows_before: Tensor
    rows: Tensor
    choices: Tensor
    expert_of: Tensor
    bytes_sent: int = 0

    @property
    def num_slots(self) -> int:
        """C."""
        return self.slots.shape[1]

    def of_experts(self, counts: Tensor, num_experts: int) -> Tensor:
        """Counts of the new numbers as counts of experts, ``(E,)``."""
        return counts.new_zeros(num_experts + 1).index_add(0, self.expert_of, counts)[:-1]


# FLOP/s that grouped products reach, bytes a second of one rank's link, and seconds of a message: half of an H100, its
# NVLink and its network card (the table of benchmarks/parts/ep_links.json); one core of a server, whose ranks talk by
# gloo.
_MACHINES = {
    ("cuda", False): (4.94e14, 4.5e11, 6e-7),
    ("cuda", True): (4.94e14, 5e10, 2.7e-6),
    ("cpu", False): (6e10, 1.5e9, 1e-4),
}


def rows_that_pay(
    hidden: int, ffn: int, number_bytes: int, flops: float, bandwidth: float, latency: float, projections: int = 3
) -> int:
    """Rows that a copy has to take over so that these cost the owner more time than the weights' way does.

    An expert is ``P H F`` numbers. Each row costs its owner ``2 P H F`` operations in forward, and H numbers that it
    receives and H that it sends back::

        rows * (2 P H F / flops + 2 H * number_bytes / bandwidth) = P H F * number_bytes / bandwidth + latency

    In backward the products double, and the gradient that comes home is as large as the weights.

    Args:
        hidden, ffn: H; F, the part of it that one rank holds.
        number_bytes: of a number of a weight, and of a row.
        flops: operations a second that an expert's products reach.
        bandwidth: bytes a second between the owner and another rank, each way.
        latency: seconds of one message.
        projections: P, 3 with a gate and 2 without.
    """
    numbers = projections * hidden * ffn
    of_row = 2 * numbers / flops + 2 * hidden * number_bytes / bandwidth
    return max(1, math.ceil((numbers * number_bytes / bandwidth + latency) / of_row))


def level(loads: Tensor, owners: int, how: Levelling, *, static: bool) -> tuple[Tensor, Tensor]:
    """The plan: who hosts copies of which experts, and how many of their rows each copy takes.

    Each owner above the limit lends from its hottest expert on as many rows as it has too many. What is lent, largest
    first, is laid beside the room of the others, largest first; each of these takes the expert of which most lies
    beside it. This is repeated with what is left. In the static mode, where any rank may host any expert that is lent,
    it is done once, and all that lies side by side is taken.

    Args:
        loads: rows of each expert from all sources, ``(E,)`` int64.
        owners: O, which divides E: owner o has experts ``[o * E / O, (o + 1) * E / O)``.
        how: limits.
        static: slots are the ``max_copies`` hottest experts of every owner, the same at every owner.

    Returns:
        The expert of each slot, E for none, and its rows, ``(O, C)`` int64; C is ``max_copies``, static: times O.
    """
    each, device = loads.shape[0] // owners, loads.device
    left = loads.view(owners, each)
    load = left.sum(1)
    limit = _limit(load, how.slack)
    if static:
        return _level_once(left, limit, how)
    none = owners * each
    slots = torch.full((owners, how.max_copies), none, device=device)
    rows, used = torch.zeros_like(slots), torch.zeros_like(load)
    for _ in range(2 * (how.max_copies + owners.bit_length())):
        if not loads.is_cuda and bool((load <= limit).all()):  # which the host knows without a wait
            break
        give = _from_hottest(left, load - limit).flatten()
        room = (limit - load).clamp(min=0).masked_fill(used >= how.max_copies, 0)
        overlap, givers, takers = _side_by_side(give, room)
        amount, which = overlap.max(0)
        amount = amount.masked_fill(amount < max(how.min_rows or 1, 1), 0)
        expert, takes = givers[which], amount > 0
        same = slots[takers] == expert.unsqueeze(1)
        known = same.any(1)
        place = torch.where(known, same.int().argmax(1), used[takers].clamp(max=how.max_copies - 1))
        slots[takers, place] = torch.where(takes, expert, slots[takers, place])
        rows[takers, place] += amount
        used[takers] += (takes & ~known).long()
        taken = torch.zeros_like(give).index_add(0, expert, amount).view(owners, each)
        left = left - taken
        load = (load - taken.sum(1)).index_add(0, takers, amount)
    slots, order = slots.sort(dim=1, stable=True)  # as copies come: by the rank of their owner
    return slots, rows.gather(1, order)


def _limit(load: Tensor, slack: float) -> Tensor:
    """The most rows of an owner: ``(1 + slack)`` means, or the mean where it is no whole number, rounded up."""
    total, owners = load.sum(), load.shape[0]
    return torch.maximum((total + owners - 1) // owners, (total.double() * (1 + slack) / owners).floor().long())


def _from_hottest(left: Tensor, excess: Tensor) -> Tensor:
    """``(O, E / O)``: what each owner lends of each expert, the hottest first, of what it has too many."""
    most, order = left.sort(dim=1, descending=True, stable=True)
    before = most.cumsum(1) - most
    amount = torch.minimum((excess.unsqueeze(1) - before).clamp(min=0), most)
    return torch.zeros_like(left).scatter(1, order, amount)


def _side_by_side(give: Tensor, room: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Both laid along one line, largest first: how much of each lies beside each, and in which order they stand."""
    give, givers = give.sort(descending=True, stable=True)
    room, takers = room.sort(descending=True, stable=True)
    end, place = give.cumsum(0).unsqueeze(1), room.cumsum(0)
    overlap = torch.minimum(end, place) - torch.maximum(end - give.unsqueeze(1), place - room)
    return overlap.clamp(min=0), givers, takers


def _level_once(left: Tensor, limit: Tensor, how: Levelling) -> tuple[Tensor, Tensor]:
    owners, each = left.shape
    load, lent = left.sum(1), min(how.max_copies, each)
    most, order = left.sort(dim=1, descending=True, stable=True)
    hottest = torch.zeros_like(left).scatter(1, order[:, :lent], most[:, :lent])
    give = _from_hottest(hottest, load - limit).flatten()
    overlap, givers, takers = _side_by_side(give, (limit - load).clamp(min=0))
    overlap = overlap.masked_fill(overlap < max(how.min_rows or 1, 1), 0)
    taken = torch.zeros_like(overlap)
    taken[givers.unsqueeze(1), takers] = overlap
    first = torch.arange(owners, device=left.device).unsqueeze(1) * each
    experts = (first + order[:, :lent]).flatten()
    return experts.expand(owners, -1), taken[experts].T.contiguous()


def plan_levels(
    choices: Tensor, num_experts: int, owners: int, loads: Tensor, here: int, how: Levelling, *, static: bool
) -> LevelPlan:
    """Renumber the choices of this rank by who computes them.

    The rows of an expert are those of source 0 first, each source's in the order of its tokens; of these each owner
    that computes the expert takes a piece, in the order of the owners.

    Args:
        choices: ``(T, K)`` int32 in [0, E]; E marks a choice that takes no expert.
        num_experts: E.
        owners: O, ranks that share an expert counted once.
        loads: choices of every source, ``(S, E)`` integer, the same on all ranks.
        here: which source this rank is.
        how, static: see :func:`level`.
    """
    loads = loads.long()
    per_expert = loads.sum(0)
    slots, slot_rows = level(per_expert, owners, how, static=static)
    each, device = num_experts // owners, choices.device
    expert = torch.arange(num_experts, device=device).view(owners, each)
    lent = per_expert.new_zeros(num_experts + 1).index_add(0, slots.flatten(), slot_rows.flatten())[:-1]
    expert_of = torch.cat([expert, slots], 1)
    rows_of = torch.cat([(per_expert - lent).view(owners, each), slot_rows], 1)
    # One line of all rows, expert by expert, of which each of the new numbers has a piece.
    order = torch.sort(expert_of.flatten(), stable=True).indices
    ends = rows_of.flatten()[order].cumsum(0)
    plan = plan_token_choice(choices, num_experts)
    start = per_expert.cumsum(0) - per_expert + loads[:here].sum(0) - plan.expert_offsets[:-1]
    chosen = choices.long()
    position = plan.token_to_rows + torch.cat([start, start.new_zeros(1)])[chosen]
    which = torch.searchsorted(ends, position.contiguous(), right=True)
    renumbered = order[which.clamp(max=order.shape[0] - 1)].masked_fill(chosen == num_experts, order.shape[0])
    before = per_expert.view(owners, each).sum(1)
    return LevelPlan(slots, slot_rows, before, rows_of.sum(1), renumbered.int(), expert_of.flatten())
