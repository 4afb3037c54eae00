"""Experts whose weights are codes: exact for the decoded values, and never decoded as a whole."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from big_allocations import BigAllocations
from helpers import saved_bytes
from hypothesis import given

import dmoe
from dmoe.functional import moe_mlp
from dmoe.ops.weight_formats import FORMATS, decode, encode


def quantized(weight, form, columns=None, interleaved=False, zeros=False):
    """A weight ``(E, [2,] N, K)`` as codes."""
    rows = weight.flatten(1, -2)
    if interleaved:
        rows = weight.transpose(1, 2).flatten(1, 2)
    block = FORMATS[form].block(weight.shape[-1])
    block = block if columns is None else (block[0], columns)
    codes, scales, zero_points = encode(rows.contiguous(), form, block, zeros)
    return dmoe.QuantizedWeight(codes, scales, form, tuple(weight.shape), block, zero_points, interleaved)


@st.composite
def cases(draw):
    """Arguments, the quantised weights, and the options."""
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    form = draw(st.sampled_from(sorted(FORMATS)))
    step = 64 if form in ("nf4", "int4") else 32 if form == "mxfp4" else 1
    hidden = draw(st.integers(1, 3)) * step + (draw(st.integers(0, 9)) if step == 1 else 0)
    ffn = draw(st.integers(1, 2)) * step + (draw(st.integers(0, 9)) if step == 1 else 0)
    experts, tokens = draw(st.integers(1, 4)), draw(st.integers(0, 7))
    gated, biased = draw(st.booleans()), draw(st.booleans())
    layout = draw(st.sampled_from(["one", "apart", "interleaved"])) if gated else "one"

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    up = normal(experts, *((2,) if gated else ()), ffn, hidden) / hidden**0.5
    zeros = form == "int4" and draw(st.booleans())
    weights = {"down_proj": quantized(normal(experts, hidden, ffn) / ffn**0.5, form, zeros=zeros)}
    if layout == "apart":
        weights |= {"gate_proj": quantized(up[:, 0], form), "up_proj": quantized(up[:, 1], form)}
    else:
        weights["up_proj"] = quantized(up, form, interleaved=layout == "interleaved", zeros=zeros)
    biases = {"up_bias": normal(*up.shape[:-1]), "down_bias": normal(experts, hidden)} if biased else {}
    plain = draw(st.booleans())  # one of the projections may be a tensor beside codes
    if plain:
        weights["down_proj"] = weights["down_proj"].dequantize(torch.float64)
    rank = draw(st.integers(0, 3))
    factors = []
    if rank:
        shapes = (experts, rank, hidden), (*up.shape[:-1], rank), (experts, rank, ffn), (experts, hidden, rank)
        factors = [normal(*shape) for shape in shapes]
    options = {
        "activation": draw(st.sampled_from(["silu", "gelu", "relu_squared"])),
        "gate_weight_on": draw(st.sampled_from(["output", "activation", "input"])),
        "backend": draw(st.sampled_from([None, "grouped", "torch"])),
        "recompute": draw(st.booleans()),
        "capacity": draw(st.sampled_from([None, 2])),
    }
    indices = torch.randint(0, experts + 1, (tokens, 2), generator=g)
    return (
        normal(tokens, hidden),
        indices,
        torch.rand(tokens, 2, generator=g).double(),
        weights,
        biases,
        factors,
        options,
    )


def decoded(weight):
    """The tensor that codes stand for, in float64."""
    return weight.dequantize(torch.float64) if isinstance(weight, dmoe.QuantizedWeight) else weight


@given(cases())
def test_forward_and_gradients_are_those_of_the_decoded_weights(case):
    x, indices, gates, weights, biases, factors, options = case
    gated = "gate_proj" in weights or len(weights["up_proj"].shape) == 4
    tensors = [t.requires_grad_() for t in (x, gates, *biases.values(), *factors)]
    adapters = dmoe.Adapters(dmoe.LowRank(*factors[:2], 0.5), dmoe.LowRank(*factors[2:], 2.0)) if factors else None
    experts = dmoe.ExpertWeights(**weights, **biases, gated=gated)
    y = moe_mlp(x, indices, gates, experts, adapters=adapters, **options)
    # The oracle: dense float64 matrices, with the adapters multiplied out, by plain PyTorch under autograd.
    dense = {name: decoded(weight) for name, weight in weights.items()}
    if "gate_proj" in dense:
        dense["up_proj"] = torch.stack([dense.pop("gate_proj"), dense["up_proj"]], 1)
    if factors:
        dense["up_proj"] = dense["up_proj"] + 0.5 * torch.einsum("e...r,eri->e...i", factors[1], factors[0])
        dense["down_proj"] = dense["down_proj"] + 2.0 * torch.einsum("eor,eri->eoi", factors[3], factors[2])
    plain = {**options, "backend": "reference", "recompute": False}
    expected = moe_mlp(x, indices, gates, dmoe.ExpertWeights(**dense, **biases, gated=gated), **plain)
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)
    weigh = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view_as(y)
    ours = torch.autograd.grad((y * weigh).sum(), tensors, materialize_grads=True)
    theirs = torch.autograd.grad((expected * weigh).sum(), tensors, materialize_grads=True)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("form", sorted(FORMATS))
def test_a_step_makes_nothing_as_large_as_the_experts_and_keeps_no_codes(form):
    experts, hidden, ffn, rank = 16, 128, 128, 4
    g = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=g)

    up, down = (quantized(normal(*s), form) for s in ((experts, 2, ffn, hidden), (experts, hidden, ffn)))
    shapes = (experts, rank, hidden), (experts, 2, ffn, rank), (experts, rank, ffn), (experts, hidden, rank)
    factors = [normal(*shape).requires_grad_() for shape in shapes]
    x, gates = normal(24, hidden).requires_grad_(), torch.rand(24, 2, generator=g)
    indices = torch.randint(0, experts, (24, 2), generator=g)
    adapters = dmoe.Adapters(dmoe.LowRank(*factors[:2]), dmoe.LowRank(*factors[2:]))
    held = (x, up.codes, up.scales, down.codes, down.scales, *factors)
    with BigAllocations(experts * hidden * ffn) as big, saved_bytes(held) as saved:
        y = moe_mlp(x, indices, gates, dmoe.ExpertWeights(up, down), adapters=adapters)
        y.sum().backward()
    assert not big.found
    rows = indices.numel()
    assert saved.total <= rows * (2 * ffn + 2 * rank) * 4 + 64 * rows  # the last: the plan and the gate weights


def test_what_does_not_fit_is_said():
    weight = torch.randn(2, 2, 64, 64)
    up, down = quantized(weight, "nf4"), quantized(torch.randn(2, 64, 64), "nf4")
    with pytest.raises(ValueError, match=r"QuantizedWeight: format: expected one of .*, got 'int3'"):
        dmoe.QuantizedWeight(up.codes, up.scales, "int3", (2, 2, 64, 64), (1, 64))
    with pytest.raises(ValueError, match=r"QuantizedWeight: shape: expected \(E, 2, F, H\) or \(E, N, K\), got"):
        dmoe.QuantizedWeight(up.codes, up.scales, "nf4", (2, 3, 64, 64), (1, 64))
    with pytest.raises(ValueError, match=r"QuantizedWeight: codes: expected shape \(2, 128, 32\) for a nf4 .* got"):
        dmoe.QuantizedWeight(up.codes[:, :3], up.scales, "nf4", (2, 2, 64, 64), (1, 64))
    with pytest.raises(TypeError, match=r"QuantizedWeight: codes: expected torch.uint8 for nf4, got torch.int8"):
        dmoe.QuantizedWeight(up.codes.view(torch.int8), up.scales, "nf4", (2, 2, 64, 64), (1, 64))
    with pytest.raises(TypeError, match=r"QuantizedWeight: scales: expected torch.float32 .* for nf4, got torch.uint8"):
        dmoe.QuantizedWeight(up.codes, up.scales.to(torch.uint8), "nf4", (2, 2, 64, 64), (1, 64))
    with pytest.raises(TypeError, match=r"QuantizedWeight: zeros: expected None for nf4, got torch.bfloat16"):
        dmoe.QuantizedWeight(up.codes, up.scales, "nf4", (2, 2, 64, 64), (1, 64), up.scales)
    with pytest.raises(ValueError, match=r"QuantizedWeight: scales: expected on cpu like codes, got meta"):
        dmoe.QuantizedWeight(up.codes, up.scales.to("meta"), "nf4", (2, 2, 64, 64), (1, 64))
    with pytest.raises(ValueError, match=r"ExpertWeights: down_proj: expected shape"):
        dmoe.ExpertWeights(up, quantized(torch.randn(2, 128, 64), "nf4"))
    with pytest.raises(ValueError, match=r"ExpertWeights: up_proj: expected a tensor with ffn_sizes="):
        dmoe.ExpertWeights(up, torch.randn(64, 128), ffn_sizes=(64, 64))
    experts = dmoe.ExpertWeights(up, down)
    x, indices, gates = torch.randn(3, 64), torch.zeros(3, 1, dtype=torch.long), torch.ones(3, 1)
    with pytest.raises(ValueError, match=r"backend: expected None, grouped or torch beside weights that are codes"):
        moe_mlp(x, indices, gates, experts, backend="reference")
    with pytest.raises(ValueError, match=r"main_grads: expected None beside weights that are codes"):
        moe_mlp(x, indices, gates, experts, main_grads=[None, None])


def test_parts_and_single_experts():
    weight = torch.randn(4, 2, 64, 128)
    up, down = quantized(weight, "int4", 32, zeros=True), quantized(torch.randn(4, 128, 64), "fp8")
    experts = dmoe.ExpertWeights(up, down)
    assert (experts.num_experts, experts.hidden_size, experts.dtype, experts.is_quantized) == (4, 128, None, True)
    halves = experts.parts(2)
    torch.testing.assert_close(halves[1].up_proj.dequantize(), up.dequantize()[2:], rtol=0, atol=0)
    torch.testing.assert_close(experts.of_expert(3)["down_proj"], down.dequantize()[3], rtol=0, atol=0)
    rows = decode(up.codes, up.scales, up.zeros, "int4", (1, 32), torch.float32)
    torch.testing.assert_close(up.dequantize(), rows.view(4, 2, 64, 128), rtol=0, atol=0)
    assert up.nbytes == 4 * 128 * 128 // 2 + 2 * up.scales.numel() * up.scales.element_size()
