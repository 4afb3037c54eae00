"""The expert MLP's Triton kernels, tile by tile under the interpreter: small blocks, so that every loop goes round."""

from __future__ import annotations

import os

import kernel_table
import oracle
import pytest
import torch
from helpers import assert_as_accurate, interpreted, nudged, without_generated_products
from hypothesis import given, settings
from kernel_cases import expert_mlp
from moe_mlp_kernel_cases import NAMES, calls, in_reference, small_blocks, tilings, widened

from dmoe import MoE, plan_expert_choice
from dmoe.activations import NAMES as ACTIVATIONS
from dmoe.experts import Experts
from dmoe.ops._moe_mlp_call import Call
from dmoe.ops.activation import activate_backward
from dmoe.ops.moe_mlp import moe_mlp_cuda, moe_mlp_inference_cuda, moe_mlp_pre_activation_cuda
from dmoe.ops.moe_mlp_cuda import moe_mlp_backward_cuda

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
configs = pytest.importorskip("dmoe.kernels.configs")
pieces = pytest.importorskip("dmoe.kernels._pieces")


@interpreted
@without_generated_products
@settings(max_examples=25)
@given(drawn=calls(), tiling=tilings())
def test_kernels_against_the_reference_in_float64(drawn, tiling):
    call, grad = drawn
    with small_blocks(**tiling):
        y, pre = moe_mlp_cuda(*call)
        ours = [y, *moe_mlp_backward_cuda(grad, pre, True, *call)]
    exact = in_reference(widened(call), grad.double())
    own = [(in_reference(call, grad), exact)]
    for _ in range(3 if call.gate_weights.numel() >= 16 else 9):
        moved, other = Call(*map(nudged, call[:6]), *call[6:]), nudged(grad)
        own.append((in_reference(moved, other), in_reference(widened(moved), other.double())))
    for i, name in enumerate(("y", *NAMES)):
        factor = 6 if name == "gate_weights" and call.x.dtype == torch.float16 else 3
        pairs = [(plain[i], true[i]) for plain, true in own]
        assert_as_accurate(name, ours[i], exact[i], pairs, factor=factor, slack_ulp=4)


@interpreted
@settings(max_examples=15)
@given(drawn=calls(), tiling=tilings())
def test_what_shares_kernels_agrees_to_the_bit(drawn, tiling):
    """Inference and training, the pre-activation alone, frozen experts, and the tile table made or given."""
    call, grad = drawn
    with small_blocks(**tiling):
        y, pre = moe_mlp_cuda(*call)
        inference, again = moe_mlp_inference_cuda(*call), moe_mlp_pre_activation_cuda(*call)
        full = moe_mlp_backward_cuda(grad, pre, True, *call)
        frozen = moe_mlp_backward_cuda(grad, pre, False, *call)
    used = int(call.expert_offsets[-1])
    assert torch.equal(inference, y)
    assert torch.equal(again[:used], pre[:used])
    assert all(torch.equal(a, b) for a, b in zip(full[:2], frozen[:2], strict=True))
    assert not any(tensor.numel() for tensor in frozen[2:])


@interpreted
@settings(max_examples=15)
@given(drawn=calls(), tiling=tilings())
def test_main_grads_take_what_the_weights_would_get(drawn, tiling):
    call, grad = drawn
    start = [torch.randn_like(w, dtype=torch.float32) for w in (call.up_proj, call.down_proj)]
    buffers = [t.clone() for t in start]
    into = call._replace(up_main_grad=buffers[0], down_main_grad=buffers[1])
    with small_blocks(**tiling):
        _, pre = moe_mlp_cuda(*call)
        grads = moe_mlp_backward_cuda(grad, pre, True, *into)
        apart = moe_mlp_backward_cuda(grad, pre, True, *call)
    assert not grads[2].numel()
    assert not grads[3].numel()
    for i in (0, 1, 4, 5):
        assert torch.equal(grads[i], apart[i])
    for buffer, before, gradient in zip(buffers, start, apart[2:4], strict=True):
        # The gradient on its own is rounded to the weights' dtype; in the buffer it is not.
        slack = torch.finfo(call.x.dtype).eps * gradient.double().abs() + 1e-6 * (1 + before.double().abs())
        assert ((buffer.double() - before.double() - gradient.double()).abs() <= slack).all()


@pytest.mark.parametrize("gate_on", ["output", "activation", "input"])
@pytest.mark.parametrize("unused", [0, 1, 9])
def test_experts_that_choose_and_leave_places_unused(unused, gate_on):
    """Assignments behind the last token's belong to nobody; their gate weights have a gradient all the same: zero."""
    torch.manual_seed(unused)
    tokens, experts, chosen, hidden, ffn = 11, 3, 5, 16, 24
    picks = torch.stack([torch.randperm(tokens)[:chosen] for _ in range(experts)])
    picks.view(-1)[torch.randperm(experts * chosen)[:unused]] = -1
    plan = plan_expert_choice(picks, tokens, tile_rows=16)
    up, down = torch.randn(experts, 2, ffn, hidden) / hidden**0.5, torch.randn(experts, hidden, ffn) / ffn**0.5
    call = Call(
        torch.randn(tokens, hidden), torch.rand(experts * chosen), up, down, None, None, plan.expert_offsets,
        plan.row_to_token, plan.row_to_slot, plan.token_offsets, plan.token_rows, None, [], "silu", True, gate_on, 0.0,
        0.0, None, plan.tiles, plan.experts_by_load, plan.tile_rows,
    )  # fmt: skip
    grad = torch.randn(tokens, hidden)
    y, pre = moe_mlp_cuda(*call)
    ours = [y, *moe_mlp_backward_cuda(grad, pre, True, *call)]
    for name, got, expected in zip(("y", *NAMES), ours, in_reference(call, grad), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")
    used = int(plan.token_offsets[-1])
    assert used == experts * chosen - unused
    assert not ours[2][used:].any()


@pytest.mark.parametrize("experts", [1, 8, 512])
def test_launches_do_not_depend_on_the_number_of_experts(experts):
    with kernel_table.counting() as names:
        expert_mlp(tokens=256, hidden=64, ffn=32, experts=experts, top_k=1, backward=False)
        forward = len(names)
        expert_mlp(tokens=256, hidden=64, ffn=32, experts=experts, top_k=1)
    assert forward == 3
    assert names[forward:] == [
        *("up_kernel", "rows_kernel", "combine_kernel"),
        *("hidden_grad_kernel", "weight_grad_kernel", "rows_kernel", "combine_kernel", "weight_grad_kernel"),
    ]


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_no_shape_depends_on_data(monkeypatch, device):
    """The whole layer on tensors without values; backward too, where autograd finds a device to run it for."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    monkeypatch.setattr(torch.Tensor, "uniform_", lambda self, *_, **__: self)  # initial values want real generators
    monkeypatch.setattr(Experts, "reset_parameters", lambda self: None)
    with_autograd = device == "cpu" or torch.cuda.is_available()  # autograd asks the device for its stream
    with FakeTensorMode(), torch.set_grad_enabled(with_autograd):
        for fields in (
            {},
            {"capacity_factor": 1.25, "drop_order": "choice_major"},
            {"shared_ffn_hidden_size": 16, "bias": "expert"},
            {"recompute_pre_activation": True, "activation_dropout": 0.1},
            *([{"router": "expert_choice", "causal": False}] if with_autograd else []),  # copies ask for the device too
        ):
            layer = MoE(hidden_size=32, ffn_hidden_size=16, num_experts=4, top_k=2, device=device, **fields)
            x = torch.empty(3, 7, 32, device=device, requires_grad=True)
            y = layer(x)
            loss = y.sum() + layer.take_aux_loss()
            assert y.shape == x.shape
            if with_autograd:
                loss.backward()
                assert x.grad.shape == x.shape
                assert layer.experts.down_proj.grad.shape == layer.experts.down_proj.shape


@triton.jit
def _activations(x, alone, value, slope, SIZE: tl.constexpr, ACTIVATION: tl.constexpr):
    at = tl.arange(0, SIZE)
    inputs = tl.load(x + at)
    both = pieces.act_slope(inputs, ACTIVATION)
    tl.store(alone + at, pieces.act(inputs, ACTIVATION))
    tl.store(value + at, both[0])
    tl.store(slope + at, both[1])


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_over_their_whole_range(activation):
    """Value and slope over [-100, 100] in float32, about as near as PyTorch's own slope; NaN stays NaN."""
    x = torch.cat(
        [torch.linspace(-100, 100, 4092), torch.linspace(-6, 6, 4096), torch.tensor([0.0, -0.0, 1e-30, -1e-30])]
    )
    x = x.to("cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda")
    alone, value, slope = (torch.empty_like(x) for _ in range(3))
    _activations[(1,)](x, alone, value, slope, SIZE=len(x), ACTIVATION=activation)
    exact, eps = oracle.ACT[activation](x.double()), torch.finfo(torch.float32).eps
    for result in (alone, value):
        assert ((result - exact).abs() <= 5 * eps * exact.abs().clamp(min=0.25)).all()
    exact = activate_backward(torch.ones_like(x).double(), x.double(), activation, False)
    assert ((slope - exact).abs() <= 10 * eps).all()
    x.fill_(torch.nan)
    _activations[(1,)](x, alone, value, slope, SIZE=len(x), ACTIVATION=activation)
    for result in (alone, value):
        assert torch.isnan(result).all()
