"""Experts cut along F over ranks, on gloo ranks against one process that holds them whole."""

from __future__ import annotations

from unittest.mock import patch

import pytest
import rank_jobs_sharding as jobs
import torch
import torch.distributed as dist
from helpers import exchanges_without_values
from hypothesis import given, settings
from hypothesis import strategies as st
from rank_pool import RankError
from sharding_cases import (
    HIDDEN_SHARDING,
    TENSOR_PARALLEL,
    H,
    assert_equal_to_one_process,
    case_of,
    cases,
    in_one_process,
)
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from dmoe import ExpertWeights, run_experts
from dmoe.parallel import AllToAllDispatcher, ffn_shard, local_experts

pytestmark = pytest.mark.usefixtures("_no_generated_products")


@settings(max_examples=30)
@given(case=cases(HIDDEN_SHARDING), dtype=st.sampled_from([torch.float64, torch.float64, torch.float32]))
def test_hidden_sharding_equals_one_process(ranks, case, dtype):
    case = case.to(dtype)
    assert_equal_to_one_process(case, case.run(ranks), 1e-12 if dtype == torch.float64 else 3e-5)


@settings(max_examples=40)
@given(case=cases(TENSOR_PARALLEL), dtype=st.sampled_from([torch.float64, torch.float64, torch.float32]))
def test_tensor_parallelism_equals_one_process(ranks, case, dtype):
    case = case.to(dtype)
    assert_equal_to_one_process(case, case.run(ranks), 1e-12 if dtype == torch.float64 else 3e-5)


@settings(max_examples=40)
@given(case=cases(HIDDEN_SHARDING + TENSOR_PARALLEL))
def test_a_token_goes_to_every_rank_of_its_experts_once_and_every_byte_is_counted(ranks, case):
    (eps, tps), top_k = case.grid, case.shares[0][1].shape[1]
    shards, each = max(eps // case.experts, 1), max(case.experts // eps, 1)
    results = case.run(ranks)

    def chosen(source, ep):  # the choices of a rank's tokens that are experts of this row of the grid, by token
        first = ep // shards * each
        return [[e for e in token if first <= e < first + each] for token in case.shares[source][1].tolist()]

    def rows_to(ep, tp):  # what comes to a rank in the first step
        sources = range(tp, case.world, tps)
        return [case.shares[s][0][t] for s in sources for t, experts in enumerate(chosen(s, ep)) if experts]

    def counts(source, ep):  # rows with each token once, and with each choice
        mine = chosen(source, ep)
        return torch.tensor([sum(map(bool, mine)), sum(map(len, mine))])

    for rank, result in enumerate(results):
        ep, tp = divmod(rank, tps)
        first = ep // shards * each
        assert result["place"] == (list(range(first, first + each)), (ep % shards * tps + tp, shards * tps))
        parts = [rows_to(ep, t) for t in range(tps)]
        expected = [row for part in parts for row in part]
        assert torch.equal(result["arrived"], torch.stack(expected) if expected else torch.zeros(0, H).double())
        assert result["rows"] == sum(len(e) for source in range(case.world) for e in chosen(source, ep))

        came = [sum(counts(source, ep) for source in range(t, case.world, tps)) for t in range(tps)]
        own, sent = counts(rank, ep), sum(counts(rank, to) for to in range(eps))
        on = came[tp] if tps > 1 else 0 * own  # in the second step
        traffic = result["traffic"]
        off = sent - own + on * (tps - 1)
        assert [traffic.rows_kept, traffic.naive_rows_kept] == own.tolist()
        assert [traffic.rows_sent + traffic.tp_rows_sent, traffic.naive_rows_sent] == off.tolist()
        assert traffic.tp_rows_sent == on[0] * (tps - 1)
        assert [traffic.rows_received + traffic.tp_rows_received, traffic.naive_rows_received] == (
            sum(came) - own
        ).tolist()
        there, back = off[0] * (H + 2 * top_k) * 8, (sum(came) - own)[0] * H * 8
        of_counts = (eps - 1 + (tps - 1) * eps) * 6 * 8
        assert result["bytes_sent"] == result["wire"] == there + back + of_counts
        assert result["calls"] == (4 if tps == 1 else 8)  # counts, choices, rows, results; twice in two steps


@settings(max_examples=30)
@given(case=cases(HIDDEN_SHARDING + TENSOR_PARALLEL), room=st.integers(0, 40))
def test_static_mode_drops_what_exceeds_its_room_from_all_slices(ranks, case, room):
    """A token that finds no room on one rank of its experts finds none on the others: it loses them, no slice."""
    (eps, tps), kept, counts = case.grid, [], []
    bound, each = -(-room // eps), max(case.experts // eps, 1)
    for _, ids, _, _ in case.shares:
        used, flags = [0] * case.experts, []
        for token in ids.tolist():
            fits = {}
            for owner in {e // each for e in token if e < case.experts}:
                fits[owner] = used[owner] < bound
                used[owner] += 1
            flags.append([e < case.experts and fits[e // each] for e in token])
        kept += flags
        chosen = ids[torch.tensor(flags, dtype=torch.bool).view(ids.shape)]
        counts.append(chosen.bincount(minlength=case.experts).tolist())
    results = case.run(ranks, room)
    assert_equal_to_one_process(case, results, kept=kept)
    for result, count in zip(results, counts, strict=True):
        assert result["kept"].tolist() == count
        assert result["arrived"].shape == (bound * eps * tps, H)
        assert result["bytes_sent"] == result["wire"]
        assert result["calls"] == (3 if tps == 1 else 6)  # no counts
        assert result["naive_bytes_sent"] is None


@settings(max_examples=15)
@given(case=cases(HIDDEN_SHARDING + TENSOR_PARALLEL))
def test_static_mode_with_room_enough_equals_the_dynamic_one(ranks, case):
    room = case.grid[0] * max(len(x) for x, *_ in case.shares)
    for one, other in zip(case.run(ranks), case.run(ranks, room), strict=True):
        for name in ("y", "x", "gates"):
            torch.testing.assert_close(other[name], one[name], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(other["weights"], one["weights"], rtol=1e-12, atol=1e-12)


def test_who_holds_which_slice():
    assert [list(local_experts(2, 6, rank)) for rank in range(6)] == [[0], [0], [0], [1], [1], [1]]
    assert [ffn_shard(2, 6, rank) for rank in range(6)] == [(0, 3), (1, 3), (2, 3)] * 2
    assert [ffn_shard(4, 2, rank) for rank in range(2)] == [(0, 1)] * 2
    with pytest.raises(ValueError, match=r"at most num_experts = 4 ranks, or a multiple of them .* got W = 6"):
        ffn_shard(4, 6, 0)


@pytest.mark.parametrize(
    ("odd", "message"),
    [((6, 2, torch.float32, True), "H: 4 on ranks 0, 1, 3, 6 on rank 2"), ((4, 2, torch.float32, False), "none on")],
)
def test_rows_that_differ_anywhere_in_the_grid_are_an_error_everywhere(ranks, odd, message):
    """Rank 1 is (0, 1) of the grid, and number 2 of the message: the ranks of one expert-parallel group in a row."""
    same = (4, 2, torch.float32, True)
    ranks.run(jobs.make_groups)
    with pytest.raises(RankError) as caught:
        ranks.run(jobs.mismatched, [same, odd, same, same])
    assert set(caught.value.by_rank) == {0, 1, 2, 3}
    for kind, text in caught.value.by_rank.values():
        assert kind == "ValueError"
        assert text.startswith("dispatch (rank = rank in group + 2 * rank in tp_group): the ranks of the")
        assert message in text


def test_a_mesh_and_a_copy_do_the_same(ranks):
    case = case_of((2, 2), 4, [3, 0, 5, 2])
    y, *_ = in_one_process(case)
    for rank, results in enumerate(ranks.run(jobs.by_mesh, case.shares, case.weights, case.options)):
        for result in results:
            torch.testing.assert_close(result, y[rank], rtol=1e-12, atol=1e-12)


def test_groups_that_are_no_grid_are_refused(ranks):
    for said in ranks.run(jobs.no_grid):
        assert "tp_group: expected to share this rank, and no other, with group, got ranks [0, 1, 2, 3] with" in said


@exchanges_without_values
@pytest.mark.parametrize("room", [8, None])
def test_static_tensor_parallelism_reads_no_tensor_and_the_dynamic_one_a_single_time(room):
    """Tensors without values: whoever asks for one is refused. Rank 1 of an imaginary 2 x 2 grid."""
    dist.init_process_group("fake", rank=1, world_size=4, store=FakeStore())
    try:
        columns = [dist.new_group([0, 2]), dist.new_group([1, 3])]
        tp_group = dist.new_group([0, 1])
        dispatcher = AllToAllDispatcher(columns[1], 4, tp_group, max_rows_received=room)
        with FakeTensorMode():
            x, gates = torch.empty(5, H, requires_grad=True), torch.empty(5, 3, requires_grad=True)
            weights = ExpertWeights(torch.empty(2, 2, 4, H, requires_grad=True), torch.empty(2, H, 4))
            reads = []

            def answered(tensor):
                reads.append(tuple(tensor.shape))
                return [[[2, 3, H, 3, 0, 3]] * 2] * 3

            with patch.object(FakeTensor, "tolist", answered):
                arrived = dispatcher.dispatch(x, torch.empty(5, 3, dtype=torch.int64), gates)
                y = run_experts(arrived.x, arrived.plan, arrived.gate_weights, weights)
                dispatcher.combine(y, arrived).sum().backward()
        assert reads == ([(3, 2, 6)] if room is None else [])
        assert arrived.x.shape == (16 if room else 8, H)
        assert x.grad.shape == x.shape
    finally:
        dist.destroy_process_group()


def test_narrow_sums_are_rounded_once_where_slices_meet(ranks):
    """1 and 2**-8 and 2**-8 in bfloat16: one after the other the small ones vanish."""
    sums = ranks.run(jobs.summed, [1.0, 2**-8, 2**-8, 0.0])
    assert all(y.dtype == torch.bfloat16 and (y == 1 + 2**-7).all() for y, _ in sums)
    assert all((grad == 1 + 2**-7).all() for _, grad in sums)
