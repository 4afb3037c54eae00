"""Dispatch and combine on gloo ranks against a loop over all tokens in one process: copies, sums, gradients, bytes."""

from __future__ import annotations

import math
from unittest.mock import patch

import pytest
import rank_jobs
import torch
import torch.distributed as dist
from dispatch_cases import F, H, assert_equal_to, case_of, exactly, in_one_process, routings
from helpers import assert_as_accurate, exchanges_without_values, nudged
from hypothesis import given, settings
from hypothesis import strategies as st
from rank_pool import RankError
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from dmoe import ExpertWeights, run_experts
from dmoe.parallel import AllToAllDispatcher, LocalDispatcher, local_experts
from dmoe.parallel.destinations import once_per_rank

OPTIONS = [
    {},
    {"gated": False, "bias": True},
    {"bias": True, "run": {"gate_weight_on": "activation"}},
    {"run": {"gate_weight_on": "input", "backend": "reference"}},
    {"run": {"recompute": True}},
]


@settings(max_examples=60)
@given(routing=routings(), options=st.sampled_from(OPTIONS))
def test_results_and_gradients_equal_one_process(ranks, routing, options):
    world, _, _, _ = routing
    shares, weights, options = case_of(routing, options=options)
    results = ranks.run(rank_jobs.experts, shares, weights, options, ranks=world)
    assert_equal_to(in_one_process(shares, weights, options), results, exactly)


@settings(max_examples=15)
@given(routing=routings(), dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_narrow_results_are_as_accurate_as_plain_pytorch(ranks, routing, dtype):
    world = routing[0]
    shares, weights, options = case_of(routing, dtype)
    results = ranks.run(rank_jobs.experts, shares, weights, options, ranks=world)
    exact = in_one_process(shares, weights, options)
    pairs = [(in_one_process(shares, weights, options, dtype), exact)]
    for _ in range(3):
        moved = [(nudged(x), i, nudged(g), nudged(dy)) for x, i, g, dy in shares], [nudged(w) for w in weights]
        pairs.append((in_one_process(*moved, options, dtype), in_one_process(*moved, options)))

    def flat(results, rank):
        return [results[name][rank] for name in ("y", "x", "gates")] + results["weights"][rank][:2]

    for rank, result in enumerate(results):
        actual = [result[name] for name in ("y", "x", "gates")] + result["weights"][:2]
        for n, value in enumerate(actual):
            own = [(flat(plain, rank)[n], flat(true, rank)[n]) for plain, true in pairs]
            # One more rounding than in one process, where the sums of the ranks meet: bounded by them, not by the sum.
            noise = 4 * torch.finfo(dtype).eps * max(own[0][1].abs().max().item(), 1) if value.numel() else 0
            assert_as_accurate(f"{n} of rank {rank}", value, flat(exact, rank)[n], own, noise=noise)


@settings(max_examples=40)
@given(routing=routings())
def test_each_token_travels_once_to_each_rank_and_every_byte_is_counted(ranks, routing):
    world, experts, ids, _ = routing
    shares, weights, options = case_of(routing)
    each, top_k = experts // world, ids[0].shape[1]
    goes = [[[{e // each for e in token if e < experts}] for token in i.tolist()] for i in ids]
    results = ranks.run(rank_jobs.experts, shares, weights, options, ranks=world)
    for rank, result in enumerate(results):
        expected = [
            share[0][t]
            for source, share in enumerate(shares)
            for t, (ranks_of,) in enumerate(goes[source])
            if rank in ranks_of
        ]
        assert torch.equal(result["arrived"], torch.stack(expected) if expected else torch.zeros(0, H).double())
        chosen = [sum(e // each == rank for e in i.flatten().tolist()) for i in ids]
        assert result["rows"] == sum(chosen)  # the plan reserves no more than what arrived
        traffic = result["traffic"]
        copies = [sum(to in ranks_of for (ranks_of,) in goes[rank]) for to in range(world)]
        assert traffic.rows_sent == sum(copies) - copies[rank]
        assert traffic.rows_kept == copies[rank]
        assert traffic.rows_received == len(expected) - copies[rank]
        mine = ids[rank].flatten().tolist()
        assert traffic.naive_rows_kept == sum(e // each == rank for e in mine)
        assert traffic.naive_rows_sent == sum(e // each != rank for e in mine if e < experts)
        assert traffic.naive_rows_received == sum(chosen) - chosen[rank]
        there, back = traffic.rows_sent * (H + 2 * top_k) * 8, traffic.rows_received * H * 8
        assert result["bytes_sent"] == there + back + (world - 1) * 6 * 8 == result["wire"]
        assert result["naive_bytes_sent"] == (traffic.naive_rows_sent + traffic.naive_rows_received) * H * 8
        assert result["dispatch_calls"] == 3  # one exchange of counts, one of choices, one of rows


@pytest.mark.parametrize(("world", "experts", "top_k"), [(8, 64, 8), (4, 8, 2), (2, 16, 4), (64, 64, 8)])
def test_copies_per_token_are_those_of_the_closed_form(world, experts, top_k):
    tokens, each = 20_000, experts // world
    generator = torch.Generator().manual_seed(0)
    choices = torch.rand(tokens, experts, generator=generator).topk(top_k).indices.int()
    copies = (once_per_rank(choices, each, world) < world).sum(1).double()
    expected = world * (1 - math.comb(experts - each, top_k) / math.comb(experts, top_k))
    assert abs(copies.mean().item() - expected) < 4 * copies.std().item() / math.sqrt(tokens) + 1e-12
    if (world, experts, top_k) == (8, 64, 8):
        assert expected / top_k == pytest.approx(0.68, abs=0.005)


def test_bytes_between_ranks_follow_the_closed_form(ranks):
    world, experts, top_k, tokens = 4, 16, 4, 1000
    generator = torch.Generator().manual_seed(0)
    ids = [torch.rand(tokens, experts, generator=generator).topk(top_k).indices for _ in range(world)]
    results = ranks.run(rank_jobs.experts, *case_of((world, experts, ids, generator)))
    rows = sum(result["traffic"].rows_sent + result["traffic"].rows_kept for result in results)
    share = rows / (tokens * world * top_k)
    expected = world * (1 - math.comb(12, 4) / math.comb(16, 4)) / top_k
    assert share == pytest.approx(expected, rel=0.01)


@settings(max_examples=25)
@given(routing=routings(), room=st.integers(0, 40))
def test_static_mode_drops_what_exceeds_its_room_and_nothing_else(ranks, routing, room):
    world, experts, ids, _ = routing
    shares, weights, options = case_of(routing)
    each, bound = experts // world, -(-room // world)
    kept = []
    for i in ids:
        used = [0] * world
        for token in i.tolist():
            fits = {}
            for to in sorted({e // each for e in token if e < experts}):
                fits[to] = used[to] < bound
                used[to] += 1
            kept.append([e < experts and fits[e // each] for e in token])
    results = ranks.run(rank_jobs.experts, shares, weights, options, room, ranks=world)
    assert_equal_to(in_one_process(shares, weights, options, kept=kept), results, exactly)
    flags = iter(kept)
    for result, i in zip(results, ids, strict=True):
        counts = [0] * experts
        for token in i.tolist():
            for e, flag in zip(token, next(flags), strict=True):
                counts[e % experts] += flag
        assert result["kept"].tolist() == counts
        assert result["arrived"].shape == (bound * world, H)
        assert result["dispatch_calls"] == 2  # no counts
        assert result["bytes_sent"] == result["wire"]
        assert result["naive_bytes_sent"] is None


@settings(max_examples=15)
@given(routing=routings())
def test_static_mode_with_room_enough_equals_the_dynamic_one(ranks, routing):
    world, _, ids, _ = routing
    case = case_of(routing)
    dynamic = ranks.run(rank_jobs.experts, *case, ranks=world)
    static = ranks.run(rank_jobs.experts, *case, world * max(len(i) for i in ids), ranks=world)
    for one, other in zip(dynamic, static, strict=True):
        for name in ("y", "x", "gates"):
            exactly(name, other[name], one[name])
        for a, b in zip(one["weights"][:2], other["weights"][:2], strict=True):
            exactly("weights", b, a)


@pytest.mark.parametrize(
    ("by_rank", "message"),
    [
        ([(4, 2, torch.float32, True)] * 3 + [(6, 2, torch.float32, True)], "H: 4 on ranks 0, 1, 2, 6 on rank 3"),
        ([(4, 2, torch.float32, True), (4, 3, torch.float32, True)] * 2, "K: 2 on ranks 0, 2, 3 on ranks 1, 3"),
        ([(4, 2, torch.float32, True)] * 3 + [(4, 2, torch.bfloat16, True)], "dtype: torch.float32 on ranks 0, 1, 2"),
        ([(4, 2, torch.float32, False)] + [(4, 2, torch.float32, True)] * 3, "requires_grad: none on rank 0, x on"),
    ],
)
def test_rows_that_differ_between_ranks_are_an_error_on_all_of_them(ranks, by_rank, message):
    with pytest.raises(RankError) as caught:
        ranks.run(rank_jobs.mismatched, by_rank)
    assert set(caught.value.by_rank) == {0, 1, 2, 3}
    for kind, text in caught.value.by_rank.values():
        assert kind == "ValueError"
        assert text.startswith("dispatch: the ranks of the expert-parallel group disagree")
        assert message in text


@pytest.fixture
def imaginary_group():
    """Rank 1 of 4, in this process alone: a backend that sends nothing."""
    dist.init_process_group("fake", rank=1, world_size=4, store=FakeStore())
    yield dist.group.WORLD
    dist.destroy_process_group()


@exchanges_without_values
@pytest.mark.parametrize("room", [16, None])
def test_static_mode_reads_no_tensor_and_the_dynamic_one_a_single_time(imaginary_group, room):
    """Tensors without values: whoever asks for one is refused."""
    dispatcher = AllToAllDispatcher(imaginary_group, 8, max_rows_received=room)
    with FakeTensorMode():
        x, gates = torch.empty(5, H, requires_grad=True), torch.empty(5, 3, requires_grad=True)
        ids = torch.empty(5, 3, dtype=torch.int64)
        weights = ExpertWeights(torch.empty(2, 2, F, H, requires_grad=True), torch.empty(2, H, F, requires_grad=True))
        reads, given = [], [[[2, 3, H, 3, 0, 3]] * 4] * 2

        def answered(tensor):
            reads.append(tuple(tensor.shape))
            return given

        with patch.object(FakeTensor, "tolist", answered):
            arrived = dispatcher.dispatch(x, ids, gates)
            y = dispatcher.combine(run_experts(arrived.x, arrived.plan, arrived.gate_weights, weights), arrived)
            y.sum().backward()
        assert reads == ([(2, 4, 6)] if room is None else [])
        assert y.shape == x.shape == x.grad.shape
        assert arrived.x.shape == (16 if room else 8, H)
        assert arrived.plan.num_rows == (16 * 3 if room else 12)
        assert weights.down_proj.grad.shape == weights.down_proj.shape


def test_a_local_dispatcher_moves_nothing():
    dispatcher = LocalDispatcher(3)
    x, ids, gates = torch.randn(4, H), torch.tensor([[0, 1], [2, 3], [3, 3], [1, 1]]), torch.rand(4, 2)
    arrived = dispatcher.dispatch(x, ids, gates)
    assert arrived.x is x
    assert arrived.gate_weights is gates
    assert arrived.plan.expert_offsets.tolist() == [0, 1, 4, 5]
    assert arrived.way_back is arrived.traffic is None
    assert dispatcher.dispatch(x, None, gates, arrived.plan).plan is arrived.plan
    assert dispatcher.combine(x, arrived) is x
    with pytest.raises(ValueError, match="expected expert_indices or a plan"):
        dispatcher.dispatch(x, None, gates)


def test_experts_are_owned_in_blocks():
    assert [list(local_experts(6, 3, rank)) for rank in range(3)] == [[0, 1], [2, 3], [4, 5]]
    with pytest.raises(ValueError, match="E = 6 experts for W = 4 ranks"):
        local_experts(6, 4, 0)
    with pytest.raises(ValueError, match="at most num_experts = 3 ranks, or a multiple of them"):
        local_experts(3, 4, 0)
