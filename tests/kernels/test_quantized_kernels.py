"""The kernel of products with quantised weights, under the interpreter: small tiles, so that every loop goes round."""

from __future__ import annotations

import contextlib
import math

import kernel_table
import pytest
import quantized_cases as cases
import torch
from helpers import interpreted, where_kernels_run
from hypothesis import given, settings
from hypothesis import strategies as st
from moe_mlp_kernel_cases import small_blocks, tilings

from dmoe.ops.quantized_gemm import quantized_gemm_cuda, quantized_gemm_ref

pytest.importorskip("triton")

FORMATS = [(format, block) for format, blocks in cases.BLOCKS.items() for block in blocks]
formats = pytest.mark.parametrize(("format", "block"), FORMATS, ids=str)


def numbers(*shape, dtype, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def offsets_of(counts):
    return torch.tensor([0, *counts]).cumsum(0).int()


def row_by_row(a, values, counts, trans_b, a2=None, b2=None):
    """Sums in float64, and those of magnitudes."""
    exact = torch.zeros(a.shape[0], values.shape[1 if trans_b else 2], dtype=torch.float64)
    sizes, row = exact.clone(), 0
    for expert, count in enumerate(counts):
        for _ in range(count):
            for left, right in ((a, values), (a2, b2)):
                if left is not None:
                    factor = left[row].double() * (right[expert] if trans_b else right[expert].T).double()
                    exact[row] += factor.sum(1)
                    sizes[row] += factor.abs().sum(1)
            row += 1
    return exact, sizes


@st.composite
def calls(draw):
    counts = draw(st.lists(st.sampled_from([0, 1, 5, 17, 40]), min_size=1, max_size=4))
    return {
        "counts": counts,
        "rows": sum(counts) + draw(st.sampled_from([1, 20])),
        "weights": draw(cases.weights()),
        "trans_b": draw(st.booleans()),
        "dtype": draw(st.sampled_from([torch.float32, torch.float16])),
        "rank": draw(st.sampled_from([0, 1, 4, 16, 35])),
        "shared": draw(st.booleans()),
        "seed": draw(st.integers(0, 99)),
    }


@interpreted
@settings(max_examples=60)
@given(call=calls(), tiling=tilings())
def test_products_of_decoded_values_in_one_kernel(call, tiling):
    """Holes hold NaN, an expert may be empty or hot, and all experts may share the thin product's weight."""
    drawn, counts, dtype, seed, trans_b = (call[key] for key in ("weights", "counts", "dtype", "seed", "trans_b"))
    codes, scales, zeros = cases.build_weights(drawn, len(counts), seed)
    inner, columns = (drawn["columns"], drawn["rows"])[:: 1 if trans_b else -1]
    a, a2, b2 = numbers(call["rows"], inner, dtype=dtype, seed=seed), None, None
    a[sum(counts) :] = torch.nan
    if rank := call["rank"]:
        a2 = numbers(call["rows"], rank, dtype=dtype, seed=seed + 1)
        a2[sum(counts) :] = torch.nan
        shape = (columns, rank) if trans_b else (rank, columns)
        b2 = numbers(1 if call["shared"] else len(counts), *shape, dtype=dtype, seed=seed + 2)
        b2 = b2.expand(len(counts), *shape)
    about = drawn["format"], list(drawn["block"]), offsets_of(counts), trans_b
    with small_blocks(**tiling), kernel_launches() as launched:
        got = quantized_gemm_cuda(a, codes, scales, zeros, *about, a2, b2)
    assert launched == (["quantized_rows_kernel"])
    values = cases.decoded(codes, scales, zeros, drawn["format"], drawn["block"], dtype)
    exact, sizes = row_by_row(a, values, counts, trans_b, a2, b2)
    assert got.dtype == dtype
    assert not got[sum(counts) :].any()
    bound = torch.finfo(dtype).eps * 0.51 * exact.abs() + 20 * torch.finfo(torch.float32).eps * sizes
    assert ((got.double() - exact).abs() <= bound + torch.finfo(dtype).tiny).all()


@contextlib.contextmanager
def kernel_launches():
    """Names of the kernels that were started inside."""
    from dmoe.kernels import _launch, offline

    original, names = _launch.launch, []

    def noted(kernel, grid, *arguments, **options):
        if all(grid):
            names.append(kernel.__name__)
        original(kernel, grid, *arguments, **options)

    with offline.instead_of_launching(noted):
        yield names


@formats
@pytest.mark.parametrize("trans_b", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_every_code_is_decoded_to_the_bit(format, block, trans_b, dtype):
    """Against the values that the bits say: rows of a unit matrix pick out the decoded weight."""
    rows, columns = 128, 256
    block = block[0], block[1] or columns
    for zero_points in (False, True)[: 2 if format == "int4" else 1]:
        codes, scales, zeros = cases.random_weights(format, block, 1, rows, columns, seed=1, zero_points=zero_points)
        every = torch.arange(256, dtype=torch.uint8)
        every[every & 127 == 127] = 0  # no NaN among those that are multiplied by 0
        codes.view(torch.uint8).view(-1)[: every.numel()] = every
        values = cases.decoded(codes, scales, zeros, format, block, dtype)[0]
        count = columns if trans_b else rows
        unit = torch.eye(count, dtype=dtype)
        arguments = codes, scales, zeros, format, list(block), offsets_of([count]), trans_b
        got = where_kernels_run(quantized_gemm_cuda)(unit, *arguments)
        assert torch.equal(got, values.T if trans_b else values)


@pytest.mark.parametrize("trans_b", [True, False])
def test_what_is_no_number_and_what_is_subnormal(trans_b):
    """NaN of e4m3 and of e8m0, and the least scale of e8m0, 2^-127, reach the sum."""
    one = torch.ones(1, 1)
    offsets, about = offsets_of([1]), ([1, 32], offsets_of([1]), trans_b)
    for bits in (0x7F, 0xFF):
        codes = torch.tensor([[[bits]]], dtype=torch.uint8).view(torch.float8_e4m3fn)
        got = where_kernels_run(quantized_gemm_cuda)(
            one, codes, torch.ones(1, 1, 1), None, "fp8", [128, 128], offsets, trans_b
        )
        assert got.isnan().all()
    codes = torch.full((1, 1, 16), 0x77, dtype=torch.uint8)  # 6, 32 times
    a = torch.zeros(1, 32) if trans_b else one
    a[0, 0] = 1
    for scale, expected in ((0, 6 * 2.0**-127), (255, math.nan), (1, 6 * 2.0**-126), (200, 6 * 2.0**73)):
        scales = torch.full((1, 1, 1), scale, dtype=torch.uint8)
        got = where_kernels_run(quantized_gemm_cuda)(a, codes, scales, None, "mxfp4", *about)
        torch.testing.assert_close(got[0, 0], torch.tensor(expected), rtol=0, atol=0, equal_nan=True)


def test_what_the_kernel_does_not_serve_is_the_reference():
    codes, scales, _ = cases.random_weights("nf4", (1, 64), 2, 3, 64)
    for a, offsets in ((torch.randn(5, 64, dtype=torch.float64), [2, 3]), (torch.randn(0, 64), [0, 0])):
        arguments = a, codes, scales, None, "nf4", [1, 64], offsets_of(offsets), True
        with kernel_launches() as launched:
            got = quantized_gemm_cuda(*arguments)
        assert not launched
        assert torch.equal(got, quantized_gemm_ref(*arguments))


@formats
def test_nothing_of_the_decoded_size_is_made(format, block):
    """On shapes alone: of what is allocated, nothing is as large as one expert's decoded weight."""
    from torch.utils._python_dispatch import TorchDispatchMode

    experts, rows, columns = 4, 512, 512
    block = block[0], block[1] or columns
    codes, scales, _ = cases.random_weights(format, block, experts, rows, columns)
    sizes = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if func.overloadpacket in (torch.ops.aten.empty, torch.ops.aten.new_empty, torch.ops.aten.clone):
                sizes.append(result.numel())
            return result

    codes, scales = (tensor.to("meta") for tensor in (codes, scales))
    for trans_b in (True, False):
        a, offsets = torch.empty(64, 512, device="meta"), torch.empty(experts + 1, dtype=torch.int32, device="meta")
        with Sizes(), kernel_table.counting() as names:
            quantized_gemm_cuda(a, codes, scales, None, format, list(block), offsets, trans_b)
        assert names == ["quantized_rows_kernel"]
    assert sizes
    assert max(sizes) < rows * columns // 4
