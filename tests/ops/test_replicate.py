"""replicate and its transpose against loops over positions."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dmoe.ops.replicate import replicate, replicate_backward_ref, replicate_ref

FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
DTYPES = [*FLOATS, torch.int16, torch.int32, torch.int64]
forward = pytest.mark.parametrize("spreads", [replicate, replicate_ref], ids=["op", "ref"])
backward = pytest.mark.parametrize(
    "sums", [torch.ops.dmoe.replicate_backward, replicate_backward_ref], ids=["op", "ref"]
)


@st.composite
def bins_and_length(draw):
    """Ends of up to nine experts, some without rows, and a length at or behind the last end."""
    rows = draw(st.lists(st.integers(0, 6) | st.just(0), min_size=1, max_size=9))
    ends = torch.tensor(rows).cumsum(0).to(draw(st.sampled_from([torch.int32, torch.int64])))
    return ends, int(ends[-1]) + draw(st.integers(0, 5))


@forward
@settings(max_examples=50)
@given(sizes=bins_and_length(), batch=st.integers(0, 4), dtype=st.sampled_from(DTYPES), transposed=st.booleans())
def test_copies_to_every_position(spreads, sizes, batch, dtype, transposed):
    bins, length = sizes
    x = torch.arange(1, batch * len(bins) + 1).view(batch, len(bins)).to(dtype)
    if transposed:
        x = x.T.contiguous().T
    expected = torch.zeros(batch, length, dtype=dtype)
    begin = 0
    for e, end in enumerate(bins.tolist()):
        for i in range(begin, end):
            for b in range(batch):
                expected[b, i] = x[b, e]
        begin = end
    got = spreads(x, bins, length)
    assert got.dtype == dtype
    assert torch.equal(got, expected)


@backward
@settings(max_examples=40)
@given(sizes=bins_and_length(), batch=st.integers(0, 4), dtype=st.sampled_from(FLOATS), transposed=st.booleans())
def test_transpose_sums_every_segment(sums, sizes, batch, dtype, transposed):
    bins, length = sizes
    grad = torch.arange(batch * length).view(batch, length).remainder(7).to(dtype)  # small integers: exact sums
    if transposed:
        grad = grad.T.contiguous().T
    rows = [[sum(row[begin:end]) for begin, end in pairwise([0, *bins.tolist()])] for row in grad.tolist()]
    got = sums(grad, bins)
    assert got.dtype == dtype
    assert got.shape == (batch, len(bins))
    assert got.tolist() == rows


@backward
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sums_are_accumulated_wide(sums, dtype):
    """4096 ones and halves: a sum kept in the narrow dtype would stop growing at 2048 (float16) or 256 (bfloat16)."""
    grad = torch.tensor([1.0, 0.5], dtype=dtype).repeat(1, 2048)
    assert sums(grad, torch.tensor([4096])).item() == 3072


@backward
@pytest.mark.parametrize("dtype", FLOATS)
def test_sum_is_as_close_as_its_dtype_allows(sums, dtype):
    grad = torch.randn(2, 3000, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)
    exact = [[math.fsum(row[:1000]), math.fsum(row[1000:])] for row in grad.tolist()]
    exact = torch.tensor(exact, dtype=torch.float64)
    got = sums(grad, torch.tensor([1000, 3000])).double()
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    accumulation = 2000 * torch.finfo(wide).eps * grad.double().abs().max()
    assert ((got - exact).abs() <= exact.abs() * torch.finfo(dtype).eps + accumulation).all()


def test_gradients_of_both_orders():
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    bins = torch.tensor([2, 2, 7, 9])
    assert torch.autograd.gradcheck(lambda x: replicate(x, bins, 11), (x,))
    assert torch.autograd.gradgradcheck(lambda x: replicate(x, bins, 11), (x,))
    row = x[1].detach().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: replicate(x, bins, 11), (row,))


@forward
def test_many_rows_on_several_threads(spreads):
    rows = torch.randint(0, 90, (50,), generator=torch.Generator().manual_seed(0))
    x = torch.arange(50 * 97).view(97, 50)
    expected = torch.repeat_interleave(x, rows, dim=1)
    got = spreads(x, rows.cumsum(0), int(rows.sum()) + 3)
    assert torch.equal(got[:, :-3], expected)
    assert not got[:, -3:].any()


def test_one_dimension():
    x = torch.tensor([1.5, 2.5, 3.5])
    assert replicate(x, torch.tensor([1, 1, 3]), 4).tolist() == [1.5, 3.5, 3.5, 0.0]


@forward
@pytest.mark.parametrize(
    ("bins", "message"),
    [
        ([1, 0, 3], r"bins\[1\]: expected 1 .. 4 \(never falling\), got 0"),
        ([1, 2, 5], r"bins\[2\]: expected 2 .. 4 \(never falling\), got 5"),
        ([-1, 2, 3], r"bins\[0\]: expected 0 .. 4 \(never falling\), got -1"),
    ],
)
def test_bad_bins_are_named(spreads, bins, message):
    for dtype in (torch.int32, torch.int64):
        with pytest.raises(RuntimeError, match=message):
            spreads(torch.zeros(2, 3), torch.tensor(bins, dtype=dtype), 4)


@pytest.mark.parametrize(
    ("x", "bins", "length", "error", "message"),
    [
        (
            torch.zeros(2, 3, dtype=torch.bool),
            torch.zeros(3).int(),
            4,
            TypeError,
            "x: expected a float dtype.*torch.bool",
        ),
        (torch.zeros(2, 3), torch.zeros(3), 4, TypeError, "bins: expected dtype int32 or int64, got torch.float32"),
        (torch.zeros(2, 0), torch.zeros(0).int(), 4, ValueError, r"E >= 1, got \(2, 0\)"),
        (torch.zeros(1, 2, 3), torch.zeros(3).int(), 4, ValueError, r"got \(1, 2, 3\)"),
        (torch.zeros(2, 3), torch.zeros(4).int(), 4, ValueError, r"bins: expected shape \(3,\), got \(4,\)"),
        (torch.zeros(2, 3), torch.zeros(3, device="meta").int(), 4, ValueError, "expected device cpu of x, got meta"),
        (torch.zeros(2, 3), torch.zeros(3).int(), -1, ValueError, "length: expected at least 0, got -1"),
    ],
)
def test_errors_name_argument_and_values(x, bins, length, error, message):
    with pytest.raises(error, match=message):
        replicate(x, bins, length)


def test_registration():
    bins = torch.tensor([2, 2, 7], dtype=torch.int32)
    x = torch.randn(2, 3, requires_grad=True)
    torch.library.opcheck(torch.ops.dmoe.replicate.default, (x, bins, 9))
    grad = torch.randn(2, 9, requires_grad=True)
    torch.library.opcheck(torch.ops.dmoe.replicate_backward.default, (grad, bins))
