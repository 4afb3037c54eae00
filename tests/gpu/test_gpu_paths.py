"""On CUDA, the paths beside the main one: tile tables, the fused router, block-sparse products, what saves memory."""

from __future__ import annotations

import pytest
import torch
from gpu_helpers import DEVICE, assert_equal_bits, cuda_only, here, leaf_there, there
from helpers import saved_bytes

from dmoe import ExpertWeights, MoE, plan_token_choice
from dmoe.functional import run_experts
from dmoe.ops import _library
from dmoe.ops.router_top_k import TopKRule, router_top_k
from dmoe.ops.tile_table import tile_table, tile_table_ref

pytestmark = pytest.mark.gpu

TRITON = ("block_sdd", "block_dsd", "block_dds", "block_sparse_mlp", "fp8_gemm", "fp8_quantize_blocks",
          "fp8_quantize_rows", "grouped_gemm", "grouped_gemm_sum", "moe_mlp", "moe_mlp_backward", "quantized_gemm",
          "moe_mlp_backward_data", "moe_mlp_backward_into", "moe_mlp_backward_weights",
          "moe_mlp_backward_weights_into", "moe_mlp_lean", "router_logits", "router_top_k", "tile_table")  # fmt: skip


def close(got, expected, dtype, name=""):
    """Relative Frobenius error of products in a dtype, against numbers in float64."""
    limit = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}[dtype]
    error = (here(got).double() - expected).norm() / expected.norm().clamp(min=1e-30)
    assert error < limit, f"{name}: {error:.2e}"


@cuda_only
def test_triton_serves_what_it_should():
    assert {name: _library.backends[name]["CUDA"] for name in TRITON} == dict.fromkeys(TRITON, "Triton")


@pytest.mark.parametrize("experts", [1, 7, 512, 1500])
@pytest.mark.parametrize("tile_rows", [16, 128])
def test_tile_table(experts, tile_rows):
    counts = torch.randint(0, 300, (experts,), generator=torch.Generator().manual_seed(experts))
    counts[experts // 2] = 5000
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)]).int()
    rows = int(offsets[-1]) + 77
    assert_equal_bits("tiles", tile_table(there(offsets), rows, tile_rows), tile_table_ref(offsets, rows, tile_rows))


@pytest.mark.parametrize("experts", [1, 8, 60, 512])
@pytest.mark.parametrize("score_function", ["softmax", "sigmoid"])
def test_fused_router(experts, score_function):
    """On evenly spaced logits, so that no two scores are nearly equal: indices as on the CPU, weights to rounding."""
    top_k = min(experts, 6)
    rule = TopKRule(top_k=top_k, score_function=score_function, normalization=1.0)
    generator = torch.Generator().manual_seed(0)
    logits = torch.stack([torch.randperm(experts, generator=generator) for _ in range(133)]).float()
    logits = logits * (6 / experts) - 3  # a sigmoid of more would saturate
    mask = torch.rand(133, generator=generator) < 0.9
    leaf, other = leaf_there(logits), logits.double().requires_grad_()
    got = router_top_k(leaf, rule, token_mask=there(mask), with_log_z=True, count_first=True)
    expected = router_top_k(other, rule, token_mask=mask, with_log_z=True, count_first=True)
    assert torch.equal(here(got.expert_indices).long(), expected.expert_indices.long())
    assert torch.equal(here(got.first_choices_per_expert), expected.first_choices_per_expert)
    for name in ("scores", "log_z", "gate_weights"):
        close(getattr(got, name), getattr(expected, name).detach(), torch.float32, name)
    grads = [torch.randn(tuple(t.shape), generator=generator) for t in (got.scores, got.log_z, got.gate_weights)]

    def backward(choice, logits, grads):
        results = (choice.scores, choice.log_z, choice.gate_weights)
        return torch.autograd.grad(results, logits, grads)[0]

    close(
        backward(got, leaf, [there(g) for g in grads]),
        backward(expected, other, [g.double() for g in grads]),
        torch.float32,
        "logits",
    )


def leaves(dtype, experts=5, hidden=96, width=64, tokens=333, top_k=2):
    generator = torch.Generator().manual_seed(1)

    def normal(*shape, scale=1.0):
        return (torch.randn(shape, generator=generator) * scale).to(dtype)

    x, grad, residual = normal(tokens, hidden), normal(tokens, hidden), normal(tokens, hidden)
    up, down = normal(experts, 2, width, hidden, scale=hidden**-0.5), normal(experts, hidden, width, scale=width**-0.5)
    indices = torch.rand(tokens, experts, generator=generator).argsort(1)[:, :top_k]
    gates = torch.rand(tokens, top_k, generator=generator)
    return x, gates, up, down, indices, grad, residual


def run(x, gates, up, down, indices, grad, residual, deferred=False, **options):
    """y and the gradients of x, gates, both projections and the residual; what a buffer took instead is None."""
    given = [t.requires_grad_() for t in (x, gates, up, down, residual)]
    plan = plan_token_choice(indices, up.shape[0])
    weights = ExpertWeights(up, down)
    y = run_experts(x, plan, gates, weights.deferred() if deferred else weights, residual=residual, **options)
    return [y.detach(), *torch.autograd.grad(y, given, grad, allow_unused=True)]


def moved(arguments, change):
    return [t.detach().to(change, copy=True) if t.is_floating_point() else t for t in arguments]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("backend", [None, "block_sparse"])
def test_backends_and_options(backend, dtype):
    arguments = leaves(dtype)
    expected = run(*moved(arguments, torch.float64))
    on_device = [there(t) for t in arguments]
    got = run(*moved(on_device, DEVICE), backend=backend)
    for name, a, b in zip(("y", "x", "gates", "up", "down", "residual"), got, expected, strict=True):
        close(a, b, dtype, name)
    if backend is not None:
        return
    lean = run(*moved(on_device, DEVICE), recompute=True)
    for a, b in zip(got, lean, strict=True):
        assert torch.equal(a, b)
    buffers = tuple(torch.ones_like(t, dtype=torch.float32) for t in on_device[2:4])
    into = run(*moved(on_device, DEVICE), main_grads=buffers)
    assert into[3] is None
    assert into[4] is None
    for buffer, b in zip(buffers, expected[3:5], strict=True):
        close(buffer - 1, b, dtype, "main_grad")
    halves = run(*moved(on_device, DEVICE), deferred=True)
    for a, b in zip(got, halves, strict=True):
        assert torch.equal(a, b)


def test_recomputing_saves_only_the_input():
    x, gates, up, down, indices, _, _ = (there(t) for t in leaves(torch.bfloat16))
    plan = plan_token_choice(indices, up.shape[0])
    wanted = [t.requires_grad_() for t in (x, gates, up, down)]
    kept = [*wanted, plan.expert_offsets, plan.row_to_token, plan.row_to_slot, plan.token_offsets, plan.token_rows]
    with saved_bytes(exclude=kept) as saved:
        run_experts(x, plan, gates, ExpertWeights(up, down), recompute=True)
    assert saved.total == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("widths", [[16, 64, 32, 128], [128, 256, 128, 384]], ids=str)
def test_experts_of_different_widths(widths, dtype):
    torch.manual_seed(0)
    layer = MoE(hidden_size=64, ffn_hidden_size=widths, num_experts=4, top_k=2, backend="block_sparse", dtype=dtype)
    oracle = MoE(hidden_size=64, ffn_hidden_size=widths, num_experts=4, top_k=2, dtype=torch.float64)
    oracle.load_state_dict({name: p.double() for name, p in layer.state_dict().items()})
    x, grad = torch.randn(200, 64).to(dtype), torch.randn(200, 64).to(dtype)
    indices = torch.rand(200, 4).argsort(1)[:, :2]
    on_device, leaf = layer.to(DEVICE), leaf_there(x)
    y = on_device(leaf, expert_indices=there(indices))
    y.backward(there(grad))
    other = x.double().requires_grad_()
    exact = oracle(other, expert_indices=indices)
    exact.backward(grad.double())
    close(y, exact.detach(), dtype, "y")
    close(leaf.grad, other.grad, dtype, "x")
    for (name, a), b in zip(on_device.named_parameters(), oracle.parameters(), strict=True):
        close(a.grad, b.grad, dtype, name)


@cuda_only
def test_block_sparse_is_captured_and_replayed_with_another_routing():
    torch.manual_seed(0)
    options = {"hidden_size": 64, "ffn_hidden_size": [32, 64, 96, 64], "num_experts": 4, "top_k": 2}
    layer = MoE(**options, backend="block_sparse", device=DEVICE, dtype=torch.bfloat16)
    x, static = (torch.randn(100, 64, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    with torch.no_grad():
        expected = layer(x)
        layer(static)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = layer(static)
        static.copy_(x)
        graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(y, expected)
