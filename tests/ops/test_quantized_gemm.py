"""quantized_gemm against sums in float64 over values that the codes' bits say."""

from __future__ import annotations

import numpy as np
import pytest
import quantized_cases as cases
import torch
from big_allocations import BigAllocations, Peak, peaks_can_be_read
from helpers import where_kernels_run
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

import dmoe.ops._library as library
from dmoe.ops.quantized_gemm import quantized_gemm, quantized_gemm_ref

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
CHECKS = {"test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"}
compiled = pytest.mark.skipif(not library.compiled, reason="promised of the compiled library; csrc/ is not built")
OPS = pytest.mark.parametrize("op", [quantized_gemm, quantized_gemm_ref], ids=["op", "ref"])


def random(*shape, dtype, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def offsets_of(counts):
    return torch.tensor([0, *np.cumsum(counts)], dtype=torch.int32)


def oracle(a, values, counts, trans_b, a2=None, b2=None):
    """In float64, expert by expert; and the sums of magnitudes, for what may be lost."""
    exact = torch.zeros(a.shape[0], values.shape[1 if trans_b else 2], dtype=torch.float64)
    sizes = exact.clone()
    begin = 0
    for expert, count in enumerate(counts):
        rows = slice(begin, begin + count)
        for left, right in ((a, values), (a2, b2)):
            if left is None:
                continue
            matrix = right[expert].double()
            matrix = matrix.T if trans_b else matrix
            exact[rows] += left[rows].double() @ matrix
            sizes[rows] += left[rows].double().abs() @ matrix.abs()
        begin += count
    return exact, sizes


def assert_near(got, exact, sizes, roundings):
    """Sums in float32 or wider, rounded as often as products are added up."""
    wide = torch.float64 if got.dtype == torch.float64 else torch.float32
    own = torch.finfo(got.dtype)
    bound = own.eps * (0.51 * exact.abs() + 0.6 * (roundings - 1) * sizes + roundings * own.smallest_normal)
    assert ((got.double() - exact).abs() <= bound + 20 * torch.finfo(wide).eps * sizes).all()


@st.composite
def calls(draw):
    counts = draw(st.lists(st.sampled_from([0, 0, 1, 2, 5, 17, 40, 70]), min_size=1, max_size=4))
    return {
        "counts": counts,
        "rows": sum(counts) + draw(st.sampled_from([0, 1, 20])),
        "weights": draw(cases.weights()),
        "trans_b": draw(st.booleans()),
        "dtype": draw(st.sampled_from(DTYPES)),
        "rank": draw(st.sampled_from([0, 0, 1, 3, 16])),
        "seed": draw(st.integers(0, 99)),
    }


def arguments_of(call):
    counts, drawn, dtype, seed = call["counts"], call["weights"], call["dtype"], call["seed"]
    codes, scales, zeros = cases.build_weights(drawn, len(counts), seed)
    inner, columns = (drawn["columns"], drawn["rows"])[:: 1 if call["trans_b"] else -1]
    a = random(call["rows"], inner, dtype=dtype, seed=seed)
    a[sum(counts) :] = float("nan")  # never read
    a2 = b2 = None
    if rank := call["rank"]:
        a2 = random(call["rows"], rank, dtype=dtype, seed=seed + 1)
        a2[sum(counts) :] = float("nan")
        shape = (columns, rank) if call["trans_b"] else (rank, columns)
        b2 = random(len(counts), *shape, dtype=dtype, seed=seed + 2)
    about = drawn["format"], list(drawn["block"]), offsets_of(counts), call["trans_b"]
    return a, codes, scales, zeros, *about, a2, b2


@OPS
@given(call=calls())
@settings(max_examples=120)
def test_products_of_decoded_values(op, call):
    a, codes, scales, zeros, format, block, _, trans_b, a2, b2 = arguments = arguments_of(call)
    got = where_kernels_run(op)(*arguments)
    values = cases.decoded(codes, scales, zeros, format, block, call["dtype"])
    used = sum(call["counts"])
    exact, sizes = oracle(a[:used], values, call["counts"], trans_b, None if a2 is None else a2[:used], b2)
    assert got.dtype == call["dtype"]
    assert got.shape == (call["rows"], exact.shape[1])
    assert not got[used:].any()
    assert_near(got[:used], exact, sizes, 1 if a2 is None else 2)


@pytest.mark.parametrize("format", cases.BLOCKS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("trans_b", [True, False])
def test_every_code_is_decoded_as_its_bits_say(format, dtype, trans_b):
    """Products with one row of the unit matrix each are the decoded values, every bit of them."""
    for block in cases.BLOCKS[format]:
        rows, columns = 200, 384
        block = block[0], block[1] or columns
        for zero_points in (False, True)[: 2 if format == "int4" else 1]:
            codes, scales, zeros = cases.random_weights(
                format, block, 2, rows, columns, seed=1, zero_points=zero_points
            )
            values = cases.decoded(codes, scales, zeros, format, block, dtype)
            count = columns if trans_b else rows
            unit = torch.eye(count, dtype=dtype).repeat(2, 1)
            got = quantized_gemm(unit, codes, scales, zeros, format, list(block), offsets_of([count] * 2), trans_b)
            assert torch.equal(got, (values.mT if trans_b else values).flatten(0, 1))


@pytest.mark.parametrize("counts", [[0, 1700, 3], [1100], [1], [0, 0], [513, 129]])
@pytest.mark.parametrize("trans_b", [True, False])
def test_hot_experts_and_many_blocks(counts, trans_b):
    """Several tasks of an expert, and several blocks of rows in a task."""
    codes, scales, _ = cases.random_weights("nf4", (1, 64), len(counts), 300, 192, seed=1)
    values = cases.decoded(codes, scales, None, "nf4", (1, 64), torch.float32)
    a = random(sum(counts), 192 if trans_b else 300, dtype=torch.float32, seed=2)
    a2 = random(sum(counts), 4, dtype=torch.float32, seed=3)
    b2 = random(len(counts), *((300, 4) if trans_b else (4, 192)), dtype=torch.float32, seed=4)
    for dtype in (torch.float32, torch.bfloat16):
        a, a2, b2 = a.to(dtype), a2.to(dtype), b2.to(dtype)
        got = quantized_gemm(a, codes, scales, None, "nf4", [1, 64], offsets_of(counts), trans_b, a2, b2)
        assert_near(got, *oracle(a, values.to(dtype), counts, trans_b, a2, b2), 2)


@pytest.mark.parametrize("format", cases.BLOCKS)
def test_strided_arguments(format):
    block = cases.BLOCKS[format][0]
    block = block[0], block[1] or 128
    codes, scales, _ = cases.random_weights(format, block, 2, 130, 128, seed=1)
    a, a2 = random(9, 128, dtype=torch.float32, seed=1), random(9, 3, dtype=torch.float32, seed=2)
    b2 = random(2, 130, 3, dtype=torch.float32, seed=3)
    rest = format, list(block), offsets_of([4, 5]), True
    expected = quantized_gemm(a, codes, scales, None, *rest, a2, b2)
    strided = [tensor.mT.contiguous().mT for tensor in (a, codes.view(torch.uint8), scales, a2, b2)]
    got = quantized_gemm(strided[0], strided[1].view(codes.dtype), strided[2], None, *rest, *strided[3:])
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-4)


@OPS
@pytest.mark.parametrize("trans_b", [True, False])
def test_no_tensor_is_as_large_as_a_decoded_weight(op, trans_b):
    experts, rows, columns = 2, 2048, 1024
    codes, scales, _ = cases.random_weights("int4", (1, 128), experts, rows, columns, seed=1)
    a = random(6, columns if trans_b else rows, dtype=torch.bfloat16)
    arguments = a, codes, scales, None, "int4", [1, 128], offsets_of([3, 3]), trans_b
    with BigAllocations(rows * columns * 2, codes, scales, a) as seen:  # of one expert
        op(*arguments)
    assert not seen.found


@compiled
@pytest.mark.skipif(not peaks_can_be_read(), reason="needs Linux' own count of a process's memory")
def test_memory_of_a_product_is_that_of_blocks():
    experts, rows, columns = 4, 4096, 2048
    codes, scales, _ = cases.random_weights("nf4", (1, 64), experts, rows, columns, seed=1)
    a = random(8, columns, dtype=torch.float32)
    arguments = codes, scales, None, "nf4", [1, 64], offsets_of([2] * experts)
    quantized_gemm(a, *arguments, True)  # threads, and libraries' own
    with Peak() as peak:
        quantized_gemm(a, *arguments, True)
        quantized_gemm(random(8, rows, dtype=torch.float32), *arguments, False)
    assert peak.bytes < rows * columns * 4 / 2  # half of one expert, of which there are four


def test_registration():
    for counts, rank in (([2, 0, 3], 0), ([1, 2], 4), ([0, 0], 0)):
        for format in cases.BLOCKS:
            for trans_b in (True, False):
                drawn = {"format": format, "block": cases.BLOCKS[format][0], "rows": 5, "columns": 64}
                drawn["block"] = drawn["block"][0], drawn["block"][1] or 64
                drawn |= {"scales_dtype": torch.float32, "zero_points": format == "int4"}
                call = {"counts": counts, "rows": sum(counts) + 1, "weights": drawn, "trans_b": trans_b}
                arguments = arguments_of(call | {"dtype": torch.float32, "rank": rank, "seed": 0})
                arguments = torch.nan_to_num(arguments[0]), *arguments[1:]
                # The check of the schema compares inputs by arithmetic that PyTorch does not have in fp8.
                skipped = {"test_schema"} if format == "fp8" else set()
                torch.library.opcheck(quantized_gemm, arguments, test_utils=sorted(CHECKS - skipped))


def test_not_differentiable_by_itself():
    codes, scales, _ = cases.random_weights("nf4", (1, 64), 1, 4, 64)
    a = random(3, 64, dtype=torch.float32).requires_grad_()
    out = quantized_gemm(a, codes, scales, None, "nf4", [1, 64], offsets_of([3]), True)
    with pytest.raises(RuntimeError, match="double backward is not supported"):
        out.sum().backward()


def test_products_are_counted():
    codes, scales, _ = cases.random_weights("nf4", (1, 64), 2, 10, 64)
    a, a2, b2 = (random(*shape, dtype=torch.float32) for shape in ((7, 64), (7, 3), (2, 10, 3)))
    rest = codes, scales, None, "nf4", [1, 64], offsets_of([2, 3]), True
    for addend, expected in (((), 2 * 5 * 10 * 64), ((a2, b2), 2 * 5 * 10 * 67)):
        with FlopCounterMode(display=False) as counter:
            library.count_flops()
            quantized_gemm(a, *rest, *addend)
        assert counter.get_total_flops() == expected


@compiled
def test_bad_input():
    codes, scales, _ = cases.random_weights("int4", (1, 32), 2, 6, 64)
    a, offsets = random(5, 64, dtype=torch.float32), offsets_of([2, 3])
    run = lambda a=a, codes=codes, scales=scales, zeros=None, format="int4", block=(1, 32), trans_b=True, **more: (  # noqa: E731
        quantized_gemm(a, codes, scales, zeros, format, list(block), offsets, trans_b, **more)
    )
    run()
    for changed, message in (
        ({"format": "int3"}, "format: expected int8, fp8, int4, nf4 or mxfp4, got int3"),
        ({"a": a.long()}, "a: expected float32, float64, bfloat16 or float16, got Long"),
        ({"a": a[:, :32]}, r"a: expected 64 columns for matrices of 6 by 64, transposed, got shape \(5, 32\)"),
        ({"trans_b": False}, r"a: expected 6 columns for matrices of 6 by 64, got shape \(5, 64\)"),
        ({"codes": codes.view(torch.int8)}, "codes: expected dtype Byte, got Char"),
        ({"codes": codes[0]}, r"codes: expected 3 dimensions, got shape \(6, 32\)"),
        ({"scales": scales.double()}, "scales: expected float32, bfloat16 or float16, got Double"),
        ({"scales": scales[:, :5]}, r"scales: expected shape \(2, 6, 2\), one for each block of \(1, 32\)"),
        ({"zeros": scales[:1]}, r"zeros: expected shape \(2, 6, 2\)"),
        ({"zeros": scales, "format": "nf4"}, "zeros: expected None, as int4 alone has them, with nf4"),
        ({"format": "mxfp4"}, "scales: expected uint8, got Float"),
        ({"block": (1, 48)}, r"block: expected \(1, a multiple of 32 that divides K = 64\) in 4 bits, got \(1, 48\)"),
        ({"block": (32,)}, r"block: expected \(rows, columns\)"),
        ({"a2": a}, "expected a2 and b2, or neither"),
        ({"a2": a[:, :2], "b2": torch.zeros(2, 5, 2)}, "expected a2 and b2 of 5 rows, 2 experts and 6 columns"),
    ):
        with pytest.raises(RuntimeError, match=f"quantized_gemm: {message}"):
            run(**changed)
    with pytest.raises(RuntimeError, match="expected an ascending sequence up to 4 rows"):
        run(a=a[:4])
