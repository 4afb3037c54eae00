"""grouped_gemm and its weight gradient against loops in float64."""

from __future__ import annotations

import contextlib
import ctypes
import mmap

import numpy as np
import pytest
import torch
from helpers import where_kernels_run
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from moe_mlp_kernel_cases import small_blocks

from dmoe.ops.grouped_gemm import (
    grouped_gemm,
    grouped_gemm_cuda,
    grouped_gemm_ref,
    grouped_gemm_weight,
    grouped_gemm_weight_cuda,
    grouped_gemm_weight_ref,
)
from dmoe.ops.grouped_gemm_sum import grouped_gemm_sum, grouped_gemm_sum_cuda

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def call_gemm(a, b, offsets, trans_b):
    return grouped_gemm(a, b, offsets, trans_b=trans_b)


def under_kernels(function):
    """The CUDA function; Triton's interpreter has no bfloat16 products."""

    def run(a, *rest):
        assume(a.dtype != torch.bfloat16 or torch.cuda.is_available())
        return where_kernels_run(function)(a, *rest)

    return run


GEMMS = pytest.mark.parametrize(
    "op", [call_gemm, grouped_gemm_ref, under_kernels(grouped_gemm_cuda)], ids=["op", "ref", "kernels"]
)
WEIGHTS = pytest.mark.parametrize(
    "op",
    [grouped_gemm_weight, grouped_gemm_weight_ref, under_kernels(grouped_gemm_weight_cuda)],
    ids=["op", "ref", "kernels"],
)


def integers(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    """From -2 to 2: sums of up to 60 products stay below 256, exact in every dtype."""
    return torch.randint(-2, 3, shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def offsets_of(counts: list[int]) -> torch.Tensor:
    return torch.tensor(np.concatenate([[0], np.cumsum(counts)]), dtype=torch.int32)


def oracle(a, b, counts, trans_b):
    """One row after the other, in float64."""
    a, b = a.double().numpy(), b.double().numpy()
    out = np.zeros((a.shape[0], b.shape[1 if trans_b else 2]))
    row = 0
    for expert, count in enumerate(counts):
        for _ in range(count):
            for n in range(out.shape[1]):
                out[row, n] = sum(a[row] * (b[expert, n] if trans_b else b[expert, :, n]))
            row += 1
    return torch.from_numpy(out)


def weight_oracle(a, b, counts):
    a, b = a.double().numpy(), b.double().numpy()
    out = np.zeros((len(counts), a.shape[1], b.shape[1]))
    row = 0
    for expert, count in enumerate(counts):
        for _ in range(count):
            out[expert] += np.outer(a[row], b[row])
            row += 1
    return torch.from_numpy(out)


@st.composite
def cases(draw):
    counts = draw(st.lists(st.sampled_from([0, 0, 1, 2, 5, 15, 16, 17, 40]), min_size=1, max_size=5))
    tail = draw(st.sampled_from([0, 1, 20]))
    return counts, sum(counts) + tail, draw(st.integers(0, 1000))


sizes = st.sampled_from([1, 2, 7, 16, 31])


def poison(rows: torch.Tensor, used: int) -> torch.Tensor:
    rows[used:] = float("nan")
    return rows


@GEMMS
@given(
    case=cases(),
    inner=sizes | st.just(0),
    columns=sizes | st.just(0),
    dtype=st.sampled_from(DTYPES),
    trans_b=st.booleans(),
)
@settings(max_examples=50)
def test_product_is_exact_on_integers(op, case, inner, columns, dtype, trans_b):
    counts, rows, seed = case
    a = poison(integers(rows, inner, dtype=dtype, seed=seed), sum(counts))
    shape = (columns, inner) if trans_b else (inner, columns)
    b = integers(len(counts), *shape, dtype=dtype, seed=seed + 1)
    got = op(a, b, offsets_of(counts), trans_b)
    assert got.dtype == dtype
    assert torch.equal(got.double(), oracle(a, b, counts, trans_b))


@WEIGHTS
@given(case=cases(), height=sizes | st.just(0), columns=sizes | st.just(0), dtype=st.sampled_from(DTYPES))
@settings(max_examples=50)
def test_weight_gradient_is_exact_on_integers(op, case, height, columns, dtype):
    counts, rows, seed = case
    a = poison(integers(rows, height, dtype=dtype, seed=seed), sum(counts))
    b = poison(integers(rows, columns, dtype=dtype, seed=seed + 1), sum(counts))
    got = op(a, b, offsets_of(counts), len(counts))
    assert got.dtype == dtype
    assert torch.equal(got.double(), weight_oracle(a, b, counts))


# Several row blocks of one expert, a last block that ends with the tensor, and (from 4096 rows) the taller block.
@pytest.mark.parametrize("counts", [[0, 700, 3, 130], [4100, 0, 400], [1], [129, 192, 191]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("trans_b", [False, True])
def test_blocks_of_rows(counts, dtype, trans_b):
    rows = sum(counts)
    a = integers(rows, 24, dtype=dtype, seed=1)
    b = integers(len(counts), *((40, 24) if trans_b else (24, 40)), dtype=dtype, seed=2)
    expected = torch.cat(
        [x.double() @ (w.double().t() if trans_b else w.double()) for x, w in zip(a.split(counts), b, strict=True)]
    )
    assert torch.equal(grouped_gemm(a, b, offsets_of(counts), trans_b=trans_b).double(), expected)


# Heights that are cut for a hot expert (512 into 4, 300 into 2 unequal ones), beside experts that are not.
@pytest.mark.parametrize("height", [512, 300, 129])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blocks_of_a_weight_gradient(height, dtype):
    counts = [3, 0, 61, 1]
    a, b = integers(65, height, dtype=dtype, seed=1), integers(65, 20, dtype=dtype, seed=2)
    got = grouped_gemm_weight(a, b, offsets_of(counts))
    expected = torch.stack([x.double().t() @ y.double() for x, y in zip(a.split(counts), b.split(counts), strict=True)])
    assert torch.equal(got.double(), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("trans_b", [False, True])
def test_rounds_once(dtype, trans_b):
    """On real numbers: within the rounding of the result, plus that of float32 sums of 200 products."""
    generator = torch.Generator().manual_seed(0)
    counts = [37, 0, 90, 5]
    a = torch.randn(132, 200, generator=generator, dtype=torch.float64).to(dtype)
    b = torch.randn(4, *((50, 200) if trans_b else (200, 50)), generator=generator, dtype=torch.float64).to(dtype)
    exact = oracle(a, b, counts, trans_b)
    magnitudes = oracle(a.abs(), b.abs(), counts, trans_b)
    sum_eps = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    bound = exact.abs() * torch.finfo(dtype).eps * 0.51 + magnitudes * sum_eps * 20
    assert ((grouped_gemm(a, b, offsets_of(counts), trans_b=trans_b).double() - exact).abs() <= bound).all()
    dy = torch.randn(132, 50, generator=generator, dtype=torch.float64).to(dtype)
    exact, magnitudes = weight_oracle(a, dy, counts), weight_oracle(a.abs(), dy.abs(), counts)
    bound = exact.abs() * torch.finfo(dtype).eps * 0.51 + magnitudes * sum_eps * 20
    assert ((grouped_gemm_weight(a, dy, offsets_of(counts)).double() - exact).abs() <= bound).all()


def test_reads_nothing_behind_the_last_row():
    """The last block is rounded up in bfloat16; here the tensor ends where memory that may not be read begins."""
    page = mmap.PAGESIZE
    memory = mmap.mmap(-1, 2 * page)
    buffer = torch.frombuffer(memory, dtype=torch.bfloat16)
    libc = ctypes.CDLL(None, use_errno=True)
    forbidden = ctypes.c_void_p(buffer.data_ptr() + page)
    assert libc.mprotect(forbidden, ctypes.c_size_t(page), 0) == 0
    a = buffer[page // 2 - 37 * 8 : page // 2].view(37, 8)
    a.copy_(integers(37, 8, seed=1))
    counts, b = [20, 17], integers(2, 5, 8, dtype=torch.bfloat16, seed=2)
    assert torch.equal(grouped_gemm(a, b, offsets_of(counts)).double(), oracle(a, b, counts, True))
    got = grouped_gemm_weight(a, a, offsets_of(counts))
    assert torch.equal(got.double(), weight_oracle(a, a, counts))


def test_padded_form_keeps_zero_rows_zero():
    # Two experts of 3 and 1 tokens, rounded up to 4 rows each: the holes are zero rows, in and out.
    offsets = torch.tensor([0, 4, 8], dtype=torch.int32)
    a, b = integers(8, 6, seed=1), integers(2, 5, 6, seed=2)
    a[3] = 0
    a[5:] = 0
    got = grouped_gemm(a, b, offsets)
    assert torch.equal(got.double(), oracle(a, b, [4, 4], True))
    assert not got[3].any()
    assert not got[5:].any()


@pytest.mark.parametrize("trans_b", [False, True])
def test_capacity_form_equals_offsets_that_say_the_same(trans_b):
    a, b = integers(3, 4, 6, seed=1), integers(3, *((5, 6) if trans_b else (6, 5)), seed=2)
    offsets = torch.tensor([0, 4, 8, 12], dtype=torch.int32)
    flat = grouped_gemm(a.flatten(0, 1), b, offsets, trans_b=trans_b)
    assert torch.equal(grouped_gemm(a, b, trans_b=trans_b), flat.view(3, 4, 5))
    assert torch.equal(grouped_gemm_weight(a, flat.view(3, 4, 5)), grouped_gemm_weight(a.flatten(0, 1), flat, offsets))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strided_inputs(dtype):
    counts, offsets = [3, 0, 20], torch.tensor([0, 9, 3, 9, 3, 9, 23], dtype=torch.int32)[::2]
    wide = integers(23, 40, dtype=dtype, seed=1)
    weights = integers(3, 9, 14, dtype=dtype, seed=2)
    for a in (wide[:, 3:17], wide[:, ::2][:, :14], wide.t().contiguous().t()[:, :14], wide[:1, :14].expand(23, 14)):
        for b in (weights, weights.transpose(1, 2).contiguous().transpose(1, 2), weights[:1].expand(3, 9, 14)):
            assert torch.equal(grouped_gemm(a, b, offsets).double(), oracle(a, b, counts, True))
            got = grouped_gemm(a, b.transpose(1, 2), offsets, trans_b=False)
            assert torch.equal(got.double(), oracle(a, b, counts, True))
        every_other = weights.repeat_interleave(2, 2)[..., ::2]
        assert torch.equal(grouped_gemm(a, every_other, offsets).double(), oracle(a, weights, counts, True))
        dy = integers(23, 18, dtype=dtype, seed=3)[:, ::2]
        assert torch.equal(grouped_gemm_weight(a, dy, offsets).double(), weight_oracle(a, dy, counts))
        assert torch.equal(grouped_gemm_weight(dy, a, offsets).double(), weight_oracle(dy, a, counts))


@pytest.mark.parametrize("trans_b", [False, True])
def test_derivatives(trans_b):
    generator = torch.Generator().manual_seed(0)
    counts = offsets_of([2, 0, 3])
    a = torch.randn(6, 4, dtype=torch.float64, generator=generator, requires_grad=True)  # with a tail of one row
    b = torch.randn(3, *((2, 4) if trans_b else (4, 2)), dtype=torch.float64, generator=generator, requires_grad=True)
    run = lambda a, b: grouped_gemm(a, b, counts, trans_b=trans_b)  # noqa: E731
    assert torch.autograd.gradcheck(run, (a, b))
    assert torch.autograd.gradgradcheck(run, (a, b), fast_mode=True)
    other = torch.randn(6, 3, dtype=torch.float64, generator=generator, requires_grad=True)
    run_weight = lambda a, b: grouped_gemm_weight(a, b, counts)  # noqa: E731
    assert torch.autograd.gradcheck(run_weight, (a, other))
    assert torch.autograd.gradgradcheck(run_weight, (a, other), fast_mode=True)


@pytest.mark.parametrize("needs", ["a", "b"])
def test_saves_a_factor_only_for_the_gradient_of_the_other(needs):
    a = integers(5, 4).requires_grad_(needs == "a")
    b = integers(2, 3, 4).requires_grad_(needs == "b")
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        out = grouped_gemm(a, b, offsets_of([2, 3]))
    assert [t.shape for t in saved if t.is_floating_point()] == [b.shape if needs == "a" else a.shape]
    out.sum().backward()
    if needs == "a":
        assert torch.equal(a.grad.double(), oracle(torch.ones(5, 3), b.detach(), [2, 3], False))
    else:
        assert torch.equal(b.grad.double(), weight_oracle(torch.ones(5, 3), a.detach(), [2, 3]))


def test_autocast_runs_in_its_dtype():
    a = integers(5, 4).requires_grad_()
    b = integers(2, 3, 4).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = grouped_gemm(a, b.to(torch.bfloat16), offsets_of([2, 3]))
        assert grouped_gemm(a.double(), b.double(), offsets_of([2, 3])).dtype == torch.float64
        assert grouped_gemm_weight(a, a, offsets_of([2, 3])).dtype == torch.bfloat16
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert a.grad.dtype == b.grad.dtype == torch.float32


def test_registration():
    for counts, tail in (([2, 0, 3], 1), ([0, 0], 0), ([], 0)):
        rows, experts = sum(counts) + tail, len(counts)
        a, b = torch.randn(rows, 4, requires_grad=True), torch.randn(experts, 3, 4, requires_grad=True)
        dy = torch.randn(rows, 3, requires_grad=True)
        torch.library.opcheck(torch.ops.dmoe.grouped_gemm.default, (a, b, offsets_of(counts), True))
        torch.library.opcheck(torch.ops.dmoe.grouped_gemm.default, (dy, b, offsets_of(counts), False))
        torch.library.opcheck(torch.ops.dmoe.grouped_gemm_weight.default, (a, dy, offsets_of(counts), experts))


def test_bad_input():
    a, b, offsets = torch.randn(5, 4), torch.randn(2, 3, 4), offsets_of([2, 3])
    with pytest.raises(
        TypeError, match=r"grouped_gemm: a: expected float32, float64, bfloat16 or float16, got torch.int64"
    ):
        grouped_gemm(a.long(), b, offsets)
    with pytest.raises(TypeError, match=r"grouped_gemm: b: expected torch.float32 like a, got torch.float64"):
        grouped_gemm(a, b.double(), offsets)
    with pytest.raises(ValueError, match=r"grouped_gemm: a: expected two dimensions, or three .*got \(4,\)"):
        grouped_gemm(a[0], b, offsets)
    with pytest.raises(ValueError, match=r"grouped_gemm: b: expected \(E, N, Kd\) with Kd = 4 .*got \(2, 4, 3\)"):
        grouped_gemm(a, b.mT, offsets)
    with pytest.raises(ValueError, match=r"grouped_gemm: b: expected \(E, Kd, N\) with Kd = 4 .*got \(2, 3, 4\)"):
        grouped_gemm(a, b, offsets, trans_b=False)
    with pytest.raises(ValueError, match=r"grouped_gemm: expert_offsets: expected shape \(E \+ 1,\).*got None"):
        grouped_gemm(a, b)
    with pytest.raises(ValueError, match=r"grouped_gemm: expert_offsets: expected None"):
        grouped_gemm(a.view(1, 5, 4), b[:1], offsets)
    with pytest.raises(ValueError, match=r"grouped_gemm: b: expected 3 experts, as many as expert_offsets has"):
        grouped_gemm(a, b, offsets_of([1, 1, 1]))
    with pytest.raises(TypeError, match=r"grouped_gemm: expert_offsets: expected int32, got torch.int64"):
        grouped_gemm(a, b, offsets.long())
    with pytest.raises(ValueError, match=r"grouped_gemm_weight: b: expected the rows of a.*got shape \(4, 4\)"):
        grouped_gemm_weight(a, a[:4], offsets)
    with pytest.raises(ValueError, match=r"grouped_gemm_weight: num_experts: expected 2.*got 3"):
        grouped_gemm_weight(a, a, offsets, 3)
    for bad, message in (
        ([1, 2, 3], "expected a leading 0, got 1"),
        ([0, 3, 2], "ascending sequence up to 5 rows, got 3, 2 for expert 1"),
        ([0, 3, 6], "ascending sequence up to 5 rows, got 3, 6 for expert 1"),
    ):
        with pytest.raises(RuntimeError, match=message):
            grouped_gemm(a, b, torch.tensor(bad, dtype=torch.int32))
        with pytest.raises(RuntimeError, match=message):
            grouped_gemm_weight(a, a, torch.tensor(bad, dtype=torch.int32))


@pytest.mark.parametrize("trans_b", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_two_products_in_one_pass_are_their_sum(trans_b, dtype):
    offsets = torch.tensor([0, 5, 5, 22, 27], dtype=torch.int32)  # 3 rows belong to no expert
    a, a2 = torch.randn(30, 12).to(dtype), torch.randn(30, 3).to(dtype)
    b, b2 = torch.randn(4, 10, 12).to(dtype), torch.randn(4, 10, 3).to(dtype)
    b, b2 = (b, b2) if trans_b else (b.mT.contiguous(), b2.mT)
    factors = a, b, a2, b2, offsets, trans_b
    exact = grouped_gemm_ref(a.double(), b.double(), offsets, trans_b) + grouped_gemm_ref(
        a2.double(), b2.double(), offsets, trans_b
    )
    error = (grouped_gemm_sum(*factors).double() - exact).abs().max()
    assert error <= 4 * torch.finfo(dtype).eps * exact.abs().max()
    torch.library.opcheck(torch.ops.dmoe.grouped_gemm_sum.default, factors)
    with pytest.raises(RuntimeError, match=r"grouped_gemm_sum: expected a2 and b2 of 30 rows|The size of tensor"):
        grouped_gemm_sum(a, b, a2[:29], b2, offsets, trans_b)


def summed(*arguments):
    return grouped_gemm_sum(*arguments)


def summed_by_kernels(*arguments):
    """In tiles of 16 or 32 columns, and 16 of a sum a step, so that both loops go round; on a GPU as it is."""
    with contextlib.nullcontext() if torch.cuda.is_available() else small_blocks(16, 16, parts=2, block_m=16, group=2):
        return where_kernels_run(grouped_gemm_sum_cuda)(*arguments)


@pytest.mark.parametrize("op", [summed, summed_by_kernels], ids=["op", "kernels"])
@given(
    case=cases(),
    inner=sizes,
    rank=st.sampled_from([1, 4, 15, 16, 17, 29]),
    columns=sizes | st.just(40),
    dtype=st.sampled_from(DTYPES),
    trans_b=st.booleans(),
    turned=st.tuples(st.booleans(), st.booleans()),
    shared=st.booleans(),
)
@settings(max_examples=60)
def test_a_product_and_a_thin_one_are_exact_on_integers(op, case, inner, rank, columns, dtype, trans_b, turned, shared):
    """Either weight may be transposed in memory; all experts may share the thin one."""
    if op is summed_by_kernels:
        assume(dtype != torch.bfloat16 or torch.cuda.is_available())
    counts, rows, seed = case
    a, a2 = (
        poison(integers(rows, width, dtype=dtype, seed=seed + i), sum(counts)) for i, width in enumerate((inner, rank))
    )
    b, b2 = (
        integers(len(counts), *((columns, width) if trans_b else (width, columns)), dtype=dtype, seed=seed + 3 + i)
        for i, width in enumerate((inner, rank))
    )
    if shared:
        b2 = b2[:1].expand(len(counts), -1, -1)
    b, b2 = (
        weight.mT.contiguous().mT if turn and not (shared and weight is b2) else weight
        for weight, turn in zip((b, b2), turned, strict=True)
    )
    got = op(a, b, a2, b2, offsets_of(counts), trans_b)
    assert got.dtype == dtype
    assert torch.equal(got.double(), oracle(a, b, counts, trans_b) + oracle(a2, b2, counts, trans_b))


def test_a_thin_product_is_added_before_anything_is_rounded():
    """Two products of 2^-11 beside 1, of which either alone is lost in half precision."""
    one, half = torch.ones(16, 1, dtype=torch.float16), torch.full((16, 1), 2.0**-11, dtype=torch.float16)
    weight, thin = torch.ones(1, 4, 1, dtype=torch.float16), torch.tensor([1.0, 1.0]).expand(1, 4, 2).half()
    both = torch.cat([half, half], 1)
    for op in (summed, summed_by_kernels):
        got = op(one, weight, both, thin.contiguous(), offsets_of([16]), True)
        assert torch.equal(got, torch.full((16, 4), 1 + 2.0**-10, dtype=torch.float16))
