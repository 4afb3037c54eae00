"""routing_plan against a plan made by walking over the assignments one at a time."""

from __future__ import annotations

import pytest
import torch
from helpers import on_threads
from hypothesis import given, settings
from hypothesis import strategies as st
from plan_cases import expected_tiles
from strategies import routings

from dmoe.ops.routing_plan import routing_plan, routing_plan_ref, row_bound

NAMES = ("row_to_token", "row_to_slot", "expert_offsets", "token_rows", "tokens_per_expert", "tiles", "experts_by_load")


def reference(
    indices,
    num_experts,
    *,
    block_size=1,
    capacity=None,
    choice_major=False,
    token_order=None,
    binned=False,
    tile_rows=0,
):
    return routing_plan_ref(indices, num_experts, block_size, capacity, choice_major, token_order, binned, tile_rows)


implementations = pytest.mark.parametrize("plan", [routing_plan, reference], ids=["op", "ref"])


def expected_plan(
    indices,
    num_experts,
    *,
    block_size=1,
    capacity=None,
    choice_major=False,
    token_order=None,
    binned=False,
    tile_rows=0,
):
    """The seven results as lists: every expert keeps a list of visitors, and the rows are these lists in a row."""
    ids = indices.tolist()
    num_tokens, top_k = indices.shape
    order = range(num_tokens) if token_order is None else token_order.tolist()
    if choice_major:
        visits = [(token, slot) for slot in range(top_k) for token in order]
    else:
        visits = [(token, slot) for token in order for slot in range(top_k)]

    visitors = [[] for _ in range(num_experts)]
    for token, slot in visits:
        if ids[token][slot] < num_experts:
            visitors[ids[token][slot]].append((token, slot))
    kept = [seen if capacity is None else seen[:capacity] for seen in visitors]

    rows, offsets = [], [0]
    for mine in kept:
        rows += mine
        while (len(rows) - offsets[-1] < capacity) if binned else (len(rows) % block_size != 0):
            rows.append((-1, -1))
        offsets.append(len(rows))

    most = num_tokens * top_k if capacity is None else min(num_tokens * top_k, num_experts * capacity)
    if binned:
        bound = num_experts * capacity
    else:  # the most rows of whole blocks that `most` rows on as many experts as possible need
        holes = min(num_experts, most) * (block_size - 1)
        bound = (most + holes) - (most + holes) % block_size
    assert len(rows) <= bound
    rows += [(-1, -1)] * (bound - len(rows))

    token_rows = [-1] * (num_tokens * top_k)
    for row, (token, slot) in enumerate(rows):
        if token >= 0:
            token_rows[token * top_k + slot] = row
    tiles, by_load = expected_tiles(offsets, bound, tile_rows) if tile_rows else ([], [])
    counts = [len(seen) for seen in visitors]
    return [r[0] for r in rows], [r[1] for r in rows], offsets, token_rows, counts, tiles, by_load


def assert_plan(plan, indices, num_experts, **options):
    got = plan(indices, num_experts, **options)
    for name, one, expected in zip(NAMES, got, expected_plan(indices, num_experts, **options), strict=True):
        assert one.dtype == torch.int32, name
        assert one.is_contiguous(), name
        assert one.tolist() == expected, name


@st.composite
def layouts(draw):
    kind = draw(st.sampled_from(["packed", "padded", "binned"]))
    capacity = draw(st.none() | st.integers(0, 12)) if kind != "binned" else draw(st.integers(0, 12))
    return {
        "block_size": draw(st.integers(2, 9)) if kind == "padded" else 1,
        "capacity": capacity,
        "binned": kind == "binned",
        "tile_rows": draw(st.sampled_from([0, 1, 2, 3, 16])),
    }


@implementations
@settings(max_examples=60)
@given(routing=routings(), layout=layouts(), choice_major=st.booleans(), data=st.data())
def test_equals_one_visit_at_a_time(plan, routing, layout, choice_major, data):
    T = routing.expert_indices.shape[0]
    order = data.draw(st.none() | st.permutations(range(T)))
    if order is not None:
        order = torch.tensor(order, dtype=data.draw(st.sampled_from([torch.int32, torch.int64])))
    assert_plan(plan, *routing, choice_major=choice_major, token_order=order, **layout)


@implementations
@pytest.mark.parametrize("choice_major", [False, True])
@pytest.mark.parametrize("ordered", [False, True])
def test_runs_of_several_threads_join_exactly(plan, choice_major, ordered):
    """Long enough that every thread gets a run whose ends lie inside a token, for any number of threads."""
    T, K, E = 9973, 7, 37
    generator = torch.Generator().manual_seed(0)
    indices = torch.randint(0, E + 1, (T, K), generator=generator)
    order = torch.randperm(T, generator=generator) if ordered else None
    options = {"block_size": 16, "capacity": 1800, "choice_major": choice_major, "token_order": order}
    options["tile_rows"] = 128
    expected = expected_plan(indices, E, **options)
    for count in (1, 2, 5):
        with on_threads(count):
            assert [part.tolist() for part in plan(indices, E, **options)] == list(expected)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(
    "options", [{"tile_rows": 64}, {"capacity": 9000, "block_size": 7}, {"capacity": 8200, "binned": True}]
)
def test_large_plan_equals_the_reference(options, threads):
    """Large enough to be written a cache line at a time; the loop over visits would take too long here."""
    T, K, E = 70_001, 8, 64
    generator = torch.Generator().manual_seed(0)
    indices = torch.randint(0, E + 1, (T, K), generator=generator)
    indices[: T // 4] = 63  # runs in which most experts get no row
    order = torch.randperm(T, generator=generator) if "capacity" in options else None
    with on_threads(threads):
        got = routing_plan(indices, E, token_order=order, **options)
    for name, one, expected in zip(NAMES, got, reference(indices, E, token_order=order, **options), strict=True):
        assert torch.equal(one, expected), name


@implementations
@pytest.mark.parametrize("num_experts", [1, 255, 1024, 5000])
def test_many_experts_few_tokens(plan, num_experts):
    indices = torch.randint(0, num_experts + 1, (11, min(3, num_experts)), dtype=torch.int32)
    assert_plan(plan, indices, num_experts)
    assert_plan(plan, indices, num_experts, block_size=128)
    assert_plan(plan, indices, num_experts, tile_rows=2)
    assert_plan(plan, indices, num_experts, capacity=2, binned=True)


@implementations
def test_no_tokens(plan):
    for dtype in (torch.int32, torch.int64):
        empty = torch.empty(0, 2, dtype=dtype)
        for choice_major in (False, True):
            assert_plan(plan, empty, 3, choice_major=choice_major)
            assert_plan(plan, empty, 3, choice_major=choice_major, block_size=4)
            assert_plan(plan, empty, 3, choice_major=choice_major, capacity=5, binned=True, tile_rows=4)
            assert_plan(plan, empty, 3, choice_major=choice_major, tile_rows=16)
            assert_plan(plan, empty, 3, choice_major=choice_major, token_order=torch.empty(0, dtype=torch.int64))


@implementations
def test_dropped_before_and_by_capacity(plan):
    """Written out by hand: three tokens of two choices, expert 1 hot, one assignment dropped by its id."""
    indices = torch.tensor([[1, 0], [1, 2], [2, 1]])  # E = 2: id 2 is dropped
    row_to_token, row_to_slot, offsets, token_rows, counts, *_ = plan(indices, 2, capacity=2)
    assert row_to_token.tolist() == [0, 0, 1, -1]
    assert row_to_slot.tolist() == [1, 0, 0, -1]
    assert offsets.tolist() == [0, 1, 3]
    assert token_rows.tolist() == [1, 0, 2, -1, -1, -1]
    assert counts.tolist() == [1, 3]


@implementations
def test_choice_major_keeps_first_choices(plan):
    indices = torch.tensor([[1, 0], [2, 0], [0, 1]])
    assert plan(indices, 3, capacity=1)[0].tolist() == [0, 0, 1]  # expert 0 keeps token 0's second choice
    assert plan(indices, 3, capacity=1, choice_major=True)[0].tolist() == [2, 0, 1]  # and here token 2's first


@implementations
def test_views_are_read_as_they_are(plan):
    generator = torch.Generator().manual_seed(1)
    wide = torch.randint(0, 4, (4, 18), generator=generator)
    for view in (wide.T, wide[:, ::3], wide[1:, 5:7], wide[:, :1].expand(4, 3)):
        order = torch.randperm(view.shape[0], generator=generator).repeat_interleave(2)[::2]
        assert not view.is_contiguous()
        assert not order.is_contiguous()
        assert_plan(plan, view, 4, capacity=3, token_order=order)


@pytest.mark.parametrize("num_assignments", [0, 1, 5, 64])
@pytest.mark.parametrize("num_experts", [1, 3, 8])
@pytest.mark.parametrize("block_size", [1, 2, 7])
def test_row_bound_is_reached(num_assignments, num_experts, block_size):
    """No smaller bound would do: of all ways to spread the assignments, the worst one uses every row."""
    bound = row_bound(num_assignments, num_experts, block_size=block_size)
    # Expert i takes `share` assignments; the worst is one assignment on every expert, and the rest on the first.
    experts = min(num_experts, num_assignments)
    worst = 0
    for extra in range(min(block_size, num_assignments - experts + 1)):
        first = 1 + num_assignments - experts - extra if experts else 0
        loads = [first] + [1 + extra] + [1] * max(experts - 2, 0) if experts > 1 else [num_assignments]
        worst = max(worst, sum(-(-load // block_size) * block_size for load in loads))
    assert worst == bound


@implementations
@pytest.mark.parametrize(
    ("value", "dtype"), [(-1, torch.int32), (5, torch.int32), (-(2**40), torch.int64), (2**40, torch.int64)]
)
def test_bad_id_is_named_with_its_position(plan, value, dtype):
    indices = torch.zeros(6, 3, dtype=dtype)
    indices[4, 1] = value
    indices[5, 2] = -7  # only the first one is reported
    with pytest.raises(RuntimeError, match=rf"expert_indices\[4, 1\]: expected an id in \[0, 4\].*, got {value}$"):
        plan(indices, 4)
    with pytest.raises(RuntimeError, match=rf"expert_indices\[4, 1\].*got {value}$"):
        plan(indices, 4, choice_major=True, token_order=torch.arange(6).flip(0))


@implementations
@pytest.mark.parametrize("order", [[0, 1, 1], [0, 1, 3], [-1, 1, 2]])
def test_order_that_is_no_permutation(plan, order):
    for dtype in (torch.int32, torch.int64):
        with pytest.raises(RuntimeError, match=r"token_order: expected a permutation of range\(3\)"):
            plan(torch.zeros(3, 1, dtype=torch.int64), 2, token_order=torch.tensor(order, dtype=dtype))


@pytest.mark.parametrize(
    ("indices", "options", "error", "message"),
    [
        (torch.zeros(3, 2), {}, TypeError, "expert_indices: expected dtype int32 or int64, got torch.float32"),
        (torch.zeros(3, dtype=torch.int32), {}, ValueError, r"expected shape \(T, K\) with K >= 1, got \(3,\)"),
        (torch.zeros(3, 0, dtype=torch.int32), {}, ValueError, r"expected shape \(T, K\) with K >= 1, got \(3, 0\)"),
        (
            torch.zeros(3, 1, dtype=torch.int32),
            {"num_experts": 0},
            ValueError,
            "num_experts: expected at least 1, got 0",
        ),
        (torch.zeros(3, 1, dtype=torch.int32), {"block_size": 0}, ValueError, "block_size: expected at least 1, got 0"),
        (
            torch.zeros(3, 1, dtype=torch.int32),
            {"capacity": -1},
            ValueError,
            "capacity: expected an integer of at least 0 or None, got -1",
        ),
        (
            torch.zeros(3, 1, dtype=torch.int32),
            {"tile_rows": -1},
            ValueError,
            "tile_rows: expected at least 0, got -1",
        ),
        (
            torch.zeros(3, 1, dtype=torch.int32),
            {"binned": True},
            ValueError,
            "binned: expected a capacity and block_size 1",
        ),
        (
            torch.zeros(3, 1, dtype=torch.int32),
            {"binned": True, "capacity": 4, "block_size": 2},
            ValueError,
            "got capacity 4, block_size 2",
        ),
        (
            torch.zeros(3, 1, dtype=torch.int32),
            {"token_order": torch.zeros(3)},
            TypeError,
            "token_order: expected dtype int32 or int64",
        ),
        (
            torch.zeros(3, 1, dtype=torch.int32),
            {"token_order": torch.zeros(2, dtype=torch.int32)},
            ValueError,
            r"token_order: expected shape \(3,\), got \(2,\)",
        ),
        (
            torch.zeros(3, 1, dtype=torch.int32),
            {"token_order": torch.zeros(3, dtype=torch.int32, device="meta")},
            ValueError,
            "token_order: expected device cpu of expert_indices, got meta",
        ),
        (
            torch.zeros(3, 1, dtype=torch.int32),
            {"num_experts": 2**10, "capacity": 2**21, "binned": True},
            ValueError,
            r"fewer than 2\*\*31 rows .*, got 2147483648 rows",
        ),
    ],
)
def test_errors_name_argument_and_values(indices, options, error, message):
    with pytest.raises(error, match=message):
        routing_plan(indices, **{"num_experts": 2, **options})


def test_more_assignments_than_int32_counts_are_refused():
    with pytest.raises(ValueError, match=r"fewer than 2\*\*31 rows and assignments"):
        routing_plan(torch.zeros(1, 1, dtype=torch.int32).expand(2**30, 2), 2, capacity=1)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"block_size": 4, "tile_rows": 8},
        {"capacity": 2, "binned": True},
        {"capacity": 3, "choice_major": True, "tile_rows": 1},
    ],
)
def test_registration(options):
    indices = torch.randint(0, 5, (7, 2), dtype=torch.int32)
    arguments = {"block_size": 1, "capacity": None, "choice_major": False, "token_order": None, "binned": False}
    arguments["tile_rows"] = 0
    torch.library.opcheck(torch.ops.dmoe.routing_plan.default, (indices, 4), {**arguments, **options})


def test_one_trace_serves_every_number_of_tokens():
    @torch.compile(fullgraph=True, dynamic=True, backend="aot_eager")
    def traced(indices):
        row_to_token, *_, tiles, _ = routing_plan(indices, 4, block_size=4, capacity=100, tile_rows=16)
        return row_to_token + 1, tiles

    with torch._dynamo.config.patch(error_on_recompile=True):
        for tokens in (8, 13, 900):  # below and above what the capacity bounds
            indices = torch.randint(0, 5, (tokens, 2))
            row_to_token, *_, tiles, _ = routing_plan(indices, 4, block_size=4, capacity=100, tile_rows=16)
            rows, cut = traced(indices)
            assert torch.equal(rows, row_to_token + 1)
            assert torch.equal(cut, tiles)
