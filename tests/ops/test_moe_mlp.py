"""The expert MLP as an operation, compiled, reference and Triton kernels: every plan layout against the oracle."""

from __future__ import annotations

from itertools import permutations

import oracle
import pytest
import torch
from helpers import assert_as_accurate, interpreted, nudged, without_generated_products
from hypothesis import example, given, settings
from moe_mlp_cases import build, cases, summands, truth

from dmoe import ExpertWeights, plan_expert_choice, plan_token_choice
from dmoe.activations import NAMES as ACTIVATIONS
from dmoe.functional import run_experts
from dmoe.ops import moe_mlp as module
from dmoe.ops.activation import activate, activate_backward

IMPLEMENTATIONS = {
    "operation": (torch.ops.dmoe.moe_mlp, torch.ops.dmoe.moe_mlp_backward),
    "reference": (module.moe_mlp_ref, module.moe_mlp_backward_ref),
    "torch": (torch.ops.dmoe.moe_mlp_torch, torch.ops.dmoe.moe_mlp_torch_backward),
    "kernels": (module.moe_mlp_cuda, module.moe_mlp_backward_cuda),
}


@without_generated_products
@pytest.mark.parametrize(
    "implementation", ["operation", "reference", "torch", pytest.param("kernels", marks=interpreted)]
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@settings(max_examples=25)
@given(case=cases())
@example(case={"tokens": 1, "experts": 1, "top_k": 1, "hidden": 1, "sizes": 4, "activation": "gelu", "gated": True,
               "bias": False, "gate_on": "output", "layout": "packed", "hot": False, "weights": "apart",
               "seed": 0})  # fmt: skip
def test_moe_mlp_equals_the_oracle(implementation, dtype, case):
    if implementation == "kernels" and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter multiplies the raw bits of bfloat16; test_gpu.py has it on a GPU")
    arguments, grad, indices, kept = build(case, dtype)
    forward, backward = IMPLEMENTATIONS[implementation]
    y, pre = forward(*arguments)
    results = [y, *backward(grad, pre, True, *arguments)]
    exact = truth(case, arguments, grad, indices, kept, torch.float64, torch.float64)
    names = ["y", "x", "gate_weights", "up_proj", "down_proj", "up_bias", "down_bias", "gate_proj"]
    if dtype == torch.float64:
        for name, ours, theirs in zip(names, results, exact, strict=True):
            if theirs is not None:
                torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}")
        return
    pairs = [(truth(case, arguments, grad, indices, kept, dtype, torch.float32), exact)]
    for _ in range(3 if exact[1].numel() >= 16 else 9):
        moved, other = [nudged(t) for t in arguments[:6]] + arguments[6:], nudged(grad)
        pairs.append(
            (
                truth(case, moved, other, indices, kept, dtype, torch.float32),
                truth(case, moved, other, indices, kept, torch.float64, torch.float64),
            )
        )
    added = summands(case, arguments, grad, indices, kept)
    for i, name in enumerate(names):
        if exact[i] is not None:
            # <a, W^T dy> sums F rounded terms where plain PyTorch's <o, dy> sums H: with F well below H and half
            # precision that is noisier, the price of not keeping o.
            factor = 6 if name == "gate_weights" and dtype.itemsize == 2 else 2
            own = [(plain[i], true[i]) for plain, true in pairs]
            assert_as_accurate(name, results[i], exact[i], own, factor=factor, summands=added[i])


def test_sums_that_cancel_are_held_to_ulps_of_what_was_added():
    """Four numbers that leave next to nothing: the order of a sum decides its last bit, and none of them is wrong."""
    numbers = torch.tensor([0.7, 0.123, -0.6, -0.2229999])
    exact = numbers.double().sum().view(1)
    own, size = [(exact, exact)], numbers.abs().sum().view(1)  # an order that is exact by luck
    for order in permutations(range(4)):
        found = sum(numbers[list(order)].unbind()).view(1)
        assert_as_accurate("sum", found, exact, own, summands=size)
    with pytest.raises(AssertionError, match="sum: error"):  # the ulp of what is left would tell the orders apart
        assert_as_accurate("sum", sum(numbers.flip(0).unbind()).view(1), exact, own)
    with pytest.raises(AssertionError, match="sum: error"):
        assert_as_accurate("sum", exact.float() + 1e-5, exact, own, summands=size)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("counts", "H", "F"),
    [([700, 1, 0, 130, 129], 40, 24), ([0, 0, 0, 9000, 3], 40, 24), ([300, 20], 530, 272)],
    ids=str,
)
def test_blocks_waves_and_cut_weight_gradients(dtype, counts, H, F):
    """Experts larger than a block or a wave, of a size that products round up, and wide enough for their weight
    gradients to be cut: against one product per expert."""
    torch.manual_seed(0)
    E = len(counts)
    experts = torch.cat([torch.full((n,), e) for e, n in enumerate(counts)])
    experts = experts[torch.randperm(len(experts))]
    x = torch.randn(len(experts), H).to(dtype).requires_grad_()
    gates = torch.rand(len(experts), 1).requires_grad_()
    up = torch.randn(E, 2, F, H).div(6).to(dtype).requires_grad_()
    down = torch.randn(E, H, F).div(5).to(dtype).requires_grad_()
    leaves = x, gates, up, down
    grad = torch.randn(len(experts), H).to(dtype)
    y = run_experts(x, plan_token_choice(experts.unsqueeze(1), E), gates, ExpertWeights(up, down))
    ours = [y, *torch.autograd.grad(y, leaves, grad)]

    def plain(kind):
        x, gates, up, down = (leaf.detach().to(kind).requires_grad_() for leaf in leaves)
        rows = torch.zeros(len(experts), H, dtype=kind)
        for e in range(E):
            t = (experts == e).nonzero().squeeze(1)
            hidden = torch.nn.functional.silu(x[t] @ up[e, 0].t()) * (x[t] @ up[e, 1].t())
            rows = rows.index_copy(0, t, (hidden @ down[e].t()) * gates[t])
        return [rows, *torch.autograd.grad(rows, (x, gates, up, down), grad.to(kind))]

    for name, a, exact, own in zip(
        ["y", "x", "gates", "up", "down"], ours, plain(torch.float64), plain(dtype), strict=True
    ):
        assert_as_accurate(name, a, exact, [(own, exact)])


COLUMN_CASES = {
    "one expert": {},
    "input, not gated": {"gate_on": "input", "gated": False, "bias": False},
    "activation, holes": {"gate_on": "activation", "experts": 2, "layout": "padded"},
    "different widths": {"experts": 3, "top_k": 2, "sizes": [300, 7, 130], "hot": True},
    "one token": {"tokens": 1, "hidden": 600, "sizes": 500},
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("changed", COLUMN_CASES.values(), ids=COLUMN_CASES)
def test_columns_are_cut_where_rows_are_few(dtype, changed):
    """Products large enough that columns of F and of H are tasks of their own: forward, and both forms of backward."""
    case = {"tokens": 35, "experts": 1, "top_k": 1, "hidden": 270, "sizes": 300, "activation": "silu", "gated": True,
            "bias": True, "gate_on": "output", "layout": "packed", "hot": False, "seed": 4} | changed  # fmt: skip
    arguments, grad, indices, kept = build(case, dtype)
    for i, scale in ((2, 0.1), (3, 0.1)):
        arguments[i] = arguments[i] * scale
    y, pre = torch.ops.dmoe.moe_mlp(*arguments)
    assert torch.equal(torch.ops.dmoe.moe_mlp_inference(*arguments), y)
    whole = torch.ops.dmoe.moe_mlp_backward(grad, pre, True, *arguments)
    halves = torch.ops.dmoe.moe_mlp_backward_data(grad, pre, *arguments)
    assert torch.equal(halves[0], whole[0])
    assert torch.equal(halves[1], whole[1])
    weights = torch.ops.dmoe.moe_mlp_backward_weights(grad, *halves[2:], *arguments)
    exact = truth(case, arguments, grad, indices, kept, torch.float64, torch.float64)
    tolerance = 1e-10 if dtype == torch.float64 else 2e-2
    names = ["y", "x", "gate_weights", "up_proj", "down_proj", "up_bias", "down_bias", "gate_proj"]
    found = zip([*names, *names[3:]], [y, *whole, *weights], [*exact, *exact[3:]], strict=True)
    for name, ours, theirs in found:
        if theirs is not None:
            assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max(), name


def test_expert_choice_plan_feeds_the_operation():
    torch.manual_seed(0)
    chosen = torch.tensor([[3, 0, 1], [3, -1, 2], [3, 1, 0]])
    plan = plan_expert_choice(chosen, 5)
    assert plan.token_offsets.tolist() == [0, 2, 4, 5, 8, 8]
    gates = torch.rand(9, dtype=torch.float64)
    up, down = torch.randn(3, 2, 4, 6, dtype=torch.float64), torch.randn(3, 6, 4, dtype=torch.float64)
    x = torch.randn(5, 6, dtype=torch.float64)
    y = run_experts(x, plan, gates, ExpertWeights(up, down))
    expected = torch.zeros_like(x)
    position = 0
    for t in range(5):
        for e in range(3):
            if t in chosen[e].tolist():
                expected[t] += gates[position] * oracle.expert_forward(
                    x[t], up[e], down[e], None, None, activation="silu", gated=True
                )
                position += 1
    torch.testing.assert_close(y, expected)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_compiled_activations_over_their_whole_range(activation, dtype):
    """Through one expert that is the identity: value and slope over [-100, 100], and NaN stays NaN."""
    x = torch.cat(
        [torch.linspace(-100, 100, 4001), torch.linspace(-6, 6, 4001), torch.tensor([0.0, -0.0, 1e-30, -1e-30])]
    )
    x = x.to(dtype).unsqueeze(1)
    one = torch.ones(1, 1, 1, dtype=dtype)
    plan = plan_token_choice(torch.zeros(len(x), 1, dtype=torch.int32), 1)
    gates = torch.ones(len(x), 1, dtype=dtype)

    def run(x):
        return run_experts(x, plan, gates, ExpertWeights(one, one, gated=False), activation=activation)

    leaf = x.clone().requires_grad_()
    y = run(leaf)
    y.sum().backward()
    exact = oracle.ACT[activation](x.double())
    slope = activate_backward(torch.ones_like(x).double(), x.double(), activation, False)
    eps = torch.finfo(dtype).eps
    assert ((y - exact).abs() <= (5 if dtype == torch.float32 else 10) * eps * exact.abs().clamp(min=0.25)).all()
    assert ((leaf.grad - slope).abs() <= (10 if dtype == torch.float32 else 40) * eps).all()  # PyTorch's own: 9 and 23
    torch.testing.assert_close(activate(x.double(), activation, False), exact)
    assert torch.isnan(run(torch.tensor([[float("nan")]], dtype=dtype).expand(len(x), 1).contiguous())).all()


def opcheck_cases():
    base = {"tokens": 6, "experts": 3, "top_k": 2, "hidden": 5, "sizes": 4, "activation": "silu", "gated": True,
            "bias": False, "gate_on": "output", "layout": "packed", "hot": False, "seed": 1}  # fmt: skip
    for change in ({}, {"bias": True, "gated": False}, {"sizes": [3, 1, 4]}, {"layout": "capacity"}, {"tokens": 0}):
        yield {**base, **change}


@pytest.mark.parametrize("case", list(opcheck_cases()), ids=str)
def test_opcheck(case):
    arguments, grad, _, _ = build(case, torch.float32)
    for tensor in arguments[:6]:
        if tensor is not None:
            tensor.requires_grad_()
    torch.library.opcheck(torch.ops.dmoe.moe_mlp.default, arguments)
    detached = [a.detach() if isinstance(a, torch.Tensor) else a for a in arguments]
    torch.library.opcheck(torch.ops.dmoe.moe_mlp_inference.default, detached)
    _, pre = torch.ops.dmoe.moe_mlp(*detached)
    torch.library.opcheck(torch.ops.dmoe.moe_mlp_backward.default, [grad, pre, True, *detached])
    torch.library.opcheck(torch.ops.dmoe.moe_mlp_backward.default, [grad, pre, False, *detached])


def test_inference_operation_equals_the_training_one():
    for case in opcheck_cases():
        arguments, _, _, _ = build(case, torch.bfloat16)
        assert torch.equal(torch.ops.dmoe.moe_mlp_inference(*arguments), torch.ops.dmoe.moe_mlp(*arguments)[0])


@pytest.mark.parametrize(
    ("position", "value", "message"),
    [
        (13, "tanh", r"expected gelu, .*, relu_squared, sigmoid, silu, clamped_swiglu\(.*\) or .*, got tanh"),
        (13, "clamped_swiglu(7.0,1.0)", r"moe_mlp: activation: expected gelu, .*, got clamped_swiglu\(7.0,1.0\)"),
        (13, "clamped_swiglu(7.0,1.0,nan)", "moe_mlp: activation: expected gelu, .*, got clamped_swiglu"),
        (13, "clamped_swiglu(7.0,1.0,0.0) ", "moe_mlp: activation: expected gelu, .*, got clamped_swiglu"),
        (13, "softcapped_swiglu(7.0;1.0)", "moe_mlp: activation: expected gelu, .*, got softcapped_swiglu"),
        (15, "nowhere", "moe_mlp: gate_weight_on: expected output, activation or input, got nowhere"),
        (1, torch.ones(6, 2, dtype=torch.float64), "moe_mlp: gate_weights: expected dtype Float, got Double"),
        (6, torch.zeros(4, dtype=torch.int64), "moe_mlp: expert_offsets: expected dtype Int, got Long"),
        (16, 0.5, "moe_mlp: seed: expected a scalar int64 tensor with dropout, got None"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_the_compiled_operation_names_what_is_wrong(position, value, message):
    from dmoe.ops._library import compiled

    if not compiled:
        pytest.skip("checks of the compiled kernels, which are not built here")
    arguments, _, _, _ = build(next(iter(opcheck_cases())), torch.float32)
    arguments[position] = value
    with pytest.raises(RuntimeError, match=message):
        torch.ops.dmoe.moe_mlp(*arguments)
