"""histogram against counting in a dictionary."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from helpers import on_threads
from hypothesis import given, settings
from hypothesis import strategies as st

from dmoe.ops.histogram import histogram, histogram_ref

DTYPES = [torch.int16, torch.int32, torch.int64]
implementations = pytest.mark.parametrize("counts", [histogram, histogram_ref], ids=["op", "ref"])


def assert_counted(counts, values, num_bins):
    seen = Counter(values.tolist())
    got = counts(values, num_bins)
    assert got.dtype == torch.int32
    assert got.tolist() == [seen[bin] for bin in range(num_bins)]


@implementations
@settings(max_examples=50)
@given(num_bins=st.integers(1, 300), dtype=st.sampled_from(DTYPES), data=st.data())
def test_equals_counter(counts, num_bins, dtype, data):
    values = data.draw(st.lists(st.integers(0, num_bins - 1), max_size=80))
    assert_counted(counts, torch.tensor(values, dtype=dtype), num_bins)


@implementations
@pytest.mark.parametrize("num_bins", [1, 17, 9000])
def test_runs_of_several_threads(counts, num_bins):
    values = torch.randint(0, num_bins, (90_001,), generator=torch.Generator().manual_seed(0))
    for count in (1, 2, 5):
        with on_threads(count):
            assert_counted(counts, values, num_bins)


@implementations
def test_empty_and_view(counts):
    for dtype in DTYPES:
        assert_counted(counts, torch.empty(0, dtype=dtype), 3)
        assert_counted(counts, torch.randint(0, 5, (9, 4), dtype=dtype)[:, 2], 5)


@implementations
@pytest.mark.parametrize("value", [-1, 7, -300])
def test_value_outside_is_named(counts, value):
    for dtype in DTYPES:
        values = torch.ones(30_000, dtype=dtype)
        values[[20_000, 29_000]] = value
        with pytest.raises(RuntimeError, match=rf"values\[20000\]: expected 0 .. 6, got {value}$"):
            counts(values, 7)


@pytest.mark.parametrize(
    ("values", "num_bins", "error", "message"),
    [
        (torch.zeros(3), 2, TypeError, "values: expected dtype int16, int32 or int64, got torch.float32"),
        (torch.zeros(3, 2, dtype=torch.int32), 2, ValueError, r"one dimension, got shape \(3, 2\)"),
        (torch.zeros(3, dtype=torch.int32), 0, ValueError, "num_bins: expected at least 1, got 0"),
        (torch.zeros(1, dtype=torch.int16).expand(2**31), 2, ValueError, r"fewer than 2\*\*31 .*, got 2147483648"),
    ],
)
def test_errors_name_argument_and_values(values, num_bins, error, message):
    with pytest.raises(error, match=message):
        histogram(values, num_bins)


def test_registration():
    torch.library.opcheck(torch.ops.dmoe.histogram.default, (torch.randint(0, 9, (17,)), 9))
