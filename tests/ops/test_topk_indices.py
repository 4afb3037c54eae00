"""topk_indices against a sort of Python tuples."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dmoe.ops.topk_indices import topk_indices, topk_indices_ref

IMPLEMENTATIONS = pytest.mark.parametrize("op", [topk_indices, topk_indices_ref], ids=["op", "ref"])
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def oracle(rows: list[list[float]], k: int) -> list[list[int]]:
    """NaN first, then the larger score, then the lower id."""

    def rank(score: float, expert: int) -> tuple[bool, float, int]:
        return (not math.isnan(score), 0.0 if math.isnan(score) else -score, expert)

    return [sorted(range(len(row)), key=lambda e: rank(row[e], e))[:k] for row in rows]


# Few distinct values, so that most cases hold ties; all are exact in every dtype.
values = st.sampled_from([0.0, -0.0, 1.0, -1.0, 0.5, -2.5, 3.0, math.inf, -math.inf, math.nan])


@st.composite
def cases(draw):
    # 64 | 65 and 512 | 513 are where the CPU kernel changes its group size, and a CUDA lane starts its second expert.
    experts = draw(st.one_of(st.integers(1, 20), st.sampled_from([31, 32, 33, 63, 64, 65, 130, 512, 513])))
    rows = draw(st.integers(0, 4))
    if experts <= 20:
        scores = draw(st.lists(st.lists(values, min_size=experts, max_size=experts), min_size=rows, max_size=rows))
    else:
        generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
        scores = torch.randint(-9, 9, (rows, experts), generator=generator).float().tolist()
    return scores, experts, draw(st.integers(1, min(experts, 20)) | st.just(experts))


@IMPLEMENTATIONS
@given(case=cases(), dtype=st.sampled_from(DTYPES))
@settings(max_examples=60)
def test_equals_the_sorted_tuples(op, case, dtype):
    scores, experts, k = case
    got = op(torch.tensor(scores, dtype=dtype).view(len(scores), experts), k)
    assert got.dtype == torch.int64
    assert got.tolist() == oracle(scores, k)
    assert got.shape == (len(scores), k)


@IMPLEMENTATIONS
@pytest.mark.parametrize("dtype", DTYPES)
def test_orders_random_scores_of_every_dtype(op, dtype):
    scores = torch.randn(300, 97, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)
    assert op(scores, 9).tolist() == oracle(scores.tolist(), 9)


@IMPLEMENTATIONS
@pytest.mark.parametrize("dtype", DTYPES)
def test_subnormals_and_neighbours_are_told_apart(op, dtype):
    info = torch.finfo(dtype)
    above_one = 1.0 + info.eps
    values = [1.0, info.tiny, above_one, info.smallest_normal * info.eps, -above_one, -1.0, 0.0, info.max]
    assert op(torch.tensor([values], dtype=dtype), 8).tolist() == [[7, 2, 0, 1, 3, 6, 5, 4]]


@IMPLEMENTATIONS
def test_rows_of_nan_give_valid_ids_in_order(op):
    scores = torch.full((3, 70), math.nan)
    scores[1, 5] = 1.0
    scores[2, :] = -math.inf
    scores[2, 69] = math.nan
    got = op(scores, 70)
    assert got[0].tolist() == list(range(70))
    assert got[1].tolist() == [e for e in range(70) if e != 5] + [5]
    assert got[2].tolist() == [69, *range(69)]
    # A NaN with its sign bit set is a NaN like any other.
    assert op(-scores, 70)[0].tolist() == list(range(70))


@IMPLEMENTATIONS
def test_strided_scores(op):
    base = torch.randn(64, 40, generator=torch.Generator().manual_seed(1))
    assert op(base.t()[:, ::3], 5).tolist() == oracle(base.t()[:, ::3].tolist(), 5)
    assert op(base[:1].expand(7, 40), 5).tolist() == oracle(base[:1].expand(7, 40).tolist(), 5)


@IMPLEMENTATIONS
def test_no_rows(op):
    assert op(torch.empty(0, 8), 3).shape == (0, 3)


def test_many_rows_over_all_threads():
    scores = torch.randint(0, 50, (5000, 64), generator=torch.Generator().manual_seed(2)).float()
    assert torch.equal(topk_indices(scores, 8), topk_indices_ref(scores, 8))


def test_registration():
    for scores in (torch.randn(5, 8), torch.randn(0, 8), torch.randn(8, 6, dtype=torch.float64).t()):
        torch.library.opcheck(torch.ops.dmoe.topk_indices.default, (scores, 3))
    assert not topk_indices(torch.randn(2, 4, requires_grad=True), 2).requires_grad


def test_bad_input():
    scores = torch.randn(3, 8)
    with pytest.raises(TypeError, match=r"topk_indices: scores: expected a floating-point tensor, got torch.int32"):
        topk_indices(scores.int(), 2)
    with pytest.raises(ValueError, match=r"topk_indices: scores: expected shape \(T, E\), got \(2, 3, 8\)"):
        topk_indices(torch.randn(2, 3, 8), 2)
    for k in (0, 9, -1):
        with pytest.raises(ValueError, match=rf"topk_indices: k: expected 1 to E = 8, got {k}"):
            topk_indices(scores, k)
