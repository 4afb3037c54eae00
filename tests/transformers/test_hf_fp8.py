"""Experts in fp8: the numbers of their dequantised weights, an expert at a time, and a sentence for four bits.

Transformers' own computation of them needs a GPU kernel, so that the yardstick here are the same numbers in float32.
"""

from __future__ import annotations

import copy
import types

import pytest
import torch
from transformers.integrations.finegrained_fp8 import ALL_FP8_EXPERTS_FUNCTIONS, FP8Experts
from transformers.integrations.moe import use_experts_implementation

import dmoe.integrations.transformers as on_transformers
from dmoe.integrations.transformers import fp8

E, H, F = 6, 64, 48


@pytest.fixture
def experts():
    """Random fp8 weights with a scale for each block of 32 by 16, which divides neither 2 F nor F evenly."""
    on_transformers.register()
    return make


def make(block=(32, 16), scales=torch.float32, gated=True, **fields):
    kind = use_experts_implementation(
        type("Fp8", (FP8Experts,), {}), experts_interface=ALL_FP8_EXPERTS_FUNCTIONS, has_gate=gated
    )
    config = types.SimpleNamespace(
        hidden_size=H,
        num_experts=E,
        moe_intermediate_size=F,
        hidden_act="silu",
        _experts_implementation="dmoe",
        **fields,
    )
    module = kind(config, block_size=block, has_gate=gated)
    torch.manual_seed(0)
    for name, parameter in module.named_parameters():
        if name.endswith("scale_inv"):
            parameter.data = torch.exp2(torch.randint(-4, 1, parameter.shape).float()).to(scales)
        else:
            parameter.data = (torch.randn(parameter.shape) / parameter.shape[-1] ** 0.5).to(torch.float8_e4m3fn)
    return module.requires_grad_(False)


def whole(module, name):
    """A weight in float32, its scales written out number by number."""
    weight, scale = getattr(module, name).float(), getattr(module, f"{name}_scale_inv").float()
    rows, columns = weight.shape[1:]
    block = module.block_size or (-(-rows // scale.shape[1]), -(-columns // scale.shape[2]))
    out = torch.empty_like(weight)
    for r in range(rows):
        for c in range(columns):
            out[:, r, c] = weight[:, r, c] * scale[:, r // block[0], c // block[1]]
    return out


def expected(module, x, index, gates):
    up = whole(module, "gate_up_proj" if module.has_gate else "up_proj")
    down, y = whole(module, "down_proj"), torch.zeros_like(x)
    for t in range(x.shape[0]):
        for k, e in enumerate(index[t].tolist()):
            if e < E:
                pre = up[e] @ x[t]
                h = module._apply_gate(pre[None])[0] if module.has_gate else module.act_fn(pre)
                y[t] = y[t] + gates[t, k] * (down[e] @ h)
    return y


def case(seed=0):
    torch.manual_seed(seed)
    index = torch.rand(9, E).argsort(1)[:, :2]
    index[3, 0] = index[5] = E  # no expert
    return torch.randn(9, H, requires_grad=True), index, torch.rand(9, 2, requires_grad=True)


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"block": None},
        {"scales": torch.float8_e8m0fnu},
        {"gated": False},
        {"swiglu_limit": 0.5},
        {"swiglu_limit": 0.5, "swiglu_alpha": 1.702},
    ],
    ids=str,
)
@pytest.mark.parametrize("at_once", [2**28, 1])
def test_computed_as_dequantised(how, at_once, experts, monkeypatch):
    monkeypatch.setattr(fp8, "_AT_ONCE", at_once)  # 1: an expert at a time
    module = experts(**how)
    x, index, gates = case()
    results = []
    for compute in (module, lambda *given: expected(module, *given)):
        x.grad = gates.grad = None
        y = compute(x, index, gates)
        y.square().sum().backward()
        results.append((y.detach(), x.grad, gates.grad))
    for found, wanted in zip(*results, strict=True):
        assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max()


def test_experts_that_nobody_chose_are_not_dequantised(experts, monkeypatch):
    module, seen = experts(), []
    plain = fp8.dequantised
    monkeypatch.setattr(fp8, "dequantised", lambda weight, *rest: seen.append(weight.shape[0]) or plain(weight, *rest))
    x, index, gates = case()
    module(x, torch.where(index < E, index % 2, E), gates)
    assert seen == [2, 2]
    module(x, torch.full_like(index, E), gates).sum().backward()
    assert not x.grad.any()


def test_bfloat16_and_no_tokens(experts):
    module = experts()
    x, index, gates = case()
    wanted = expected(module, x, index, gates)
    y = module(x.bfloat16(), index, gates)
    assert y.dtype == torch.bfloat16
    assert (y - wanted).abs().max() <= 0.03 * wanted.abs().max()
    assert module(x[:0], index[:0], gates[:0]).shape == (0, H)


def test_dequantised_when_loaded(experts):
    module = experts()
    x, index, gates = case()
    wanted = module(x, index, gates)
    for name in ("gate_up_proj", "down_proj"):
        getattr(module, name).data = whole(module, name)
    assert (module(x, index, gates) - wanted).abs().max() <= 1e-6 * wanted.abs().max()


def test_four_bits_are_refused(experts):
    module = copy.deepcopy(experts())
    module.down_proj = torch.nn.Parameter(torch.zeros(E, H, F // 2, dtype=torch.int8), requires_grad=False)
    with pytest.raises(TypeError, match=r"Fp8.down_proj: expected weights in fp8, got torch.int8, as fp4 is packed"):
        module(*case())
