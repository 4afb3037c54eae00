"""Routing plans made by plain Python loops, for the tests of what a plan feeds."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor


@dataclass(frozen=True)
class PlanCase:
    """Lists, for oracles to walk over, and the same as int32 tensors."""

    tokens: int
    num_experts: int
    assignments: list[list[int]]  # [token][slot] -> row, or -1
    rows: int
    expert_starts: list[int]

    @property
    def row_owner(self) -> list[tuple[int, int] | None]:
        owner: list[tuple[int, int] | None] = [None] * self.rows
        for token, slots in enumerate(self.assignments):
            for slot, row in enumerate(slots):
                if row >= 0:
                    owner[row] = (token, slot)
        return owner

    @property
    def row_to_token(self) -> Tensor:
        return torch.tensor([-1 if o is None else o[0] for o in self.row_owner], dtype=torch.int32)

    @property
    def row_to_slot(self) -> Tensor:
        return torch.tensor([-1 if o is None else o[1] for o in self.row_owner], dtype=torch.int32)

    @property
    def token_offsets(self) -> Tensor:
        counts = torch.tensor([0, *(len(slots) for slots in self.assignments)])
        return counts.cumsum(0).to(torch.int32)

    @property
    def token_rows(self) -> Tensor:
        return torch.tensor([row for slots in self.assignments for row in slots], dtype=torch.int32)

    @property
    def expert_offsets(self) -> Tensor:
        return torch.tensor(self.expert_starts, dtype=torch.int32)


def make_plan(
    experts: list[list[int]], num_experts: int, *, block: int = 1, capacity: int | None = None, tail: int = 0
):
    """Lay out ``experts[token][slot]`` (``num_experts`` = dropped): packed, padded to ``block``, or binned."""
    takers: list[list[tuple[int, int]]] = [[] for _ in range(num_experts)]
    for token, slots in enumerate(experts):
        for slot, expert in enumerate(slots):
            if expert < num_experts and (capacity is None or len(takers[expert]) < capacity):
                takers[expert].append((token, slot))
    assignments = [[-1] * len(slots) for slots in experts]
    starts = [0]
    for taken in takers:
        for place, (token, slot) in enumerate(taken):
            assignments[token][slot] = starts[-1] + place
        size = capacity if capacity is not None else -(-len(taken) // block) * block
        starts.append(starts[-1] + size)
    return PlanCase(len(experts), num_experts, assignments, starts[-1] + tail, starts)


@st.composite
def plan_cases(draw, max_tokens: int = 9, max_experts: int = 6):
    """Every layout, with drops, holes, a tail, empty experts, hot experts, and tokens of different numbers of slots."""
    num_experts = draw(st.integers(1, max_experts))
    expert = st.integers(0, num_experts) if draw(st.booleans()) else st.just(draw(st.integers(0, num_experts - 1)))
    if draw(st.booleans()):
        top_k = draw(st.integers(1, 4))
        slots = st.lists(expert, min_size=top_k, max_size=top_k)
    else:
        slots = st.lists(expert, max_size=4)
    experts = draw(st.lists(slots, max_size=max_tokens))
    layout = draw(st.sampled_from(["packed", "padded", "binned"]))
    if layout == "binned":
        return make_plan(experts, num_experts, capacity=draw(st.integers(0, 5)))
    block = draw(st.integers(2, 5)) if layout == "padded" else 1
    return make_plan(experts, num_experts, block=block, tail=draw(st.integers(0, 3)))


def expected_tiles(offsets, num_rows, tile_rows):
    """Lists: the tiles, filled up with -1, and the experts by load."""
    loads = [end - start for start, end in itertools.pairwise(offsets)]
    by_load = sorted(range(len(loads)), key=lambda e: (-loads[e], e))
    tiles = [[e, row] for e in by_load for row in range(offsets[e], offsets[e + 1], tile_rows)]
    bound = num_rows // tile_rows + min(len(loads), num_rows)
    assert len(tiles) <= bound
    return tiles + [[-1, -1]] * (bound - len(tiles)), by_load
