"""Which tokens experts specialise in: how often each expert was given each of the most frequent token ids."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from dmoe.ops.histogram import histogram

_INTEGERS = (torch.uint8, torch.int16, torch.int32, torch.int64)


@dataclass(frozen=True)
class TokenTable:
    """Assignments by expert and token id, over all ranks, since the monitor started.

    Attributes:
        step: the last that is in it.
        ids: the N token ids that are counted, ascending.
        layers: by name, E rows of N counts; layers whose experts choose are left out.
    """

    step: int
    ids: tuple[int, ...]
    layers: Mapping[str, tuple[tuple[int, ...], ...]]


class TokenCounts:
    """Counts on the device; what ranks counted is summed with the other numbers of a record.

    The ids are the most frequent ones of rank 0 in the first recorded step that has any, and counting begins behind it.
    Sums are made in the 2nd, 4th, 8th ... such step, and then in every 64th.

    Args:
        experts: E by layer name.
        most: how many ids are counted at most.
    """

    def __init__(self, experts: Mapping[str, int], most: int) -> None:
        self._experts, self._most = experts, most
        self._ids: Tensor | None = None  # of the step, (T,)
        self._positions: dict[str, int] = {}  # where the next forward's tokens are in them, by layer
        self._places: dict[tuple[int, int], Tensor] = {}
        self._counted: Tensor | None = None  # ids, ascending
        self._since: dict[str, Tensor] = {}  # (E, N) by layer, since the last sum
        self._totals: dict[str, Tensor] = {}
        self._steps = 0

    def begin(self, token_ids: Tensor | None) -> None:
        """A step begins, with the ids of its tokens.

        Raises:
            TypeError: no integers.
        """
        if token_ids is not None and (not isinstance(token_ids, Tensor) or token_ids.dtype not in _INTEGERS):
            got = token_ids.dtype if isinstance(token_ids, Tensor) else type(token_ids).__name__
            raise TypeError(f"Monitor.begin_step: token_ids: expected a tensor of integers, got {got}")
        self._ids = None if token_ids is None else token_ids.detach().flatten()
        self._positions, self._places = dict.fromkeys(self._experts, 0), {}

    def count(self, name: str, chosen: Tensor | None, tokens: int) -> None:
        """A forward of a layer has sent its tokens to these experts, ``(T, K)``, E where to none.

        Raises:
            ValueError: more tokens than the step has ids.
        """
        if self._ids is None or chosen is None:
            return
        first = self._positions[name]
        self._positions[name] = last = first + tokens
        if last > len(self._ids):
            raise ValueError(
                f"Monitor.begin_step: token_ids: expected an id for each token of all forwards of the step, got "
                f"{len(self._ids)} ids, and layer {name} has seen {last} tokens"
            )
        if self._counted is None:
            return
        several, experts = len(self._counted) + 1, self._experts[name]
        place = self._places.get((first, last))
        if place is None:
            place = self._places[first, last] = self._place(self._ids[first:last].to(chosen.device), several - 1)
        pairs = chosen.long().clamp(max=experts) * several + place.unsqueeze(1)
        table = histogram(pairs.flatten(), (experts + 1) * several).view(experts + 1, several)[:-1, :-1].long()
        self._since[name] = self._since[name] + table if name in self._since else table

    def _place(self, ids: Tensor, none: int) -> Tensor:
        """Where each id is among those that are counted, ``none`` for others."""
        assert self._counted is not None
        self._counted = counted = self._counted.to(ids.device)
        place = torch.searchsorted(counted, ids.long()).clamp(max=none - 1)
        return torch.where(counted[place] == ids, place, none)

    def to_sum(self, rank: int) -> list[Tensor]:
        """What this step has to be summed over ranks, as float64; nothing in most steps."""
        if self._ids is None:
            return []
        self._steps += 1
        if self._counted is None:
            frequent = torch.zeros(self._most, dtype=torch.float64, device=self._ids.device)
            if rank == 0:  # the sum brings everyone this rank's; an id more, as 0 is none
                ids, counts = self._ids[self._ids >= 0].unique(return_counts=True)
                first = ids[counts.argsort(descending=True, stable=True)[: self._most]]
                frequent[: len(first)] = first.double() + 1
            return [frequent]
        if self._steps & (self._steps - 1) and self._steps % 64:
            return []
        columns = len(self._counted)
        return [
            self._since[name].flatten().double() if name in self._since else torch.zeros(experts * columns).double()
            for name, experts in self._experts.items()
        ]

    def summed(self, step: int, sums: list[Tensor]) -> TokenTable | None:
        """Take what came of :meth:`to_sum`; the table, where there is a new one."""
        if not sums:
            return None
        if self._counted is None:
            ids = sums[0].long()
            self._counted = ids[ids > 0].sub(1).sort().values if bool((ids > 0).any()) else None
            return None
        columns = len(self._counted)
        for (name, experts), total in zip(self._experts.items(), sums, strict=True):
            table = total.long().view(experts, columns).cpu()
            self._totals[name] = self._totals[name] + table if name in self._totals else table
        self._since = {}
        tables = {name: tuple(map(tuple, table.tolist())) for name, table in self._totals.items() if table.any()}
        return TokenTable(step, tuple(self._counted.tolist()), tables)
