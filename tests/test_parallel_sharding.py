"""Experts cut along F over ranks, on gloo ranks against one process that holds them whole."""

from __future__ import annotations

from typing import NamedTuple
from unittest.mock import patch

import oracle
import pytest
import rank_jobs_sharding as jobs
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from rank_pool import RankError
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from dmoe.experts import ExpertWeights, run_experts
from dmoe.parallel import AllToAllDispatcher, LocalDispatcher, ffn_shard, local_experts

pytestmark = pytest.mark.usefixtures("_no_generated_products")
H, F = 5, 8
# The grid of ranks, as (expert-parallel, tensor-parallel), and the experts.
HIDDEN_SHARDING = [((2, 1), 1), ((4, 1), 1), ((4, 1), 2)]
TENSOR_PARALLEL = [((1, 2), 3), ((1, 4), 2), ((2, 2), 2), ((2, 2), 6), ((2, 2), 1)]  # the last with hidden sharding


class Case(NamedTuple):
    """A grid of ranks, E, each rank's (x, ids, gates, dy), all experts' weights, options."""

    grid: tuple[int, int]
    experts: int
    shares: list
    weights: list
    options: dict

    @property
    def world(self):
        return len(self.shares)

    def __repr__(self):
        tokens, options = [ids.tolist() for _, ids, _, _ in self.shares], self.options
        return f"Case({self.grid}, {self.experts} experts, {tokens}, {options})"

    def to(self, dtype):
        """The same numbers, rounded."""
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        shares = [(x.to(dtype), ids, gates.to(wide), dy.to(dtype)) for x, ids, gates, dy in self.shares]
        return self._replace(shares=shares, weights=[None if w is None else w.to(dtype) for w in self.weights])

    def run(self, ranks, *more):
        ranks.run(jobs.make_groups)  # again after a job that broke the ranks, and the groups with them
        return ranks.run(jobs.sharded, self.grid, self.shares, self.weights, self.options, *more, ranks=self.world)


OPTIONS = [
    {"gated": True, "bias": False, "run": {}},
    {"gated": False, "bias": True, "run": {}},
    {"gated": True, "bias": True, "run": {"gate_weight_on": "activation"}},
    {"gated": True, "bias": False, "run": {"gate_weight_on": "input", "backend": "reference"}},
]


@st.composite
def cases(draw, layouts):
    """Idle ranks, hot ranks, masked choices, an expert chosen twice, no token anywhere."""
    grid, experts = draw(st.sampled_from(layouts))
    world, top_k = grid[0] * grid[1], draw(st.integers(1, 4))
    kind = draw(st.sampled_from(["any", "any", "one expert", "no token"]))
    share = draw(st.sampled_from([0.0, 0.0, 0.4, 1.0]))
    tokens = [0 if kind == "no token" else draw(st.sampled_from([0, 1, 3, 9])) for _ in range(world)]
    options = draw(st.sampled_from(OPTIONS))
    return case_of(grid, experts, tokens, top_k, options, draw(st.integers(0, 2**20)), kind == "one expert", share)


def case_of(grid, experts, tokens, top_k=2, options=OPTIONS[0], seed=0, one_expert=False, masked=0.0):
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    shares = []
    for n in tokens:
        ids = torch.randint(0, 1 if one_expert else experts, (n, top_k), generator=generator)
        ids[torch.rand(n, top_k, generator=generator) < masked] = experts
        shares.append((randn(n, H), ids, torch.rand(n, top_k, generator=generator).double(), randn(n, H)))
    halves = (2,) if options["gated"] else ()
    biases = [randn(experts, *halves, F), randn(experts, H)] if options["bias"] else [None, None]
    return Case(grid, experts, shares, [randn(experts, *halves, F, H), randn(experts, H, F), *biases], options)


def in_one_process(case, kept=None):
    """The oracle on all ranks' tokens in a row."""
    x, ids, gates, grad_y = (torch.cat(parts) for parts in zip(*case.shares, strict=True))
    x, gates = x.clone().requires_grad_(), gates.clone().requires_grad_()
    leaves = [None if w is None else w.clone().requires_grad_() for w in case.weights]
    kept = (ids != case.experts).tolist() if kept is None else kept
    gate_on = case.options["run"].get("gate_weight_on", "output")
    y = oracle.moe(x, ids.tolist(), gates, kept, leaves, gated=case.options["gated"], gate_on=gate_on)
    sizes = [len(share[0]) for share in case.shares]
    inputs = [x, gates, *(leaf for leaf in leaves if leaf is not None)]
    grads = torch.autograd.grad(((y + 0 * x) * grad_y).sum(), inputs, allow_unused=True, materialize_grads=True)
    return y.detach().split(sizes), grads[0].split(sizes), grads[1].split(sizes), grads[2:]


def assert_equal_to_one_process(case, results, tolerance=1e-12, kept=None):
    y, grad_x, grad_gates, grad_weights = in_one_process(case, kept)

    def close(name, actual, expected):
        torch.testing.assert_close(
            actual, expected, rtol=tolerance, atol=tolerance, msg=lambda m: f"{name} of rank {rank}: {m}"
        )

    for rank, result in enumerate(results):
        close("y", result["y"], y[rank])
        close("x", result["x"], grad_x[rank])
        close("gates", result["gates"], grad_gates[rank])
        experts, (index, count) = result["place"]
        columns = range(index * F // count, (index + 1) * F // count)
        for n, (mine, whole) in enumerate(
            zip((w for w in result["weights"] if w is not None), grad_weights, strict=True)
        ):
            part = whole[experts]
            if n == 3:  # down_bias is whole on each of its ranks, and counts on one
                part = part if index == 0 else torch.zeros_like(part)
            else:
                part = part.index_select(-2 if n == 0 else -1, torch.tensor(columns))
            close(f"weight {n}", mine, part)


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
        assert [traffic.rows_kept, traffic.naive_rows_kept] == (own + on).tolist()
        assert [traffic.rows_sent, traffic.naive_rows_sent] == (sent - own + on * (tps - 1)).tolist()
        assert [traffic.rows_received, traffic.naive_rows_received] == (sum(came) - own).tolist()
        there, back = traffic.rows_sent * (H + 2 * top_k) * 8, traffic.rows_received * H * 8
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
        ranks.run(jobs.mismatched, [same, odd, same, same], limit=20)
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


def lines(text):
    return [line.strip() for line in text.strip().splitlines()]


@pytest.mark.parametrize("grid", [(4, 1), (2, 2)])
def test_work_between_the_halves_lies_between_launch_and_wait(ranks, grid):
    case = case_of(grid, 4, [3, 0, 5, 2])
    ranks.run(jobs.make_groups)
    results = ranks.run(jobs.in_halves, grid, case.shares, case.weights, case.options)
    # The second steps, those to the other slices of F, lie outside the halves.
    there = "wait for choices\nwait for rows"
    if grid[1] > 1:
        there = "wait for choices\nstart choices\nwait for rows\nstart rows\n" + there
    counts, back = "start counts\nwait for counts", ""
    if grid[1] > 1:
        counts, back = counts + "\nstart counts", "start rows\nwait for rows"
    forward = f"""{counts}
        start choices
        start rows
        work in dispatch
        {there}
        experts
        {back}
        start rows
        work in combine
        wait for rows"""
    in_experts = "start rows\nstart choices"
    if grid[1] > 1:
        in_experts += "\nwait for rows\nstart rows\nwait for choices\nstart choices"
    backward = f"""start rows
        work in combine
        wait for rows
        {back}
        experts
        {in_experts}
        work in dispatch
        wait for rows
        wait for choices"""
    y, grad_x, *_ = in_one_process(case)
    for rank, (in_forward, in_backward, mine, grad) in enumerate(results):
        assert in_forward == [line for line in lines(forward) if line]
        assert in_backward == [line for line in lines(backward) if line]
        x, _, _, grad_y = case.shares[rank]
        torch.testing.assert_close(mine, y[rank] + 8 * x, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(grad, grad_x[rank] + 8 * grad_y, rtol=1e-12, atol=1e-12)


def test_nothing_is_under_way_where_nothing_moves():
    dispatcher = LocalDispatcher(3)
    x, ids, gates = torch.randn(4, H), torch.tensor([[0, 1], [2, 3], [3, 3], [1, 1]]), torch.rand(4, 2)
    arrived = dispatcher.finish_dispatch(dispatcher.start_dispatch(x, ids, gates))
    assert arrived.x is x
    assert arrived.plan.expert_offsets.tolist() == [0, 1, 4, 5]
    assert dispatcher.finish_combine(dispatcher.start_combine(x, arrived)) is x
