"""The kernels of fp8 under the interpreter: codes and scales to the bit, products against loops in float64."""

from __future__ import annotations

import math

import kernel_table
import pytest
import torch
from helpers import interpreted, where_kernels_run
from hypothesis import given, settings
from hypothesis import strategies as st
from moe_mlp_kernel_cases import small_blocks, tilings

from dmoe.ops.fp8 import (
    fp8_gemm_cuda,
    quantize_blocks_cuda,
    quantize_blocks_ref,
    quantize_rows_cuda,
    quantize_rows_ref,
)

triton = pytest.importorskip("triton")

rows_by_kernel, blocks_by_kernel, gemm_by_kernel = map(
    where_kernels_run, (quantize_rows_cuda, quantize_blocks_cuda, fp8_gemm_cuda)
)


def assert_same(got, expected):
    """Codes by their bits, scales with NaN equal to NaN."""
    for one, other in zip(got, expected, strict=True):
        if one.dtype == torch.float8_e4m3fn:
            one, other = one.view(torch.uint8).int(), other.view(torch.uint8).int()
            # NaN has two codes, and its sign means nothing.
            one, other = (codes.masked_fill(codes & 127 == 127, 127) for codes in (one, other))
        assert one.dtype == other.dtype
        assert torch.equal(one.nan_to_num(nan=-1.0), other.nan_to_num(nan=-1.0))


def numbers(*shape, dtype, seed, spread):
    """Of very different sizes: some codes are 0, some subnormal, none is too large."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.exp(spread * (torch.rand(shape, generator=generator, dtype=torch.float64) - 0.7))
    return (sizes * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype)


@interpreted
@settings(max_examples=40)
@given(
    rows=st.sampled_from([1, 3, 17, 40]),
    width=st.sampled_from([1, 16, 33, 256, 1030, 5000]),
    dtype=st.sampled_from([torch.float32, torch.float16]),
    spread=st.sampled_from([1.0, 20.0]),
    gather=st.booleans(),
    weighed=st.booleans(),
    seed=st.integers(0, 99),
)
def test_rows_to_the_bit(rows, width, dtype, spread, gather, weighed, seed):
    """Rows of several chunks, holes, NaN beside numbers, zeros."""
    tokens = numbers(rows, width, dtype=dtype, seed=seed, spread=spread)
    tokens[0, width // 2] = (0.0, math.nan, math.inf, -math.inf, 65504.0)[seed % 5]
    tokens[-1] = 0.0 if seed % 2 else tokens[-1]
    token, weights, count = None, None, rows
    generator = torch.Generator().manual_seed(seed)
    if gather:
        count = rows + 5
        token = torch.randint(-1, rows, (count,), generator=generator).int()
    if weighed:
        weights = torch.randn(count, generator=generator)
    assert_same(rows_by_kernel(tokens, token, weights), quantize_rows_ref(tokens, token, weights))


def test_every_number_of_half_precision():
    """All of float16 beside 448, so that the scale is 1: every code, and every way of rounding to it."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.float16)
    every = every[every.abs() <= 448]
    assert len(every) > 40000
    every = torch.nn.functional.pad(every, (0, -len(every) % 1023)).view(-1, 1023)
    rows = torch.nn.functional.pad(every, (0, 1), value=448.0)
    assert_same(rows_by_kernel(rows, None, None), quantize_rows_ref(rows))


@pytest.mark.parametrize("largest", [2.0**-149, 1e-38, 1e-30, 447.9, 448.0, 448.1, 1.7e38, 3.4e38])
def test_scales_of_the_smallest_and_of_the_largest_numbers(largest):
    """On both sides of a power of two, and at the ends of the range."""
    values = torch.tensor([[largest], [math.nextafter(largest, math.inf)], [largest * 2.0**-7]], dtype=torch.float32)
    assert_same(rows_by_kernel(values, None, None)[1:], quantize_rows_ref(values)[1:])


@interpreted
@settings(max_examples=20)
@given(
    experts=st.integers(1, 2),
    height=st.sampled_from([1, 64, 130, 256]),
    width=st.sampled_from([1, 31, 128, 200]),
    dtype=st.sampled_from([torch.float32, torch.float16]),
    turned=st.booleans(),
    with_transposed=st.booleans(),
    seed=st.integers(0, 99),
)
def test_blocks_to_the_bit(experts, height, width, dtype, turned, with_transposed, seed):
    """Ragged blocks, weights that are transposed in memory, a block that holds what is no number."""
    weight = numbers(experts, height, width, dtype=dtype, seed=seed, spread=12.0)
    if seed % 3 == 0:
        weight[-1, -1, -1] = math.inf
    given_weight = weight.mT.contiguous().mT if turned else weight
    got = blocks_by_kernel(given_weight, with_transposed)
    assert_same(got, quantize_blocks_ref(weight, with_transposed))


@st.composite
def calls(draw):
    counts = draw(st.lists(st.sampled_from([0, 1, 5, 17, 40]), min_size=1, max_size=4))
    return {
        "counts": counts,
        "rows": sum(counts) + draw(st.sampled_from([1, 20])),
        "inner": draw(st.sampled_from([1, 16, 40, 128, 200, 272])),
        "columns": draw(st.sampled_from([1, 16, 33, 128, 150])),
        "trans_b": draw(st.booleans()),
        "dtype": draw(st.sampled_from([torch.float32, torch.float16])),
        "seed": draw(st.integers(0, 99)),
    }


@interpreted
@settings(max_examples=40)
@given(call=calls(), tiling=tilings())
def test_products_of_codes(call, tiling):
    """An empty or a hot expert, rows of nobody that are NaN, sums over several blocks, ragged at both ends."""
    counts, seed, trans_b, dtype = (call[key] for key in ("counts", "seed", "trans_b", "dtype"))
    a = numbers(call["rows"], call["inner"], dtype=torch.float32, seed=seed, spread=3.0)
    a[sum(counts) :] = torch.nan
    weight = numbers(len(counts), call["columns"], call["inner"], dtype=torch.float32, seed=seed + 1, spread=3.0)
    weight /= call["inner"]
    codes, scales = quantize_rows_ref(a)
    w_codes, w_scales, turned = quantize_blocks_ref(weight, True)
    given_w = (w_codes, w_scales) if trans_b else (turned if seed % 2 else w_codes.mT, w_scales.mT)
    offsets = torch.tensor([0, *counts]).cumsum(0).int()
    with small_blocks(**tiling):
        got = fp8_gemm_cuda(codes, scales, *given_w, offsets, trans_b, dtype)
    exact = torch.zeros(got.shape, dtype=torch.float64)
    sizes, row = exact.clone(), 0
    numbers_of = {e: decoded(w_codes[e], w_scales[e]) for e in range(len(counts))}
    for e, count in enumerate(counts):
        for _ in range(count):
            factor = numbers_of[e] * codes[row].double()
            exact[row], sizes[row] = factor.sum(1) * scales[row], factor.abs().sum(1) * scales[row]
            row += 1
    assert got.dtype == dtype
    assert not got[sum(counts) :].any()
    bound = torch.finfo(dtype).eps * 0.51 * exact.abs() + 20 * torch.finfo(torch.float32).eps * sizes
    assert ((got.double() - exact).abs() <= bound + torch.finfo(dtype).tiny).all()


def decoded(codes, scales):
    """One expert's weight, block by block, in float64."""
    values = codes.double()
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            values[128 * i : 128 * (i + 1), 128 * j : 128 * (j + 1)] *= scales[i, j].double()
    return values


def test_launches_and_what_is_not_offered(monkeypatch):
    """One launch each; without fp8 tensor cores decoded numbers are multiplied."""
    import dmoe.kernels._launch as _launch

    def meta(*shape, dtype=torch.bfloat16):
        return torch.empty(shape, dtype=dtype, device="meta")

    offsets = meta(3, dtype=torch.int32)

    def run():
        with kernel_table.counting() as names:
            codes, scales = quantize_rows_cuda(meta(40, 64), None, None)
            w_codes, w_scales, _ = quantize_blocks_cuda(meta(2, 32, 64), True)
            fp8_gemm_cuda(codes, scales, w_codes, w_scales, offsets, True, torch.bfloat16)
        return names

    assert run() == ["quantize_rows_kernel", "quantize_blocks_kernel", "fp8_rows_kernel"]
    monkeypatch.setattr(_launch, "capability", lambda device: 80)
    assert run()[:2] == ["quantize_rows_kernel", "quantize_blocks_kernel"]
    assert "fp8_rows_kernel" not in run()
    rows = torch.randn(4, 8, dtype=torch.float64)  # no kernel's
    assert_same(quantize_rows_cuda(rows, None, None), quantize_rows_ref(rows))
