"""Weights whose rows of gate and up take turns, as GPT-OSS's: read where they lie, their gradients likewise."""

from __future__ import annotations

import pytest
import torch
from big_allocations import BigAllocations, Peak, peaks_can_be_read
from helpers import assert_as_accurate, interpreted
from moe_mlp_cases import CASE, build, interleaved, truth
from moe_mlp_kernel_cases import small_blocks

from dmoe import ClampedSwiGLU, ExpertWeights
from dmoe.functional import moe_mlp
from dmoe.ops._library import compiled
from dmoe.ops._moe_mlp_call import Call
from dmoe.ops.moe_mlp_cuda import _served, moe_mlp_backward_cuda, moe_mlp_cuda
from dmoe.strides import bias_beside, half_by_half, in_memory_order, is_interleaved, matrices, readable

EXPERTS, WIDTH, HIDDEN = 512, 32, 256
ALL_EXPERTS = EXPERTS * 2 * WIDTH * HIDDEN * 4  # bytes of the up projection, 32 MiB
HELD = ("gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias")  # as GptOssExperts has them


def as_gpt_oss(experts=EXPERTS, width=WIDTH, hidden=HIDDEN, dtype=torch.float32, scale=0.01):
    """Parameters in Hugging Face's shapes, and the weights as views of them."""
    shapes = (experts, hidden, 2 * width), (experts, 2 * width), (experts, width, hidden), (experts, hidden)
    held = {n: (scale * torch.randn(*s)).to(dtype).requires_grad_() for n, s in zip(HELD, shapes, strict=True)}
    return held, lambda: views(held)


def views(held):
    up, up_bias, down, down_bias = (held[name] for name in HELD)
    width = down.shape[1]
    return ExpertWeights(
        up.mT.unflatten(1, (width, 2)).transpose(1, 2),
        down.mT,
        up_bias.unflatten(1, (width, 2)).transpose(1, 2),
        down_bias,
    )


def eager(held, x, experts, gates, activation):
    """What Hugging Face's loop computes, a token at a time, rounded where its tensors are."""
    rows = []
    for t in range(len(x)):
        total = 0
        for k, e in enumerate(experts[t].tolist()):
            both = x[t] @ held[HELD[0]][e] + held[HELD[1]][e]
            gate = both[::2].clamp(max=activation.limit)
            up = both[1::2].clamp(-activation.limit, activation.limit)
            hidden = (up + activation.up_offset) * gate * torch.sigmoid(activation.alpha * gate)
            total = total + gates[t, k] * (hidden @ held[HELD[2]][e] + held[HELD[3]][e])
        rows.append(total.to(x.dtype))
    return torch.stack(rows)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", [None, "torch", "reference", "block_sparse"])
def test_parameters_of_gpt_oss_as_they_are(backend, dtype):
    """Transposed, interleaved, with biases, clamped: y and every parameter's gradient, in the parameter's own order."""
    torch.manual_seed(1)
    held, _ = as_gpt_oss(4, 16, 12, dtype, scale=0.5)
    x, experts = (3 * torch.randn(19, 12)).to(dtype), torch.rand(19, 4).topk(2).indices
    gates = torch.rand(19, 2, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    grad, activation = torch.randn(19, 12).to(dtype), ClampedSwiGLU(2.0)

    def run(kind, function):
        leaves = {name: tensor.detach().to(kind).requires_grad_() for name, tensor in held.items()}
        inputs = x.to(kind).requires_grad_()
        y = function(leaves, inputs)
        return [y.detach(), *torch.autograd.grad(y, (inputs, *leaves.values()), grad.to(kind))]

    ours = run(dtype, lambda held, x: moe_mlp(x, experts, gates, views(held), activation=activation, backend=backend))
    exact = run(torch.float64, lambda held, x: eager(held, x, experts, gates.double(), activation))
    plain = run(dtype, lambda held, x: eager(held, x, experts, gates, activation))
    for name, mine, right, own in zip(("y", "x", *HELD), ours, exact, plain, strict=True):
        assert mine.is_contiguous() or backend == "block_sparse", name
        if dtype == torch.float64:
            torch.testing.assert_close(mine, right, rtol=1e-10, atol=1e-11)
        else:
            assert_as_accurate(name, mine, right, [(own, right)])


@pytest.mark.parametrize("transposed", [True, False])
def test_nothing_copies_all_experts(transposed):
    """No operation makes a tensor of their size, forward or backward, but for the gradients; nor is one saved."""
    held, weights = as_gpt_oss()
    if not transposed:
        held["gate_up_proj"] = torch.randn(EXPERTS, 2 * WIDTH, HIDDEN).requires_grad_()

        def weights():
            up = held["gate_up_proj"].unflatten(1, (WIDTH, 2)).transpose(1, 2)
            return ExpertWeights(up, held["down_proj"].mT)

    x, experts = torch.randn(24, HIDDEN, requires_grad=True), torch.randint(EXPERTS, (24, 2))
    known, packed = [x, *held.values()], []
    with (
        BigAllocations(ALL_EXPERTS // 4, *known) as forward,
        torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t) or t, lambda t: t),
    ):
        y = moe_mlp(x, experts, torch.rand(24, 2), weights(), activation=ClampedSwiGLU())
    with BigAllocations(ALL_EXPERTS // 4, *known) as backward:
        y.sum().backward()
    assert forward.found == backward.found == []
    theirs = {tensor.untyped_storage().data_ptr() for tensor in known}
    own = [t for t in packed if t.untyped_storage().data_ptr() not in theirs]
    assert len(packed) - len(own) >= 2  # both projections, as they lie
    assert max(t.numel() for t in own) == 48 * 2 * WIDTH  # the pre-activation
    for name in ("gate_up_proj", "down_proj"):
        assert held[name].grad.is_contiguous(), name
        assert held[name].grad.abs().sum() > 0, name
    with BigAllocations(ALL_EXPERTS // 4, *known) as counted:
        weights().up_proj.contiguous()
    assert counted.found == ["aten.clone.default"]


@pytest.mark.skipif(not compiled or not peaks_can_be_read(), reason="needs the compiled operation and Linux's /proc")
def test_memory_of_a_call_does_not_grow_by_all_experts():
    held, weights = as_gpt_oss()
    x, experts, gates = torch.randn(24, HIDDEN, requires_grad=True), torch.randint(EXPERTS, (24, 2)), torch.rand(24, 2)
    moe_mlp(x, experts, gates, weights()).sum().backward()  # threads, scratch and what PyTorch loads on first use
    for tensor in held.values():
        tensor.grad = None
    with Peak() as forward:
        y = moe_mlp(x, experts, gates, weights())
    with Peak() as backward:
        y.sum().backward()
    assert forward.bytes < ALL_EXPERTS // 4
    assert backward.bytes < 1.75 * ALL_EXPERTS  # gradients of both projections, one and a half
    with Peak() as counted:
        copy = weights().up_proj.contiguous()
    assert counted.bytes >= ALL_EXPERTS * 0.9
    del copy


def test_who_saves_the_weights_in_another_order_does_no_harm():
    """The pre-activation lies one way whatever the weights do, so backward may see them as a hook gives them back."""
    results = []
    for pack in (lambda t: t, torch.Tensor.contiguous):
        torch.manual_seed(0)
        held, weights = as_gpt_oss(3, 5, 6, torch.float64, scale=1.0)
        x = torch.randn(9, 6, dtype=torch.float64, requires_grad=True)
        experts, gates = torch.randint(3, (9, 2)), torch.rand(9, 2, dtype=torch.float64)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            y = moe_mlp(x, experts, gates, weights(), activation=ClampedSwiGLU())
        results.append([y, *torch.autograd.grad(y.square().sum(), (x, *held.values()))])
    for expected, got in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


WIDE = {
    "one expert": {},
    "holes, weighed activation": {"gate_on": "activation", "experts": 2, "layout": "padded"},
    "one token": {"tokens": 1, "hidden": 600, "sizes": 500},
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", ["interleaved", "interleaved, transposed"])
@pytest.mark.parametrize("changed", WIDE.values(), ids=WIDE)
def test_columns_are_cut_where_rows_are_few(layout, dtype, changed):
    """Of gate and up together: forward with and without the pre-activation kept, and both forms of backward."""
    case = {"tokens": 35, "experts": 1, "top_k": 1, "hidden": 270, "sizes": 300, "gated": True, "bias": True,
            "activation": "clamped_swiglu(1.5,1.702,1.0)", "gate_on": "output", "layout": "packed", "hot": False,
            "weights": layout, "seed": 4} | changed  # fmt: skip
    arguments, grad, indices, kept = build(case, dtype)
    arguments[2], arguments[3] = arguments[2] * 0.1, arguments[3] * 0.1
    y, pre = torch.ops.dmoe.moe_mlp(*arguments)
    assert torch.equal(torch.ops.dmoe.moe_mlp_inference(*arguments), y)
    whole = torch.ops.dmoe.moe_mlp_backward(grad, pre, True, *arguments)
    halves = torch.ops.dmoe.moe_mlp_backward_data(grad, pre, *arguments)
    assert all(map(torch.equal, halves[:2], whole[:2]))
    weights = torch.ops.dmoe.moe_mlp_backward_weights(grad, *halves[2:], *arguments)
    exact = truth(case, arguments, grad, indices, kept, torch.float64, torch.float64)
    tolerance = 1e-10 if dtype == torch.float64 else 0.1  # a number rounded to the other side of a limit counts whole
    for ours, theirs in zip([y, *whole, *weights], [*exact, *exact[3:]], strict=True):
        if theirs is not None:
            assert (ours - theirs).norm() <= tolerance * theirs.norm()
    eps = torch.finfo(dtype).eps
    for part in ("plain", "torch"):  # the pre-activation lies one way: columns of the gate, then those of up
        other, *_ = build({**case, "weights": "plain"}, dtype)
        other[2], other[3] = other[2] * 0.1, other[3] * 0.1
        expected = torch.ops.dmoe.moe_mlp(*other)[1] if part == "plain" else torch.ops.dmoe.moe_mlp_torch(*arguments)[1]
        used = int(arguments[6][-1])
        assert (pre - expected)[:used].abs().max() <= max(1e-10, eps) * expected[:used].abs().max()


def test_which_strides_are_interleaved():
    rows, columns = torch.zeros(3, 10, 4), torch.zeros(3, 4, 10).mT
    for weight in (rows, columns):
        up = half_by_half(weight)
        assert up.shape == (3, 2, 5, 4)
        assert is_interleaved(up)
        assert readable(up) is up
        assert in_memory_order(up).stride() == weight.stride()
        (one,) = matrices(up, None, True)
        assert one.stride() == weight.stride()
        assert torch.empty_like(up).stride() == up.stride()
        assert readable(up[1:]).data_ptr() == up[1:].data_ptr()
    plain = torch.zeros(3, 2, 5, 4)
    for weight in (plain, plain.mT.contiguous().mT, plain.flatten(1, 2).mT.contiguous().mT.unflatten(1, (2, 5))):
        assert not is_interleaved(weight)
    assert not is_interleaved(torch.zeros(3, 2, 1, 4))
    odd = half_by_half(torch.zeros(3, 10, 8)[..., ::2])
    assert is_interleaved(odd)
    assert readable(odd).is_contiguous()
    bias = half_by_half(torch.zeros(3, 10))
    assert bias_beside(bias, half_by_half(rows)) is bias
    assert bias_beside(plain[..., 0], plain).is_contiguous()
    assert is_interleaved(bias_beside(plain[..., 0], half_by_half(rows)).unsqueeze(-1))


@interpreted
def test_main_grads_in_another_order_than_the_weights():
    """Plain buffers for interleaved weights are added to all the same."""
    arguments, grad, *_ = build({**CASE, "weights": "interleaved", "hidden": 16, "sizes": 16}, torch.float32)
    call = Call(*arguments)
    assert _served(call)
    found = []
    for buffers in (None, [torch.full(call.up_proj.shape, 2.0), None], [torch.full_like(call.up_proj, 2.0), None]):
        with small_blocks(16, 16, 1, 16, 2):
            _, pre = moe_mlp_cuda(*call)
            grads = moe_mlp_backward_cuda(grad, pre, True, *(call if buffers is None else call.with_buffers(buffers)))
        found.append(grads[2] if buffers is None else buffers[0] - 2)
        assert grads[2].numel() == (call.up_proj.numel() if buffers is None else 0)
    for buffer in found[1:]:
        torch.testing.assert_close(buffer, found[0], rtol=1e-5, atol=1e-5)


def test_interleaving_is_of_the_test_s_own_making():
    """What the cases call interleaved: gate 0, up 0, gate 1 in memory."""
    weight = torch.arange(12.0).view(1, 2, 3, 2)
    assert interleaved(weight).equal(weight)
    assert in_memory_order(interleaved(weight))[0, :, 0].tolist() == [0, 6, 2, 8, 4, 10]
