"""Block-sparse products against dense ones: every transpose, empty rows, tails, gradients; by kernels and in PyTorch.

Values are small integers, so every product and sum is exact in every dtype, and results are compared bit by bit.
"""

from __future__ import annotations

import functools

import pytest
import torch
from block_sparse_cases import KERNELS, integers, structure, to_blocks, to_dense
from hypothesis import given, settings
from hypothesis import strategies as st

from dmoe.ops import block_sparse
from dmoe.ops.block_sparse import block_dds, block_dsd, block_sdd, block_size_for
from dmoe.ops.topology import BlockTopology

REFERENCE = {
    "sdd": functools.partial(block_sparse._sdd, block_sparse.sdd_ref),
    "dsd": functools.partial(block_sparse._dsd, block_sparse.spmm_ref),
    "dds": functools.partial(block_sparse._dds, block_sparse.spmm_ref),
}
BOTH = pytest.mark.parametrize("run", [REFERENCE, KERNELS], ids=["ref", "kernels"])


def laid(x: torch.Tensor, how: str) -> torch.Tensor:
    """The same values as rows, as a ``.t()`` view, or with no dimension contiguous."""
    if how == "transposed":
        return x.t().contiguous().t()
    if how == "strided":
        return torch.stack((x, x), dim=-1)[..., 0]
    return x


@st.composite
def products(draw, blocks=(16, 32), extent=3, inner=(0, 1, 7, 16, 40, 65)):
    """A structure with its tail, block size, the dense factor's other dimension, dtype, layout and a seed."""
    rows, columns = draw(st.integers(1, extent)), draw(st.integers(1, extent))
    kind = draw(st.sampled_from(["any", "none", "all"]))
    flag = st.booleans() if kind == "any" else st.just(kind == "all")
    used = draw(st.lists(st.lists(flag, min_size=columns, max_size=columns), min_size=rows, max_size=rows))
    topology = structure(used, draw(st.integers(0, 2)), draw(st.sampled_from([-1, rows + 7])))
    how = st.sampled_from(["rows", "transposed", "strided"])
    return (
        topology,
        draw(st.sampled_from(blocks)),
        draw(st.sampled_from(inner)),
        draw(st.sampled_from([torch.float16, torch.float32])),
        (draw(how), draw(how)),
        draw(st.integers(0, 2**20)),
    )


def poisoned(data: torch.Tensor, topology: BlockTopology) -> torch.Tensor:
    """Blocks that nothing may read hold NaN."""
    data = data.clone()
    data[int(topology.offsets[-1]) :] = torch.nan
    return data


def check_sdd(run, case):
    topology, block, inner, dtype, how, seed = case
    rows, columns = (topology.offsets.shape[0] - 1) * block, (topology.offsets_t.shape[0] - 1) * block
    a, b = integers(rows, inner, dtype=dtype, seed=seed), integers(inner, columns, dtype=dtype, seed=seed + 1)
    got = run["sdd"](laid(a, how[0]), laid(b, how[1]), *topology, block)
    expected = to_blocks(a.double() @ b.double(), topology, block)
    assert got.dtype == dtype
    assert torch.equal(got.double(), expected)  # zeros in the tail


def check_dsd(run, case, transposed):
    topology, block, inner, dtype, how, seed = case
    shape = (topology.offsets.shape[0] - 1) * block, (topology.offsets_t.shape[0] - 1) * block
    data = to_blocks(integers(*shape, dtype=dtype, seed=seed), topology, block)
    b = integers(shape[0] if transposed else shape[1], inner, dtype=dtype, seed=seed + 1)
    got = run["dsd"](poisoned(data, topology), *topology, transposed, laid(b, how[0]))
    dense = to_dense(data.double(), topology)
    expected = (dense.t() if transposed else dense) @ b.double()
    assert got.dtype == dtype
    assert got.is_contiguous()
    assert torch.equal(got.double(), expected)


def check_dds(run, case, transposed):
    topology, block, inner, dtype, how, seed = case
    shape = (topology.offsets.shape[0] - 1) * block, (topology.offsets_t.shape[0] - 1) * block
    data = to_blocks(integers(*shape, dtype=dtype, seed=seed), topology, block)
    a = integers(inner, shape[1] if transposed else shape[0], dtype=dtype, seed=seed + 1)
    got = run["dds"](laid(a, how[0]), poisoned(data, topology), *topology, transposed)
    dense = to_dense(data.double(), topology)
    expected = a.double() @ (dense.t() if transposed else dense)
    assert got.dtype == dtype
    assert got.is_contiguous()
    assert torch.equal(got.double(), expected)


@BOTH
@settings(max_examples=25)
@given(case=products())
def test_sdd_is_the_masked_product(run, case):
    check_sdd(run, case)


@BOTH
@settings(max_examples=25)
@given(case=products(), transposed=st.booleans())
def test_dsd_is_the_product(run, case, transposed):
    check_dsd(run, case, transposed)


@BOTH
@settings(max_examples=25)
@given(case=products(), transposed=st.booleans())
def test_dds_is_the_product(run, case, transposed):
    check_dds(run, case, transposed)


@BOTH
@pytest.mark.parametrize("block", [64, 128])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_large_blocks(run, block, dtype):
    case = structure([[True, False], [True, True]], 1), block, 72, dtype, ("transposed", "rows"), 5
    check_sdd(run, case)
    for transposed in (False, True):
        check_dsd(run, case, transposed)
        check_dds(run, case, transposed)


@BOTH
def test_many_block_rows_fill_several_groups(run):
    """More rows than programs are grouped by, of uneven lengths, so that the last group and line are not full."""
    used = [[(r * c + r + c) % 4 != 0 for c in range(5)] for r in range(19)]
    case = structure(used, 3), 16, 140, torch.float16, ("rows", "rows"), 1
    check_sdd(run, case)
    for transposed in (False, True):
        check_dsd(run, case, transposed)
        check_dds(run, case, transposed)


@BOTH
def test_nothing_at_all(run):
    empty = structure([], 0)
    assert run["sdd"](torch.ones(0, 8), torch.ones(8, 0), *empty, 16).shape == (0, 16, 16)
    assert run["dsd"](torch.ones(0, 16, 16), *empty, False, torch.ones(0, 5)).shape == (0, 5)
    assert run["dds"](torch.ones(5, 0), torch.ones(0, 16, 16), *empty, False).shape == (5, 0)
    rows = structure([[False], [False]], 0)
    assert torch.equal(run["dsd"](torch.ones(0, 16, 16), *rows, False, torch.ones(16, 5)), torch.zeros(32, 5))


@BOTH
def test_stacked_factors_are_read_and_written_in_place(run):
    """(E, H, F) weights: the part that block columns point into, as a stack of transposed matrices."""
    sdd, spmm = (
        (block_sparse.sdd_ref, block_sparse.spmm_ref)
        if run is REFERENCE
        else (block_sparse.sdd_cuda, block_sparse.spmm_cuda)
    )
    block, experts, width, hidden = 16, 3, 32, 24
    topology = structure([[c // 2 == r for c in range(6)] for r in range(3)])
    down = integers(experts, hidden, width, dtype=torch.float32, seed=0)
    flat = down.transpose(1, 2).reshape(experts * width, hidden)
    rows = integers(48, hidden, dtype=torch.float32, seed=1)
    stack = down.transpose(1, 2)
    data = sdd(rows, stack, topology.row_indices, topology.column_indices, block)
    assert torch.equal(data, to_blocks(rows @ flat.t(), topology, block))
    out = torch.empty(48, hidden)
    spmm(data, False, topology.offsets, topology.column_indices, None, stack, out.unsqueeze(0))
    assert torch.equal(out, to_dense(data, topology) @ flat)
    grad = torch.empty_like(down)
    order = (topology.offsets_t, topology.column_indices_t, topology.block_offsets_t)
    spmm(data, True, *order, rows.unsqueeze(0), grad.transpose(1, 2))
    expected = (to_dense(data, topology).t() @ rows).view(experts, width, hidden).transpose(1, 2)
    assert torch.equal(grad, expected)


# ----------------------------------------------------------------------------------------------------------- gradients


@settings(max_examples=25)
@given(case=products(inner=(1, 7, 16)), transposed=st.booleans())
def test_gradients_equal_those_of_dense_products(case, transposed):
    topology, block, inner, _, how, seed = case
    shape = (topology.offsets.shape[0] - 1) * block, (topology.offsets_t.shape[0] - 1) * block
    mask = to_dense(torch.ones(topology.row_indices.shape[0], block, block, dtype=torch.float64), topology)
    double = {"dtype": torch.float64}

    def leaf(*size, add):
        return integers(*size, **double, seed=seed + add).requires_grad_()

    def compare(sparse, dense, leaves, others):
        upstream = integers(*sparse.shape, **double, seed=seed + 9)
        sparse.backward(upstream)
        dense.backward(to_dense(upstream, topology) if dense.shape != sparse.shape else upstream)
        for mine, theirs in zip(leaves, others, strict=True):
            assert torch.equal(mine.grad, theirs.grad)
            mine.grad = theirs.grad = None

    a, b = leaf(shape[0], inner, add=0), leaf(inner, shape[1], add=1)
    a2, b2 = a.detach().clone().requires_grad_(), b.detach().clone().requires_grad_()
    data = block_sdd(laid(a, how[0]), laid(b, how[1]), *topology, block)
    compare(data, (a2 @ b2) * mask, (a, b), (a2, b2))

    values = to_blocks(integers(*shape, **double, seed=seed + 2), topology, block).requires_grad_()
    for product in ("dsd", "dds"):
        sparse = to_dense(values.detach(), topology).requires_grad_()
        factor = sparse.t() if transposed else sparse
        size = (factor.shape[1], inner) if product == "dsd" else (inner, factor.shape[0])
        x = leaf(*size, add=3)
        x2 = x.detach().clone().requires_grad_()
        if product == "dsd":
            got, expected = block_dsd(values, *topology, transposed, laid(x, how[0])), factor @ x2
        else:
            got, expected = block_dds(laid(x, how[0]), values, *topology, transposed), x2 @ factor
        upstream = integers(*got.shape, **double, seed=seed + 8)
        got.backward(upstream)
        expected.backward(upstream)
        assert torch.equal(x.grad, x2.grad)
        assert torch.equal(values.grad, to_blocks(sparse.grad, topology, block))
        values.grad = None


def test_derivatives_of_the_derivatives():
    torch.manual_seed(0)
    topology = structure([[True, False], [True, True]], 1)
    options = {"dtype": torch.float64, "requires_grad": True}
    a, b, data = torch.randn(32, 3, **options), torch.randn(3, 32, **options), torch.randn(4, 16, 16, **options)
    check = functools.partial(torch.autograd.gradgradcheck, fast_mode=True)
    assert check(lambda a, b: block_sdd(a, b, *topology, 16), (a, b))
    for transposed in (False, True):
        assert check(lambda data, b, t=transposed: block_dsd(data, *topology, t, b.t()), (data, b))
        assert check(lambda a, data, t=transposed: block_dds(a.t(), data, *topology, t), (a, data))


# ------------------------------------------------------------------------------------------------------ types and sizes


def test_indices_past_int16():
    """33,000 block rows: int16 ends at 32,767."""
    row, block = 33_000, 16
    topology = BlockTopology(
        torch.tensor([row, -1], dtype=torch.int32),
        torch.tensor([1, -1], dtype=torch.int32),
        torch.cat((torch.zeros(row + 1), torch.ones(8))).int(),
        torch.tensor([row, -1], dtype=torch.int32),
        torch.tensor([0, 0, 1], dtype=torch.int32),
        torch.tensor([0, -1], dtype=torch.int32),
    )
    a, b = torch.zeros((row + 8) * block, 2), integers(2, 32, dtype=torch.float32, seed=0)
    a[row * block : (row + 1) * block] = integers(block, 2, dtype=torch.float32, seed=1)
    expected = a[row * block : (row + 1) * block] @ b[:, 16:]
    for run in (REFERENCE, KERNELS):
        data = run["sdd"](a, b, *topology, block)
        assert torch.equal(data, torch.stack((expected, torch.zeros(16, 16))))
        out = run["dsd"](data, *topology, True, a)
        assert torch.equal(out[16:], expected.t() @ a[row * block : (row + 1) * block])
        assert (out[:16] == 0).all()


def test_addresses_past_int32():
    """A row that begins behind element 2**31 of its matrix; of the 4 GiB only its own pages are touched."""
    torch.utils.deterministic.fill_uninitialized_memory = False  # the fixture sets it anew for every test
    row, block, inner = 2**31 // 4096 // 16, 16, 4096
    a = torch.empty((row + 1) * block, inner, dtype=torch.float16)
    mine = a[row * block :]
    mine.copy_(integers(block, inner, dtype=torch.float16, seed=0))
    b = integers(inner, block, dtype=torch.float16, seed=1)
    index = torch.tensor([row, 0], dtype=torch.int32)
    data = block_sparse.sdd_cuda(a, b.t().unsqueeze(0), index[:1], index[1:], block)
    assert torch.equal(data[0].double(), mine.double() @ b.double())
    # The same row as the dense factor of a product, and as its result.
    offsets = torch.tensor([0, 1], dtype=torch.int32)
    out = torch.empty(1, block, inner, dtype=torch.float16)
    block_sparse.spmm_cuda(data / 64, True, offsets, index[:1], None, a.unsqueeze(0), out)
    assert torch.equal(out[0].double(), ((data[0] / 64).double().t() @ mine.double()).half().double())


def test_what_cannot_be_computed_on_cuda_is_named():
    with pytest.raises(TypeError, match=r"sdd: expected bfloat16, float16 or float32 on CUDA, got torch\.float64"):
        KERNELS["sdd"](torch.ones(16, 1).double(), torch.ones(1, 16).double(), *structure([[True]]), 16)


@pytest.mark.parametrize(
    ("sizes", "expected"), [((128, 256), 128), ((192, 64), 64), ((96,), 32), ((16, 128), 16), ((24, 48), None)]
)
def test_block_size_is_the_largest_that_divides(sizes, expected):
    assert block_size_for(sizes) == expected


def test_float32_is_rounded_only_where_the_user_said_so():
    from dmoe.kernels.block_sparse import _precision

    matmul = torch.backends.cuda.matmul
    before = matmul.allow_tf32
    try:
        matmul.allow_tf32 = False
        assert _precision(torch.float32) == "ieee"
        matmul.allow_tf32 = True
        assert _precision(torch.float32) == "tf32"
    finally:
        matmul.allow_tf32 = before


def test_under_autocast_the_factors_are_cast():
    topology = structure([[True]])
    with torch.autocast("cpu", torch.bfloat16):
        data = block_sdd(torch.ones(16, 2), torch.ones(2, 16), *topology, 16)
        assert block_dsd(data, *topology, False, torch.ones(16, 3)).dtype == torch.bfloat16
        assert block_dds(torch.ones(3, 16), data, *topology, True).dtype == torch.bfloat16
    assert data.dtype == torch.bfloat16


def test_registration():
    topology = structure([[True, False], [True, True]], 1)
    a, b = torch.randn(32, 5, requires_grad=True), torch.randn(5, 32, requires_grad=True)
    data = torch.randn(4, 16, 16, requires_grad=True)
    torch.library.opcheck(torch.ops.dmoe.block_sdd.default, (a, b, *topology, 16))
    torch.library.opcheck(torch.ops.dmoe.block_dsd.default, (data, *topology, True, a))
    torch.library.opcheck(torch.ops.dmoe.block_dds.default, (b, data, *topology, False))
