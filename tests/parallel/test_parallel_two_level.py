"""Rows in two hops against rows in one: the same rows in the same places, the same gradients, counted messages."""

from __future__ import annotations

from unittest.mock import patch

import pytest
import rank_jobs_wire
import torch
import torch.distributed as dist
from dispatch_cases import DTYPES, F, H, case_of, pieces
from helpers import exchanges_without_values
from hypothesis import given, settings
from hypothesis import strategies as st
from rank_pool import RankPool
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from dmoe import ExpertWeights, run_experts
from dmoe.parallel import AllToAllDispatcher, TwoLevel
from dmoe.parallel.two_level import Pieces


@pytest.fixture(scope="module")
def six():
    """Six ranks, for nodes that are not as many as the ranks of one."""
    pool = RankPool(6)
    yield pool
    pool.close()


@pytest.fixture(scope="module")
def pool_of(ranks, six):
    """The pool for nodes x ranks."""
    return lambda shape: six if shape[0] * shape[1] == 6 else ranks


SHAPES = st.sampled_from([(2, 2), (2, 2), (2, 3), (3, 2), (1, 4), (4, 1)])


@st.composite
def exchanges(draw):
    """``counts[i][j]`` rows from rank i to rank j, and rows that each rank keeps behind them; nodes x ranks."""
    shape = draw(SHAPES)
    world = shape[0] * shape[1]
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    most = draw(st.sampled_from([0, 1, 4]))
    counts = torch.randint(0, most + 1, (world, world), generator=generator)
    idle = torch.rand(2, world, generator=generator) < draw(st.sampled_from([0.0, 0.4]))
    counts[idle[0]] = 0
    counts[:, idle[1]] = 0
    if draw(st.integers(0, 4)) == 0:
        counts.fill_(most)  # as in the static mode
    extra = [draw(st.integers(0, 2)) for _ in range(world)]
    return shape, counts.tolist(), extra, draw(st.integers(1, 5))


def held_by(shape, counts):
    """Rows that pass each rank, by the rank of its node and the node."""
    nodes, each = shape
    return [
        [counts[node * each + neighbour][other * each + local] for neighbour in range(each) for other in range(nodes)]
        for node in range(nodes)
        for local in range(each)
    ]


@settings(max_examples=30)
@given(case=exchanges(), dtype=st.sampled_from(DTYPES))
def test_rows_arrive_where_the_flat_exchange_brings_them(pool_of, case, dtype):
    shape, counts, extra, width = case
    rows = [
        (torch.arange((sum(c) + e) * width).view(-1, width) % 19 + 20 * rank).to(dtype)
        for rank, (c, e) in enumerate(zip(counts, extra, strict=True))
    ]
    results = pool_of(shape).run(rank_jobs_wire.two_level_copy, shape, rows, counts, held_by(shape, counts))
    for target, received in enumerate(results):
        expected = torch.cat([pieces(rows, counts, source, target) for source in range(len(counts))])
        assert received.dtype == dtype
        assert torch.equal(received.view(torch.uint8), expected.view(torch.uint8))


@settings(max_examples=40)
@given(case=exchanges(), seed=st.integers(0, 99), back=st.booleans())
def test_both_ways_and_their_gradients(pool_of, case, seed, back):
    shape, counts, extra, width = case
    world = len(counts)
    torch.manual_seed(seed)
    there = [list(column) for column in zip(*counts, strict=True)] if back else counts
    held = held_by(shape, there)  # on the way back it is the way there that says what passes whom
    rows = [torch.randn(sum(c) + e, width, dtype=torch.float64) for c, e in zip(counts, extra, strict=True)]
    arriving = [sum(sent[target] for sent in counts) for target in range(world)]
    factors = [torch.randn(n, width, dtype=torch.float64) for n in arriving]
    results = pool_of(shape).run(rank_jobs_wire.two_level, shape, rows, counts, held, factors, back)
    for rank, (arrived, once, again, twice, home) in enumerate(results):
        assert torch.equal(arrived, torch.cat([pieces(rows, counts, source, rank) for source in range(world)]))
        sent = sum(counts[rank])
        assert torch.equal(home, torch.cat([rows[rank][:sent], torch.zeros_like(rows[rank][sent:])]))
        factor = torch.zeros_like(rows[rank])
        for target in range(world):
            first, begin = sum(counts[rank][:target]), sum(counts[s][target] for s in range(rank))
            n = counts[rank][target]
            factor[first : first + n] = factors[target][begin : begin + n]
        torch.testing.assert_close(once, 3 * factor * rows[rank] ** 2)
        assert torch.equal(again, once)
        torch.testing.assert_close(twice, 6 * factor * rows[rank])


def test_work_between_the_halves_and_the_first_hop_overlap_both_ways(ranks):
    counts = [[(i + 2 * j) % 3 for j in range(4)] for i in range(4)]
    rows = [torch.randn(sum(c), 2) for c in counts]
    held = held_by((2, 2), counts)
    for order in ranks.run(rank_jobs_wire.two_level_order, (2, 2), rows, counts, held):
        assert order == ["inside", "work", "between", "between", "inside", "work"]


@st.composite
def shaped_routings(draw):
    """As test_parallel_dispatch.routings, for nodes x ranks."""
    shape = draw(SHAPES)
    world = shape[0] * shape[1]
    experts, top_k = world * draw(st.integers(1, 2)), draw(st.integers(1, 4))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    hot, share = draw(st.booleans()), draw(st.sampled_from([0.0, 0.4]))
    ids = []
    for _ in range(world):
        tokens = draw(st.sampled_from([0, 1, 3, 9]))
        chosen = torch.randint(0, experts // world if hot else experts, (tokens, top_k), generator=generator)
        ids.append(chosen.masked_fill(torch.rand(tokens, top_k, generator=generator) < share, experts))
    return shape, (world, experts, ids, generator)


@settings(max_examples=40)
@given(
    case=shaped_routings(),
    wire=st.sampled_from([{}, {}, {"wire_dtype": "fp8", "wire_backward": True}, {"wire_dtype": "int8"}]),
    room=st.none() | st.integers(0, 40),
    dtype=st.sampled_from([torch.float64, torch.bfloat16]),
)
def test_dispatcher_in_two_hops_equals_one_hop_bit_for_bit(pool_of, case, wire, room, dtype):
    (nodes, each), routing = case
    arguments = (*case_of(routing, dtype), {**wire, "max_rows_received": room})
    pool, top_k = pool_of((nodes, each)), routing[2][0].shape[1]
    flat = pool.run(rank_jobs_wire.experts, *arguments)
    hops = pool.run(rank_jobs_wire.experts, *arguments, (nodes, each))
    element, choice = (8, 8) if dtype == torch.float64 else (2, 4)
    row = (H + 4 if wire else H * element) + 2 * top_k * choice
    counts = 0 if room is not None else 6 * 8
    for one, two in zip(flat, hops, strict=True):
        for name in ("arrived", "y", "x", "gates"):
            assert torch.equal(two[name], one[name]), name
        for mine, theirs in zip(two["weights"][:2], one["weights"][:2], strict=True):
            assert torch.equal(mine, theirs)
        if room is not None:
            assert torch.equal(two["kept"], one["kept"])
        calls = 4 if room is None else 3  # counts, choices, rows, and results
        assert [hop.others for hop in two["traffic"].hops] == [each - 1, nodes - 1]
        assert two["traffic"].messages_per_exchange == each - 1 + nodes - 1
        assert one["traffic"].messages_per_exchange == nodes * each - 1
        for result in (one, two):
            assert result["bytes_sent"] == result["wire_bytes"]
            for hop, measured in zip(result["traffic"].hops, result["wire"], strict=True):
                assert measured["calls"] == calls
                assert measured["messages"] == calls * hop.others
                rows = hop.rows_there * row + hop.rows_back * H * element
                ranks_told = hop.others * (nodes * each // (hop.others + 1))
                assert measured["bytes"] == rows + counts * ranks_told
        assert two["traffic"].naive_bytes_sent == one["traffic"].naive_bytes_sent
        assert two["traffic"].rows_sent == one["traffic"].rows_sent


@settings(max_examples=30)
@given(case=shaped_routings(), wire=st.sampled_from([{}, {}, {"wire_dtype": "fp8"}]), joined=st.booleans())
def test_a_token_crosses_to_each_node_once(pool_of, case, wire, joined):
    """Results and gradients are those of one hop; between nodes it goes once to each node of its experts."""
    (nodes, each), routing = case
    world, experts, ids, _ = routing
    pool, data, options = pool_of((nodes, each)), case_of(routing), {**wire, "join_choices": joined}
    flat = pool.run(rank_jobs_wire.experts, *data, options)
    by_node = pool.run(rank_jobs_wire.experts, *data, {**options, "by_node": True}, (nodes, each))
    top_k, of_rank = ids[0].shape[1], experts // world
    for rank, (one, two) in enumerate(zip(flat, by_node, strict=True)):
        for name in ("y", "x", "gates"):
            torch.testing.assert_close(two[name], one[name], rtol=1e-12, atol=1e-12 if not wire else 1e-6)
        for mine, theirs in zip(two["weights"][:2], one["weights"][:2], strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12 if not wire else 1e-6)
        chosen = [{e // of_rank // each for e in token if e < experts} for token in ids[rank].tolist()]
        between, inside = two["traffic"].hops
        assert between.rows_there == sum(len(found - {rank // each}) for found in chosen)
        assert [inside.others, between.others] == [each - 1, nodes - 1]
        row = (H + 4 if wire else H * 8) + 2 * top_k * 8
        measured = dict(zip(("inside", "between"), two["wire"], strict=True))
        for name, hop in (("inside", inside), ("between", between)):
            calls = 3 if joined else 4
            assert measured[name]["calls"] == calls
            rows = hop.rows_there * row + hop.rows_back * H * 8
            assert measured[name]["bytes"] == rows + 6 * 8 * hop.others
        assert two["bytes_sent"] == two["wire_bytes"]
        assert two["traffic"].naive_bytes_sent is None


@pytest.mark.parametrize("wire", [{}, {"wire_dtype": "fp8"}, {"join_choices": False}], ids=str)
@pytest.mark.parametrize("by_node", [False, True])
def test_both_hops_of_a_chunk_travel_while_another_is_computed(ranks, by_node, wire):
    there, back = ("between", "inside") if by_node else ("inside", "between")
    twice = 2 if wire.get("join_choices") is False else 1  # choices, and rows
    launched, arrived = [there] * 2 * twice, [back] * twice
    home, home_again = ("inside", "between") if by_node else ("between", "inside")
    results = [home, home_again] if by_node else [home]  # the sums of a node are made before they go on
    hops = [*launched, *arrived, *arrived, "experts 0", *results, "experts 1", *results]
    hops += [] if by_node else [home_again] * 2
    for order, difference in ranks.run(rank_jobs_wire.chunks_in_two_hops, by_node, wire):
        assert order == hops
        assert difference < (1e-12 if "wire_dtype" not in wire else 1e-5)


def test_what_a_node_dispatcher_cannot_have(ranks):
    told = ranks.run(rank_jobs_wire.no_node_dispatcher)
    for shared, bounded in told:
        assert "num_experts: expected a multiple of the 2 nodes" in shared
        assert shared.endswith("got 1")
        assert "max_rows_received: expected None, got 8" in bounded


@settings(max_examples=60)
@given(
    counts=st.integers(1, 4).flatmap(
        lambda n: st.lists(st.lists(st.integers(0, 3), min_size=n, max_size=n), min_size=1, max_size=4)
    ),
    extra=st.integers(0, 2),
    room=st.none() | st.integers(0, 3),
)
def test_pieces_change_places(counts, extra, room):
    total = sum(map(sum, counts))
    x = torch.arange((total + extra) * 2.0, dtype=torch.float64).view(-1, 2).requires_grad_()
    split = x.detach()[:total].split([count for row in counts for count in row])
    width = len(counts[0])
    expected = torch.cat([split[a * width + b] for b in range(width) for a in range(len(counts))])
    y = Pieces(counts).regroup(x, None if room is None else total + room)
    assert torch.equal(y[:total], expected)
    assert torch.equal(y[total:], torch.zeros(room or 0, 2, dtype=torch.float64))
    factor = torch.randn_like(y)
    (y**2 * factor).sum().backward()
    of_tokens = torch.zeros_like(x)
    of_tokens[(expected[:, 0] / 2).long()] = 2 * expected * factor[:total]
    assert torch.equal(x.grad, of_tokens)


@pytest.fixture
def imaginary_levels():
    """Rank 1 of 2 nodes of 3 ranks, in this process alone: a backend that sends nothing."""
    dist.init_process_group("fake", rank=1, world_size=6, store=FakeStore())
    yield TwoLevel(inner=dist.new_group([0, 1, 2]), outer=dist.new_group([1, 4]))
    dist.destroy_process_group()


@exchanges_without_values
@pytest.mark.parametrize("wire", [{}, {"wire_dtype": "fp8", "wire_backward": True}, {"wire_dtype": "int8"}])
@pytest.mark.parametrize("room", [18, None])
def test_static_mode_reads_no_tensor_and_the_dynamic_one_a_single_time(imaginary_levels, room, wire):
    """Tensors without values: whoever asks for one is refused."""
    dispatcher = AllToAllDispatcher(dist.group.WORLD, 12, max_rows_received=room, two_level=imaginary_levels, **wire)
    with FakeTensorMode():
        x, gates = torch.empty(5, H, requires_grad=True), torch.empty(5, 3, requires_grad=True)
        ids = torch.empty(5, 3, dtype=torch.int64)
        weights = ExpertWeights(torch.empty(2, 2, F, H, requires_grad=True), torch.empty(2, H, F, requires_grad=True))
        reads, told = [], [[[2, 3, H, 3, 0, 3], [0, 0, H, 3, 0, 3], [1, 1, H, 3, 0, 3]] * 2] * 3

        def answered(tensor):
            reads.append(tuple(tensor.shape))
            return told

        with patch.object(FakeTensor, "tolist", answered):
            arrived = dispatcher.dispatch(x, ids, gates)
            y = dispatcher.combine(run_experts(arrived.x, arrived.plan, arrived.gate_weights, weights), arrived)
            y.sum().backward()
        assert reads == ([(3, 6, 6)] if room is None else [])
        assert y.shape == x.shape == x.grad.shape
        assert arrived.x.shape == (18 if room else 6, H)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("swapped", "TwoLevel: inner: expected the global ranks [0, 1] on rank 0 of the group of [0, 1, 2, 3] with 2 "),
        ("outer", "TwoLevel: outer: expected the global ranks [0, 2] on rank 0"),
        ("mesh", "TwoLevel: expected a DeviceMesh of two dimensions, nodes first, got 1"),
        ("counts", "TwoLevelExchange: tokens: held_counts: expected 4 counts of at least 0, for 2 nodes of 2 ranks"),
        ("negative", "TwoLevelExchange: tokens: recv_counts: expected 4 counts of at least 0"),
        ("few", "all_to_all_rows: tokens: expected shape (R, C) with R >= 4, the sum of send_counts, got (3, 2)"),
    ],
)
def test_what_does_not_fit_is_refused(ranks, kind, message):
    assert ranks.run(rank_jobs_wire.two_level_refused, kind)[0].startswith(message)


def test_groups_of_meshes(ranks):
    for rank, (world, part) in enumerate(ranks.run(rank_jobs_wire.mesh_groups)):
        assert world
        assert part == [[0, 1], [2, 3]][rank // 2]
