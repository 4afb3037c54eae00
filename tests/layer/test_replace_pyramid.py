"""replace_ffn: a pyramid of experts, and blocks that stay beside theirs (PR-MoE)."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import dmoe

H, WIDTH = 12, 20


def block(*dropouts):
    drop = [nn.Dropout(p) for p in dropouts]
    return nn.Sequential(nn.Linear(H, WIDTH), nn.GELU(), *drop[:1], nn.Linear(WIDTH, H), *drop[1:])


class Net(nn.Module):
    def __init__(self, *blocks):
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleDict({"norm": nn.LayerNorm(H), "ffn": each}) for each in blocks)

    def forward(self, x):
        for layer in self.layers:
            x = x + layer["ffn"](layer["norm"](x))
        return x


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("residual", [False, True])
def test_a_pyramid_takes_its_counts_in_order(residual):
    net, x = Net(*(block() for _ in range(3))).eval(), torch.randn(5, H)
    before = net(x)
    names = dmoe.replace_ffn(net, "*.ffn", num_experts=[2, 4, 8], top_k=2, upcycle=True, residual=residual)
    assert names == [f"layers.{index}.ffn" for index in range(3)]
    assert [layer.config.num_experts for layer in dmoe.moe_layers(net).values()] == [2, 4, 8]
    torch.testing.assert_close(net(x), before, rtol=1e-5, atol=1e-5)  # copies of it, whatever they are weighted with


def test_shared_blocks_take_one_count():
    shared = block()
    net = Net(shared, block(), shared)
    dmoe.replace_ffn(net, "*.ffn", num_experts=(2, 4))
    assert [layer["ffn"].config.num_experts for layer in net.layers] == [2, 4, 2]


@pytest.mark.parametrize("counts", [[4], [4, 4, 4, 4], []])
def test_another_number_of_counts_is_refused_and_changes_nothing(counts):
    net = Net(block(), block())
    before = dict(net.named_modules())
    told = rf"^replace_ffn: num_experts: expected 2 counts.*layers\.0\.ffn, layers\.1\.ffn\), got {len(counts)}: \["
    with pytest.raises(ValueError, match=told):
        dmoe.replace_ffn(net, "*.ffn", num_experts=counts)
    with pytest.raises(ValueError, match="top_k: expected at most num_experts = 1"):
        dmoe.replace_ffn(net, "*.ffn", num_experts=[4, 1])
    assert dict(net.named_modules()) == before


def test_a_block_stays_with_its_weights_beside_its_experts():
    net = Net(block(), block()).double()
    blocks = [layer["ffn"] for layer in net.layers]
    blocks[1].requires_grad_(False)
    blocks[0][2].eval()  # a flag inside a block is its own
    flags = [[module.training for module in each.modules()] for each in blocks]
    dmoe.replace_ffn(net, "*.ffn", num_experts=4, residual=True)
    mixed = [layer["ffn"] for layer in net.layers]
    assert all(type(each) is dmoe.ResidualMoE for each in mixed)
    assert [each.mlp for each in mixed] == blocks
    assert [[module.training for module in each.modules()] for each in blocks] == flags
    assert all(each.training and each.moe.training and each.coefficient.training for each in mixed)
    assert all(parameter.dtype == torch.float64 for parameter in net.parameters())
    assert all(parameter.requires_grad for parameter in mixed[0].parameters())
    assert not any(parameter.requires_grad for parameter in mixed[1].parameters())

    x = torch.randn(7, H, dtype=torch.float64)
    share = torch.softmax(mixed[0].coefficient(x), -1)
    expected = share[:, :1] * mixed[0].moe(x) + share[:, 1:] * blocks[0](x)
    torch.testing.assert_close(mixed[0](x), expected)
    (net(x).square().sum() + dmoe.aux_loss(net)).backward()
    assert all(p.grad.abs().max() > 0 for name, p in mixed[0].named_parameters() if "router" not in name)


def test_dropouts_of_both_halves():
    net = Net(block(0.1, 0.2))
    dmoe.replace_ffn(net, "*.ffn", num_experts=4, residual=True)
    mixed = net.layers[0]["ffn"]
    assert mixed.moe.moe.config.activation_dropout == pytest.approx(0.1)
    assert mixed.moe.dropout.p == pytest.approx(0.2)
    assert [part.p for part in mixed.mlp if isinstance(part, nn.Dropout)] == [0.1, 0.2]
    net(torch.randn(3, H))


@pytest.mark.parametrize("kind", [nn.TransformerEncoderLayer, nn.TransformerDecoderLayer])
def test_transformer_layers_keep_their_feed_forward_part(kind):
    encoder = kind is nn.TransformerEncoderLayer
    stack = nn.TransformerEncoder if encoder else nn.TransformerDecoder
    net = stack(kind(H, 2, WIDTH, 0.1, "gelu", batch_first=True), 2).eval()
    inputs = (torch.randn(2, 6, H),) if encoder else (torch.randn(2, 6, H), torch.randn(2, 5, H))
    before, linears = net(*inputs), [layer.linear1 for layer in net.layers]
    dmoe.replace_ffn(net, "layers.*", num_experts=[2, 4], upcycle=True, residual=True)
    for grad in (True, False):  # without gradients PyTorch would take its fused kernels
        with torch.set_grad_enabled(grad):
            torch.testing.assert_close(net(*inputs), before, rtol=1e-5, atol=1e-5)
    mixed = [layer.linear1 for layer in net.layers]
    assert [each.mlp.linear1 for each in mixed] == linears
    assert all(each.mlp.dropout.p == 0.1 for each in mixed)
    if encoder:
        assert not net.use_nested_tensor
    net.train()
    assert mixed[0].mlp.dropout.training
    (net(*inputs).square().mean() + dmoe.aux_loss(net)).backward()
    assert all(parameter.grad is not None for parameter in net.parameters())
    twin = copy.deepcopy(net).eval()
    torch.testing.assert_close(twin(*inputs), net.eval()(*inputs))


def test_a_frozen_bias_stays_frozen():
    net = Net(block())
    dmoe.replace_ffn(net, "*.ffn", num_experts=4, frozen_down_bias=True)
    assert not net.layers[0]["ffn"].experts.down_bias.requires_grad
