"""The expert MLP with a backward in two halves: equal to the one in a piece, and in the order that was asked for."""

from __future__ import annotations

import pytest
import torch
from helpers import interpreted, without_generated_products
from hypothesis import given, settings
from moe_mlp_cases import CASE, build, cases, leaves
from moe_mlp_kernel_cases import calls, small_blocks, tilings
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from dmoe import ExpertWeights
from dmoe.functional import run_experts
from dmoe.ops import moe_mlp_cuda as kernels
from dmoe.ops import moe_mlp_ref as reference

OPS = torch.ops.dmoe
NAMES = ("up_proj", "down_proj", "up_bias", "down_bias")


class Order(TorchDispatchMode):
    """Which halves of backward ran, in their order."""

    def __init__(self):
        super().__init__()
        self.ran = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func).removesuffix(".default").removeprefix("dmoe.moe_mlp_backward")
        if str(func).startswith("dmoe.moe_mlp_backward"):
            self.ran.append(name.removeprefix("_"))
        return func(*args, **(kwargs or {}))


@without_generated_products
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@settings(max_examples=40)
@given(case=cases())
def test_the_halves_are_the_whole(dtype, case):
    arguments, grad, _, _ = build(case, dtype)
    _, pre = OPS.moe_mlp(*arguments)
    whole = OPS.moe_mlp_backward(grad, pre, True, *arguments)
    grad_x, grad_gate, grad_pre, hidden = OPS.moe_mlp_backward_data(grad, pre, *arguments)
    assert torch.equal(grad_x, whole[0])
    assert torch.equal(grad_gate, whole[1])
    grads = OPS.moe_mlp_backward_weights(grad, grad_pre, hidden, *arguments)
    for name, one, other in zip((*NAMES, "gate_proj"), grads, whole[2:], strict=True):
        tolerance = 1e-12 if dtype == torch.float64 else 2e-2
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")
    *_, ref_pre, ref_hidden = reference.moe_mlp_backward_data_ref(grad, pre, *arguments)
    tolerance = 1e-12 if dtype == torch.float64 else 4e-2
    torch.testing.assert_close(grad_pre, ref_pre, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(hidden, ref_hidden, rtol=tolerance, atol=tolerance)


@interpreted
@settings(max_examples=5)
@given(drawn=calls(), tiling=tilings())
def test_the_kernels_halves_are_the_whole_to_the_bit(drawn, tiling):
    call, grad = drawn
    buffers = [torch.ones_like(w, dtype=torch.float32) for w in (call.up_proj, call.down_proj) * 2]
    with small_blocks(**tiling):
        _, pre = kernels.moe_mlp_cuda(*call)
        whole = kernels.moe_mlp_backward_cuda(grad, pre, True, *call)
        grad_x, grad_gate, grad_pre, hidden = kernels.moe_mlp_backward_data_cuda(grad, pre, *call)
        weights = kernels.moe_mlp_backward_weights_cuda(grad, grad_pre, hidden, *call)
        into = kernels.moe_mlp_backward_weights_cuda(grad, grad_pre, hidden, *call.with_buffers(buffers[:2]))
        kernels.moe_mlp_backward_cuda(grad, pre, True, *call.with_buffers(buffers[2:]))
    names = ("x", "gate_weights", *NAMES, "gate_proj")
    for name, one, other in zip(names, (grad_x, grad_gate, *weights), whole, strict=True):
        assert torch.equal(one, other), name
    assert [tensor.numel() for tensor in into[:2]] == [0, 0]
    assert torch.equal(buffers[0], buffers[2])
    assert torch.equal(buffers[1], buffers[3])


def test_opcheck():
    for change in ({}, {"bias": False, "gated": False}, {"sizes": [3, 1, 4], "layout": "capacity"}, {"tokens": 0}):
        arguments, grad, _, _ = build({**CASE, **change}, torch.float32)
        _, pre = OPS.moe_mlp(*arguments)
        *_, grad_pre, hidden = OPS.moe_mlp_backward_data(grad, pre, *arguments)
        torch.library.opcheck(OPS.moe_mlp_backward_data.default, [grad, pre, *arguments])
        torch.library.opcheck(OPS.moe_mlp_backward_weights.default, [grad, grad_pre, hidden, *arguments])
        buffers = [torch.zeros_like(arguments[n]) for n in (2, 3)]
        into = [grad, grad_pre, hidden, *arguments, None, None, None, 0, *buffers]
        torch.library.opcheck(OPS.moe_mlp_backward_weights_into.default, into)


def tensors_of(x, gates, weights):
    return x, gates, *(getattr(weights, name) for name in NAMES)


@pytest.mark.parametrize("sizes", [5, [3, 1, 4]], ids=str)
@pytest.mark.parametrize("option", ["plain", "recompute", "residual", "checkpoint", "reference", "twice"])
def test_gradients_are_those_of_a_backward_in_one_piece(option, sizes):
    x, plan, gates, weights, grad = leaves(sizes=sizes)
    wanted = tensors_of(x, gates, weights)
    more = {"recompute": {"recompute": True}, "residual": {"residual": x}, "reference": {"backend": "reference"}}

    def run(weights):
        y = run_experts(x, plan, gates, weights, **more.get(option, {}))
        return y + run_experts(2 * x, plan, gates, weights) if option == "twice" else y

    expected = torch.autograd.grad(run(weights), wanted, grad)
    deferred = weights.deferred()
    y = checkpoint(run, deferred, use_reentrant=False) if option == "checkpoint" else run(deferred)
    with Order() as order:
        ours = torch.autograd.grad(y, wanted, grad)
    halves = {"reference": [], "twice": ["data", "data", "weights", "weights"]}
    assert order.ran == halves.get(option, ["data", "weights"])
    for one, other in zip(ours, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_weights_come_where_they_were_deferred():
    """Backward runs in the reverse order of forward: what was called after :meth:`deferred` is differentiated first."""
    x, plan, gates, weights, grad = leaves()
    order = Order()

    def noted(x, what):
        x = x * 1
        x.register_hook(lambda grad: order.ran.append(what))
        return x

    early = noted(x, "before")
    deferred = weights.deferred()
    late = noted(early, "after")
    y = run_experts(late, plan, gates, deferred)
    with order:
        y.backward(grad)
    assert order.ran == ["data", "after", "weights", "before"]


def test_a_backward_that_ends_before_the_weights_leaves_nothing_to_the_next():
    x, plan, gates, weights, grad = leaves()
    y = run_experts(x, plan, gates, weights.deferred())
    for _ in range(2):
        torch.autograd.grad(y, (x,), grad, retain_graph=True)
    ours = torch.autograd.grad(y, (weights.up_proj, weights.down_bias), grad)
    expected = torch.autograd.grad(run_experts(x, plan, gates, weights), (weights.up_proj, weights.down_bias), grad)
    for one, other in zip(ours, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_nothing_is_deferred_where_no_gradient_is_wanted():
    *_, weights, _ = leaves()
    frozen = ExpertWeights(*(getattr(weights, name).detach() for name in NAMES))
    assert frozen.deferred() is frozen
    with torch.no_grad():
        assert weights.deferred() is weights


def test_one_frozen_projection_gets_none():
    x, plan, gates, weights, grad = leaves()
    weights.up_proj.requires_grad_(False)
    run_experts(x, plan, gates, weights.deferred()).backward(grad)
    assert weights.up_proj.grad is None
    assert weights.down_proj.grad is not None


def test_main_grads_take_the_projections_gradients():
    x, plan, gates, weights, grad = leaves(torch.bfloat16)
    start = [torch.full_like(w, 2.0, dtype=torch.float32) for w in (weights.up_proj, weights.down_proj)]
    buffers = tuple(buffer.clone() for buffer in start)
    run_experts(x, plan, gates, weights.deferred(), main_grads=buffers).backward(grad)
    assert weights.up_proj.grad is None
    assert weights.down_proj.grad is None
    apart = run_experts(x, plan, gates, weights)
    expected = torch.autograd.grad(apart, tensors_of(x, gates, weights), grad)
    for buffer, before, gradient in zip(buffers, start, expected[2:4], strict=True):
        torch.testing.assert_close(buffer - before, gradient.float(), rtol=2e-2, atol=2e-2)
    for leaf, gradient in zip(
        (x, gates, weights.up_bias, weights.down_bias), (*expected[:2], *expected[4:]), strict=True
    ):
        torch.testing.assert_close(leaf.grad, gradient, rtol=2e-2, atol=2e-2)


def test_autocast_reaches_both_halves():
    x, plan, gates, weights, grad = leaves(torch.float32)
    wanted, results = tensors_of(x, gates, weights), []
    for how in (weights, weights.deferred()):
        with torch.autocast("cpu", torch.bfloat16):
            y = run_experts(x, plan, gates, how)
        assert y.dtype == torch.bfloat16
        results.append(torch.autograd.grad(y, wanted, grad.bfloat16()))
    for one, other, leaf in zip(*results, wanted, strict=True):
        assert one.dtype == leaf.dtype
        torch.testing.assert_close(one, other, rtol=2e-2, atol=2e-2)


def test_second_derivatives_are_refused_in_both_halves():
    x, plan, gates, weights, grad = leaves()
    y = run_experts(x, plan, gates, weights.deferred())
    of_x, of_weight = torch.autograd.grad(y, (x, weights.up_proj), grad, create_graph=True)
    for gradient in (of_x, of_weight):
        with pytest.raises(RuntimeError, match="double backward is not supported"):
            torch.autograd.grad(gradient.sum(), (x,), retain_graph=True)


def test_a_compiled_call_keeps_its_backward_in_one_piece():
    x, plan, gates, weights, grad = leaves(torch.float32)

    @torch.compile(backend="aot_eager", fullgraph=True)
    def run(x, gates, up, down, up_bias, down_bias):
        return run_experts(x, plan, gates, ExpertWeights(up, down, up_bias, down_bias).deferred())

    wanted = tensors_of(x, gates, weights)
    y = run(*wanted)
    with Order() as order:
        ours = torch.autograd.grad(y, wanted, grad)
    assert order.ran == [""]
    expected = torch.autograd.grad(run_experts(x, plan, gates, weights), wanted, grad)
    for one, other in zip(ours, expected, strict=True):
        torch.testing.assert_close(one, other)
