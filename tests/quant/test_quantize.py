"""A model's experts become codes and come back: what is computed, how much memory it takes, what is refused."""

from __future__ import annotations

import pytest
import quantized_cases as cases
import torch
from big_allocations import BigAllocations, Peak, peaks_can_be_read
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import dmoe
from dmoe import MoE
from dmoe.ops.weight_formats import FORMATS
from dmoe.quant import QuantizedProjection, assign, dequantize, quantize

SIZES = {"hidden_size": 128, "ffn_hidden_size": 64, "num_experts": 4, "top_k": 2}
NAMES = ["experts.gate_up_proj", "experts.down_proj"]


def layer_of(seed=0, **fields):
    torch.manual_seed(seed)
    options = {name: fields.pop(name) for name in ("dtype", "device") if name in fields}
    return MoE(**{**SIZES, "load_balancing_coefficient": 0.0, **fields}, **options)


def with_decoded(layer):
    """A layer in float64 whose experts are the values that codes' bits say; the router is this layer's."""
    twin = MoE(layer.config, dtype=torch.float64)
    state = {name: value.double() for name, value in layer.state_dict().items() if ".codes" not in name}
    for name, module in layer.named_modules():
        if isinstance(module, QuantizedProjection):
            value = module.value()
            parts = value.codes, value.scales, value.zeros, value.format, value.block
            state[name] = cases.decoded(*parts, torch.float64).view(value.shape)
    twin.load_state_dict({name: value for name, value in state.items() if name in twin.state_dict()})
    return twin


def run(layer, x, indices):
    x = x.detach().clone().requires_grad_()
    y = layer(x, expert_indices=indices)
    (grad,) = torch.autograd.grad((y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum(), x)
    return y.detach(), grad


@given(
    format=st.sampled_from(list(FORMATS)),
    group=st.sampled_from([None, 32, 64]),
    gated=st.booleans(),
    bias=st.sampled_from(["none", "expert", "output"]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    tokens=st.sampled_from([0, 1, 33]),
    shared=st.booleans(),
    seed=st.integers(0, 9),
)
@settings(max_examples=40)
def test_a_layer_computes_with_the_decoded_values(format, group, gated, bias, dtype, tokens, shared, seed):
    group = group if format == "int4" else None
    fields = {"gated": gated, "activation": "silu" if gated else "gelu", "bias": bias, "dtype": dtype}
    layer = layer_of(seed, shared_ffn_hidden_size=64 if shared else None, **fields)
    zero_points = format == "int4" and seed % 2 == 0
    names = quantize(layer, format, targets=["*"], group=group, zero_points=zero_points)
    assert names == [n for n, m in layer.named_modules() if isinstance(m, QuantizedProjection)]
    assert len(names) == (4 if shared else 2)
    x = torch.randn(tokens, 128, dtype=dtype)
    indices = torch.randint(0, 4, (tokens, 2), dtype=torch.int32)
    got, exact = run(layer, x, indices), run(with_decoded(layer), x.double(), indices)
    for mine, true in zip(got, exact, strict=True):
        tolerance = 1e-12 if dtype == torch.float64 else 1e-5
        assert (
            (mine.double() - true).abs().max() <= tolerance * true.abs().max() if tokens else mine.shape == true.shape
        )


@pytest.mark.parametrize("format", FORMATS)
def test_back_again(format):
    layer = layer_of(dtype=torch.bfloat16, bias="expert")
    names = quantize(layer, format)
    assert names == NAMES
    values = {name: layer.get_submodule(name).value().dequantize(torch.bfloat16) for name in names}
    x = torch.randn(9, 128, dtype=torch.bfloat16)
    before = layer(x)
    assert dequantize(layer) == names
    assert dequantize(layer) == []
    for name, value in values.items():
        parameter = layer.get_parameter(name)
        assert isinstance(parameter, nn.Parameter)
        assert not parameter.requires_grad
        assert dmoe.is_expert_param(parameter)
        assert torch.equal(parameter, value)
    torch.testing.assert_close(layer(x), before, rtol=2e-2, atol=2e-3)
    assert set(layer.state_dict()) == set(layer_of(bias="expert").state_dict())
    quantize(layer, format)
    dequantize(layer, torch.float64)
    assert layer.experts.down_proj.dtype == torch.float64


def test_targets():
    for targets, expected in (
        (["experts"], NAMES),
        (["experts.down"], NAMES[1:]),
        (["*.up"], ["experts.gate_up_proj", "shared_expert.mlp.gate_up_proj"]),
        (["shared_expert"], ["shared_expert.mlp.gate_up_proj", "shared_expert.mlp.down_proj"]),
    ):
        layer = layer_of(shared_ffn_hidden_size=64)
        assert quantize(layer, "int8", targets=targets) == expected
        layer(torch.randn(3, 128)).sum().backward()
        trained = {name for name, parameter in layer.named_parameters() if parameter.grad is not None}
        everything = {name for name, _ in layer_of(shared_ffn_hidden_size=64).named_parameters()}
        assert trained == everything - set(expected)
    seen = []
    quantize(layer_of(), "int8", progress=lambda names, total: seen.append(total) or names)
    assert seen == [2]


def test_gradients_reach_biases_router_and_input_alone():
    layer = layer_of(bias="expert")
    quantize(layer, "nf4")
    assert {name for name, _ in layer.named_parameters()} == {
        "router.weight", "experts.gate_up_bias", "experts.down_bias",
    }  # fmt: skip
    x = torch.randn(20, 128, requires_grad=True)
    layer(x).sum().backward()
    assert all(parameter.grad is not None for parameter in layer.parameters())
    assert x.grad is not None
    with torch.no_grad():
        assert torch.equal(layer.eval()(x), layer.eval()(x))


def test_main_grads_and_a_reset():
    layer = layer_of(accumulate_main_grad=True)
    quantize(layer, "nf4")
    layer(torch.randn(3, 128)).sum().backward()  # no buffers, as nothing is trained
    before = layer.experts.gate_up_proj.codes.clone()
    layer.experts.reset_parameters()
    assert torch.equal(layer.experts.gate_up_proj.codes, before)


@pytest.mark.parametrize("format", FORMATS)
def test_no_second_copy_of_all_experts_is_made(format):
    layer = layer_of(hidden_size=128, ffn_hidden_size=128, num_experts=32)
    one = layer.experts.down_proj.nbytes
    with BigAllocations(one, *layer.parameters()) as seen:
        quantize(layer, format)
    assert not seen.found
    held = layer.get_submodule(NAMES[1])
    assert held.value().nbytes < one * (0.27 if FORMATS[format].bits == 8 else 0.15)


@pytest.mark.skipif(not peaks_can_be_read(), reason="needs Linux' own count of a process's memory")
def test_what_was_weights_is_given_back_projection_by_projection():
    model = nn.Sequential(*(layer_of(hidden_size=512, ffn_hidden_size=1024, num_experts=8) for _ in range(3)))
    layer_bytes = sum(p.nbytes for p in model[0].experts.parameters())
    quantize(layer_of(hidden_size=512, ffn_hidden_size=1024, num_experts=8), "nf4")  # libraries' own memory
    with Peak() as peak:
        quantize(model, "nf4")
    assert peak.bytes < layer_bytes  # of three; most of it is what one expert takes on the way


def test_meta():
    layer = layer_of(device="meta")
    assert quantize(layer, "mxfp4") == NAMES
    assert layer.experts.down_proj.codes.is_meta
    real = layer_of()
    quantize(real, "mxfp4")
    layer.load_state_dict(real.state_dict(), assign=True)
    x = torch.randn(5, 128)
    assert torch.equal(layer(x), real(x))


def test_assign_takes_codes_as_they_are():
    layer, given_up = layer_of(), cases.random_weights("mxfp4", (1, 32), 4, 128, 128, seed=1)
    up = dmoe.QuantizedWeight(*given_up[:2], "mxfp4", (4, 2, 64, 128), (1, 32), interleaved=True)
    assign(layer.experts, up_proj=up)
    assert layer.experts.gate_up_proj.interleaved
    x = torch.randn(7, 128)
    y = layer(x)
    rows = cases.decoded(*given_up, "mxfp4", (1, 32), torch.float32)
    twin = layer_of()
    with torch.no_grad():
        twin.experts.gate_up_proj.copy_(torch.stack([rows[:, ::2], rows[:, 1::2]], 1))
    torch.testing.assert_close(y, twin(x))
    assign(layer.experts, up_proj=up)  # in place of codes
    dequantize(layer)
    assert torch.equal(layer.experts.gate_up_proj, twin.experts.gate_up_proj)
    with pytest.raises(ValueError, match=r"assign: down_proj: expected shape \(4, 128, 64\), got \(4, 2, 64, 128\)"):
        assign(layer.experts, down_proj=up)
    with pytest.raises(TypeError, match="assign: gate_up_proj: expected a QuantizedWeight, got Tensor"):
        assign(layer.experts, up_proj=rows)
    with pytest.raises(TypeError, match="assign: experts: expected a layer's experts, got MoE"):
        assign(layer, up_proj=up)


def test_what_is_refused_changes_nothing():
    done = layer_of()
    quantize(done, "int8")
    poisoned = layer_of()
    with torch.no_grad():
        poisoned.experts.down_proj[2, 1, 1] = float("inf")  # behind what would be quantised first
    for layer, options, error, message in (
        (layer_of(), {"format": "int3"}, ValueError, "quantize: format: expected one of int8, fp8"),
        (
            layer_of(),
            {"targets": ["router"]},
            ValueError,
            "quantize: targets: expected patterns of experts.up, .*got 'router'",
        ),
        (layer_of(), {"targets": "experts"}, TypeError, "quantize: targets: expected a sequence of patterns"),
        (layer_of(), {"targets": ["shared_expert"]}, ValueError, "expected experts that targets .* name, found none"),
        (nn.Linear(3, 3), {}, ValueError, "expected experts that targets .* name, found none"),
        (layer_of(), {"format": "int4", "group": 48}, ValueError, "experts.gate_up_proj: block: expected"),
        (layer_of(ffn_hidden_size=40), {}, ValueError, "experts.down_proj: nf4: expected a multiple of 64 columns"),
        (layer_of(ffn_hidden_size=[64, 32, 64, 64]), {}, ValueError, "expected experts of one width, got"),
        (layer_of(backend="reference"), {}, ValueError, "expected backend None, 'grouped' or 'torch', got 'reference'"),
        (done, {}, ValueError, "experts.gate_up_proj: expected a weight, got codes of int8 1x128: .*dequantize"),
        (layer_of(), {"zero_points": True}, ValueError, "encode: zero_points: expected False"),
        (poisoned, {}, ValueError, "experts.down_proj: expected finite values, got others in expert 2"),
    ):
        before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
        with pytest.raises(error, match=message):
            quantize(layer, **options)
        after = layer.state_dict()
        assert before.keys() == after.keys()
        assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_weights_come_back_in_the_dtype_that_the_rest_of_the_model_has_now():
    layer = layer_of(bias="expert")
    quantize(layer, "int8")
    layer.bfloat16()
    assert len(dequantize(layer)) == 2
    assert {p.dtype for p in layer.experts.parameters()} == {torch.bfloat16}
    layer(torch.randn(5, layer.config.hidden_size, dtype=torch.bfloat16))
