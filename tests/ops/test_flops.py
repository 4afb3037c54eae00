"""FlopCounterMode counts every product of dmoe's operations once: 2 m n k each."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import dmoe
from dmoe import ops
from dmoe.ops.fp8 import fp8_gemm, quantize_blocks, quantize_rows
from dmoe.ops.grouped_gemm_sum import grouped_gemm_sum
from dmoe.ops.moe_mlp_deferred import defer, moe_mlp_deferred

T, H, F, E, K = 10, 8, 6, 4, 2


def counted(run) -> int:
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def a_step(layer, x):
    def run():
        y = layer(x)
        if layer.training:
            (y.sum() + dmoe.aux_loss(layer)).backward()

    return run


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize(
    "options",
    [{}, {"recompute_pre_activation": True}, {"accumulate_main_grad": True}, {"batch_invariant": True}],
    ids=str,
)
def test_a_step_of_the_layer(gated, options):
    if "batch_invariant" in options and not ops._library.compiled:
        pytest.skip("csrc/ was not built, and nothing else promises it")
    layer = dmoe.MoE(hidden_size=H, ffn_hidden_size=F, num_experts=E, top_k=K, gated=gated, **options)
    if "accumulate_main_grad" in options:
        for weight in (layer.experts.gate_up_proj if gated else layer.experts.up_proj, layer.experts.down_proj):
            weight.main_grad = torch.zeros_like(weight)
    x = torch.randn(T, H, requires_grad=True)
    up, down, router = 2 * T * K * H * F * (2 if gated else 1), 2 * T * K * H * F, 2 * T * H * E
    recomputed = up if "recompute_pre_activation" in options else 0
    assert counted(a_step(layer, x)) == 3 * (up + down + router) + recomputed
    assert counted(a_step(layer.eval(), x.detach())) == up + down + router


def test_a_step_with_frozen_experts_and_with_a_backward_in_halves():
    layer = dmoe.MoE(hidden_size=H, ffn_hidden_size=F, num_experts=E, top_k=K)
    layer.experts.requires_grad_(False)
    x = torch.randn(T, H, requires_grad=True)
    experts, router = 2 * T * K * H * F * 3, 2 * T * H * E
    assert counted(a_step(layer, x)) == 2 * experts + 3 * router

    from moe_mlp_cases import build

    case = {
        "tokens": T, "experts": E, "top_k": K, "hidden": H, "sizes": F, "activation": "silu", "gated": True,
        "bias": False, "gate_on": "output", "layout": "packed", "hot": False, "seed": 1,
    }  # fmt: skip
    arguments = build(case, torch.float32)[0]
    weights = [arguments[2].requires_grad_(), arguments[3].requires_grad_(), None, None]
    rows = int(arguments[6][-1])  # some choices are masked

    def run():
        deferred, later = defer(*weights)
        moe_mlp_deferred(later, arguments[0].requires_grad_(), arguments[1], *deferred, *arguments[6:]).sum().backward()

    assert counted(run) == 3 * 2 * rows * H * F * 3


@pytest.mark.parametrize("backend", [None, "block_sparse"])
def test_each_width_costs_what_it_is_wide(backend):
    sizes = [16, 48, 32, 16]
    layer = dmoe.MoE(hidden_size=H, ffn_hidden_size=sizes, num_experts=E, top_k=1, backend=backend).eval()
    x = torch.randn(T, H)
    layer(x)
    rows = layer.last_metrics.tokens_per_expert.tolist()
    experts = sum(2 * n * 3 * size * H for n, size in zip(rows, sizes, strict=True))
    assert counted(lambda: layer(x)) == experts + 2 * T * H * E


def test_products_and_their_gradients():
    offsets = torch.tensor([0, 3, 3, 7], dtype=torch.int32)
    a, b = torch.randn(9, 5, requires_grad=True), torch.randn(3, 4, 5, requires_grad=True)
    assert counted(lambda: ops.grouped_gemm(a, b, offsets)) == 2 * 7 * 5 * 4
    assert counted(lambda: ops.grouped_gemm(a, b, offsets).sum().backward()) == 3 * 2 * 7 * 5 * 4
    assert counted(lambda: ops.grouped_gemm_weight(a, a, offsets)) == 2 * 7 * 5 * 5
    thin = torch.randn(a.shape[0], 2), torch.randn(3, 4, 2)
    assert counted(lambda: grouped_gemm_sum(a.detach(), b.detach(), *thin, offsets, True)) == 2 * 7 * 4 * (5 + 2)
    codes = *quantize_rows(a.detach()), *quantize_blocks(b.detach())[:2]
    assert counted(lambda: fp8_gemm(*codes, offsets)) == 2 * 7 * 5 * 4
    capacity_form = torch.randn(3, 2, 5)
    assert counted(lambda: ops.grouped_gemm(capacity_form, b)) == 2 * 6 * 5 * 4

    structure = ops.expert_topology(torch.tensor([0, 16, 48], dtype=torch.int32), 16, [32, 16], 4)  # 2 + 2 blocks
    left, right = torch.randn(64, 7, requires_grad=True), torch.randn(7, 48, requires_grad=True)
    one = 2 * 4 * 16 * 16 * 7
    assert counted(lambda: ops.block_sdd(left, right, *structure, 16).sum().backward()) == 3 * one
    data = torch.randn(structure.row_indices.shape[0], 16, 16, requires_grad=True)
    dense = torch.randn(48, 7, requires_grad=True)
    assert counted(lambda: ops.block_dsd(data, *structure, False, dense).sum().backward()) == 3 * one
    dense = torch.randn(7, 64, requires_grad=True)
    assert counted(lambda: ops.block_dds(dense, data, *structure, False).sum().backward()) == 3 * one


def test_without_values_a_plan_counts_as_full():
    layer = dmoe.MoE(hidden_size=H, ffn_hidden_size=F, num_experts=E, top_k=K, device="meta").eval()
    x = torch.randn(T, H, device="meta")
    assert counted(lambda: layer(x)) == 2 * T * K * H * F * 3 + 2 * T * H * E


def test_a_counter_that_was_there_first():
    """The formulas come with the first call, as importing PyTorch's counter with dmoe would load Triton."""
    program = """
import sys, torch, dmoe
from torch.utils.flop_counter import FlopCounterMode
assert "dmoe.ops.flops" not in sys.modules
with FlopCounterMode(display=False) as counter:
    dmoe.ops.grouped_gemm(torch.randn(5, 3), torch.randn(1, 4, 3), torch.tensor([0, 5], dtype=torch.int32))
print(counter.get_total_flops())
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert int(done.stdout) == 2 * 5 * 3 * 4
