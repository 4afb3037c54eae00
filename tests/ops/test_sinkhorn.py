"""Sinkhorn's algorithm, against a loop over rows and columns in Python."""

from __future__ import annotations

import math

import pytest
import torch

from dmoe.ops.sinkhorn import sinkhorn

WAYS = {"one expert": (5, 1), "few tokens": (3, 4), "many": (40, 6)}


def by_hand(logits, tolerance, most):
    cost = [[math.exp(x) for x in row] for row in logits]
    columns = [1.0] * len(cost[0])
    for _ in range(most):
        rows = [1 / (len(cost) * sum(c * x for c, x in zip(columns, row, strict=True))) for row in cost]
        before = columns
        totals = [sum(r * row[e] for r, row in zip(rows, cost, strict=True)) for e in range(len(columns))]
        columns = [1 / (len(columns) * total) for total in totals]
        if sum(abs(a - b) for a, b in zip(columns, before, strict=True)) / len(columns) <= tolerance:
            break
    return [[r * x * c for x, c in zip(row, columns, strict=True)] for r, row in zip(rows, cost, strict=True)]


@pytest.mark.parametrize("most", [2, 200])
@pytest.mark.parametrize("shape", WAYS.values(), ids=WAYS)
def test_against_a_loop(shape, most):
    logits = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3)) * 2
    found, expected = sinkhorn(logits, 1e-4, most), by_hand(logits.tolist(), 1e-4, most)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-6, atol=0)
    if most == 200:
        torch.testing.assert_close(found.sum(0), torch.full((shape[1],), 1 / shape[1], dtype=torch.float64))
        assert (found.sum(1) * shape[0] - 1).abs().max() < 0.01


@pytest.mark.parametrize("absent", [-math.inf, math.nan, math.inf])
def test_rows_that_are_absent_are_felt_by_nobody(absent):
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(40, 6, generator=generator) * 2
    whole = torch.full((60, 6), absent)
    there = torch.randperm(60, generator=generator)[:40].sort().values
    whole[there] = logits
    found = sinkhorn(whole)
    torch.testing.assert_close(found[there], sinkhorn(logits), rtol=1e-5, atol=0)
    assert found.sum() == pytest.approx(1, abs=1e-5)
    assert not sinkhorn(torch.full((3, 2), absent)).any()
    assert sinkhorn(torch.empty(0, 2)).shape == (0, 2)


def test_large_logits_do_not_overflow():
    logits = torch.tensor([[1000.0, 999.0], [0.0, -1.0], [500.0, 502.0]])
    torch.testing.assert_close(sinkhorn(logits), sinkhorn(logits - logits.amax(1, keepdim=True)))


def test_logits_of_another_kind():
    with pytest.raises(ValueError, match=r"sinkhorn: logits: expected \(T, E\) floating point, got \(3,\) torch.int64"):
        sinkhorn(torch.arange(3))
    torch.library.opcheck(torch.ops.dmoe.sinkhorn.default, (torch.randn(4, 3), 1e-4, 5))
