"""Every operation on CUDA against its plain-PyTorch meaning on the CPU: movement and counting to the last bit."""

from __future__ import annotations

import pytest
import quantized_cases
import torch
from gpu_helpers import DEVICE, assert_equal_bits, cuda_only, here, leaf_there, there
from helpers import assert_as_accurate
from hypothesis import given, settings
from hypothesis import strategies as st
from plan_cases import make_plan, plan_cases
from strategies import routings

import dmoe
from dmoe.ops import _library
from dmoe.ops.balanced_assignment import balanced_assignment
from dmoe.ops.cumsum import exclusive_cumsum, exclusive_cumsum_ref, inclusive_cumsum, inclusive_cumsum_ref
from dmoe.ops.fp8 import fp8_gemm, quantize_blocks, quantize_rows
from dmoe.ops.fp8_ref import fp8_gemm_ref, quantize_blocks_ref, quantize_rows_ref
from dmoe.ops.gate_weights import gate_weights, gate_weights_backward_ref, gate_weights_ref
from dmoe.ops.grouped_gemm import (
    grouped_gemm,
    grouped_gemm_ref,
    grouped_gemm_weight,
    grouped_gemm_weight_ref,
)
from dmoe.ops.grouped_gemm_sum import grouped_gemm_sum
from dmoe.ops.histogram import histogram, histogram_ref
from dmoe.ops.permute import permute, permute_ref, unpermute, unpermute_backward_ref, unpermute_ref
from dmoe.ops.quantized_gemm import quantized_gemm
from dmoe.ops.replicate import replicate, replicate_backward_ref, replicate_ref
from dmoe.ops.routing_plan import routing_plan, routing_plan_ref
from dmoe.ops.sort import sort, sort_ref
from dmoe.ops.topk_indices import topk_indices, topk_indices_ref
from dmoe.ops.topology import topology, topology_ref

pytestmark = pytest.mark.gpu

INTEGERS = [torch.int16, torch.int32, torch.int64]
FLOATS = [torch.float32, torch.bfloat16, torch.float16]
COMPILED = (
    "routing_plan", "sort", "histogram", "inclusive_cumsum", "exclusive_cumsum", "replicate", "replicate_backward",
    "topology", "permute", "unpermute", "unpermute_backward", "topk_indices", "grouped_gemm", "grouped_gemm_weight",
)  # fmt: skip
drawn = settings(max_examples=40)
# Around a warp, a block, several blocks, and enough for a scan over blocks.
LENGTHS = [0, 1, 31, 32, 33, 1023, 1025, 4097, 300_001]


@cuda_only
def test_the_compiled_library_serves_this_gpu():
    """The other tests here would compare a reference with itself."""
    assert _library.compiled, _library.missing_reason
    assert {
        name: _library.backends[name]["CUDA"] for name in COMPILED if _library.backends[name]["CUDA"] == "reference"
    } == {}
    major, _ = torch.cuda.get_device_capability()
    assert any(arch.startswith(f"sm_{major}") for arch in _library.cuda_archs()), _library.cuda_archs()


def integers(shape, dtype, low, high, seed=0):
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def small(shape, dtype, seed=0):
    """From -2 to 2: sums of up to 60 products are exact in every dtype."""
    return integers(shape, dtype, -2, 3, seed)


@drawn
@given(
    routing=routings(max_tokens=80, max_experts=17),
    choice_major=st.booleans(),
    layout=st.sampled_from(
        [(1, None, False), (4, None, False), (1, 3, False), (128, None, False), (1, 5, True), (8, 2, False)]
    ),
    ordered=st.booleans(),
    tile_rows=st.sampled_from([0, 1, 16, 128]),
)
def test_routing_plan(routing, choice_major, layout, ordered, tile_rows):
    indices, experts = routing
    block_size, capacity, binned = layout
    order = torch.randperm(indices.shape[0]) if ordered else None
    expected = routing_plan_ref(indices, experts, block_size, capacity, choice_major, order, binned, tile_rows)
    options = {"block_size": block_size, "capacity": capacity, "choice_major": choice_major, "binned": binned}
    got = routing_plan(there(indices), experts, token_order=there(order), tile_rows=tile_rows, **options)
    assert_equal_bits("routing_plan", got, expected)


@pytest.mark.parametrize("experts", [1, 2, 8, 127, 512, 1024])
@pytest.mark.parametrize("choice_major", [False, True])
def test_routing_plan_of_many_tokens(experts, choice_major):
    top_k = min(experts, 8)
    scores = torch.rand(20_011, experts, generator=torch.Generator().manual_seed(0))
    scores[:, 0] += 0.5  # a hot expert
    indices = scores.topk(top_k).indices
    indices[::7, 0] = experts  # some dropped
    for capacity, tile_rows in ((None, 128), (100, 16), (None, 0)):
        expected = routing_plan_ref(indices, experts, 1, capacity, choice_major, None, False, tile_rows)
        got = routing_plan(there(indices), experts, capacity=capacity, choice_major=choice_major, tile_rows=tile_rows)
        assert_equal_bits("routing_plan", got, expected)


@cuda_only
def test_routing_plan_counts_ids_out_of_range_as_dropped():
    indices = torch.tensor([[0, 5], [-1, 2], [3, 4], [9, 1]])
    masked = torch.where((indices < 0) | (indices > 3), 3, indices)
    expected = routing_plan_ref(masked, 3, 1, None, False, None, False, 0)
    assert_equal_bits("plan", routing_plan(there(indices), 3), expected)


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
@pytest.mark.parametrize("length", LENGTHS)
def test_sort(dtype, length):
    for bits in (1, 7, 9, 15):
        keys = integers((length,), dtype, 0, 2**bits, bits)
        assert_equal_bits(f"sort of {bits} bits", sort(there(keys), bits), sort_ref(keys, bits))


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
@pytest.mark.parametrize("length", LENGTHS)
def test_histogram(dtype, length):
    for bins in (1, 8, 512, 5000):
        values = integers((length,), dtype, 0, bins, bins)
        assert_equal_bits(f"{bins} bins", histogram(there(values), bins), histogram_ref(values, bins))
        hot = torch.full_like(values, bins - 1)
        assert_equal_bits(f"one of {bins} bins", histogram(there(hot), bins), histogram_ref(hot, bins))


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
@pytest.mark.parametrize("shape", [(n,) for n in LENGTHS] + [(3, 1025), (1025, 3), (0, 4), (300, 2049)], ids=str)
def test_cumsum(dtype, shape):
    x = integers(shape, dtype, -50, 100)
    for dim in range(len(shape)):
        for op, ref in ((inclusive_cumsum, inclusive_cumsum_ref), (exclusive_cumsum, exclusive_cumsum_ref)):
            assert_equal_bits(f"{op.__name__} along {dim}", op(there(x), dim), ref(x, dim))


@pytest.mark.parametrize("counts", [[0, 3, 0, 1], [1], [1000, 0, 3000, 7], [0, 0]], ids=str)
@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64, torch.int32, torch.int64], ids=str)
def test_replicate(counts, dtype):
    bins = torch.tensor(counts).cumsum(0).int()
    x = small((3, len(counts)), dtype)
    length = sum(counts) + 5
    assert_equal_bits("replicate", replicate(there(x), there(bins), length), replicate_ref(x, bins, length))
    if dtype.is_floating_point:
        leaf = leaf_there(x)
        grad = (small((3, length), dtype) != 0).to(dtype)  # counts up to 256 are exact in every dtype
        grad[:, 200:] = 0
        (got,) = torch.autograd.grad(replicate(leaf, there(bins), length), leaf, there(grad))
        assert_equal_bits("its gradient", got, replicate_backward_ref(grad, bins))


@pytest.mark.parametrize("blocks", [[0, 2, 1], [1], [3, 0, 0, 70], [0]], ids=str)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_topology(blocks, dtype):
    offsets = torch.tensor([0, *blocks]).cumsum(0).mul(128).to(dtype)
    for ffn_blocks, spare in ((1, 0), (3, 2), (40, 1)):
        arguments = 128, ffn_blocks, sum(blocks) + spare
        assert_equal_bits("topology", topology(there(offsets), *arguments), topology_ref(offsets, *arguments))


@drawn
@given(case=plan_cases(), hidden=st.sampled_from([1, 3, 8, 33, 264]), dtype=st.sampled_from([*FLOATS, torch.float64]))
def test_permute_and_its_gradient(case, hidden, dtype):
    x = small((case.tokens, hidden), dtype, 1)
    plan = case.row_to_token, case.token_offsets, case.token_rows
    leaf = leaf_there(x)
    rows = permute(leaf, *there(plan))
    assert_equal_bits("permute", rows, permute_ref(x, *plan))
    grad = small((case.rows, hidden), dtype, 2)
    (got,) = torch.autograd.grad(rows, leaf, there(grad))
    expected = unpermute_ref(grad, None, case.row_to_token, None, case.token_offsets, case.token_rows)
    assert_equal_bits("its gradient", got, expected)


@drawn
@given(
    case=plan_cases(),
    hidden=st.sampled_from([1, 3, 8, 33, 264]),
    dtype=st.sampled_from([*FLOATS, torch.float64]),
    weighted=st.booleans(),
)
def test_unpermute_and_its_gradients(case, hidden, dtype, weighted):
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    rows = small((case.rows, hidden), dtype, 1)
    plan = case.row_to_token, case.row_to_slot, case.token_offsets, case.token_rows
    weights = small((len(case.token_rows),), wide, 2) if weighted else None
    leaf, gates = leaf_there(rows), None if weights is None else leaf_there(weights)
    y = unpermute(leaf, gates, *there(plan))
    assert_equal_bits("unpermute", y, unpermute_ref(rows, weights, *plan))
    grad = small((case.tokens, hidden), dtype, 3)
    if weighted:
        got = torch.autograd.grad(y, (leaf, gates), there(grad))
        assert_equal_bits("its gradients", got, unpermute_backward_ref(grad, rows, weights, *plan))
    else:
        (got,) = torch.autograd.grad(y, leaf, there(grad))
        assert_equal_bits("its gradient", got, permute_ref(grad, plan[0], *plan[2:]))


def test_movement_of_unaligned_rows():
    """Views that begin in the middle of 16 bytes, and wide strides."""
    plan = make_plan([[0, 1], [1, 2], [2, 0], [1, 1]], 3, tail=2)
    x = small((4, 41), torch.bfloat16)[:, 3:36]
    arguments = plan.row_to_token, plan.token_offsets, plan.token_rows
    wide = small((4, 41), torch.bfloat16).to(DEVICE)[:, 3:36]
    rows = permute(wide, *there(arguments))
    assert_equal_bits("permute", rows, permute_ref(x, *arguments))
    whole = (plan.row_to_token, plan.row_to_slot, plan.token_offsets, plan.token_rows)
    base = small((plan.rows, 35), torch.bfloat16)
    got = unpermute(base.to(DEVICE)[:, 1:34], None, *there(whole))
    assert_equal_bits("unpermute", got, unpermute_ref(base[:, 1:34], None, *whole))


@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64], ids=str)
@pytest.mark.parametrize(("experts", "k"), [(1, 1), (3, 3), (8, 2), (33, 8), (128, 8), (512, 16), (1000, 3)])
def test_topk_indices(dtype, experts, k):
    scores = integers((700, experts), torch.int64, 0, 7).to(dtype)  # full of ties
    scores[3, 0], scores[5] = float("nan"), float("nan")
    scores[6, experts // 2], scores[7, 0] = float("-inf"), float("inf")
    scores[8, ::2] = -0.0
    assert_equal_bits("topk_indices", topk_indices(there(scores), k), topk_indices_ref(scores, k))


def test_balanced_assignment_is_the_hosts():
    scores = integers((600, 12), torch.int64, -7, 7).float()
    got = balanced_assignment(there(scores))
    assert got.device == there(scores).device
    assert_equal_bits("balanced_assignment", got, balanced_assignment(scores))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("counts", [[0, 3, 0, 70], [1], [130, 0, 1, 64, 65], [0, 0, 0]], ids=str)
@pytest.mark.parametrize(("inner", "columns"), [(16, 32), (33, 17), (1, 5), (40, 136)])
def test_grouped_gemm(dtype, counts, inner, columns):
    """Exact on small integers, NaN in the rows that belong to nobody, every orientation of the weights."""
    offsets = torch.tensor([0, *counts]).cumsum(0).int()
    used, rows = sum(counts), sum(counts) + 7
    a, grad = small((rows, inner), dtype, 1), small((rows, columns), dtype, 2)
    a[used:], grad[used:] = float("nan"), float("nan")
    for trans_b in (True, False):
        b = small((len(counts), columns, inner) if trans_b else (len(counts), inner, columns), dtype, 3)
        got = grouped_gemm(there(a), there(b), there(offsets), trans_b=trans_b)
        assert_equal_bits("grouped_gemm", got, grouped_gemm_ref(a, b, offsets, trans_b))
        turned = there(b).transpose(1, 2).contiguous().transpose(1, 2)
        got = grouped_gemm(there(a), turned, there(offsets), trans_b=trans_b)
        assert_equal_bits("grouped_gemm of a transposed view", got, grouped_gemm_ref(a, b, offsets, trans_b))
    sparse = a * (torch.arange(rows) % 4 == 0)[:, None]  # sums of at most 60 products
    sparse[used:] = float("nan")
    got = grouped_gemm_weight(there(sparse), there(grad), there(offsets))
    assert_equal_bits("grouped_gemm_weight", got, grouped_gemm_weight_ref(sparse, grad, offsets, len(counts)))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("counts", [[0, 3, 0, 70], [130, 0, 1, 64, 65]], ids=str)
@pytest.mark.parametrize(("inner", "rank", "columns"), [(32, 16, 136), (33, 5, 17), (16, 40, 40)])
def test_grouped_gemm_sum(dtype, counts, inner, rank, columns):
    """Exact on small integers: a product and a thin one in one kernel."""
    offsets, rows = torch.tensor([0, *counts]).cumsum(0).int(), sum(counts) + 7
    a, a2 = (small((rows, width), dtype, width) for width in (inner, rank))
    a[sum(counts) :], a2[sum(counts) :] = float("nan"), float("nan")
    for trans_b in (True, False):
        b, b2 = (
            small((len(counts), *((columns, width) if trans_b else (width, columns))), dtype, width + 1)
            for width in (inner, rank)
        )
        got = grouped_gemm_sum(*there([a, b, a2, b2]), there(offsets), trans_b)
        expected = grouped_gemm_ref(a, b, offsets, trans_b) + grouped_gemm_ref(a2, b2, offsets, trans_b)
        assert_equal_bits("grouped_gemm_sum", got, expected)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("format", quantized_cases.BLOCKS)
def test_quantized_gemm(format, dtype):
    """A unit matrix picks out the decoded weights, every bit of them, whichever way round."""
    rows, columns = 136, 384
    for block in quantized_cases.BLOCKS[format]:
        block = block[0], block[1] or columns
        for zero_points in (False, True)[: 2 if format == "int4" else 1]:
            weight = quantized_cases.random_weights(format, block, 2, rows, columns, seed=1, zero_points=zero_points)
            values = quantized_cases.decoded(*weight, format, block, dtype)
            for trans_b in (True, False):
                count = columns if trans_b else rows
                unit, offsets = torch.eye(count, dtype=dtype).repeat(2, 1), torch.tensor([0, count, 2 * count]).int()
                got = quantized_gemm(*there([unit, *weight]), format, list(block), there(offsets), trans_b)
                assert_equal_bits(format, got, (values.mT if trans_b else values).flatten(0, 1))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_fp8(dtype):
    """Codes and scales to the bit; products to float32's rounding and one of the result."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(300, 272, generator=generator) * torch.rand(300, 1, generator=generator).mul(6).exp()
    rows[5], rows[6, 3], rows[7, 3] = 0, float("nan"), float("inf")
    token = torch.randint(-1, 300, (400,), generator=generator).int()
    weights, weight = torch.rand(400, generator=generator), torch.randn(3, 200, 272, generator=generator)

    def bits(tensors):
        return [each.view(torch.uint8) if each.dtype == torch.float8_e4m3fn else each for each in tensors]

    for arguments in ((rows.to(dtype), None, None), (rows.to(dtype), token, weights)):
        got = quantize_rows(*there(list(arguments)))
        assert_equal_bits("quantize_rows", here(list(got))[1], quantize_rows_ref(*arguments)[1])
        real = quantize_rows_ref(*arguments)[1].isfinite()
        assert_equal_bits("codes", bits(here(list(got)))[0][real], bits(quantize_rows_ref(*arguments))[0][real])
    blocks = quantize_blocks_ref(weight.to(dtype), True)
    got = quantize_blocks(there(weight.to(dtype)), with_transposed=True)
    assert_equal_bits("quantize_blocks", bits(here(list(got))), bits(blocks))
    codes, scales = quantize_rows_ref(rows[8:])
    offsets = torch.tensor([0, 150, 150, 280]).int()
    exact = fp8_gemm_ref(codes, scales, blocks[0], blocks[1], offsets, True, torch.float32).double()
    for trans_b in (True, False):
        factor = (blocks[0], blocks[1]) if trans_b else (blocks[2], blocks[1].mT)
        got = fp8_gemm(*there([codes, scales, *factor, offsets]), trans_b=trans_b, dtype=dtype)
        error = (here(got).double() - exact).norm() / exact.norm()
        assert error < 2 * torch.finfo(dtype).eps + 1e-3  # fp8 units add up 128 products in fewer bits than float32
        assert not here(got)[280:].any()


@pytest.mark.parametrize("p", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("after_drop", [False, True])
def test_gate_weights(p, after_drop):
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(200, 9, generator=generator)
    indices = torch.rand(200, 9, generator=generator).argsort(1)[:, :3]
    indices[::5, 1] = 9
    rows = torch.where(torch.rand(200, 3, generator=generator) < 0.2, -1, 0).int()
    leaf = leaf_there(scores)
    got = gate_weights(leaf, there(indices), there(rows), normalization=p or None, after_drop=after_drop, scale=1.5)
    grad = torch.randn(200, 3, generator=generator)
    (got_grad,) = torch.autograd.grad(got, leaf, there(grad))
    arguments = indices, rows, p, after_drop, 1.5
    exact, own = (gate_weights_ref(s, *arguments) for s in (scores.double(), scores))
    assert_as_accurate("gate_weights", here(got), exact, [(own, exact)])
    exact = gate_weights_backward_ref(grad.double(), scores.double(), *arguments)
    own = gate_weights_backward_ref(grad, scores, *arguments)
    assert_as_accurate("gradient", here(got_grad), exact, [(own, exact)])


def test_plans_of_all_kinds_on_the_device():
    """What lies between the operations: the plan's own arithmetic, with every drop order, and experts that choose."""
    generator = torch.Generator().manual_seed(0)
    indices = torch.rand(50, 6, generator=generator).argsort(1)[:, :3]
    priority = torch.rand(50, 3, generator=generator)
    fields = ("row_to_token", "row_to_slot", "expert_offsets", "token_offsets", "token_rows", "tokens_per_expert")
    for order in ("token_major", "choice_major", "batch_prioritized", "gate_weight"):
        options = {"capacity": 11, "drop_order": order}
        expected = dmoe.plan_token_choice(indices, 6, priority=priority, **options)
        got = dmoe.plan_token_choice(there(indices), 6, priority=there(priority), **options)
        for field in (*fields, "kept_per_expert", "token_to_rows"):
            assert_equal_bits(f"{order}: {field}", getattr(got, field), getattr(expected, field))
    chosen = torch.stack([torch.randperm(50, generator=generator)[:9] for _ in range(6)])
    chosen[2, 3:] = -1
    expected, got = dmoe.plan_expert_choice(chosen, 50), dmoe.plan_expert_choice(there(chosen), 50)
    for field in fields:
        assert_equal_bits(f"expert choice: {field}", getattr(got, field), getattr(expected, field))
