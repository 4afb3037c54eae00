"""The structure of the experts' activation, and the padded plan under it, against plain loops."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plan_cases import make_plan, plan_cases

from dmoe.ops import pad_plan as pad_module
from dmoe.ops.pad_plan import pad_plan
from dmoe.ops.routing_plan import row_bound
from dmoe.ops.topology import (
    BlockTopology,
    expert_topology,
    expert_topology_cuda,
    expert_topology_ref,
    topology,
    topology_arguments,
)

BOTH = pytest.mark.parametrize("build", [expert_topology_ref, expert_topology_cuda], ids=["ref", "kernels"])


def loops(heights, widths, row_blocks, halves, side_by_side):
    """Lists in the order of :class:`BlockTopology`, from one cell after the other."""
    total, cells = sum(widths), []
    row = 0
    for e, height in enumerate(heights):
        left = sum(widths[:e])
        for _ in range(height):
            for j in range(widths[e]):
                for half in range(halves):
                    column = half * total + left + j if side_by_side else halves * left + half * widths[e] + j
                    cells.append((row, column))
            row += 1
    by_column = sorted(range(len(cells)), key=lambda i: (cells[i][1], cells[i][0]))
    nothing = [-1] * (row_blocks * max(widths) * halves - len(cells))
    return [
        [r for r, _ in cells] + nothing,
        [c for _, c in cells] + nothing,
        [sum(r < end for r, _ in cells) for end in range(row_blocks + 1)],
        [cells[i][0] for i in by_column] + nothing,
        [sum(c < end for _, c in cells) for end in range(total * halves + 1)],
        by_column + nothing,
    ]


@BOTH
@settings(max_examples=30)
@given(
    experts=st.lists(st.tuples(st.integers(0, 3), st.integers(1, 4)), min_size=1, max_size=6),
    spare=st.integers(0, 2),
    block=st.sampled_from([16, 32]),
    halves=st.sampled_from([1, 2]),
    side_by_side=st.booleans(),
    same=st.booleans(),
)
def test_equals_plain_loops(build, experts, spare, block, halves, side_by_side, same):
    heights, widths = [h for h, _ in experts], [w for _, w in experts]
    widths = [widths[0]] * len(widths) if same else widths
    offsets = torch.tensor([0, *heights]).cumsum(0).int() * block
    row_blocks = sum(heights) + spare
    sizes = [widths[0] * block] if same else [width * block for width in widths]
    table = topology_arguments(sizes, len(heights), block, offsets.device)
    got = build(offsets, *table, block, row_blocks, halves, side_by_side)
    assert all(index.dtype == torch.int32 for index in got)
    names = BlockTopology._fields
    expected = loops(heights, widths, row_blocks, halves, side_by_side)
    assert dict(zip(names, [index.tolist() for index in got], strict=True)) == dict(zip(names, expected, strict=True))


def test_blocks_in_use_are_the_sum_over_experts_of_rows_times_their_own_width():
    heights, widths = [3, 0, 5, 1], [2, 7, 1, 4]
    offsets = torch.tensor([0, *heights]).cumsum(0).int() * 64
    structure = expert_topology(offsets, 64, [64 * width for width in widths], 12)
    assert structure.offsets[-1] == 3 * 2 + 5 * 1 + 1 * 4
    assert structure.row_indices.shape == (12 * 7,)  # what no routing can exceed
    assert (structure.row_indices >= 0).sum() == 15


def test_agrees_with_the_columns_alone():
    offsets = torch.tensor([0, 32, 32, 96, 112], dtype=torch.int32)
    mine = expert_topology(offsets, 16, 48, 9)
    assert torch.equal(mine.column_indices, topology(offsets, 16, 3, 9))


def test_more_block_rows_than_int16_counts():
    heights = torch.tensor([40_000, 0, 70_000])
    offsets = torch.cat((torch.zeros(1), heights.cumsum(0))).int() * 16
    mine = expert_topology(offsets, 16, [16, 32, 48], 110_003)
    rows = torch.cat((torch.arange(40_000), torch.arange(40_000, 110_000).repeat_interleave(3)))
    assert torch.equal(mine.row_indices[: rows.shape[0]], rows.int())
    assert mine.offsets[-1] == 250_000
    assert mine.offsets_t.tolist() == [0, 40_000, 40_000, 40_000, 110_000, 180_000, 250_000]
    assert mine.column_indices_t[249_999] == 109_999
    assert mine.block_offsets_t[180_000] == 40_002
    assert (mine.row_indices[250_000:] == -1).all()


def test_a_wider_table_than_one_chunk_and_many_experts():
    """Loops over chunks of a row, a column and the tail go round more than once."""
    heights, widths = [0] * 30 + [140] + [2] * 6, [1] * 30 + [140] + [1] * 6
    offsets = torch.tensor([0, *heights]).cumsum(0).int() * 16
    table = topology_arguments([16 * width for width in widths], 37, 16, offsets.device)
    arguments = (offsets, *table, 16, 153, 1, False)
    for a, b in zip(expert_topology_cuda(*arguments), expert_topology_ref(*arguments), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((torch.zeros(3).long(), 16, 16, 1), TypeError, "expert_offsets: expected dtype int32, got torch.int64"),
        ((torch.zeros(1).int(), 16, 16, 1), ValueError, r"expected shape \(E\+1,\), got \(1,\)"),
        ((torch.zeros(3).int(), 0, 16, 1), ValueError, "block_size: expected at least 1, got 0"),
        ((torch.zeros(3).int(), 16, [16], 1), ValueError, "ffn_sizes: expected 2 widths, got 1"),
        ((torch.zeros(3).int(), 16, [16, 24], 1), ValueError, r"positive multiples of block_size 16, got \[16, 24\]"),
        ((torch.zeros(3).int(), 16, 0, 1), ValueError, r"positive multiples of block_size 16, got \[0\]"),
        ((torch.zeros(3).int(), 16, 16, -1), ValueError, "at least 0 row blocks .*, got -1 row blocks"),
        ((torch.zeros(3).int(), 16, 2**20, 2**15), ValueError, r"fewer than 2\*\*31 blocks .* got 32768 row blocks"),
    ],
)
def test_errors_name_argument_and_values(arguments, error, message):
    with pytest.raises(error, match=message):
        expert_topology(*arguments)


# --------------------------------------------------------------------------------------------------------- padded plan


def check_padding(run, case, block):
    experts = case.num_experts
    plan = case.expert_offsets, case.row_to_token, case.row_to_slot, case.token_offsets, case.token_rows
    blocks = row_bound(case.rows, experts, block_size=block) // block
    offsets, token, slot, assignment, token_rows = (index.tolist() for index in run(*plan, block, blocks))
    assert offsets[0] == 0
    assert len(token) == blocks * block
    expected, flat = [], [(t, s) for t, slots in enumerate(case.assignments) for s in range(len(slots))]
    for e in range(experts):
        mine = case.row_owner[case.expert_starts[e] : case.expert_starts[e + 1]]
        expected += mine + [None] * (-len(mine) % block)
        assert offsets[e + 1] == len(expected)
    assert len(expected) <= len(token)
    expected += [None] * (len(token) - len(expected))
    assert token == [-1 if owner is None else owner[0] for owner in expected]
    assert slot == [-1 if owner is None else owner[1] for owner in expected]
    assert assignment == [-1 if owner is None else flat.index(owner) for owner in expected]
    where = {owner: row for row, owner in enumerate(expected) if owner is not None}
    assert token_rows == [where.get(place, -1) for place in flat]


@pytest.mark.parametrize("run", [pad_module.pad_plan_ref, pad_module.pad_plan_cuda], ids=["ref", "kernels"])
@settings(max_examples=60)
@given(case=plan_cases(), block=st.sampled_from([16, 32]))
def test_padding_moves_every_row_and_loses_none(run, case, block):
    check_padding(run, case, block)


@pytest.mark.parametrize("run", [pad_module.pad_plan_ref, pad_module.pad_plan_cuda], ids=["ref", "kernels"])
def test_padding_of_experts_that_fill_several_blocks(run):
    """One expert with more than a block, one with exactly two, one with none, one with a single row."""
    experts = [[0, 1]] * 32 + [[0, 3]] + [[0, 4]] * 7
    check_padding(run, make_plan(experts, 4, tail=5), 16)


def test_padding_twice_changes_nothing():
    case = make_plan([[0, 2], [2, 1], [2, 0]], 3)
    plan = case.expert_offsets, case.row_to_token, case.row_to_slot, case.token_offsets, case.token_rows
    once = pad_plan(*plan, 16)
    again = pad_plan(once.expert_offsets, once.row_to_token, once.row_to_slot, plan[3], once.token_rows, 16)
    for a, b in zip(once, again, strict=True):
        assert torch.equal(a, b[: a.shape[0]])
