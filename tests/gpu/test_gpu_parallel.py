"""Expert parallelism on one CUDA rank with NCCL: the whole path, its one wait, and the static mode in a CUDA graph."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from gpu_helpers import DEVICE, cuda_only

from dmoe import MoE, aux_loss

pytestmark = pytest.mark.gpu

FIELDS = {"hidden_size": 64, "ffn_hidden_size": 96, "num_experts": 8, "top_k": 2, "bias": "expert"}


@pytest.fixture(scope="module")
def group(tmp_path_factory):
    store = tmp_path_factory.mktemp("store") / "store"
    options = {"device_id": DEVICE} if DEVICE.type == "cuda" and DEVICE.index is not None else {}
    dist.init_process_group(
        "nccl" if DEVICE.type == "cuda" else "gloo", init_method=f"file://{store}", rank=0, world_size=1, **options
    )
    yield dist.group.WORLD
    dist.destroy_process_group()


def layers(group, **fields):
    """The same layer twice, on the ranks of a group and without one."""
    torch.manual_seed(0)
    spread = MoE(**FIELDS, **fields, ep_group=group, device=DEVICE)
    torch.manual_seed(0)
    return spread, MoE(**FIELDS, device=DEVICE)


def results(layer, x):
    x = x.clone().requires_grad_()
    y = layer(x)
    (y.square().sum() + aux_loss(layer)).backward()
    grads = {name: p.grad for name, p in layer.named_parameters()}
    return y.detach(), x.grad, {n: g.to_local() if hasattr(g, "to_local") else g for n, g in grads.items()}


@pytest.mark.parametrize("fields", [{}, {"max_rows_received": 300}, {"shared_ffn_hidden_size": 32}], ids=str)
@pytest.mark.parametrize("tokens", [300, 0])
def test_one_rank_equals_no_rank(group, fields, tokens):
    spread, local = layers(group, **fields)
    if "shared_ffn_hidden_size" in fields:
        torch.manual_seed(0)
        local = MoE(**FIELDS, **fields, device=DEVICE)
    x = torch.randn(tokens, 64, device=DEVICE)
    y, dx, grads = results(spread, x)
    expected_y, expected_dx, expected = results(local, x)
    torch.testing.assert_close(y, expected_y, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(dx, expected_dx, rtol=1e-3, atol=1e-3)
    for name, gradient in expected.items():
        torch.testing.assert_close(grads[name], gradient, rtol=1e-3, atol=2e-3, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("wire_dtype", ["fp8", "int8"])
def test_a_narrow_wire(group, wire_dtype):
    spread, local = layers(group, wire_dtype=wire_dtype)
    x = torch.randn(300, 64, device=DEVICE)
    y, expected = spread(x), local(x)
    error = (y - expected).norm() / expected.norm()
    assert 0 < error < 0.06


@cuda_only
def test_the_host_waits_in_the_dynamic_mode_only(group):
    """The one wait is for an event, which the sync debug mode does not count; anything else would raise."""
    x = torch.randn(300, 64, device=DEVICE)
    for fields in ({}, {"max_rows_received": 300}):
        spread, _ = layers(group, **fields)
        results(spread, x)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            results(spread, x)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@cuda_only
def test_the_static_mode_is_captured_in_a_cuda_graph_and_replayed_with_another_routing(group):
    spread, local = layers(group, max_rows_received=300)
    static = torch.randn(300, 64, device=DEVICE, requires_grad=True)

    def step():
        static.grad = None
        spread.zero_grad(set_to_none=True)
        y = spread(static)
        y.square().sum().backward()
        return y

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = step()
    fresh = torch.randn(300, 64, device=DEVICE)
    with torch.no_grad():
        static.copy_(fresh)
    graph.replay()
    torch.cuda.synchronize()
    leaf = fresh.clone().requires_grad_()
    expected = local(leaf)
    expected.square().sum().backward()
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(static.grad, leaf.grad, rtol=1e-3, atol=1e-3)
