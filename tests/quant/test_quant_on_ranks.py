"""Experts that are codes under expert parallelism, on gloo ranks against one process."""

from __future__ import annotations

import pytest
import rank_jobs_quant as jobs
import torch

from dmoe import MoE
from dmoe.quant import quantize

FIELDS = {
    "hidden_size": 128, "ffn_hidden_size": 64, "num_experts": 4, "top_k": 2, "bias": "expert",
    "load_balancing_coefficient": 0.0,
}  # fmt: skip


def whole(format):
    torch.manual_seed(0)
    layer = MoE(**FIELDS)
    quantize(layer, format)
    return layer


def shares_of():
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(5 + 3 * rank, 128, generator=generator) for rank in range(4)]


@pytest.mark.parametrize("dtensor", [True, False])
@pytest.mark.parametrize("format", ["nf4", "fp8", "int4"])
def test_ranks_compute_what_one_process_does(ranks, format, dtensor):
    layer, shares = whole(format), shares_of()
    for share, found in zip(shares, ranks.run(jobs.computed, FIELDS, format, dtensor, shares), strict=True):
        x = share.clone().requires_grad_()
        y = layer(x)
        y.square().sum().backward()
        for got, expected in zip(found, (y.detach(), x.grad) * 2, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtensor", [True, False])
def test_ranks_take_their_part_of_a_whole_state(ranks, dtensor):
    layer, shares = whole("nf4"), shares_of()
    results = ranks.run(jobs.loaded_whole, FIELDS, "nf4", dtensor, layer.state_dict(), shares)
    for share, got in zip(shares, results, strict=True):
        torch.testing.assert_close(got, layer(share).detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("format", ["nf4", "fp8"])
def test_distributed_checkpoints_hold_all_experts(ranks, tmp_path, format):
    shares = shares_of()
    results = ranks.run(jobs.through_a_distributed_checkpoint, FIELDS, format, str(tmp_path), shares)
    for before, after, shapes in results:
        assert torch.equal(before, after)
        assert shapes["experts.down_proj.codes"] == tuple(whole(format).experts.down_proj.codes.shape)


@pytest.mark.parametrize("dtensor", [True, False])
def test_codes_become_parameters_of_ranks_again(ranks, dtensor):
    expected = whole("int8").experts.down_proj.value().dequantize()
    results = ranks.run(jobs.decoded, FIELDS, "int8", dtensor)
    assert all(kept for kept, _ in results)
    assert torch.equal(torch.cat([part for _, part in results]), expected)
