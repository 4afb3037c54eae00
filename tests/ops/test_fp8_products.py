"""Products of a composition in fp8: by the operation and by decoding, against float64 from the decoded numbers."""

from __future__ import annotations

import pytest
import torch
from fp8_cases import blocks_on_grid, on_grid

from dmoe.ops.fp8_products import Fp8Products, Fp8Rows, quantized
from dmoe.ops.fp8_ref import CODES, decoded_codes
from dmoe.ops.projection import GroupedProducts, TorchProducts


def kinds(offsets, *operands):
    return [Fp8Products(GroupedProducts(offsets)), Fp8Products(TorchProducts(offsets, *operands))]


@pytest.mark.parametrize("back", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("added", [False, True])
def test_both_ways_multiply_the_same_numbers(dtype, back, added):
    torch.manual_seed(0)
    counts, out_width, inner = [3, 0, 5], 140, 131
    offsets = torch.tensor([0, *counts]).cumsum(0).int()
    rows = torch.randn(sum(counts), out_width if back else inner).to(dtype)
    weight = (torch.randn(3, out_width, inner) / 10).to(dtype)
    thin = torch.randn(sum(counts), 2).to(dtype)
    factor = torch.randn((3, 2, inner) if back else (3, out_width, 2)).to(dtype)
    expected = []
    for row, e in enumerate([0] * 3 + [2] * 5):
        w, a = blocks_on_grid(weight[e].double()), on_grid(rows[row].double())
        of_one = w.T @ a if back else w @ a
        low = factor[e].double().T if back else factor[e].double()
        expected.append(of_one + (low @ thin[row].double() if added else 0))
    expected = torch.stack(expected)
    for products in kinds(offsets, rows, weight):
        beside = (thin, factor) if added else (None, None)
        got = products.through(rows, weight, back, beside)
        assert got.dtype == dtype
        bound = 2 * torch.finfo(dtype).eps * expected.abs().max() + 2e-6 * (dtype != torch.float64)
        assert (got.double() - expected).abs().max() <= bound
        same = products.through(products.taken(rows), weight, back, beside)
        assert torch.equal(got, same)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_codes_decode_as_pytorch_decodes_them(dtype):
    codes = torch.arange(256, dtype=torch.uint8).view(CODES).view(2, 128)
    assert torch.equal(decoded_codes(codes, dtype).nan_to_num(1e3), codes.to(dtype).nan_to_num(1e3))
    with torch.inference_mode():
        in_inference = decoded_codes(codes, dtype)
    assert torch.equal(in_inference.nan_to_num(1e3), codes.to(dtype).nan_to_num(1e3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("backend", [None, "torch"])
def test_decoded_rows_are_quantised_to_themselves(dtype, backend):
    """What is saved, and quantised again by a product, loses nothing the second time."""
    torch.manual_seed(0)
    rows = (torch.randn(300, 33) * torch.rand(300, 1).mul(20).sub(10).exp()).to(dtype)
    once = quantized(rows, backend).decoded(dtype)
    assert torch.equal(quantized(once, backend).decoded(dtype), once)
    for row, ours in zip(rows, once, strict=True):
        assert torch.equal(ours.double(), on_grid(row.double()))
    assert isinstance(quantized(rows, backend), Fp8Rows)
