"""The running sums against a loop over Python integers."""

from __future__ import annotations

import pytest
import torch
from helpers import on_threads
from hypothesis import given, settings
from hypothesis import strategies as st

from dmoe.ops.cumsum import exclusive_cumsum, exclusive_cumsum_ref, inclusive_cumsum, inclusive_cumsum_ref

BITS = {torch.int16: 16, torch.int32: 32, torch.int64: 64}
implementations = pytest.mark.parametrize(
    ("sums", "exclusive"),
    [
        (inclusive_cumsum, False),
        (inclusive_cumsum_ref, False),
        (exclusive_cumsum, True),
        (exclusive_cumsum_ref, True),
    ],
    ids=["inclusive", "inclusive_ref", "exclusive", "exclusive_ref"],
)


def expected_row(values, bits, exclusive):
    out, total = [], 0
    for value in values:
        before, total = total, total + value
        shown = before if exclusive else total
        out.append((shown + 2 ** (bits - 1)) % 2**bits - 2 ** (bits - 1))  # two's complement
    return out


def assert_sums(sums, exclusive, x, dim):
    bits = BITS[x.dtype]
    if x.dim() == 1:
        expected = expected_row(x.tolist(), bits, exclusive)
    elif dim % 2 == 1:
        expected = [expected_row(row, bits, exclusive) for row in x.tolist()]
    else:
        columns = [expected_row(column, bits, exclusive) for column in zip(*x.tolist(), strict=True)]
        expected = [list(row) for row in zip(*columns, strict=True)] if x.shape[1] else x.tolist()
    got = sums(x, dim)
    assert got.dtype == x.dtype
    assert got.shape == x.shape
    assert got.tolist() == expected


@implementations
@settings(max_examples=30)
@given(
    shape=st.tuples(st.integers(0, 40)) | st.tuples(st.integers(0, 12), st.integers(0, 12)),
    dtype=st.sampled_from(list(BITS)),
    small=st.booleans(),
    seed=st.integers(0, 2**31),
    transposed=st.booleans(),
    data=st.data(),
)
def test_equals_a_loop(sums, exclusive, shape, dtype, small, seed, transposed, data):
    bound = 9 if small else 2 ** (BITS[dtype] - 1) - 1  # large ones wrap around
    x = torch.randint(-bound, bound, shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))
    x = x.T if transposed and x.dim() == 2 else x
    assert_sums(sums, exclusive, x, data.draw(st.integers(-x.dim(), x.dim() - 1)))


@implementations
@pytest.mark.parametrize(("shape", "dim"), [((100_003,), 0), ((3, 35_001), 1), ((20_001, 3), 0), ((3, 35_001), 0)])
def test_runs_of_several_threads(sums, exclusive, shape, dim):
    x = torch.randint(-999, 999, shape, generator=torch.Generator().manual_seed(0))
    for count in (1, 3):
        with on_threads(count):
            assert_sums(sums, exclusive, x, dim)


@pytest.mark.parametrize("sums", [inclusive_cumsum, exclusive_cumsum])
@pytest.mark.parametrize(
    ("x", "dim", "error", "message"),
    [
        (torch.zeros(3), 0, TypeError, "x: expected dtype int16, int32 or int64, got torch.float32"),
        (torch.zeros(1, 1, 1, dtype=torch.int32), 0, ValueError, r"one or two dimensions, got shape \(1, 1, 1\)"),
        (torch.zeros(3, dtype=torch.int32), 1, ValueError, "dim: expected -1 .. 0, got 1"),
        (torch.zeros(3, 2, dtype=torch.int32), -3, ValueError, "dim: expected -2 .. 1, got -3"),
    ],
)
def test_errors_name_argument_and_values(sums, x, dim, error, message):
    with pytest.raises(error, match=message):
        sums(x, dim)


@pytest.mark.parametrize("name", ["inclusive_cumsum", "exclusive_cumsum"])
def test_registration(name):
    op = getattr(torch.ops.dmoe, name).default
    torch.library.opcheck(op, (torch.randint(0, 9, (17,)), 0))
    torch.library.opcheck(op, (torch.randint(0, 9, (5, 7), dtype=torch.int16), 0))
