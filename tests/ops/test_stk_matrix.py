"""sdd, dsd and dds on stk.Matrix: used as stk's own, and against stk's own kernels."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from block_sparse_cases import integers, structure, to_blocks, to_dense

from dmoe.ops import dds, dsd, expert_topology, sdd, sparse_matrix

stk = pytest.importorskip("stk")
ROOT = Path(__file__).resolve().parents[2]


def matrix(used, dtype=torch.float32, block=16, seed=0, index=torch.int32):
    topology = structure(used)
    size = len(used) * block, len(used[0]) * block
    data = to_blocks(integers(*size, dtype=dtype, seed=seed), topology, block)
    return sparse_matrix(size, data, type(topology)(*(part.to(index) for part in topology))), topology


USED = [[True, False, True], [False, False, False], [True, True, False]]


@pytest.mark.parametrize("index", [torch.int16, torch.int32], ids=str)
def test_products_of_matrices_and_their_transposes(index):
    sparse, topology = matrix(USED, index=index)
    dense = to_dense(sparse.data, topology)
    assert torch.equal(dense, stk.ops.to_dense(sparse))
    x = integers(48, 5, dtype=torch.float32, seed=2)
    assert torch.equal(dsd(sparse, x), dense @ x)
    assert torch.equal(dsd(sparse.t(), x), dense.t() @ x)
    assert torch.equal(dds(x.t(), sparse), x.t() @ dense)
    assert torch.equal(dds(x.t(), sparse.t()), x.t() @ dense.t())
    assert torch.equal(dsd(sparse.t().t(), x), dense @ x)
    y = integers(5, 48, dtype=torch.float32, seed=3)
    product = sdd(x, y, sparse)
    assert isinstance(product, stk.Matrix)
    assert product.size() == sparse.size()
    assert product.row_indices.dtype == product.column_indices.dtype == product.block_offsets_t.dtype == torch.int32
    assert torch.equal(product.data, to_blocks(x @ y, topology, 16))
    assert torch.equal(dsd(product.t(), x), to_dense(product.data, topology).t() @ x)


def test_a_structure_without_values():
    """MegaBlocks' topology: blocks in half precision on ``meta``, which say their size alone."""
    sparse, topology = matrix(USED)
    nowhere = torch.empty(sparse.data.shape, dtype=torch.float16, device="meta")
    bare = sparse_matrix((48, 48), nowhere, topology)
    x, y = integers(48, 5, dtype=torch.float32, seed=2), integers(5, 48, dtype=torch.float32, seed=3)
    assert torch.equal(sdd(x, y, bare).data, to_blocks(x @ y, topology, 16))
    with pytest.raises(ValueError, match=r"sdd: a: expected on cpu like the sparse matrix, got meta"):
        sdd(x.to("meta"), y, sparse)
    for product in (lambda: dsd(bare, x), lambda: dds(y, bare)):
        with pytest.raises(ValueError, match=r"expected values on cpu like their structure, got meta"):
            product()


def test_a_matrix_made_by_stk_and_its_gradient():
    dense = to_dense(matrix(USED)[0].data, structure(USED)).requires_grad_()
    sparse = stk.ops.to_sparse(dense.detach(), 16)
    assert sparse.row_indices.dtype == torch.int16
    sparse.requires_grad_(True)
    x = integers(48, 5, dtype=torch.float32, seed=2).requires_grad_()
    x2 = x.detach().clone().requires_grad_()
    for product, plain in ((dsd(sparse.t(), x), dense.t() @ x2), (dds(x.t(), sparse), x2.t() @ dense)):
        upstream = integers(*product.shape, dtype=torch.float32, seed=4)
        product.backward(upstream)
        plain.backward(upstream)
        assert torch.equal(x.grad, x2.grad)
        masked = dense.grad * (dense != 0).view(3, 16, 3, 16).any(3).any(1).repeat_interleave(16, 0).repeat_interleave(
            16, 1
        )
        assert torch.equal(stk.ops.to_dense(sparse.grad), masked)
        x.grad = x2.grad = dense.grad = sparse.data.grad = None


def test_a_dropless_layer_without_a_host_synchronisation():
    """The static tail of the experts' structure passes through all three products unseen."""
    offsets = torch.tensor([0, 16, 16, 48], dtype=torch.int32)
    topology = expert_topology(offsets, 16, [32, 16, 16], 5)
    layout = sparse_matrix((80, 64), torch.empty(topology.row_indices.shape[0], 16, 16), topology)
    x = integers(80, 7, dtype=torch.float32, seed=0).requires_grad_()
    up = integers(64, 7, dtype=torch.float32, seed=1).requires_grad_()
    down = integers(64, 7, dtype=torch.float32, seed=2).requires_grad_()
    hidden = sdd(x, up.t(), layout)
    assert hidden.data.shape[0] == 10
    y = dsd(sparse_matrix(hidden.size(), hidden.data.relu(), topology), down)
    y.sum().backward()
    x2, up2, down2 = (t.detach().clone().requires_grad_() for t in (x, up, down))
    parts = [x2[:16] @ up2[:32].t(), x2[16:48] @ up2[48:].t()]
    y2 = torch.cat((parts[0].relu() @ down2[:32], parts[1].relu() @ down2[48:], torch.zeros(32, 7)))
    y2.sum().backward()
    assert torch.equal(y, y2)
    for mine, other in ((x, x2), (up, up2), (down, down2)):
        assert torch.equal(mine.grad, other.grad)


def test_more_block_rows_than_stk_can_index():
    rows = 33_000
    offsets = torch.tensor([0, rows * 16], dtype=torch.int32)
    topology = expert_topology(offsets, 16, 16, rows)
    big = sparse_matrix((rows * 16, 16), torch.ones(rows, 16, 16), topology)
    assert torch.equal(dsd(big, torch.ones(16, 1)), torch.full((rows * 16, 1), 16.0))
    half = sparse_matrix(big.size(), big.data.half(), topology)
    with pytest.raises(ValueError, match=r"Expected int16 row_indices\. Got torch\.int32"):
        half.validate()


def bad_calls():
    sparse, _ = matrix(USED)
    x = torch.ones(48, 5)
    yield lambda: dsd(x, x), TypeError, "dsd: a: expected an stk.Matrix, got Tensor"
    yield lambda: dds(x, x), TypeError, "dds: b: expected an stk.Matrix, got Tensor"
    yield lambda: dsd(sparse, x[:40]), ValueError, r"dsd: b: expected 48 rows for .* \(48, 48\), got shape \(40, 5\)"
    yield lambda: dds(x, sparse), ValueError, r"dds: a: expected 48 columns for .*, got shape \(48, 5\)"
    yield lambda: dsd(sparse, x[0]), ValueError, r"dsd: b: expected a tensor of two dimensions, got \(5,\)"
    yield lambda: dsd(sparse, x.half()), TypeError, "one floating-point dtype, got torch.float32 and torch.float16"
    yield lambda: dsd(sparse, x.to("meta")), ValueError, "dsd: b: expected on cpu like the sparse matrix, got meta"
    yield lambda: sdd(x, x.t(), sparse.t()), ValueError, "sdd: topology: expected a matrix that is not transposed"
    yield (
        lambda: sdd(x, x.t()[:4], sparse),
        ValueError,
        r"expected a \(M, K\) and b \(K, N\), got \(48, 5\) and \(4, ",
    )
    yield lambda: sdd(x[:3], x.t(), sparse), ValueError, r"sdd: a: expected 48 rows"
    small, _ = matrix([[True]], block=8)
    yield lambda: dsd(small, x[:8]), ValueError, r"blocks of 16, 32, 64 or 128 as data \(nnz, B, B\), got \(1, 8, 8\)"


@pytest.mark.parametrize("number", range(len(list(bad_calls()))))
def test_errors_name_argument_and_values(number):
    call, error, message = list(bad_calls())[number]
    with pytest.raises(error, match=message):
        call()


def test_without_stk_the_error_says_how_to_install_it(monkeypatch):
    sparse, _ = matrix(USED)
    monkeypatch.setitem(sys.modules, "stk", None)
    with pytest.raises(ImportError, match=r"dsd: .*`pip install 'dmoe\[sparse\]'`"):
        dsd(sparse, torch.ones(48, 1))


# stk's own kernels take blocks of 128 in float16; under the interpreter they write beside smaller ones.
_AGAINST_STK = """
import sys
sys.path.insert(0, "tests/support")
import stk, torch
from block_sparse_cases import KERNELS, integers
from dmoe import ops

torch.manual_seed(0)
mask = torch.tensor([[1, 0], [1, 1], [0, 0]]).repeat_interleave(128, 0).repeat_interleave(128, 1)
full = (torch.randint(-2, 3, (384, 256)) * mask).half()
a = stk.ops.to_sparse(full, 128)
topology = tuple(getattr(a, n).int() for n in (
    "row_indices", "column_indices", "offsets", "column_indices_t", "offsets_t", "block_offsets_t"))
tall, wide = torch.randint(-2, 3, (384, 128)).half(), torch.randint(-2, 3, (256, 128)).half()

def same(name, theirs, *ours):
    for mine in ours:
        assert torch.equal(theirs, mine), name
    print(name)

same("dsd", stk.ops.dsd(a, wide), ops.dsd(a, wide), KERNELS["dsd"](a.data, *topology, False, wide))
same("dsd_t", stk.ops.dsd(a.t(), tall), ops.dsd(a.t(), tall), KERNELS["dsd"](a.data, *topology, True, tall))
same("dds", stk.ops.dds(tall.t(), a), ops.dds(tall.t(), a), KERNELS["dds"](tall.t(), a.data, *topology, False))
same("dds_t", stk.ops.dds(wide.t(), a.t()), ops.dds(wide.t(), a.t()), KERNELS["dds"](wide.t(), a.data, *topology, True))
theirs = stk.ops.sdd(tall, wide.t(), a)
same("sdd", theirs.data, ops.sdd(tall, wide.t(), a).data, KERNELS["sdd"](tall, wide.t(), *topology, 128))
"""


def test_equals_stks_own_kernels():
    done = subprocess.run(
        [sys.executable, "-c", _AGAINST_STK],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.split() == ["dsd", "dsd_t", "dds", "dds_t", "sdd"], done.stdout + done.stderr
