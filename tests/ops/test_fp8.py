"""Rows and weights in fp8, against a table of all codes, and their products against loops in float64."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dmoe.ops.fp8 import fp8_gemm, quantize_blocks, quantize_rows


def number_of(code: int) -> float:
    """e4m3 by its definition (OCP 8-bit floating point, section 5.2)."""
    sign, exponent, fraction = (-1.0 if code & 128 else 1.0), (code >> 3) & 15, code & 7
    if exponent == 15 and fraction == 7:
        return math.nan
    return sign * (fraction / 8 * 2.0**-6 if exponent == 0 else (1 + fraction / 8) * 2.0 ** (exponent - 7))


NUMBERS = [number_of(code) for code in range(256)]


def nearest(value: float) -> float:
    """The number of a code that is nearest; of two, the one whose fraction is even."""
    codes = [code for code in range(256) if not math.isnan(NUMBERS[code])]
    return NUMBERS[min(codes, key=lambda code: (abs(NUMBERS[code] - value), code & 1))]


def scale_of(values: list[float]) -> float:
    """The least power of two that brings all under 448, found by trying."""
    largest = max(map(abs, values), default=0.0)
    if largest == 0:
        return 1.0
    exponent = -110
    while largest > 448 * 2.0**exponent:
        exponent += 1
    return 2.0**exponent


def decoded(codes: torch.Tensor) -> torch.Tensor:
    return torch.tensor(NUMBERS, dtype=torch.float64)[codes.view(torch.uint8).long()]


magnitudes = st.sampled_from([0.0, 1e-30, 1e-3, 1.0, 447.9, 448.0, 448.1, 3e4])


@st.composite
def drawn_rows(draw):
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]))
    count, width = draw(st.integers(0, 9)), draw(st.sampled_from([0, 1, 5, 16]))
    torch.manual_seed(draw(st.integers(0, 1000)))
    size = torch.tensor([draw(magnitudes) for _ in range(count)], dtype=torch.float64)
    spread = torch.exp(-torch.rand(count, width, dtype=torch.float64) * draw(st.sampled_from([1.0, 12.0])))
    rows = size.view(-1, 1) * spread * torch.randint(0, 2, (count, width)).mul(2).sub(1)
    if count and width:
        rows[0, 0] = size[0]
    return rows.to(dtype)


@settings(max_examples=60)
@given(rows=drawn_rows())
def test_rows_take_the_nearest_codes_under_the_least_power_of_two(rows):
    codes, scales = quantize_rows(rows)
    assert codes.dtype == torch.float8_e4m3fn
    assert scales.dtype == torch.float32
    numbers = decoded(codes)
    for values, scale, got in zip(rows.float().tolist(), scales.tolist(), numbers.tolist(), strict=True):
        assert scale == scale_of(values)
        assert got == [nearest(value / scale) for value in values]


def test_every_code_and_every_half_way_between_two():
    """Ties go to the even fraction, also between subnormal numbers."""
    numbers = sorted({abs(number) for number in NUMBERS if not math.isnan(number)})
    halves = [(low + high) / 2 for low, high in itertools.pairwise(numbers)]
    values = torch.tensor([[448.0, *numbers, *halves, *(-half for half in halves)]])
    codes, scales = quantize_rows(values)
    assert scales.tolist() == [1.0]
    assert decoded(codes)[0].tolist() == [nearest(value) for value in values[0].tolist()]


@settings(max_examples=40)
@given(rows=drawn_rows(), seed=st.integers(0, 1000), weighed=st.booleans())
def test_rows_are_gathered_and_weighed(rows, seed, weighed):
    generator = torch.Generator().manual_seed(seed)
    count = 12 if len(rows) else 0
    token = torch.randint(-1, max(len(rows), 1), (count,), generator=generator).int()
    weights = torch.randn(count, generator=generator) if weighed else None
    if weighed:
        weights[token < 0] = torch.nan  # of nobody
    codes, scales = quantize_rows(rows, token, weights)
    for row in range(count):
        values = torch.zeros(1, rows.shape[1]) if token[row] < 0 else rows[token[row]].float().view(1, -1)
        if weighed and token[row] >= 0:
            values = values * weights[row]
        expected, scale = quantize_rows(values)
        assert torch.equal(codes[row].view(torch.uint8), expected[0].view(torch.uint8))
        assert scales[row] == scale[0]


def test_many_rows_are_the_same_as_few():
    rows = torch.randn(5000, 3)
    codes, scales = quantize_rows(rows)
    for part in (slice(0, 7), slice(2040, 2060), slice(4990, 5000)):
        some, theirs = quantize_rows(rows[part])
        assert torch.equal(codes[part].view(torch.uint8), some.view(torch.uint8))
        assert torch.equal(scales[part], theirs)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_spoils_its_row_or_block_alone(bad):
    rows = torch.ones(3, 5)
    rows[1, 2] = bad
    codes, scales = quantize_rows(rows)
    assert scales.isnan().tolist() == [False, True, False]
    assert (decoded(codes) * scales[:, None]).isnan().all(1).tolist() == [False, True, False]
    weight = torch.ones(1, 200, 130)
    weight[0, 150, 3] = bad
    codes, scales, _ = quantize_blocks(weight)
    assert scales.isnan().tolist() == [[[False, False], [True, False]]]
    assert decoded(codes)[0, 128:, :128].isnan().all()
    assert not decoded(codes)[0, :128].isnan().any()


@pytest.mark.parametrize("shape", [(3, 128, 256), (2, 130, 77), (1, 1, 1), (0, 5, 5), (2, 0, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blocks(shape, dtype):
    """Each block of 128 x 128, those at the edges too, is quantised as one long row would be."""
    torch.manual_seed(0)
    weight = (torch.randn(shape) * torch.rand(shape[0], 1, shape[2]).mul(9).exp()).to(dtype)
    codes, scales, transposed = quantize_blocks(weight, with_transposed=True)
    assert scales.shape == (shape[0], -(-shape[1] // 128), -(-shape[2] // 128))
    for e in range(shape[0]):
        for i in range(scales.shape[1]):
            for j in range(scales.shape[2]):
                at = e, slice(128 * i, 128 * (i + 1)), slice(128 * j, 128 * (j + 1))
                expected, scale = quantize_rows(weight[at].reshape(1, -1))
                assert scales[e, i, j] == scale[0]
                assert torch.equal(codes[at].reshape(1, -1).view(torch.uint8), expected.view(torch.uint8))
    assert transposed.is_contiguous()
    assert torch.equal(transposed.view(torch.uint8), codes.view(torch.uint8).mT)
    alone = quantize_blocks(weight)
    assert alone[2] is None
    assert torch.equal(alone[0].view(torch.uint8), codes.view(torch.uint8))


def factors(counts, tail, inner, columns, seed=0):
    generator = torch.Generator().manual_seed(seed)
    rows = sum(counts) + tail
    a = torch.randn(rows, inner, generator=generator) * torch.rand(rows, 1, generator=generator).mul(8).exp()
    a[sum(counts) :] = torch.nan
    b = torch.randn(len(counts), columns, inner, generator=generator) / inner**0.5
    return a, b, torch.tensor([0, *counts]).cumsum(0).int()


def product(a_codes, a_scales, w_codes, w_scales, counts):
    """Row by row in float64, from the table, each with the scale that counts for it."""
    a, w = decoded(a_codes) * a_scales.double()[:, None], decoded(w_codes)
    for e in range(w.shape[0]):
        for i in range(w.shape[1]):
            for j in range(w.shape[2]):
                w[e, i, j] *= w_scales[e, i // 128, j // 128].item()
    out, row = torch.zeros(a.shape[0], w.shape[1], dtype=torch.float64), 0
    for e, count in enumerate(counts):
        for _ in range(count):
            out[row] = (w[e] * a[row]).sum(1)
            row += 1
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("counts", [[5, 0, 17, 1], [0, 0, 40], [3]])
@pytest.mark.parametrize(("inner", "columns"), [(16, 8), (131, 129), (5, 140)])
def test_product_rounds_the_sum_of_decoded_numbers_once(counts, inner, columns, dtype):
    a, b, offsets = factors(counts, 3, inner, columns)
    codes, scales = quantize_rows(a)
    w_codes, w_scales, transposed = quantize_blocks(b, with_transposed=True)
    exact = product(codes, scales, w_codes, w_scales, counts)
    got = fp8_gemm(codes, scales, w_codes, w_scales, offsets, dtype=dtype)
    turned = fp8_gemm(codes, scales, transposed, w_scales.mT, offsets, trans_b=False, dtype=dtype)
    magnitude = product(*(decoded_size(t) for t in (codes, scales, w_codes, w_scales)), counts)
    bound = 0.51 * torch.finfo(dtype).eps * exact.abs() + 20 * torch.finfo(torch.float32).eps * magnitude
    for result in (got, turned):
        assert result.dtype == dtype
        fits = exact.abs() < torch.finfo(dtype).max
        assert ((result.double() - exact).abs() <= bound + torch.finfo(dtype).tiny)[fits].all()
        assert not result[sum(counts) :].any()


def decoded_size(tensor):
    """The same with positive numbers."""
    if tensor.dtype == torch.float8_e4m3fn:
        return tensor.view(torch.uint8).bitwise_and(127).view(torch.float8_e4m3fn)
    return tensor.abs()


def test_error_of_a_product_is_that_of_three_bits():
    """What quantising both factors costs: about 2^-4 / sqrt(3) of each number, in sums that average it out."""
    a, b, offsets = factors([300, 0, 84], 0, 512, 256)
    exact = torch.cat([a[:300].double() @ b[0].double().T, a[300:].double() @ b[2].double().T])
    codes, scales = quantize_rows(a)
    w_codes, w_scales, _ = quantize_blocks(b)
    got = fp8_gemm(codes, scales, w_codes, w_scales, offsets, dtype=torch.float32)
    error = (got - exact).norm() / exact.norm()
    assert 0.02 < error < 0.05


def test_registration():
    rows, token = torch.randn(6, 20), torch.tensor([3, -1, 0, 5], dtype=torch.int32)
    weights, weight = torch.rand(4), torch.randn(2, 5, 20)
    ops, tests = torch.ops.dmoe, ("test_schema", "test_faketensor")
    torch.library.opcheck(ops.fp8_quantize_rows.default, (rows, None, None), test_utils=tests)
    torch.library.opcheck(ops.fp8_quantize_rows.default, (rows, token, weights), test_utils=tests)
    for with_transposed in (False, True):
        torch.library.opcheck(ops.fp8_quantize_blocks.default, (weight, with_transposed), test_utils=tests)
    codes, scales = quantize_rows(rows)
    w_codes, w_scales, _ = quantize_blocks(weight)
    arguments = (codes, scales, w_codes, w_scales, torch.tensor([0, 2, 5], dtype=torch.int32), True, torch.bfloat16)
    torch.library.opcheck(ops.fp8_gemm.default, arguments, test_utils=tests[1:])  # the other multiplies its arguments


def test_bad_input():
    rows, offsets = torch.randn(5, 4), torch.tensor([0, 2, 5], dtype=torch.int32)
    codes, scales = quantize_rows(rows)
    w_codes, w_scales, _ = quantize_blocks(torch.randn(2, 3, 4))
    for call, error, message in (
        (lambda: quantize_rows(rows.long()), TypeError, "fp8_quantize_rows: rows: expected float32, .*got torch.int64"),
        (lambda: quantize_rows(rows[0]), ValueError, r"fp8_quantize_rows: rows: expected shape \(R, K\), got \(4,\)"),
        (lambda: quantize_rows(rows, offsets.long()), TypeError, "row_to_token: expected int32, got torch.int64"),
        (
            lambda: quantize_rows(rows, None, torch.ones(4)),
            ValueError,
            "row_weights: expected one for each of 5 rows, got 4",
        ),
        (lambda: quantize_blocks(rows), ValueError, r"fp8_quantize_blocks: weight: expected shape \(E, N, K\)"),
        (
            lambda: fp8_gemm(rows, scales, w_codes, w_scales, offsets),
            TypeError,
            "fp8_gemm: a_codes: expected torch.float8_e4m3fn, got torch.float32",
        ),
        (
            lambda: fp8_gemm(codes, scales.double(), w_codes, w_scales, offsets),
            TypeError,
            "fp8_gemm: a_scales: expected torch.float32, got torch.float64",
        ),
        (
            lambda: fp8_gemm(codes, scales, w_codes, w_scales, offsets, dtype=torch.int8),
            TypeError,
            "fp8_gemm: dtype: expected float32, bfloat16 or float16, got torch.int8",
        ),
        (
            lambda: fp8_gemm(codes, scales[:4], w_codes, w_scales, offsets),
            ValueError,
            r"fp8_gemm: expected a_codes \(R, Kd\) and a_scales \(R,\), got \(5, 4\) and \(4,\)",
        ),
        (
            lambda: fp8_gemm(codes, scales, w_codes, w_scales, offsets, trans_b=False),
            ValueError,
            r"fp8_gemm: w_codes: expected \(E, Kd, N\) with E = 2 and Kd = 4, got \(2, 3, 4\)",
        ),
        (
            lambda: fp8_gemm(codes, scales, w_codes, w_scales[:1], offsets),
            ValueError,
            r"fp8_gemm: w_scales: expected \(2, 1, 1\), one for each block, got \(1, 1, 1\)",
        ),
        (
            lambda: fp8_gemm(codes, scales, w_codes, w_scales, torch.tensor([0, 4, 3], dtype=torch.int32)),
            RuntimeError,
            r"fp8_gemm: expert_offsets: expected a leading 0 and an ascending sequence up to 5 rows, got \[0, 4, 3\]",
        ),
    ):
        with pytest.raises(error, match=message):
            call()
