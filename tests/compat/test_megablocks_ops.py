"""MegaBlocks' operations on dmoe: every one against loops over Python numbers, gradients too."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import routings

from dmoe.compat import grouped_gemm
from dmoe.compat.megablocks import grouped_gemm_util, ops

INTEGERS = [torch.int16, torch.int32, torch.int64]
FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


class Case:
    """One routing as MegaBlocks writes it, made of lists: tokens, E, K, and its index tensors."""

    def __init__(self, routing, block, dtype=torch.int32):
        self.T, self.K = routing.expert_indices.shape
        self.E, self.block = routing.num_experts, block
        experts = routing.expert_indices.flatten().tolist()
        self.order = sorted(range(len(experts)), key=lambda a: experts[a])
        self.ids = [experts[a] for a in self.order]
        self.counts = [experts.count(e) for e in range(self.E)]
        self.padded = [-(-count // block) * block for count in self.counts]
        self.starts = [sum(self.padded[:e]) for e in range(self.E)]
        self.indices = torch.tensor(self.order, dtype=dtype)
        self.bin_ids = torch.tensor(self.ids, dtype=dtype)
        self.bins = torch.tensor([sum(self.counts[: e + 1]) for e in range(self.E)], dtype=dtype)
        self.padded_bins = torch.tensor([sum(self.padded[: e + 1]) for e in range(self.E)], dtype=dtype)

    def packed_rows(self):
        """Row of each sorted position."""
        return list(range(len(self.order)))

    def padded_rows(self):
        return [self.starts[e] + rank for e in range(self.E) for rank in range(self.counts[e])]

    def binned_rows(self, size):
        return [e * size + rank if rank < size else None for e in range(self.E) for rank in range(self.counts[e])]


@st.composite
def cases(draw):
    return Case(
        draw(routings(max_tokens=12, max_experts=6, dropped=False)),
        draw(st.sampled_from([1, 2, 5, 128])),
        draw(st.sampled_from(INTEGERS)),
    )


def numbers(*shape, low=-4, high=5, dtype=torch.float32, strided=False):
    """Small integers, so that every sum below is exact in every dtype; on request behind odd strides."""
    if strided:
        wide = torch.randint(low, high, (*shape[:-1], 2 * shape[-1] + 1)).to(dtype)
        return wide[..., 1::2]
    return torch.randint(low, high, shape).to(dtype)


LAYOUTS = ("packed", "padded", "binned")


def run_gather(layout, case, x, size):
    if layout == "packed":
        return ops.gather(x, case.indices, case.bin_ids, case.bins, case.K), case.packed_rows()
    if layout == "padded":
        y = ops.padded_gather(x, case.indices, case.bin_ids, case.bins, case.padded_bins, case.K)
        return y, case.padded_rows()
    return ops.binned_gather(x, case.indices, case.bins, size, case.K), case.binned_rows(size)


def run_scatter(layout, case, rows, weights, size):
    if layout == "packed":
        return ops.scatter(rows, case.indices, case.bin_ids, weights, case.bins, case.K), case.packed_rows()
    if layout == "padded":
        y = ops.padded_scatter(rows, case.indices, case.bin_ids, weights, case.bins, case.padded_bins, case.K)
        return y, case.padded_rows()
    return ops.binned_scatter(rows, case.indices, weights, case.bins, case.K), case.binned_rows(size)


def shape_of(layout, case, size, hidden):
    if layout == "packed":
        return (case.T * case.K, hidden)
    return (sum(case.padded), hidden) if layout == "padded" else (case.E, size, hidden)


@given(
    cases(), st.sampled_from(LAYOUTS), st.sampled_from([0, 1, 3]), st.sampled_from([1, 7]), st.sampled_from(FLOATS),
    st.booleans(),
)  # fmt: skip
def test_gathers_copy_and_their_gradients_sum(case, layout, size, hidden, dtype, strided):
    x = numbers(case.T, hidden, dtype=dtype, strided=strided).requires_grad_()
    y, rows = run_gather(layout, case, x, size)
    assert y.dtype == dtype
    assert tuple(y.shape) == shape_of(layout, case, size, hidden)
    expected = torch.zeros_like(y).view(-1, hidden)
    upstream = numbers(*y.shape, low=-2, high=3, dtype=dtype, strided=strided)
    grad = torch.zeros(case.T, hidden, dtype=dtype)
    for position, row in enumerate(rows):
        if row is not None:
            token = case.order[position] // case.K
            expected[row] = x.detach()[token]
            grad[token] += upstream.reshape(-1, hidden)[row]
    assert torch.equal(y.detach().view(-1, hidden), expected)
    y.backward(upstream)
    assert torch.equal(x.grad, grad)


@given(
    cases(), st.sampled_from(LAYOUTS), st.sampled_from([0, 1, 3]), st.sampled_from([1, 7]), st.sampled_from(FLOATS),
    st.booleans(), st.booleans(),
)  # fmt: skip
def test_scatters_sum_weighted_rows_and_so_do_their_gradients(case, layout, size, hidden, dtype, strided, weighted):
    rows = numbers(*shape_of(layout, case, size, hidden), dtype=dtype, strided=strided).requires_grad_()
    weights = numbers(case.T * case.K, low=0, high=4, dtype=dtype).requires_grad_() if weighted else None
    y, places = run_scatter(layout, case, rows, weights, size)
    assert y.dtype == dtype
    flat = rows.detach().reshape(-1, hidden).double()
    upstream = numbers(case.T, hidden, low=-2, high=3, dtype=dtype, strided=strided)
    expected = torch.zeros(case.T, hidden, dtype=torch.float64)
    grad_rows, grad_weights = torch.zeros_like(flat), torch.zeros(case.T * case.K, dtype=torch.float64)
    for position, row in enumerate(places):
        if row is None:
            continue
        assignment = case.order[position]
        weight = weights[assignment].item() if weighted else 1.0
        expected[assignment // case.K] += weight * flat[row]
        grad_rows[row] = weight * upstream[assignment // case.K].double()
        grad_weights[assignment] = (upstream[assignment // case.K].double() * flat[row]).sum()
    assert torch.equal(y.detach().double(), expected)
    y.backward(upstream)
    assert torch.equal(rows.grad.reshape(-1, hidden).double(), grad_rows)
    if weighted:
        assert weights.grad.dtype == dtype
        assert torch.equal(weights.grad.double(), grad_weights)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gathers_and_scatters_pass_gradcheck(layout):
    torch.manual_seed(0)
    experts = torch.tensor([[0, 2], [2, 1], [2, 0], [2, 3], [0, 3]])
    case = Case(type("Routing", (), {"expert_indices": experts, "num_experts": 4})(), 4)
    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: run_gather(layout, case, x, 2)[0], (x,))
    rows = torch.randn(*shape_of(layout, case, 2, 3), dtype=torch.float64, requires_grad=True)
    weights = torch.rand(10, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda r, w: run_scatter(layout, case, r, w, 2)[0], (rows, weights))


def test_a_scatter_rounds_once():
    # 1 + 2**-8 in bfloat16 is a tie that rounds to 1, twice if it were rounded after each term
    case = Case(type("Routing", (), {"expert_indices": torch.tensor([[0, 1, 2]]), "num_experts": 3})(), 1)
    rows = torch.tensor([[1.0], [2**-8], [2**-8]], dtype=torch.bfloat16)
    y = ops.scatter(rows, case.indices, case.bin_ids, torch.ones(3), case.bins, 3)
    assert y.item() == 1 + 2**-7


def test_a_padded_gather_of_given_size_has_a_tail_of_zeros():
    case = Case(type("Routing", (), {"expert_indices": torch.tensor([[1], [0], [1]]), "num_experts": 2})(), 2)
    x = numbers(3, 4, low=1)
    args = (x, case.indices, case.bin_ids, case.bins, case.padded_bins, 1)
    exact, longer = ops.padded_gather(*args), ops.padded_gather(*args, output_rows=9)
    assert exact.shape == (4, 4)
    assert torch.equal(longer[:4], exact)
    assert not longer[4:].any()
    y = ops.padded_scatter(longer, case.indices, case.bin_ids, None, case.bins, case.padded_bins, 1)
    assert torch.equal(y, x)
    with pytest.raises(ValueError, match=r"padded_gather: expected at least 4 rows for these bins, got 3"):
        ops.padded_gather(*args, output_rows=3)


def test_only_a_padded_gather_without_a_size_reads_the_device():
    meta = torch.device("meta")
    indices, bin_ids = torch.zeros(6, dtype=torch.int32, device=meta), torch.zeros(6, dtype=torch.int32, device=meta)
    bins, x = torch.zeros(4, dtype=torch.int32, device=meta), torch.zeros(3, 5, device=meta)
    weights = torch.zeros(6, device=meta)
    assert ops.gather(x, indices, bin_ids, bins, 2).shape == (6, 5)
    assert ops.scatter(ops.gather(x, indices, bin_ids, bins, 2), indices, bin_ids, weights, bins, 2).shape == (3, 5)
    assert ops.binned_gather(x, indices, bins, 7, 2).shape == (4, 7, 5)
    assert ops.binned_scatter(torch.zeros(4, 7, 5, device=meta), indices, weights, bins, 2).shape == (3, 5)
    padded = ops.padded_gather(x, indices, bin_ids, bins, bins, 2, output_rows=16)
    assert padded.shape == (16, 5)
    assert ops.padded_scatter(padded, indices, bin_ids, weights, bins, bins, 2).shape == (3, 5)
    with pytest.raises((NotImplementedError, RuntimeError), match=r"[Mm]eta"):
        ops.padded_gather(x, indices, bin_ids, bins, bins, 2)


def test_data_move_in_autocasts_dtype():
    case = Case(type("Routing", (), {"expert_indices": torch.tensor([[1], [0]]), "num_experts": 2})(), 2)
    x, weights = torch.randn(2, 4), torch.rand(2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rows = ops.gather(x, case.indices, case.bin_ids, case.bins, 1)
        assert rows.dtype == torch.bfloat16
        assert ops.scatter(rows, case.indices, case.bin_ids, weights, case.bins, 1).dtype == torch.bfloat16
        assert ops.binned_gather(x, case.indices, case.bins, 1, 1).dtype == torch.bfloat16
        assert ops.gather(x.double(), case.indices, case.bin_ids, case.bins, 1).dtype == torch.float64
    assert torch.equal(rows, x.bfloat16()[case.indices.long()])


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda c, x, r, w: ops.gather(x, c.indices[1:], c.bin_ids, c.bins, 1), ValueError, "bin_ids: expected shape"),
        (lambda c, x, r, w: ops.gather(x[1:], c.indices, c.bin_ids, c.bins, 1), ValueError, "2 tokens . top_k 1"),
        (lambda c, x, r, w: ops.gather(x[0], c.indices, c.bin_ids, c.bins, 1), ValueError, "x: expected shape"),
        (lambda c, x, r, w: ops.gather(x, c.indices.float(), c.bin_ids, c.bins, 1), TypeError, "indices: expected int"),
        (lambda c, x, r, w: ops.gather(x, c.indices, c.bin_ids, c.bins[None], 1), ValueError, "bins: expected one dim"),
        (lambda c, x, r, w: ops.gather(x, c.indices, c.bin_ids, c.bins, 0), ValueError, "top_k: expected at least 1"),
        (lambda c, x, r, w: ops.gather(x, c.indices, c.bin_ids, c.bins[:0], 1), ValueError, "bins: expected at least"),
        (lambda c, x, r, w: ops.scatter(r, c.indices, c.bin_ids, w, c.bins, 2), ValueError, "multiple of top_k = 2"),
        (
            lambda c, x, r, w: ops.scatter(r, c.indices, c.bin_ids, w[1:], c.bins, 1),
            ValueError,
            "weights: expected one",
        ),
        (lambda c, x, r, w: ops.scatter(r[1:], c.indices, c.bin_ids, w, c.bins, 1), ValueError, "expected 3 rows, got"),
        (
            lambda c, x, r, w: ops.scatter(r[0], c.indices, c.bin_ids, w, c.bins, 1),
            ValueError,
            r"expected shape \(rows",
        ),
        (
            lambda c, x, r, w: ops.padded_gather(x, c.indices, c.bin_ids, c.bins, c.padded_bins[1:], 1),
            ValueError,
            "padded_bins: expected shape",
        ),
        (
            lambda c, x, r, w: ops.padded_scatter(r, c.indices, c.bin_ids, w, c.bins, c.padded_bins, 1),
            ValueError,
            "expected at least 4 rows",
        ),
        (lambda c, x, r, w: ops.binned_scatter(r, c.indices, w, c.bins, 1), ValueError, "expected shape .E = 2, bin"),
        (
            lambda c, x, r, w: ops.gather(x, c.indices, c.bin_ids, c.bins.to("meta"), 1),
            ValueError,
            "bins: expected on cpu",
        ),
    ],
)
def test_what_does_not_fit_is_named(call, error, message):
    case = Case(type("Routing", (), {"expert_indices": torch.tensor([[1], [0], [1]]), "num_experts": 2})(), 2)
    with pytest.raises(error, match=message):
        call(case, torch.zeros(3, 4), torch.zeros(3, 4), torch.zeros(3))


@given(st.lists(st.integers(-(2**15), 2**15 - 1), max_size=60), st.sampled_from(INTEGERS), st.booleans())
def test_sort_over_all_bits_takes_signed_keys(keys, dtype, explicit):
    bits = torch.iinfo(dtype).bits
    values, positions = ops.sort(torch.tensor(keys, dtype=dtype), bits if explicit else None)
    expected = sorted(range(len(keys)), key=lambda i: keys[i])
    assert values.dtype == positions.dtype == dtype
    assert positions.tolist() == expected
    assert values.tolist() == [keys[i] for i in expected]


@given(st.lists(st.integers(0, 40), max_size=60), st.sampled_from(INTEGERS), st.integers(1, 15))
def test_sort_looks_at_the_low_bits_it_is_told(keys, dtype, end_bit):
    values, positions = ops.sort(torch.tensor(keys, dtype=dtype), end_bit)
    expected = sorted(range(len(keys)), key=lambda i: keys[i] % 2**end_bit)
    assert positions.dtype == dtype
    assert positions.tolist() == expected
    assert values.tolist() == [keys[i] for i in expected]


@pytest.mark.parametrize("end_bit", [None, 3])
def test_positions_of_many_int16_keys_do_not_wrap(end_bit):
    keys = torch.arange(40_000).remainder(5).to(torch.int16)
    values, positions = ops.sort(keys, end_bit)
    assert (values.dtype, positions.dtype) == (torch.int16, torch.int32)
    assert torch.equal(positions.long(), torch.tensor(sorted(range(40_000), key=lambda i: i % 5)))
    assert ops.sort(keys[: 2**15], end_bit)[1].dtype == torch.int16
    assert ops.sort(keys[: 2**15], end_bit)[1].max() == 2**15 - 1


@given(st.integers(0, 4), st.integers(0, 30), st.integers(1, 9), st.sampled_from(INTEGERS), st.booleans())
def test_histogram_counts_each_row(batch, length, bins, dtype, flat):
    values = [[(7 * b + i * i) % bins for i in range(length)] for b in range(batch)]
    expected = [[row.count(v) for v in range(bins)] for row in values]
    x = torch.tensor(values, dtype=dtype).view(batch, length)
    if flat and batch:
        x, expected = x[0], expected[0]
    counts = ops.histogram(x, bins)
    assert counts.dtype == torch.int32
    assert counts.tolist() == expected
    assert tuple(counts.shape) == (*x.shape[:-1], bins)


@given(st.lists(st.integers(-50, 50), max_size=20), st.sampled_from(INTEGERS))
def test_running_sums(values, dtype):
    x = torch.tensor(values, dtype=dtype)
    inclusive, exclusive = ops.inclusive_cumsum(x, 0), ops.exclusive_cumsum(x, 0)
    assert inclusive.dtype == exclusive.dtype == dtype
    assert inclusive.tolist() == [sum(values[: i + 1]) for i in range(len(values))]
    assert exclusive.tolist() == [sum(values[:i]) for i in range(len(values))]
    assert inclusive.shape == x.shape  # also (1,)
    both = torch.stack([x, 2 * x])
    assert torch.equal(ops.inclusive_cumsum(both, 1), torch.stack([inclusive, 2 * inclusive]))


@given(st.integers(0, 3), st.lists(st.integers(0, 5), min_size=1, max_size=6), st.integers(0, 4))
def test_replicate_repeats_and_its_gradient_sums(batch, counts, tail):
    x = numbers(batch, len(counts), dtype=torch.float16).requires_grad_()
    bins = torch.tensor([sum(counts[: e + 1]) for e in range(len(counts))], dtype=torch.int32)
    out = ops.replicate(x, bins, sum(counts) + tail)
    rows = [[v for e, v in enumerate(row) for _ in range(counts[e])] + [0.0] * tail for row in x.tolist()]
    assert out.dtype == torch.float16
    assert out.tolist() == rows
    out.sum().backward()
    assert x.grad.tolist() == [[float(count) for count in counts]] * batch
    assert ops.replicate(x.detach().to(torch.int16), bins, sum(counts)).dtype == torch.int16


def topology_by_loops(padded_bins, block, columns):
    out, start = [], 0
    for expert, end in enumerate(padded_bins):
        for _ in range(start, end, block):
            out += [expert * columns + column for column in range(columns)]
        start = end
    return out


@given(st.lists(st.integers(0, 4), min_size=1, max_size=6), st.sampled_from([1, 16, 128]), st.integers(1, 5))
def test_topology_lists_each_row_blocks_columns(blocks, block, columns):
    bins = [block * sum(blocks[: e + 1]) for e in range(len(blocks))]
    out = ops.topology(torch.tensor(bins, dtype=torch.int32), block, sum(blocks), columns)
    assert out.dtype == torch.int16
    assert out.tolist() == topology_by_loops(bins, block, columns)


@pytest.mark.parametrize(
    ("row_blocks", "columns", "dtype"),
    [([32_768], 1, torch.int16), ([20_000, 12_769], 1, torch.int32), ([1, 1], 16_384, torch.int16),
     ([1, 1], 16_385, torch.int32)],
)  # fmt: skip
def test_topology_widens_before_an_index_wraps(row_blocks, columns, dtype):
    bins = [2 * sum(row_blocks[: e + 1]) for e in range(len(row_blocks))]
    out = ops.topology(torch.tensor(bins, dtype=torch.int32), 2, sum(row_blocks), columns)
    assert out.dtype == dtype
    assert out.tolist() == topology_by_loops(bins, 2, columns)


def test_the_small_helpers():
    x = torch.tensor([0, 1, 127, 128, 129], dtype=torch.int32)
    assert ops.round_up(x, 128).tolist() == [0, 128, 128, 128, 256]
    assert ops.round_up(x, 128).dtype == torch.int32
    with pytest.raises(TypeError, match="integer"):
        ops.round_up(x.float(), 128)
    with pytest.raises(ValueError, match="at least 1"):
        ops.round_up(x, 0)
    y = torch.arange(6.0).view(2, 3)
    assert ops.repeat(y, (1, 1)) is y
    assert torch.equal(ops.repeat(y, (2, 1)), torch.cat([y, y]))
    assert torch.equal(ops.sum(y, 0), y[0] + y[1])
    assert torch.equal(ops.sum(y), y[0] + y[1])
    assert torch.equal(ops.sum(y[:1], 0), y[0])
    assert ops.sum(y[:, :1].int(), 1).dtype == torch.int32


def test_the_operations_in_sequence_undo_each_other():
    torch.manual_seed(0)
    tokens, experts, top_k, block = 37, 5, 2, 8
    top = torch.rand(tokens, experts).topk(top_k, 1).indices.flatten().int()
    bin_ids, indices = ops.sort(top, 3)
    counts = ops.histogram(top, experts)
    bins = ops.inclusive_cumsum(counts, 0)
    padded_bins = ops.inclusive_cumsum(ops.round_up(counts, block), 0)
    x = numbers(tokens, 6)
    ones = torch.ones(tokens * top_k)
    rows = ops.padded_gather(x, indices, bin_ids, bins, padded_bins, top_k)
    y = ops.padded_scatter(rows, indices, bin_ids, ones, bins, padded_bins, top_k)
    assert torch.equal(y, top_k * x)
    ids = torch.arange(experts, dtype=torch.int32)[None]
    assert torch.equal(ops.replicate(ids, bins, tokens * top_k)[0], bin_ids)


@st.composite
def products(draw):
    sizes = draw(st.lists(st.integers(0, 5), min_size=1, max_size=5))
    return sizes, draw(st.integers(1, 6)), draw(st.integers(1, 6)), draw(st.sampled_from([torch.int32, torch.int64]))


@given(products(), st.booleans(), st.booleans(), st.sampled_from([torch.float32, torch.float64]))
def test_gmm_multiplies_each_group_and_so_does_its_gradient(product, trans_b, strided, dtype):
    sizes, inner, outer, index = product
    rows, experts = sum(sizes), len(sizes)
    a = numbers(rows, inner, dtype=dtype, strided=strided).requires_grad_()
    shape = (experts, outer, inner) if trans_b else (experts, inner, outer)
    b = numbers(*shape, dtype=dtype, strided=strided).requires_grad_()
    out = grouped_gemm.ops.gmm(a, b, torch.tensor(sizes, dtype=index), trans_b)  # fourth by position, as users do
    upstream = numbers(rows, outer, dtype=dtype)
    out.backward(upstream)
    start, expected, grad_a, grad_b = 0, [], [], []
    for e, size in enumerate(sizes):
        part, matrix = a.detach()[start : start + size], b.detach()[e].T if trans_b else b.detach()[e]
        expected.append(part @ matrix)
        grad_a.append(upstream[start : start + size] @ matrix.T)
        grad = part.T @ upstream[start : start + size]
        grad_b.append(grad.T if trans_b else grad)
        start += size
    assert out.dtype == dtype
    assert torch.equal(out.detach(), torch.cat(expected))
    assert torch.equal(a.grad, torch.cat(grad_a))
    assert torch.equal(b.grad, torch.stack(grad_b))


@given(products())
def test_gmm_with_trans_a_is_the_weight_gradient(product):
    sizes, inner, outer, index = product
    a, b = numbers(sum(sizes), inner).requires_grad_(), numbers(sum(sizes), outer).requires_grad_()
    batch_sizes = torch.tensor(sizes, dtype=index)
    bounds = [(sum(sizes[:e]), sum(sizes[: e + 1])) for e in range(len(sizes))]
    expected = torch.stack([a.detach()[s:t].T @ b.detach()[s:t] for s, t in bounds])
    for out in (
        grouped_gemm.ops.gmm(a, b, batch_sizes, trans_a=True),
        grouped_gemm.backend.gmm(a, b, batch_sizes, True, False),
    ):
        assert torch.equal(out.detach(), expected)
    upstream = numbers(*expected.shape)
    out.backward(upstream)
    assert torch.equal(a.grad, torch.cat([b.detach()[s:t] @ upstream[e].T for e, (s, t) in enumerate(bounds)]))
    assert torch.equal(b.grad, torch.cat([a.detach()[s:t] @ upstream[e] for e, (s, t) in enumerate(bounds)]))


def test_gmm_writes_into_an_output_and_names_what_does_not_fit():
    a, b, sizes = numbers(3, 2), numbers(2, 2, 4), torch.tensor([1, 2])
    c = torch.full((3, 4), torch.nan)
    assert grouped_gemm.backend.gmm(a, b, sizes, c=c) is c
    assert torch.equal(c, grouped_gemm.ops.gmm(a, b, sizes))
    with pytest.raises(ValueError, match=r"c: expected torch.float32 of shape \(3, 4\)"):
        grouped_gemm.backend.gmm(a, b, sizes, c=c[:2])
    with pytest.raises(ValueError, match="at most one of trans_a and trans_b"):
        grouped_gemm.ops.gmm(a, b, sizes, trans_b=True, trans_a=True)
    with pytest.raises(TypeError, match="batch_sizes: expected dtype int32 or int64"):
        grouped_gemm.ops.gmm(a, b, sizes.float())
    with pytest.raises(ValueError, match="batch_sizes: expected one dimension"):
        grouped_gemm.ops.gmm(a, b, sizes[None])
    with pytest.raises(ValueError, match="expected 1 experts"):
        grouped_gemm.ops.gmm(a, b, sizes[:1])
    assert grouped_gemm_util.grouped_gemm_is_available()
    grouped_gemm_util.assert_grouped_gemm_is_available()
    assert grouped_gemm_util.ops is grouped_gemm.ops
    assert grouped_gemm_util.backend is grouped_gemm.backend


@pytest.mark.parametrize("function", [grouped_gemm.ops.sinkhorn_kernel, grouped_gemm.backend.sinkhorn])
def test_sinkhorn(function):
    """The formula of Megatron that the fork's kernel is tested against."""
    cost = torch.rand(48, 5, generator=torch.Generator().manual_seed(0)) * 6
    given, matrix, columns, error = cost.clone(), cost.double().exp(), torch.ones(5, dtype=torch.float64), 1.0
    while error > 0.1:
        rows = 1 / (48 * (matrix @ columns))
        before, columns = columns, 1 / (5 * (rows @ matrix))
        error = float((before - columns).abs().mean())
    expected = (rows[:, None] * matrix * columns).float()
    torch.testing.assert_close(function(cost, 0.1), expected)
    assert torch.equal(cost, given)
    uneven = [float((each.sum(1) * 48 - 1).abs().max()) for each in (expected, function(cost))]
    assert uneven[1] < 0.01 < uneven[0]
