"""What the layer saves for backward, to the byte."""

from __future__ import annotations

import pytest
import torch
from helpers import saved_bytes
from layer_cases import formula
from torch import nn

from dmoe import MoE, MoEConfig


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"top_k": 1, "gate_normalization": 2.0},
        {"gated": False, "activation": "gelu", "bias": "expert", "router_bias": True},
        {"gate_weight_on": "input"},
        {"gate_weight_on": "activation", "load_balancing_coefficient": 0.0},
        {"router_z_loss_coefficient": 0.1},
        {"ffn_hidden_size": [16, 8, 24, 8]},
        {"softmax_order": "after_topk", "gate_scale": 2.0, "num_moe_layers": 5},
        {"score_function": "sigmoid", "gate_normalization": 1.0, "load_balancing_coefficient": 0.0},
        {"score_function": "sigmoid", "selection_bias": True, "num_groups": 2, "top_k_groups": 1},
    ],
    ids=lambda fields: "-".join(fields) or "default",
)
def test_saved_bytes_equal_the_formula(fields, dtype):
    torch.manual_seed(0)
    config = MoEConfig(**{"hidden_size": 32, "ffn_hidden_size": 24, "num_experts": 4, "top_k": 2, **fields})
    layer = MoE(config, dtype=dtype)
    x = torch.randn(2, 9, 32, dtype=dtype, requires_grad=True)
    with saved_bytes(exclude=list(layer.parameters())) as saved:
        y = layer(x)
        loss = y.sum() + layer.take_aux_loss() if config.load_balancing_coefficient else y.sum()
    assert saved.total == formula(config, 18, dtype)
    loss.backward()


@pytest.mark.parametrize("capacity", [0, 1, 5])
def test_a_capacity_saves_fewer_rows(capacity):
    config = MoEConfig(hidden_size=32, ffn_hidden_size=24, num_experts=4, top_k=2, capacity=capacity)
    layer = MoE(config)
    x = torch.randn(18, 32, requires_grad=True)
    with saved_bytes(exclude=list(layer.parameters())) as saved:
        layer(x)
    assert saved.total == formula(config, 18, torch.float32, rows=min(36, 4 * capacity))


def test_a_strided_input_is_copied_once():
    config = MoEConfig(hidden_size=32, ffn_hidden_size=24, num_experts=4)
    layer = MoE(config)
    x = torch.randn(32, 18, requires_grad=True).t()
    with saved_bytes(exclude=list(layer.parameters())) as saved:
        layer(x)
    assert saved.total == formula(config, 18, torch.float32)


def test_dropout_saves_one_seed_and_no_mask():
    config = MoEConfig(
        hidden_size=32, ffn_hidden_size=24, num_experts=4, top_k=2, activation_dropout=0.1, expert_dropout=0.2
    )
    layer = MoE(config)
    x = torch.randn(18, 32, requires_grad=True)
    with saved_bytes(exclude=list(layer.parameters())) as saved:
        layer(x)
    assert saved.total == formula(config, 18, torch.float32) + 8


def test_evaluation_without_gradients_saves_nothing_and_keeps_nothing():
    layer = MoE(hidden_size=32, ffn_hidden_size=24, num_experts=4).eval()
    with saved_bytes() as saved, torch.no_grad():
        layer(torch.randn(18, 32))
    assert saved.total == 0
    assert layer.take_aux_loss() is None


def test_leaner_than_a_loop_over_experts():
    """The formula's meaning: the same layer written with autograd over PyTorch operations saves more."""
    torch.manual_seed(0)
    layer = MoE(hidden_size=32, ffn_hidden_size=24, num_experts=4, load_balancing_coefficient=0.0)
    x = torch.randn(18, 32, requires_grad=True)
    with saved_bytes(exclude=list(layer.parameters())) as ours:
        layer(x)
    up, down = layer.experts.gate_up_proj, layer.experts.down_proj
    with saved_bytes(exclude=list(layer.parameters())) as loop:
        probs = (x @ layer.router.weight.t()).softmax(-1)
        gates, indices = probs.topk(2)
        y = torch.zeros_like(x)
        for e in range(4):
            t, k = torch.where(indices == e)
            hidden = nn.functional.silu(x[t] @ up[e, 0].t()) * (x[t] @ up[e, 1].t())
            y = y.index_add(0, t, (hidden @ down[e].t()) * gates[t, k].unsqueeze(1))
    torch.testing.assert_close(layer(x), y)
    assert ours.total < 0.6 * loop.total
