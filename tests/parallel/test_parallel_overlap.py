"""Work while rows travel: between the halves of dispatch and combine, and chunk by chunk of the experts."""

from __future__ import annotations

import pytest
import rank_jobs_overlap as jobs
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rank_jobs_sharding import make_groups
from sharding_cases import H, assert_equal_to_one_process, case_of, cases, in_one_process

from dmoe.parallel import LocalDispatcher, chunk_of

pytestmark = pytest.mark.usefixtures("_no_generated_products")
CHUNKED = [((2, 1), 8), ((4, 1), 8), ((4, 1), 24), ((1, 2), 4), ((2, 2), 12)]  # grids, and experts


CHOICES, ROWS = ["start choices", "wait for choices"], ["start rows", "wait for rows"]


@pytest.mark.parametrize("grid", [(4, 1), (2, 2)])
def test_work_between_the_halves_lies_between_launch_and_wait(ranks, grid):
    case = case_of(grid, 4, [3, 0, 5, 2])
    ranks.run(make_groups)
    results = ranks.run(jobs.in_halves, grid, case.shares, case.weights, case.options)
    # With tensor parallelism the steps to the other slices of F lie outside the halves.
    forward = ["start counts", "wait for counts"] + (["start counts", "wait for counts"] if grid[1] > 1 else [])
    forward += [CHOICES[0], ROWS[0], "work in dispatch", CHOICES[1]]
    forward += [CHOICES[0], ROWS[1], ROWS[0], CHOICES[1]] if grid[1] > 1 else []
    forward += [ROWS[1], "experts", *(ROWS if grid[1] > 1 else []), ROWS[0], "work in combine", ROWS[1]]
    backward = [ROWS[0], "work in combine", ROWS[1], *(ROWS if grid[1] > 1 else []), "experts", ROWS[0], CHOICES[0]]
    backward += [ROWS[1], ROWS[0], CHOICES[1], CHOICES[0]] if grid[1] > 1 else []
    backward += ["weights", "work in dispatch", ROWS[1], CHOICES[1]]
    y, grad_x, *_ = in_one_process(case)
    for rank, (in_forward, in_backward, mine, grad) in enumerate(results):
        assert in_forward == forward
        assert in_backward == backward
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


def chunked(ranks, case, *more):
    ranks.run(make_groups)
    job = (jobs.chunked, case.grid, case.shares, case.weights, case.options)
    return ranks.run(*job, *more, ranks=case.world)


@settings(max_examples=30)
@given(case=cases(CHUNKED), data=st.data())
def test_chunks_equal_one_process(ranks, case, data):
    each = case.experts // case.grid[0]
    degree = data.draw(st.sampled_from([d for d in range(1, each + 1) if each % d == 0]))
    results = chunked(ranks, case, degree)
    assert_equal_to_one_process(case, results)
    for result, plain in zip(results, case.run(ranks), strict=True):
        assert result["bytes_sent"] == result["wire"]
        assert result["naive_rows_sent"] == plain["traffic"].naive_rows_sent
        assert result["kept"] is None


@settings(max_examples=15)
@given(case=cases(CHUNKED), room=st.integers(0, 12))
def test_a_static_bound_is_each_chunks(ranks, case, room):
    (eps, _), each = case.grid, case.experts // case.grid[0]
    bound, kept, counts = -(-room // eps), [], []
    for _, ids, _, _ in case.shares:
        used, flags = {}, []
        for token in ids.tolist():
            fits = {}
            for place in {(e // each, 2 * (e % each) // each) for e in token if e < case.experts}:  # rank, chunk
                fits[place] = used.get(place, 0) < bound
                used[place] = used.get(place, 0) + 1
            flags.append([e < case.experts and fits[e // each, 2 * (e % each) // each] for e in token])
        kept += flags
        chosen = ids[torch.tensor(flags, dtype=torch.bool).view(ids.shape)]
        counts.append(chosen.bincount(minlength=case.experts).tolist())
    results = chunked(ranks, case, 2, room)
    assert_equal_to_one_process(case, results, kept=kept)
    for result, count in zip(results, counts, strict=True):
        assert result["kept"].tolist() == count
        assert result["bytes_sent"] == result["wire"]


def test_a_chunk_travels_while_another_is_computed(ranks):
    """The host waits for all counts before anything is computed; each chunk's rows start before the one before it."""
    case = case_of((4, 1), 12, [3, 0, 5, 2])
    launch, arrive = ["wait for counts", CHOICES[0], ROWS[0]], [CHOICES[1], ROWS[1]]
    forward = ["start counts"] * 3 + launch
    for chunk in range(3):
        forward += (launch if chunk < 2 else []) + [f"on the way {chunk}"] + arrive + [f"experts {chunk}", ROWS[0]]
    forward += [ROWS[1]] * 3
    # Backward from the last chunk on: its gradients are on their way to the tokens while the one before is computed.
    backward, back = [ROWS[0]] * 3, [ROWS[0], CHOICES[0]]
    for chunk, before in ((2, []), (1, []), (0, [ROWS[1], CHOICES[1]])):
        backward += [*before, ROWS[1], f"experts {chunk}", *back, "weights"]
    backward += [ROWS[1], CHOICES[1]] * 2
    for result in chunked(ranks, case, 3):
        assert result["forward"] == forward
        assert result["backward"] == backward


@pytest.mark.parametrize("degree", [1, 2])
def test_a_layers_weight_gradients_come_while_those_of_its_tokens_travel(ranks, degree):
    fields = {"hidden_size": 6, "ffn_hidden_size": 4, "num_experts": 4, "top_k": 2, "overlap_degree": degree}
    results, tokens, arrived = [ROWS[0]], [ROWS[1], ROWS[0], CHOICES[0], "weights"], [ROWS[1], CHOICES[1]]
    for order in ranks.run(jobs.layer, fields, ranks=2):
        assert order == results * degree + tokens * degree + arrived * degree


def test_experts_are_cut_evenly():
    assert [chunk_of(6, 3, chunk) for chunk in range(3)] == [slice(0, 2), slice(2, 4), slice(4, 6)]
    for degree in (0, 4):
        with pytest.raises(ValueError, match=f"overlap_degree: expected a divisor of the 6 experts .* got {degree}"):
            chunk_of(6, degree, 0)
