"""The block-sparse backend: against the reference backend and the oracle, and what it costs."""

from __future__ import annotations

import dataclasses
import re

import kernel_table
import oracle
import pytest
import torch
from helpers import assert_as_accurate, nudged, saved_bytes
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

import dmoe
from dmoe import ExpertWeights, MoE, MoEConfig, plan_token_choice
from dmoe.functional import _block_sparse_by_default, moe_mlp, run_experts
from dmoe.ops import block_sparse_mlp as module

pytestmark = pytest.mark.filterwarnings("ignore:dmoe. a MoE layer ran a second training forward")
SIZES = {"hidden_size": 24, "num_experts": 3, "top_k": 2}


@pytest.fixture
def by_kernels(monkeypatch):
    """CPU tensors through the Triton kernels, under the interpreter."""
    monkeypatch.setattr(module, "_REFERENCE", module._triton())


def step(layer, x, grad, **kwargs):
    """Output and all gradients; dropout and jitter from one seed."""
    layer.zero_grad()
    leaf = x.detach().clone().requires_grad_()
    torch.manual_seed(11)
    y = layer(leaf, **kwargs)
    y.backward(grad)
    grads = (torch.zeros_like(p) if p.grad is None else p.grad for p in layer.parameters())  # None: not reached
    return [y.detach(), leaf.grad, *grads]


def pair(config, dtype, other="reference"):
    layer = MoE(config, dtype=dtype)
    plain = MoE(dataclasses.replace(config, backend=other), dtype=dtype)
    plain.load_state_dict(layer.state_dict())
    return layer, plain


# ----------------------------------------------------------------------------------------------------------- the values


@st.composite
def configs(draw):
    experts = draw(st.integers(1, 5))
    choice = draw(st.sampled_from(["top_k", "top_k", "expert_choice"]))
    sizes = st.sampled_from([16, 32, 48])
    fields = {
        "hidden_size": draw(st.integers(1, 21)),
        "ffn_hidden_size": draw(sizes | st.lists(sizes, min_size=experts, max_size=experts)),
        "num_experts": experts,
        "top_k": draw(st.integers(1, experts)),
        "activation": draw(st.sampled_from(["silu", "gelu", "gelu_tanh", "relu", "relu_squared", "sigmoid"])),
        "gated": draw(st.booleans()),
        "bias": draw(st.sampled_from(["none", "expert", "output"])),
        "gate_weight_on": draw(st.sampled_from(["output", "activation", "input"])),
        "activation_dropout": draw(st.sampled_from([0.0, 0.3])),
        "expert_dropout": draw(st.sampled_from([0.0, 0.3])),
        "router": choice,
        "causal": choice == "top_k",
        "shared_ffn_hidden_size": draw(st.sampled_from([None, 5])),
        "load_balancing_coefficient": 0.0,
        "backend": "block_sparse",
    }
    if choice == "top_k":
        fields["capacity"] = draw(st.none() | st.integers(0, 4))
        fields["drop_order"] = draw(st.sampled_from(["token_major", "choice_major", "gate_weight"]))
    return MoEConfig(**fields), draw(st.integers(0, 30)), draw(st.booleans()), draw(st.integers(0, 2**20))


@settings(max_examples=80)
@given(case=configs())
def test_every_option_agrees_with_the_reference_backend(case):
    config, tokens, masked, seed = case
    torch.manual_seed(seed)
    layer, plain = pair(config, torch.float64)
    for p, q in zip(layer.parameters(), plain.parameters(), strict=True):
        if p.dim() < 3 and (p == 0).all():  # biases
            q.data.copy_(torch.nn.init.normal_(p.data))
    x, grad = torch.randn(2, tokens, config.hidden_size, dtype=torch.float64)
    mask = torch.rand(tokens) < 0.7 if masked else None
    mine, theirs = step(layer, x, grad, token_mask=mask), step(plain, x, grad, token_mask=mask)
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


KERNEL_CASES = {
    "default": {"ffn_hidden_size": 32},
    "widths": {"ffn_hidden_size": [16, 48, 32], "bias": "expert"},
    "plain": {"ffn_hidden_size": [32, 64, 32], "gated": False, "activation": "gelu", "bias": "expert"},
    "on_input": {"ffn_hidden_size": 32, "gate_weight_on": "input", "activation": "gelu_tanh", "bias": "expert"},
    "on_activation": {"ffn_hidden_size": [32, 16, 16], "gate_weight_on": "activation", "activation": "relu"},
    "dropout": {"ffn_hidden_size": [16, 32, 16], "activation_dropout": 0.3, "expert_dropout": 0.2, "bias": "expert"},
    "capacity": {"ffn_hidden_size": 16, "capacity": 3},
    "expert_choice": {"ffn_hidden_size": [16, 32, 16], "router": "expert_choice", "causal": False},
    "sigmoid": {"ffn_hidden_size": [16, 32, 16], "gated": False, "activation": "sigmoid", "bias": "expert"},
    "squared": {"ffn_hidden_size": 16, "activation": "relu_squared", "gate_weight_on": "activation"},
    "GPT-OSS": {"ffn_hidden_size": 32, "activation": dmoe.ClampedSwiGLU(), "bias": "expert"},
    "block_128": {"ffn_hidden_size": 128, "gated": False},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("name", KERNEL_CASES)
def test_kernels_are_as_accurate_as_plain_pytorch(name, dtype, by_kernels):
    torch.manual_seed(0)
    config = MoEConfig(**SIZES, **KERNEL_CASES[name], backend="block_sparse", load_balancing_coefficient=0.0)
    layer, plain = pair(config, dtype)
    exact = MoE(plain.config, dtype=torch.float64)
    x, grad = torch.randn(2, 21, 24).to(dtype)
    indices = None if config.family.experts_choose else plain.router(x).expert_indices
    kwargs = {} if indices is None else {"expert_indices": indices}
    mine = step(layer, x, grad, **kwargs)

    def pairs(layer, x, grad):
        exact.load_state_dict(layer.state_dict())
        own = step(layer, x, grad, **kwargs)
        return zip(own, step(exact, x.double(), grad.double(), **kwargs), strict=True)

    yardsticks = [list(pairs(plain, x, grad))]
    truth = [t for _, t in yardsticks[0]]
    if indices is not None:
        for _ in range(2):
            yardsticks.append(list(pairs(plain, nudged(x), nudged(grad))))
    names = ["y", "x", *(n for n, _ in layer.named_parameters())]
    for i, (what, got, right) in enumerate(zip(names, mine, truth, strict=True)):
        noise = 1e-6 if what == "router.weight" else 0.0  # a difference of gradients that nearly cancel
        noise = noise if dtype == torch.float32 else 2e-2 * noise / 1e-6 * 1e-1
        assert_as_accurate(what, got, right, [y[i] for y in yardsticks], noise=noise)


@pytest.mark.parametrize("kernels", [False, True], ids=["ref", "kernels"])
@pytest.mark.parametrize("sizes", [(), (16, 32, 16)], ids=["one", "widths"])
def test_agrees_with_the_oracle(sizes, kernels, request):
    if kernels:
        request.getfixturevalue("by_kernels")
    torch.manual_seed(0)
    total = sum(sizes) or 16
    double = {"dtype": torch.float64}
    up = torch.randn(2, total, 8, **double) if sizes else torch.randn(3, 2, 16, 8, **double)
    down = torch.randn(8, total, **double) if sizes else torch.randn(3, 8, 16, **double)
    exact = [torch.randn(11, 8, **double), torch.rand(11, 2, **double), up, down, torch.randn(up.shape[:-1], **double)]
    exact.append(torch.randn(3, 8, **double))
    indices = torch.stack([torch.randperm(3)[:2] for _ in range(11)])
    grad = torch.randn(11, 8, **double)
    dtype = torch.float32 if kernels else torch.float64
    narrow = [t.to(dtype).requires_grad_() for t in exact]
    exact = [t.detach().double().requires_grad_() for t in narrow]
    x, gates, *weights = narrow
    y = moe_mlp(x, indices, gates, ExpertWeights(*weights, ffn_sizes=sizes), backend="block_sparse")
    y.backward(grad.to(dtype))
    kept = [[True, True]] * 11
    truth = oracle.moe(exact[0], indices.tolist(), exact[1], kept, exact[2:], ffn_sizes=sizes)
    truth.backward(grad.to(dtype).double())
    tolerance = {"rtol": 1e-12, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 1e-4, "atol": 2e-4}
    torch.testing.assert_close(y.double(), truth, **tolerance)
    for mine, right in zip(narrow, exact, strict=True):
        torch.testing.assert_close(mine.grad.double(), right.grad, **tolerance)


def test_frozen_experts_get_no_gradient_and_the_rest_does():
    torch.manual_seed(0)
    layer, plain = pair(MoEConfig(**SIZES, ffn_hidden_size=16, backend="block_sparse"), torch.float64)
    for model in (layer, plain):
        model.experts.requires_grad_(False)
    x, grad = torch.randn(2, 9, 24, dtype=torch.float64)
    for a, b in zip(step(layer, x, grad), step(plain, x, grad), strict=True):
        torch.testing.assert_close(a, b)
    assert layer.router.weight.grad.abs().max() > 0
    assert all(p.grad is None for p in layer.experts.parameters())


def test_same_input_same_bits(by_kernels):
    torch.manual_seed(0)
    layer = MoE(**SIZES, ffn_hidden_size=[16, 32, 16], backend="block_sparse")
    x, grad = torch.randn(2, 40, 24)
    first = step(layer, x, grad)
    for a, b in zip(step(layer, x, grad), first, strict=True):
        assert torch.equal(a, b)


def test_autocast_keeps_gates_precise_and_returns_bfloat16():
    torch.manual_seed(0)
    layer, x = MoE(**SIZES, ffn_hidden_size=16, backend="block_sparse"), torch.randn(9, 24)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert layer.experts.down_proj.grad.dtype == torch.float32
    torch.testing.assert_close(y.float(), layer(x), rtol=0.05, atol=0.02)


# ------------------------------------------------------------------------------------------------------------- the work


def arguments(config, tokens, device, dtype=torch.bfloat16):
    """What the layer hands to the operation, for a plan of any values."""
    layer = MoE(config, device=device, dtype=dtype)
    index = torch.zeros(tokens, config.top_k, dtype=torch.int32, device=device)
    plan = plan_token_choice(index, config.num_experts)
    weights = layer.experts.weights()
    x = torch.empty(tokens, config.hidden_size, device=device, dtype=dtype)
    gates = torch.empty(tokens, config.top_k, device=device)
    seed = torch.empty((), dtype=torch.int64, device=device) if config.activation_dropout else None
    return (
        x, gates, weights.up_proj, weights.down_proj, weights.up_bias, weights.down_bias, plan.expert_offsets,
        plan.row_to_token, plan.row_to_slot, plan.token_offsets, plan.token_rows, seed, list(weights.ffn_sizes),
        config.activation, config.gated, config.gate_weight_on, config.activation_dropout, config.expert_dropout,
    )  # fmt: skip


@pytest.mark.parametrize("extra", [{}, {"bias": "expert", "activation_dropout": 0.1, "expert_dropout": 0.1}], ids=str)
def test_launches_do_not_grow_with_experts_and_need_no_values(extra):
    """On the meta device there are no values at all, so nothing can wait for one."""
    names = []
    for experts in (2, 64):
        for widths in (32, [32, 64] * (experts // 2)):
            config = MoEConfig(hidden_size=64, ffn_hidden_size=widths, num_experts=experts, **extra)
            call = arguments(config, 20, "meta")
            with kernel_table.counting() as launched:
                y, pre = module.block_sparse_mlp_cuda(*call)
                grads = module.block_sparse_mlp_backward_cuda(y, pre, True, *call)
            assert y.shape == (20, 64)
            assert grads[2].shape == call[2].shape
            names.append(list(launched))
    assert names[0] == names[1] == names[2] == names[3]
    products = [name for name in names[0] if name in ("_block_sdd", "_block_spmm")]
    assert len(products) == 6 + bool(extra)  # two of each kind of product, and the sums of up_bias' gradient


def test_exactly_the_experts_own_widths_are_computed(monkeypatch):
    """Every block in use is written by the first product, no other one is touched; the sum is over own widths."""
    torch.manual_seed(0)
    written = []
    kernels = module._triton()

    def sdd(*given):
        out = kernels.sdd(*given)
        written.append(int((~out.isnan()).all(-1).all(-1).sum()))
        assert written[-1] == int((~out.isnan()).any(-1).any(-1).sum())  # whole blocks
        return out

    monkeypatch.setattr(module, "_REFERENCE", kernels._replace(sdd=sdd))
    widths, counts = [16, 64, 32], [20, 0, 33]
    config = MoEConfig(hidden_size=8, ffn_hidden_size=widths, num_experts=3, top_k=1, backend="block_sparse")
    layer = MoE(config)
    index = torch.repeat_interleave(torch.arange(3), torch.tensor(counts)).unsqueeze(1)
    layer(torch.randn(53, 8), expert_indices=index).sum().backward()
    blocks = sum(-(-count // 16) * (width // 16) for count, width in zip(counts, widths, strict=True))
    assert written == [2 * blocks, blocks]  # gate and up in forward, the hidden gradient in backward
    padded_to_widest = sum(-(-count // 16) for count in counts) * (64 // 16)
    assert blocks < padded_to_widest / 2


@pytest.mark.parametrize("widths", [32, [16, 64, 32]], ids=str)
def test_saves_x_the_pre_activation_and_indices(widths):
    config = MoEConfig(hidden_size=24, ffn_hidden_size=widths, num_experts=3, top_k=2, backend="block_sparse")
    call = list(arguments(config, 19, "cpu", torch.float32))
    call[0].requires_grad_()
    plan = plan_token_choice(torch.randint(0, 3, (19, 2)), 3)
    call[6:11] = plan.expert_offsets, plan.row_to_token, plan.row_to_slot, plan.token_offsets, plan.token_rows
    with saved_bytes(exclude=call[2:6:1][:2]) as saved:
        module.block_sparse_mlp(*call)
    block = 32 if widths == 32 else 16
    rows = (38 + 3 * (block - 1)) // block * block
    pre = rows * 2 * (max(widths) if isinstance(widths, list) else widths)
    assert saved.total == 4 * (19 * 24 + 38 + pre + (3 + 1) + 38 + 38 + (19 + 1) + 38)


@pytest.mark.parametrize("widths", [32, [16, 32, 16]], ids=str)
def test_compile_is_one_graph_that_new_routing_does_not_recompile(widths):
    torch.manual_seed(0)
    eager = MoE(**SIZES, ffn_hidden_size=widths, backend="block_sparse", load_balancing_coefficient=0.0)
    traced = MoE(eager.config)
    traced.load_state_dict(eager.state_dict())
    compiled = torch.compile(traced, fullgraph=True, backend="aot_eager")
    for _ in range(3):
        x = torch.randn(11, 24)
        y = compiled(x)
        y.sum().backward()
        torch.testing.assert_close(y, eager(x))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_registration():
    torch.manual_seed(0)
    config = MoEConfig(**SIZES, ffn_hidden_size=[16, 32, 16], bias="expert", backend="block_sparse")
    call = arguments(config, 7, "cpu", torch.float32)
    filled = [torch.randn_like(v) if isinstance(v, torch.Tensor) and v.is_floating_point() else v for v in call]
    for value in filled[:6]:
        value.requires_grad_()
    torch.library.opcheck(torch.ops.dmoe.block_sparse_mlp.default, tuple(filled))


# --------------------------------------------------------------------------------------------------------- who takes it


def test_on_cuda_widths_that_differ_take_it_by_default():
    def asked(widths, dtype, device):
        config = MoEConfig(hidden_size=16, ffn_hidden_size=widths, num_experts=2)
        with FakeTensorMode():
            meta = MoE(config, device="meta", dtype=dtype).experts.weights()
            up, down = (torch.empty(p.shape, device=device, dtype=dtype) for p in (meta.up_proj, meta.down_proj))
            weights = ExpertWeights(up, down, ffn_sizes=meta.ffn_sizes)
            return _block_sparse_by_default(torch.empty(3, 16, device=device, dtype=dtype), weights)

    assert asked([16, 48], torch.bfloat16, "cuda")
    assert not asked([16, 40], torch.bfloat16, "cuda")
    assert not asked(16, torch.bfloat16, "cuda")
    assert not asked([16, 48], torch.float64, "cuda")
    assert not asked([16, 48], torch.bfloat16, "cpu")


@pytest.mark.parametrize(("backend", "taken"), [(None, True), ("block_sparse", True), ("grouped", False)])
def test_the_backend_decides_between_the_operations(backend, taken, monkeypatch):
    monkeypatch.setattr("dmoe.functional._block_sparse_by_default", lambda x, weights: True)
    calls = []
    monkeypatch.setattr("dmoe.functional.block_sparse_mlp", lambda *given: calls.append("sparse"))
    monkeypatch.setattr("dmoe.functional.moe_mlp_op", lambda *given, **named: calls.append("grouped"))
    config = MoEConfig(**SIZES, ffn_hidden_size=[16, 32, 16])
    layer = MoE(config)
    plan = plan_token_choice(torch.zeros(3, 2, dtype=torch.int64), 3)
    run_experts(torch.randn(3, 24), plan, torch.ones(3, 2), layer.experts.weights(), backend=backend)
    assert calls == ["sparse" if taken else "grouped"]


def test_widths_that_16_does_not_divide_are_refused():
    message = "MoEConfig: ffn_hidden_size: expected multiples of 16 with backend='block_sparse', got "
    for widths in (24, (16, 24, 16)):
        with pytest.raises(ValueError, match=f"^{re.escape(message + str(widths))}$"):
            MoEConfig(**SIZES, ffn_hidden_size=widths, backend="block_sparse")
    weights = MoE(**SIZES, ffn_hidden_size=24).experts.weights()
    index, gates = torch.zeros(3, 2, dtype=torch.int64), torch.ones(3, 2)
    with pytest.raises(ValueError, match=r"every expert's width to be a multiple of 16, got \[24\]; use another"):
        moe_mlp(torch.ones(3, 24), index, gates, weights, backend="block_sparse")


def test_a_shared_expert_may_have_any_width():
    layer = MoE(**SIZES, ffn_hidden_size=16, shared_ffn_hidden_size=5, backend="block_sparse")
    assert layer(torch.randn(4, 24)).shape == (4, 24)


def test_double_backward_is_refused_with_a_sentence():
    layer = MoE(**SIZES, ffn_hidden_size=16, backend="block_sparse")
    x = torch.randn(3, 24, requires_grad=True)
    (grad,) = torch.autograd.grad(layer(x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward is not supported"):
        grad.sum().backward()


def test_evaluation_saves_nothing():
    layer = MoE(**SIZES, ffn_hidden_size=16, backend="block_sparse").eval()
    with saved_bytes() as saved, torch.no_grad():
        y = layer(torch.randn(4, 24))
    assert saved.total == 0
    assert not dmoe.is_expert_param(y)
