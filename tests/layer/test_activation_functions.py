"""Python functions as activations: values and gradients against loops, what is refused, what becomes a name."""

from __future__ import annotations

import copy
import dataclasses
import functools
import pickle
import types
from pathlib import Path

import oracle
import pytest
import torch
from doc_blocks import run_page
from helpers import saved_bytes, small_config
from hypothesis import given, settings
from moe_mlp_cases import CASE, build, cases, leaves, truth
from torch import nn

import dmoe
from dmoe import ExpertWeights, MoE, MoEConfig, plan_token_choice
from dmoe.activation_functions import check_function, name_of, read_given
from dmoe.activations import NAMES
from dmoe.functional import moe_mlp, run_experts
from dmoe.ops._moe_mlp_call import Call
from dmoe.ops.moe_mlp_composed import moe_mlp_composed
from dmoe.parallel import agreement

pytestmark = pytest.mark.filterwarnings("ignore:dmoe. a MoE layer ran a second training forward")
F = nn.functional
BACKENDS = (None, "torch", "reference")


def log_of_size(x):
    """Infinite at 0, where experts that are narrower, and rows without a token, have their pre-activation."""
    return x.abs().log()


def two_poles(x):
    """Infinite at 0 and at what the compositions put in the place of such numbers."""
    return x.abs().log() + 1 / (x - 0.5)


def own_relu(x):
    return _Through.apply(x)


class _Through(torch.autograd.Function):
    """relu's values, the identity's derivative."""

    @staticmethod
    def forward(ctx, x):
        return x.clamp(min=0)

    @staticmethod
    def backward(ctx, grad):
        return grad


# ----------------------------------------------------------------------------------------------------------- the values


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=15, deadline=None)
@given(case=cases())
def test_forward_and_backward_equal_the_loops(backend, case):
    functions = {"mish": F.mish, "log of size": log_of_size}
    if backend != "reference":  # whose autograd would multiply 0 by infinity
        functions["two poles"] = two_poles
    for name, function in functions.items():
        case = {**case, "activation": name}
        arguments, grad, indices, kept = build(case, torch.float64)
        exact = truth(case, arguments, grad, indices, kept, torch.float64, torch.float64)
        call = Call(*arguments)
        given = [call.x, call.gate_weights, *arguments[2:6], call.gate_proj]
        for tensor in given:
            if tensor is not None:
                tensor.requires_grad_()
        y = moe_mlp_composed(None, None, None, *call._replace(activation=function), backend=backend)
        y.backward(grad)
        found = [y.detach(), *(None if t is None else t.grad for t in given)]
        for got, right in zip(found, exact, strict=True):
            if right is not None:
                got = torch.zeros_like(right) if got is None else got
                torch.testing.assert_close(got, right, rtol=1e-9, atol=1e-9 * max(1, float(right.abs().sum())))


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("gate_on", ["output", "activation", "input"])
@pytest.mark.parametrize("backend", [None, "torch"])
def test_gradcheck_with_dropout_and_recomputation(gated, gate_on, backend):
    recompute = backend == "torch"
    x, gates = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((3, 2), (3, 2)))
    up = torch.randn(2, *((2,) if gated else ()), 3, 2, dtype=torch.float64, requires_grad=True)
    down = torch.randn(2, 2, 3, dtype=torch.float64, requires_grad=True)
    indices = torch.rand(3, 2).argsort(-1)

    def run(x, gates, up, down):
        torch.manual_seed(7)  # one mask
        return moe_mlp(
            x,
            indices,
            gates,
            ExpertWeights(up, down, gated=gated),
            activation=F.mish,
            gate_weight_on=gate_on,
            activation_dropout=0.3,
            expert_dropout=0.2,
            backend=backend,
            recompute=recompute,
        )

    assert torch.autograd.gradcheck(run, (x, gates, up, down))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_function_sees_float32_and_may_write_into_it(dtype):
    x, plan, gates, weights, grad = leaves(torch.float32)
    seen = []

    def into(x):
        seen.append((x.dtype, x.dim()))
        return F.mish(x, inplace=True)

    x = x.detach().to(dtype).requires_grad_()
    held = dataclasses.replace(
        weights, **{n: getattr(weights, n).to(dtype) for n in ("up_proj", "down_proj", "up_bias", "down_bias")}
    )
    results = []
    run_experts(x, plan, gates, held, activation=into)
    seen.clear()  # what looks at the function first has numbers of its own
    for function in (F.mish, into):
        y = run_experts(x, plan, gates, held, activation=function)
        results.append([y, *torch.autograd.grad(y, [x, gates], grad.to(dtype))])
    assert set(seen) == {(torch.float32, 2)}
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5 if dtype == torch.float32 else 1e-2, atol=1e-5)


def test_it_saves_what_a_named_activation_saves():
    x, plan, gates, weights, _ = leaves(torch.float32)
    bytes_of = []
    for activation in ("silu", F.mish):
        with saved_bytes() as saved:
            run_experts(x, plan, gates, weights, activation=activation)
        bytes_of.append(saved.total)
    assert bytes_of[0] == bytes_of[1] > 0


def test_nothing_is_differentiated_twice_but_by_the_reference():
    x, plan, gates, weights, _ = leaves()
    for backend in (None, "reference"):
        y = run_experts(x, plan, gates, weights, activation=F.mish, backend=backend)
        (grad,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        if backend is None:
            with pytest.raises(RuntimeError, match=r"differentiate twice|does not require grad"):
                grad.sum().backward()
        else:
            grad.square().sum().backward()


def test_weights_whose_gradients_come_later_get_them():
    x, plan, gates, weights, grad = leaves()
    grads = []
    for held in (weights, weights.deferred()):
        y = run_experts(x, plan, gates, held, activation=F.mish)
        grads.append(torch.autograd.grad(y, [x, weights.up_proj, weights.down_proj], grad))
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other)


# ------------------------------------------------------------------------------------------------------------ the layer


def test_a_layer_trains_with_a_function_and_so_does_its_shared_expert():
    torch.manual_seed(0)
    config = small_config(activation=nn.Mish(), shared_ffn_hidden_size=8, bias="expert")
    layer, x = MoE(config, dtype=torch.float64), torch.randn(2, 5, config.hidden_size, dtype=torch.float64)
    slow = MoE(dataclasses.replace(config, backend="reference"), dtype=torch.float64)
    slow.load_state_dict(layer.state_dict())
    for each in (layer, slow):
        each(x).square().sum().backward()
        each.take_aux_loss()
    for (name, mine), theirs in zip(layer.named_parameters(), slow.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, msg=lambda text, name=name: f"{name}: {text}")
    assert "gated torch.nn.modules.activation.Mish()" in str(layer)
    assert set(layer.state_dict()) == set(MoE(dataclasses.replace(config, activation="silu")).state_dict())


def test_the_page_runs_and_lists_every_name():
    layer = run_page("activations.md")["layer"]
    assert layer.experts.down_proj.grad.abs().sum() > 0
    text = (Path(__file__).resolve().parents[2] / "docs" / "activations.md").read_text()
    assert all(f'| `"{name}"` |' in text for name in NAMES)


def test_layers_with_a_function_are_copied_and_pickled():
    layer, x = MoE(small_config(activation=log_of_size)), torch.randn(5, small_config().hidden_size)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert other.config == layer.config
        assert torch.equal(other(x), layer(x))


def test_a_compiled_layer_breaks_its_graph_and_is_right():
    layer = MoE(small_config(activation=F.mish))
    x = torch.randn(5, layer.config.hidden_size)
    with pytest.raises(Exception, match=r"(?i)skip|disable"):
        torch.compile(layer, backend="aot_eager", fullgraph=True)(x)
    torch.compiler.reset()
    y = torch.compile(layer, backend="aot_eager")(x)
    torch.testing.assert_close(y, layer(x))
    grads = [torch.autograd.grad(each.sum(), layer.experts.down_proj)[0] for each in (y, layer(x))]
    torch.testing.assert_close(*grads)


def test_under_autocast():
    layer = MoE(small_config(activation=F.mish))
    x = torch.randn(5, layer.config.hidden_size)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), layer(x), rtol=5e-2, atol=5e-2)


# -------------------------------------------------------------------------------------------------- names and refusals


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (F.silu, "silu"),
        (nn.SiLU(), "silu"),
        (torch.relu_, "relu"),
        (nn.ReLU(inplace=True), "relu"),
        (torch.sigmoid, "sigmoid"),
        (lambda x: F.relu(x) ** 2, "relu_squared"),
        (functools.partial(F.gelu, approximate="tanh"), "gelu_tanh"),
        (lambda x: x * 0.5 * (1 + torch.erf(x * 0.5**0.5)), "gelu"),
        (F.mish, None),
        (own_relu, None),  # another derivative
        (lambda x: F.silu(x.float()).to(x.dtype), None),  # float32's rounding
        (lambda x: F.relu(x).clamp(max=100), None),
        (lambda x: F.silu(x).clamp(max=8000), None),
        (lambda x: torch.where(x.abs() > 8, F.silu(x) * 1.005, F.silu(x)), None),
        (lambda x: torch.where((x > 8.01) & (x < 24.9), 8.0, F.silu(x)), None),
        (lambda x: torch.where((x > 0.011) & (x < 0.039), 0.0, F.silu(x)), None),
        (lambda x: torch.where(x < -8.5, -1e-4, F.relu(x)), None),
        (nn.Sequential(nn.SiLU(), nn.Dropout(0.1)), None),
    ],
)
def test_a_function_becomes_the_name_of_what_it_computes(function, name):
    config = MoEConfig(8, 4, 4, activation=function)
    assert config.activation == (function if name is None else name)
    with torch.device("meta"), torch.inference_mode():
        assert read_given(copy.copy(function), "test", False) == config.activation or name is None


def test_a_module_with_a_hook_is_called():
    module, seen = nn.SiLU(), []
    module.register_forward_hook(lambda *_: seen.append(1))
    layer = MoE(small_config(activation=module))
    assert layer.config.activation is module
    seen.clear()
    layer(torch.randn(3, layer.config.hidden_size))
    assert seen


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (F.mish, "torch.nn.functional.mish"),
        (torch.tanh, "torch.tanh"),
        (log_of_size, f"{__name__}.log_of_size"),
        (nn.LeakyReLU(0.25), "torch.nn.modules.activation.LeakyReLU(negative_slope=0.25)"),
        (
            functools.partial(F.leaky_relu, negative_slope=0.5),
            "functools.partial(torch.nn.functional.leaky_relu, negative_slope=0.5)",
        ),
        (functools.partial(F.elu, nn.ELU(), 2.0), None),
        (dmoe.ClampedSwiGLU(), "clamped_swiglu(7.0,1.702,1.0)"),
    ],
)
def test_names_are_alike_in_every_process(function, expected):
    assert expected in (name_of(function), None)
    assert " at 0x" not in name_of(function)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda x: torch.softmax(x, -1), "of which a number depends on others"),
        (lambda x: x - x.mean(0), "of which a number depends on others"),
        (lambda x: x * torch.arange(x.shape[1]), "of which a number depends on its place"),
        (lambda x: x * x.shape[0], "of which a number depends on how many there are"),
        (lambda x: torch.where(x.max() > 10, 2 * x, x), "of which a number depends on others"),
        (lambda x: x[:, :1], r"made of shape \(4, 6\) \(4, 1\)"),
        (lambda x: x.half(), r"made of shape \(4, 6\) \(4, 6\), torch.float16 on cpu"),
        (lambda x: None, "which gave NoneType"),
        (lambda x: x.nothing, "which raised AttributeError: .*nothing"),
        (nn.RReLU().train(), "RReLU.* which gave other numbers the second time"),
        (lambda x: torch.from_numpy(x.detach().numpy()), "whose result autograd does not follow"),
        (lambda x, w=nn.Parameter(torch.ones(())): w * x, "computes with a tensor that requires a gradient"),  # noqa: B008
    ],
)
def test_what_is_no_elementwise_function_is_refused_by_name_at_the_first_call(function, message):
    layer, state = MoE(small_config(activation=function)), torch.get_rng_state()
    for _ in range(2):
        torch.set_rng_state(state)
        with pytest.raises(ValueError, match=f"moe_mlp: activation: expected a function .* got .*{message}"):
            layer(torch.randn(3, layer.config.hidden_size))


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (
            nn.PReLU(),
            r"a module without parameters and buffers, .* got torch.nn.modules.activation.PReLU\(.*with weight",
        ),
        (nn.Softplus, "expected a function, got the class Softplus"),
        (3, "expected gelu, .*got 3"),
    ],
)
def test_what_a_config_refuses(function, message):
    with pytest.raises(ValueError, match=f"MoEConfig: activation: .*{message}"):
        MoEConfig(8, 4, 4, activation=function)


def test_a_function_is_tried_once_for_each_device_and_dtype():
    calls = []

    def counted(x):
        calls.append(x.shape)
        return F.mish(x)

    device = torch.device("cpu")
    for dtype in (torch.float32, torch.float64):
        for again in (False, True):
            before = len(calls)
            check_function(counted, "test", device, dtype)
            assert (len(calls) == before) == again
    state = torch.get_rng_state()
    with pytest.raises(ValueError, match=r"^test: activation: .*the second time"):
        check_function(lambda x: x * torch.rand_like(x), "test", device, torch.float32)
    assert torch.equal(torch.get_rng_state(), state)


def test_what_goes_with_a_function_and_what_does_not():
    x, plan, gates, weights, _ = leaves()
    buffers = tuple(torch.zeros_like(w, dtype=torch.float32) for w in (weights.up_proj, weights.down_proj))
    for options, message in (
        ({"backend": "block_sparse"}, "backend: expected None, grouped .* torch.nn.functional.mish .*block_sparse"),
        ({"main_grads": buffers}, "main_grads: expected None beside the function torch.nn.functional.mish"),
    ):
        with pytest.raises(ValueError, match=f"moe_mlp: {message}"):
            run_experts(x, plan, gates, weights, activation=F.mish, **options)
    for options, message in (
        ({"backend": "block_sparse", "ffn_hidden_size": 16}, "backend: expected None, .* torch.nn.functional.mish"),
        ({"accumulate_main_grad": True}, "accumulate_main_grad: expected False with the function torch.nn.functional"),
    ):
        with pytest.raises(ValueError, match=f"MoEConfig: {message}"):
            small_config(activation=F.mish, **options)
    assert small_config(activation=F.silu, backend="block_sparse", ffn_hidden_size=16).activation == "silu"


def test_no_file_holds_a_function():
    config = small_config(activation=F.mish)
    with pytest.raises(ValueError, match=r"config_to_json: activation: .*the Python function torch.nn.functional.mish"):
        dmoe.config_to_json(config)
    assert dmoe.config_to_json(small_config(activation=F.silu)) == dmoe.config_to_json(small_config())


def test_ranks_tell_each_other_a_functions_name(monkeypatch):
    told = {}
    monkeypatch.setattr(agreement, "check_agreement", lambda operation, fields, *_: told.update(fields))
    layer = MoE(small_config(activation=log_of_size))
    alone = types.SimpleNamespace(two_level=None, num_ranks=1, world_size=1, groups=(), levelling=None)
    monkeypatch.setitem(layer.__dict__, "dispatcher", alone)
    agreement.check_layers(layer, torch.float32)
    assert told["activation"] == f"{__name__}.log_of_size"


def test_adapters_and_a_function_together():
    x, plan, gates, weights, grad = leaves(bias=False)
    a, b = torch.randn(3, 2, 6, dtype=torch.float64), torch.randn(3, 2, 5, 2, dtype=torch.float64)
    adapters = dmoe.Adapters(up=dmoe.LowRank(a, b, 0.5))
    merged = dataclasses.replace(weights, up_proj=weights.up_proj + 0.5 * torch.einsum("egfr,erh->egfh", b, a))
    found = [
        run_experts(x, plan, gates, weights, activation=F.mish, adapters=adapters),
        run_experts(x, plan, gates, merged, activation=F.mish),
    ]
    torch.testing.assert_close(*found)
    torch.testing.assert_close(*(torch.autograd.grad(y, x, grad)[0] for y in found))


def test_experts_of_one_plan_compute_the_formula():
    """By hand, without an oracle between: ``fn(gate) * up``."""
    arguments, *_ = build({**CASE, "bias": False, "experts": 1, "top_k": 1}, torch.float64)
    x, up, down = arguments[0], arguments[2], arguments[3]
    plan = plan_token_choice(torch.zeros(len(x), 1, dtype=torch.int32), 1)
    ones = torch.ones(len(x), 1, dtype=torch.float64)
    y = run_experts(x, plan, ones, ExpertWeights(up, down), activation=torch.tanh)
    torch.testing.assert_close(y, (torch.tanh(x @ up[0, 0].T) * (x @ up[0, 1].T)) @ down[0].T)
    assert oracle.ACT["mish"](torch.tensor(1.0)) == pytest.approx(F.mish(torch.tensor(1.0)).item())
