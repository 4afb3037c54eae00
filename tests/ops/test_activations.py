"""Activations with numbers of their own: as values, as text, and what every implementation makes of them."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import pickle

import oracle
import pytest
import torch
from helpers import interpreted, small_config
from moe_mlp_cases import CASE, WITH_NUMBERS, build, truth
from moe_mlp_kernel_cases import small_blocks

from dmoe import ClampedSwiGLU, ExpertWeights, MoE, MoEConfig, SoftcappedSwiGLU, plan_token_choice
from dmoe.activations import NAMES, activation_of, kind_and_numbers
from dmoe.checkpoint.files import read_file
from dmoe.functional import moe_mlp, run_experts
from dmoe.ops.activation import activate, activate_backward
from dmoe.ops.moe_mlp import moe_mlp as moe_mlp_op
from dmoe.ops.moe_mlp_cuda import moe_mlp_backward_cuda, moe_mlp_cuda
from dmoe.ops.moe_mlp_ref import moe_mlp_backward_ref, moe_mlp_ref

GPT_OSS, DEEPSEEK_V4, INKLING_2 = ClampedSwiGLU(), ClampedSwiGLU(10, 1, 0), SoftcappedSwiGLU(4, 25)
VALUES = (GPT_OSS, DEEPSEEK_V4, INKLING_2, ClampedSwiGLU(0.1, 1e-7, -0.5))
TEXTS = [str(value) for value in VALUES]


def test_values_are_text_for_operations_and_files():
    assert str(GPT_OSS) == "clamped_swiglu(7.0,1.702,1.0)"
    assert str(INKLING_2) == "softcapped_swiglu(4.0,25.0)"
    assert kind_and_numbers(TEXTS[3]) == ("clamped_swiglu", (0.1, 1e-7, -0.5))
    assert kind_and_numbers("relu_squared") == ("relu_squared", ())
    for value in VALUES:
        as_json = json.loads(json.dumps(dataclasses.asdict(value)))
        for form in (value, str(value), as_json, copy.deepcopy(value), pickle.loads(pickle.dumps(value))):
            found = activation_of(form, "test", gated=True)
            assert (found, str(found), hash(found)) == (value, str(value), hash(value))


@pytest.mark.parametrize("value", VALUES, ids=str)
def test_a_config_holds_the_value_whatever_names_it(value, tmp_path):
    config = MoEConfig(8, 4, 4, activation=value)
    for written in (str(value), dataclasses.asdict(value)):
        assert MoEConfig(8, 4, 4, activation=written) == config
    assert config.activation is value
    fields = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    text = json.dumps({**fields, "router": config.family.name, "activation": str(config.activation)})
    assert MoEConfig(**json.loads(text)) == config
    torch.save({"config": config}, tmp_path / "held.pt")
    assert read_file(tmp_path / "held.pt") == {"config": config}
    assert str(value) in str(MoE(config).experts)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ClampedSwiGLU(0), "ClampedSwiGLU: limit: expected a finite number above 0, got 0"),
        (lambda: ClampedSwiGLU(math.inf), "ClampedSwiGLU: limit: expected a finite number above 0, got inf"),
        (lambda: ClampedSwiGLU(True), "ClampedSwiGLU: limit: expected a finite number above 0, got True"),
        (lambda: ClampedSwiGLU(alpha=-1.0), "ClampedSwiGLU: alpha: expected a finite number above 0, got -1.0"),
        (lambda: ClampedSwiGLU(up_offset=math.nan), "ClampedSwiGLU: up_offset: expected a finite number, got nan"),
        (lambda: SoftcappedSwiGLU("4", 25), "SoftcappedSwiGLU: gate_cap: expected a finite number above 0, got '4'"),
        (lambda: SoftcappedSwiGLU(4, 1e39), "SoftcappedSwiGLU: up_cap: expected a finite number above 0, got 1e.39"),
        (lambda: kind_and_numbers("clamped_swiglu(7, 1.702, 1.0)"), "moe_mlp: activation: expected gelu, .*, got 'cla"),
        (lambda: kind_and_numbers("clamped_swiglu(-7.0,1.702,1.0)"), "moe_mlp: activation: expected gelu, .*, got 'cl"),
        (lambda: kind_and_numbers("clamped_swiglu"), "moe_mlp: activation: expected gelu, .*, got 'clamped_swiglu'"),
        (lambda: kind_and_numbers("silu(1.0)"), r"moe_mlp: activation: expected gelu, .*, got 'silu\(1.0\)'"),
        (
            lambda: kind_and_numbers("softcapped_swiglu(4.0,25.0)\n"),
            "moe_mlp: activation: expected gelu, .*, got 'soft",
        ),
    ],
)
def test_bad_numbers_and_bad_text_are_named(make, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        make()


@pytest.mark.parametrize("backend", [None, "torch", "reference", "block_sparse"])
def test_without_a_gate_they_are_refused_by_name(backend):
    x, indices, gates = torch.randn(3, 4), torch.zeros(3, 1, dtype=torch.int64), torch.ones(3, 1)
    weights = ExpertWeights(torch.randn(1, 16, 4), torch.randn(1, 4, 16), gated=False)
    for given, message in ((GPT_OSS, "one of gelu, .* silu with gated=False, got Clamped"), ("tanh", "gelu, .*'tanh'")):
        with pytest.raises(ValueError, match=f"moe_mlp: activation: expected {message}"):
            moe_mlp(x, indices, gates, weights, activation=given, backend=backend)


def test_the_compiled_operation_refuses_them_without_a_gate():
    arguments, *_ = build({**CASE, "gated": False, "activation": TEXTS[0]}, torch.float32)
    with pytest.raises((RuntimeError, ValueError)):
        torch.ops.dmoe.moe_mlp(*arguments)


def through_one_expert(backend):
    """Gate and up of every row as given, ``(N,)``, through one expert whose projections are the identity."""

    def run(gate, up, activation):
        x = torch.stack([gate, up], 1)
        eye = torch.eye(2, dtype=x.dtype).view(1, 2, 1, 2)
        weights = ExpertWeights(eye, torch.ones(1, 2, 1, dtype=x.dtype))
        plan = plan_token_choice(torch.zeros(len(x), 1, dtype=torch.int32), 1)
        ones = torch.ones(len(x), 1, dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)
        return run_experts(x, plan, ones, weights, activation=activation, backend=backend)[:, 0]

    return run


@pytest.mark.parametrize("backend", [None, "torch", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("value", VALUES, ids=str)
def test_value_and_slopes_over_the_whole_range(value, dtype, backend):
    """Against the formula in float64 and autograd through it, either factor's argument over [-100, 100] and near 0."""
    torch.manual_seed(0)
    line = torch.cat([torch.linspace(-100, 100, 2001), torch.linspace(-3, 3, 2001), torch.logspace(-12, 0, 200)])
    gate, up = line.to(dtype), line[torch.randperm(len(line))].to(dtype)
    mine = gate.clone().requires_grad_(), up.clone().requires_grad_()
    y = through_one_expert(backend)(*mine, value)
    grads = torch.autograd.grad(y.sum(), mine)
    exact = gate.double().requires_grad_(), up.double().requires_grad_()
    kind, numbers = kind_and_numbers(str(value))
    expected = oracle.GATED[kind](*exact, *numbers)
    slopes = torch.autograd.grad(expected.sum(), exact)
    eps = torch.finfo(dtype).eps
    # Small ones keep their digits, too; an exponential's error is that of its argument, and in float32 it ends at -87.
    relative = 8 + 2 * gate.double().abs()
    assert ((y - expected).abs() <= relative * eps * expected.abs() + 1e-34).all()
    other = (oracle.GATED[kind](line.double(), line.double(), *numbers)).abs().sqrt().max()
    for got, slope in zip(grads, slopes, strict=True):
        assert ((got - slope).abs() <= 16 * eps * (slope.abs() + other * other)).all()
    wide = torch.stack([gate, up], 1).double()
    torch.testing.assert_close(activate(wide, str(value), True)[:, 0], expected.detach(), rtol=1e-12, atol=1e-300)


@pytest.mark.parametrize("backend", [None, "torch", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_a_clamp_passes_gradients_on_at_its_limits_and_stops_them_beyond(dtype, backend):
    """PyTorch's derivative of clamp, on numbers that every dtype holds."""
    gate = torch.tensor([7.0, 7.0, 7.25, -9.0, 1.0, 1.0, 1.0, 1.0], dtype=dtype, requires_grad=True)
    up = torch.tensor([1.0, 2.0, 1.0, 1.0, 7.0, 7.25, -7.0, -7.25], dtype=dtype, requires_grad=True)
    y = through_one_expert(backend)(gate, up, GPT_OSS)
    of_gate, of_up = torch.autograd.grad(y.sum(), (gate, up))
    assert ((of_gate != 0) == torch.tensor([True, True, False, True, True, True, True, True])).all()
    assert ((of_up != 0) == torch.tensor([True, True, True, True, True, False, True, False])).all()
    exact = gate.detach().double().requires_grad_(), up.detach().double().requires_grad_()
    expected = torch.autograd.grad(oracle.clamped_swiglu(*exact, 7.0, 1.702, 1.0).sum(), exact)
    tolerance = 1e-2 if dtype == torch.bfloat16 else 1e-5
    for got, right in zip((of_gate, of_up), expected, strict=True):
        torch.testing.assert_close(got.double(), right, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("backend", [None, "torch", "reference"])
@pytest.mark.parametrize("activation", [*TEXTS, *NAMES])
def test_nan_stays_nan(activation, backend):
    """Each number is the bias of an expert of its own, whose projections are zeros: NaN spreads to nothing else."""
    number, nan = torch.tensor([0.5, 100.0, -100.0]), torch.full((3,), math.nan)
    weights = ExpertWeights(torch.zeros(6, 2, 1, 1), torch.ones(6, 1, 1))
    plan, x, gates = plan_token_choice(torch.arange(6).unsqueeze(1), 6), torch.zeros(6, 1), torch.ones(6, 1)
    bias = torch.stack([torch.cat([nan, number]), torch.cat([number, nan])], 1).unsqueeze(2).requires_grad_()
    held = dataclasses.replace(weights, up_bias=bias)
    y = run_experts(x, plan, gates, held, activation=activation, backend=backend)
    assert y.isnan().all()
    (grad,) = torch.autograd.grad(y.sum(), bias)
    assert grad[:3, 1].isnan().all() or "softcapped" not in activation  # what is beyond a limit has none
    assert grad[0, 1].isnan() or "(0.1" in activation


@pytest.mark.parametrize("activation", [*TEXTS, *WITH_NUMBERS, "relu_squared"])
def test_the_derivative_in_plain_pytorch_is_the_formulas(activation):
    gated = activation != "relu_squared"
    pre = (4 * torch.randn(40, 6, dtype=torch.float64)).requires_grad_()
    grad = torch.randn(40, 3 if gated else 6, dtype=torch.float64)
    (expected,) = torch.autograd.grad(activate(pre, activation, gated), pre, grad)
    torch.testing.assert_close(activate_backward(grad, pre.detach(), activation, gated), expected)


@pytest.mark.parametrize("gate_on", ["output", "activation", "input"])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("activation", [*NAMES, *WITH_NUMBERS])
def test_every_activation_with_every_place_of_the_gate_weight(activation, gated, gate_on):
    """Whatever computes: compiled, composed, and the reference, against loops in float64."""
    if not gated and activation in WITH_NUMBERS:
        return
    case = {**CASE, "activation": activation, "gated": gated, "gate_on": gate_on}
    arguments, grad, indices, kept = build(case, torch.float64)
    expected = truth(case, arguments, grad, indices, kept, torch.float64, torch.float64)
    for backend in (None, "torch", "reference"):
        given = [tensor.clone().requires_grad_() for tensor in arguments[:6]]
        y = moe_mlp_op(*given, *arguments[6:], backend=backend)
        y.backward(grad)
        for got, right in zip([y.detach(), *(tensor.grad for tensor in given)], expected, strict=False):
            torch.testing.assert_close(got, right, rtol=1e-10, atol=1e-10)


@interpreted
@pytest.mark.parametrize(
    ("weights", "activation", "dtype"),
    [
        ("interleaved, transposed", TEXTS[0], torch.float32),
        ("plain", TEXTS[1], torch.float16),
        ("interleaved", TEXTS[2], torch.float32),
    ],
    ids=str,
)
def test_kernels_with_every_option_at_once(weights, activation, dtype):
    """Bias, weighed activation, and large values, so that limits are met, against the reference in float64."""
    case = {**CASE, "hidden": 33, "sizes": 40, "activation": activation, "gate_on": "activation", "weights": weights}
    arguments, grad, *_ = build(case, dtype)
    wide = [a.double() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in arguments]
    y, pre = moe_mlp_ref(*wide)
    assert (pre.abs() > 7).any()
    expected = [y, *moe_mlp_backward_ref(grad.double(), pre, True, *wide)]
    with small_blocks(16, 16, 2, 16, 2):
        y, pre = moe_mlp_cuda(*arguments)
        found = [y, *moe_mlp_backward_cuda(grad, pre, True, *arguments)]
    tolerance = 1e-4 if dtype == torch.float32 else 5e-2
    for got, right in zip(found, expected, strict=True):
        if right.numel():
            assert (got.double() - right).norm() <= tolerance * right.norm()


def test_a_layer_trains_with_them_and_so_does_its_shared_expert():
    torch.manual_seed(0)
    config = small_config(activation=ClampedSwiGLU(2.0), shared_ffn_hidden_size=8, bias="expert")
    layer, x = MoE(config), torch.randn(2, 5, config.hidden_size)
    plain = MoE(dataclasses.replace(config, activation="silu"))
    plain.load_state_dict(layer.state_dict())
    slow = MoE(dataclasses.replace(config, backend="reference"))
    slow.load_state_dict(layer.state_dict())
    y, other, expected = layer(x), plain(x), slow(x)
    assert not torch.allclose(y, other)
    torch.testing.assert_close(y, expected)
    for each, result in ((layer, y), (slow, expected)):
        result.square().sum().backward()
        each.take_aux_loss()
    for (name, mine), theirs in zip(layer.named_parameters(), slow.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, msg=lambda text, name=name: f"{name}: {text}")


def test_a_compiled_call_takes_the_value():
    arguments, grad, indices, _ = build({**CASE, "bias": False}, torch.float32)
    weights = ExpertWeights(arguments[2], arguments[3])
    x, gates, indices = arguments[0].requires_grad_(), arguments[1], torch.tensor(indices)

    @torch.compile(backend="aot_eager", fullgraph=True)
    def run(x, activation):
        return moe_mlp(x, indices, gates, weights, activation=activation)

    for activation in (ClampedSwiGLU(1.0), INKLING_2):
        y, expected = run(x, activation), moe_mlp(x, indices, gates, weights, activation=activation)
        torch.testing.assert_close(y, expected)
        torch.testing.assert_close(*(torch.autograd.grad(each, x, grad)[0] for each in (y, expected)))
