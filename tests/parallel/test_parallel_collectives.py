"""Rows between ranks: exact copies of every dtype, and gradients that go back the same way."""

from __future__ import annotations

import pytest
import rank_jobs
import torch
from dispatch_cases import DTYPES, exchanges, pieces
from hypothesis import given, settings
from hypothesis import strategies as st
from rank_pool import RankError


@settings(max_examples=40)
@given(case=exchanges(), dtype=st.sampled_from(DTYPES))
def test_rows_arrive_as_they_were(ranks, case, dtype):
    world, counts, extra, width = case
    rows = [
        (torch.arange((sum(c) + e) * width).view(-1, width) % 7 + 8 * rank).to(dtype)
        for rank, (c, e) in enumerate(zip(counts, extra, strict=True))
    ]
    for target, received in enumerate(ranks.run(rank_jobs.exchange, rows, counts, ranks=world)):
        expected = torch.cat([pieces(rows, counts, source, target) for source in range(world)])
        assert received.dtype == dtype
        assert torch.equal(received.view(torch.uint8), expected.view(torch.uint8))


@settings(max_examples=20)
@given(case=exchanges(), seed=st.integers(0, 99))
def test_gradients_of_rows_return_to_them_twice(ranks, case, seed):
    world, counts, extra, width = case
    torch.manual_seed(seed)
    rows = [torch.randn(sum(c) + e, width, dtype=torch.float64) for c, e in zip(counts, extra, strict=True)]
    arriving = [sum(sent[target] for sent in counts) for target in range(world)]
    factors = [torch.randn(n, width, dtype=torch.float64) for n in arriving]
    results = ranks.run(rank_jobs.exchange_gradients, rows, counts, factors, ranks=world)
    for source, (once, again, twice) in enumerate(results):
        factor = torch.zeros_like(rows[source])
        for target in range(world):
            first, begin = sum(counts[source][:target]), sum(counts[s][target] for s in range(source))
            n = counts[source][target]
            factor[first : first + n] = factors[target][begin : begin + n]
        torch.testing.assert_close(once, 3 * factor * rows[source] ** 2)
        torch.testing.assert_close(again, once, rtol=0, atol=0)
        torch.testing.assert_close(twice, 6 * factor * rows[source])


def test_two_exchanges_under_way_and_work_between_them_in_both_directions(ranks):
    counts = [[1, 2], [0, 3]]
    rows = [torch.arange(6.0).view(3, 2), torch.arange(6.0, 12).view(3, 2)]
    for target, (y1, y2, grad, order) in enumerate(ranks.run(rank_jobs.overlapped, rows, counts, ranks=2)):
        expected = torch.cat([pieces(rows, counts, source, target) for source in range(2)])
        assert torch.equal(y1, expected)
        assert torch.equal(y2, 2 * expected)
        assert torch.equal(grad, 1 + 8 * rows[target] + 3)
        assert order == ["exchange", "exchange", "between"]  # gradients of what lay between, while both travel


@pytest.mark.parametrize(
    ("rows", "counts", "message"),
    [
        ([torch.zeros(2, 3)] * 2, [[1, 2], [2, 1]], r"expected shape \(R, C\) with R >= 3"),
        ([torch.zeros(4)] * 2, [[1, 1], [1, 1]], r"expected shape \(R, C\)"),
        ([torch.zeros(4, 1)] * 2, [[1, -1], [1, 1]], "counts of at least 0"),
        ([torch.zeros(4, 1)] * 2, [[1, 1, 0], [1, 1, 0]], "one count for each of 2 ranks, got 3"),
    ],
)
def test_counts_that_do_not_fit_are_refused(ranks, rows, counts, message):
    with pytest.raises(RankError, match=message):
        ranks.run(rank_jobs.exchange, rows, counts, ranks=2)
