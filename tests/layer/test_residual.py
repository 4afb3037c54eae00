"""ResidualMoE: PR-MoE's formula, gradients, masks, and that what looks for MoE layers finds the one inside."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import dmoe
from dmoe import ResidualMoE

H, WIDTH, EXPERTS = 6, 10, 4
FIELDS = {"hidden_size": H, "ffn_hidden_size": WIDTH, "num_experts": EXPERTS, "gated": False, "activation": "relu"}
FIELDS |= {"load_balancing_coefficient": 0.0}


def dense_block(dtype=torch.float64):
    return nn.Sequential(nn.Linear(H, WIDTH), nn.ReLU(), nn.Linear(WIDTH, H)).to(dtype)


def residual(dtype=torch.float64, **fields):
    torch.manual_seed(0)
    moe = dmoe.MoE(**{**FIELDS, **fields}, dtype=dtype)
    return ResidualMoE(moe, dense_block(dtype))


def plain(layer, x, expert_indices):
    """The formula, token by token, with a softmax over all experts and no renormalisation."""
    experts, rows = layer.moe.experts, []
    for token, chosen in zip(x, expert_indices.tolist(), strict=True):
        probs = torch.softmax(layer.moe.router.weight @ token, 0)
        routed = sum(probs[e] * (experts.down_proj[e] @ torch.relu(experts.up_proj[e] @ token)) for e in chosen)
        a, b = layer.coefficient.weight @ token + layer.coefficient.bias
        share = torch.sigmoid(a - b)
        first, _, last = layer.mlp
        dense = last.weight @ torch.relu(first.weight @ token + first.bias) + last.bias
        rows.append(share * routed + (1 - share) * dense)
    return torch.stack(rows)


def test_the_formula_and_its_gradients():
    layer = residual(top_k=2)
    x = torch.randn(9, H, dtype=torch.float64, requires_grad=True)
    chosen = torch.stack([torch.randperm(EXPERTS)[:2] for _ in range(9)])
    y, expected = layer(x, expert_indices=chosen), plain(layer, x, chosen)
    torch.testing.assert_close(y, expected)
    wanted = [x, *(p for name, p in layer.named_parameters())]
    upstream = torch.randn_like(y)
    for got, exact in zip(
        torch.autograd.grad(y, wanted, upstream), torch.autograd.grad(expected, wanted, upstream), strict=True
    ):
        torch.testing.assert_close(got, exact)
    best = torch.softmax(x @ layer.moe.router.weight.t(), -1).topk(2).indices
    torch.testing.assert_close(layer(x.view(3, 3, H)), plain(layer, x, best).view(3, 3, H))


def test_gradients_by_finite_differences():
    layer = residual(top_k=EXPERTS)  # all experts: nothing changes places
    x = torch.randn(2, H, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, (x,))


def test_masked_tokens_may_hold_anything():
    layer = residual(top_k=2)
    x, mask = torch.randn(2, 5, H, dtype=torch.float64), torch.rand(2, 5) < 0.6
    poisoned = x.masked_fill(~mask.unsqueeze(-1), torch.nan).requires_grad_()
    y = layer(poisoned, token_mask=mask)
    torch.testing.assert_close(y[mask], layer(x)[mask])
    y.sum().backward()
    assert all(p.grad.isfinite().all() for p in (poisoned, *layer.parameters()))
    with pytest.raises(ValueError, match="token_mask"):
        layer(x, token_mask=mask[0])


def test_ids_reach_a_router_that_looks_at_them():
    layer = residual(router=dmoe.routing.Hash(vocab_size=9), top_k=1)
    x, ids = torch.randn(5, H, dtype=torch.float64), torch.tensor([7, 7, 3, 1, 7])
    layer(x, token_ids=ids)
    counts = layer.moe.last_metrics.tokens_per_expert
    assert counts.sum() == 5
    assert counts.max() >= 3


def test_what_looks_for_layers_finds_the_one_inside():
    model = nn.Sequential(residual(selection_bias=True, losses={"load_balancing": 0.1, "z": 0.01}))
    x = torch.randn(11, H, dtype=torch.float64)
    model(x).sum().backward(retain_graph=True)
    assert list(dmoe.moe_layers(model)) == ["0.moe"]
    loss = dmoe.aux_loss(model)
    assert loss > 0
    assert torch.autograd.grad(loss, model[0].moe.router.weight)[0].abs().max() > 0
    assert list(dmoe.reduce_metrics(model)) == ["0.moe"]
    dmoe.update_selection_bias(model)
    assert model[0].moe.router.selection_bias.abs().max() > 0
    twin = copy.deepcopy(model)
    twin.load_state_dict(model.state_dict())
    assert torch.equal(twin(x), model(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_autocast_and_other_dtypes(dtype):
    layer, x = residual(dtype), torch.randn(7, H, dtype=dtype)
    assert layer.coefficient.weight.dtype == dtype
    assert layer(x).dtype == dtype
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), layer(x).float(), rtol=5e-2, atol=5e-2)


def test_one_compiled_graph():
    layer, x = residual(top_k=2), torch.randn(7, H, dtype=torch.float64)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), layer(x))


class Pair(nn.Module):
    def __init__(self, bias):
        super().__init__()
        self.bias = bias

    def forward(self, x):
        return x, self.bias


def test_a_bias_that_would_not_be_weighted_is_refused():
    with pytest.raises(ValueError, match=r"^ResidualMoE: moe: expected return_bias=False, got True"):
        residual(bias="output", return_bias=True)
    assert residual(bias="output").moe.output_bias is not None
    x = torch.randn(3, H)
    assert torch.allclose(ResidualMoE(Pair(None), Pair(None), H)(x), x)
    for parts, name in (((Pair(x), Pair(None)), "moe"), ((Pair(None), Pair(x)), "mlp")):
        with pytest.raises(ValueError, match=rf"^ResidualMoE: {name}: expected the output, or a pair of it and None"):
            ResidualMoE(*parts, H)(x)
    with pytest.raises(ValueError, match=r"^ResidualMoE: hidden_size: expected an integer with Pair, got None"):
        ResidualMoE(Pair(None), Pair(None))
    layer = ResidualMoE(Pair(None), Pair(None), H)
    layer.mlp.forward = lambda x: (None, None)
    with pytest.raises(ValueError, match=r"^ResidualMoE: mlp: expected to return a tensor, got NoneType"):
        layer(x)
