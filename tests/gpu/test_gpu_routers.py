"""On CUDA, every family of routers: the same routing as on the CPU, and no wait of the host."""

from __future__ import annotations

from unittest.mock import patch

import pytest
import torch
from gpu_helpers import DEVICE, assert_equal_bits, cuda_only, here, there
from router_cases import FAMILIES, inputs, layer_of

import dmoe
from dmoe.routing import noise

pytestmark = pytest.mark.gpu


def drawn(kind, like):
    """The same numbers on every device."""
    generator = torch.Generator().manual_seed(7)
    uniform = torch.rand(like.shape, generator=generator, dtype=torch.float64)
    values = {"uniform": uniform, "gaussian": torch.erfinv(2 * uniform - 1) * 2**0.5, "gumbel": -(-uniform.log()).log()}
    return values[kind].to(like)


@pytest.mark.parametrize("name", [*FAMILIES])
def test_a_family_routes_as_on_the_cpu(name):
    layer, twin = layer_of(name), layer_of(name).to(DEVICE)
    x, ids = inputs(64)
    fake = {kind: lambda like, kind=kind: drawn(kind, like) for kind in ("uniform", "gaussian", "gumbel")}
    with patch.multiple(noise, **fake):
        for training in (True, False):
            y = layer.train(training)(x, token_ids=ids)
            loss = dmoe.aux_loss(layer)
            other = twin.train(training)(there(x), token_ids=there(ids))
            torch.testing.assert_close(here(dmoe.aux_loss(twin)), loss.detach(), rtol=1e-4, atol=1e-5)
            assert_equal_bits("load", twin.last_metrics.tokens_per_expert, layer.last_metrics.tokens_per_expert)
            assert_equal_bits("kept", twin.last_metrics.kept_per_expert, layer.last_metrics.kept_per_expert)
            torch.testing.assert_close(here(other), y.detach(), rtol=2e-3, atol=2e-3)


@cuda_only
@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "base"])  # which says that it waits
def test_no_family_makes_the_host_wait(name):
    layer = layer_of(name).to(DEVICE)
    x, ids = inputs(64)
    x, ids = there(x).requires_grad_(), there(ids)
    (layer(x, token_ids=ids).sum() + dmoe.aux_loss(layer)).backward()  # compiles, certifies
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        (layer(x, token_ids=ids).sum() + dmoe.aux_loss(layer)).backward()
        layer.update_selection_bias()
    finally:
        torch.cuda.set_sync_debug_mode("default")
