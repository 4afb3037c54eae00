"""The expert MLP on weights that lie otherwise in memory: the same results, the same order, no copy of all experts."""

from __future__ import annotations

import pytest
import torch
from big_allocations import BigAllocations, Peak, peaks_can_be_read
from helpers import interpreted
from moe_mlp_cases import CASE, LAYOUTS, build, relaid
from moe_mlp_kernel_cases import small_blocks

from dmoe import ExpertWeights, plan_token_choice
from dmoe.functional import moe_mlp, run_experts
from dmoe.ops._library import compiled
from dmoe.ops._moe_mlp_call import PROJECTIONS, Call
from dmoe.ops.grouped_gemm import grouped_gemm
from dmoe.ops.moe_mlp import GRADS
from dmoe.ops.moe_mlp_cuda import _served, moe_mlp_backward_cuda, moe_mlp_cuda
from dmoe.ops.moe_mlp_ref import moe_mlp_backward_ref, moe_mlp_ref
from dmoe.strides import in_layout_of, is_transposed, readable

OPS = torch.ops.dmoe
OTHERS = LAYOUTS[1:]
INTERLEAVED = ("interleaved", "interleaved, transposed")
BESIDE = ("up_proj", "down_proj", "gate_proj")


def problem(layout, dtype=torch.float64, **change):
    """x, plan, gate weights, weights in this layout (all of it leaves), and a gradient of y."""
    arguments, grad, indices, _ = build({**CASE, **change}, dtype)
    call = Call(*relaid(arguments, layout))
    named = {name: getattr(call, name) for name in ("up_proj", "down_proj", "up_bias", "down_bias", "gate_proj")}
    for tensor in (call.x, call.gate_weights, *named.values()):
        if tensor is not None:
            tensor.requires_grad_()
    weights = ExpertWeights(**named, gated=call.gated, ffn_sizes=tuple(call.ffn_sizes or ()))
    return call.x, plan_token_choice(torch.tensor(indices), call.num_experts), call.gate_weights, weights, grad


def joined(weights, get=lambda tensor: tensor):
    """Up projection with its gate, and down projection, or what ``get`` makes of each tensor."""
    up = get(weights.up_proj)
    if weights.gate_proj is not None:
        up = torch.stack([get(weights.gate_proj), up], 0 if weights.ffn_sizes else 1)
    return [up, get(weights.down_proj)]


def gradients(run, x, gates, weights, grad):
    """y and the gradients of x, gate weights, biases and projections, gate and up joined."""
    y = run(x, gates, weights)
    y.backward(grad)
    biases = [tensor.grad for tensor in (weights.up_bias, weights.down_bias) if tensor is not None]
    return [y.detach(), x.grad, gates.grad, *biases, *joined(weights, lambda tensor: tensor.grad)]


@pytest.mark.parametrize("layout", OTHERS)
@pytest.mark.parametrize("change", [{}, {"gated": False}, {"sizes": [3, 1, 4]}, {"bias": False}], ids=str)
@pytest.mark.parametrize("option", ["plain", "recompute", "deferred", "reference", "parts", "dropout"])
def test_results_are_those_on_contiguous_weights(layout, change, option):
    def run(x, gates, weights):
        if option == "deferred":
            weights = weights.deferred()
        if option == "parts":
            weights = weights.parts(1)[0]
        options = {
            "recompute": {"recompute": True},
            "reference": {"backend": "reference"},
            "dropout": {"activation_dropout": 0.3, "expert_dropout": 0.2, "gate_weight_on": "activation"},
        }.get(option, {})
        torch.manual_seed(5)  # of the masks
        return run_experts(x, plan, gates, weights, **options)

    results = []
    for how in ("plain", layout):
        x, plan, gates, weights, grad = problem(how, **change)
        with torch.no_grad():
            inference = run(x, gates, weights)
        results.append([inference, *gradients(run, x, gates, weights, grad)])
    for expected, got in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("layout", OTHERS)
def test_block_sparse_products_take_one_copy_and_give_the_same(layout):
    results = []
    for how in ("plain", layout):
        x, plan, gates, weights, grad = problem(how, sizes=16)
        results.append(
            gradients(
                lambda x, gates, weights, plan=plan: run_experts(x, plan, gates, weights, backend="block_sparse"),
                *(x, gates, weights, grad),
            )
        )
    for expected, got in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("change", [{}, {"sizes": [3, 1, 4]}], ids=str)
@pytest.mark.parametrize("option", ["plain", "deferred", "reference"])
@pytest.mark.parametrize("layout", OTHERS)
def test_gradients_lie_as_the_weights_do(layout, option, change):
    x, plan, gates, weights, grad = problem(layout, **change)
    received = {}
    for name in BESIDE:
        if (tensor := getattr(weights, name)) is not None:
            tensor.register_hook(lambda grad, name=name: received.update({name: grad.stride()}))
    held = weights.deferred() if option == "deferred" else weights
    # Widths that differ are padded by the reference, through PyTorch's own operations.
    run_experts(x, plan, gates, held, backend="reference" if option == "reference" else None).backward(grad)
    if option == "reference" and (change or layout == "merged"):
        return
    expected = {n: torch.empty_like(w).stride() for n in BESIDE if (w := getattr(weights, n)) is not None}
    if option == "reference" and layout == "transposed":  # its up projection is two matrices, put together by PyTorch
        del expected["up_proj"], received["up_proj"]
    assert received == expected
    assert all(weight.stride() == expected[n] for n in expected if (weight := getattr(weights, n)) is not None)


@pytest.mark.parametrize("trans_b", [True, False])
def test_the_gradient_of_a_product_lies_as_its_matrices_do(trans_b):
    offsets = torch.tensor([0, 2, 2, 5], dtype=torch.int32)
    a, plain = torch.randn(5, 4), torch.randn(3, 6, 4) if trans_b else torch.randn(3, 4, 6)
    grads = []
    for b in (plain, plain.mT.contiguous().mT):
        b.requires_grad_()
        grouped_gemm(a, b, offsets, trans_b=trans_b).sum().backward()
        grads.append(b.grad)
        assert torch.autograd.grad(grouped_gemm(a, b, offsets, trans_b=trans_b).sum(), b)[0].stride() == b.stride()
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("layout", OTHERS)
def test_gradcheck(layout):
    x, plan, gates, weights, _ = problem(layout, tokens=4, hidden=3, sizes=2)
    named = {n: t for n in ("up_proj", "down_proj", "gate_proj", "up_bias") if (t := getattr(weights, n)) is not None}

    def run(*tensors):
        held = dict(zip(named, tensors, strict=True))
        return run_experts(x, plan, gates, ExpertWeights(**held, down_bias=weights.down_bias))

    assert torch.autograd.gradcheck(run, tuple(named.values()), nondet_tol=0.0)


@pytest.mark.parametrize(
    ("layout", "sizes"), [("transposed", 5), ("merged", 5), ("apart", [3, 1, 4]), (INTERLEAVED[1], 5)], ids=str
)
def test_opcheck(layout, sizes):
    """Fake results have the strides of the real ones."""
    arguments, grad, _, _ = build({**CASE, "sizes": sizes, "weights": layout}, torch.float32)
    call = Call(*arguments)
    _, pre = OPS.moe_mlp(*call)
    fake = ("test_schema", "test_faketensor")
    torch.library.opcheck(OPS.moe_mlp_backward.default, [grad, pre, True, *call], test_utils=fake)
    *_, grad_pre, hidden = OPS.moe_mlp_backward_data(grad, pre, *call)
    torch.library.opcheck(OPS.moe_mlp_backward_weights.default, [grad, grad_pre, hidden, *call], test_utils=fake)
    given = (call.up_proj, call.down_proj, call.gate_proj)
    into = call.with_buffers([None if w is None else torch.zeros_like(w) for w in given])
    torch.library.opcheck(OPS.moe_mlp_backward_into.default, [grad, pre, *into], test_utils=fake)
    torch.library.opcheck(OPS.moe_mlp_backward_weights_into.default, [grad, grad_pre, hidden, *into], test_utils=fake)
    for tensor in (call.x, *given):
        if tensor is not None:
            tensor.requires_grad_()
    torch.library.opcheck(OPS.moe_mlp.default, list(call), test_utils=(*fake, "test_aot_dispatch_dynamic"))


@pytest.mark.parametrize("held", ["contiguous", "as the weight"])
@pytest.mark.parametrize("option", ["plain", "deferred", "recompute"])
@pytest.mark.parametrize("layout", ["transposed", "apart", "apart, transposed", *INTERLEAVED])
def test_main_grads_take_the_projections_gradients(layout, option, held):
    x, plan, gates, weights, grad = problem(layout, torch.float32)
    names = [name for name in BESIDE if getattr(weights, name) is not None]
    projections = [getattr(weights, name) for name in names]
    expected = torch.autograd.grad(run_experts(x, plan, gates, weights), projections, grad)
    order = torch.contiguous_format if held == "contiguous" else torch.preserve_format
    buffers = [torch.full_like(weight, 2.0, memory_format=order, requires_grad=False) for weight in projections]
    at_work = weights.deferred() if option == "deferred" else weights
    run_experts(x, plan, gates, at_work, main_grads=buffers, recompute=option == "recompute").backward(grad)
    for name, weight, buffer, gradient in zip(names, projections, buffers, expected, strict=True):
        assert weight.grad is None, name
        torch.testing.assert_close(buffer, 2 + gradient, msg=lambda text, name=name: f"{name}: {text}")
    assert weights.up_bias.grad is not None


# ------------------------------------------------------------------------------------------------- no copy in a call

EXPERTS, WIDTH, HIDDEN = 512, 64, 256
ALL_EXPERTS = EXPERTS * WIDTH * HIDDEN * 4  # bytes of one projection, 32 MiB


def as_megablocks(gated=True):
    """Parameters ``(E * F, H)`` of 512 experts, and the weights as views of them."""
    names = ("w1", "v1", "w2") if gated else ("w1", "w2")
    held = {name: torch.full((EXPERTS * WIDTH, HIDDEN), 0.01, requires_grad=True) for name in names}

    def weights():
        by_expert = {name: tensor.view(EXPERTS, WIDTH, HIDDEN) for name, tensor in held.items()}
        down = by_expert["w2"].transpose(1, 2)
        if not gated:
            return ExpertWeights(by_expert["w1"], down, gated=False)
        return ExpertWeights(by_expert["v1"], down, gate_proj=by_expert["w1"])

    return held, weights


@pytest.mark.parametrize("gated", [True, False])
def test_no_operation_copies_all_experts(gated):
    held, weights = as_megablocks(gated)
    x, experts = torch.randn(24, HIDDEN, requires_grad=True), torch.randint(EXPERTS, (24, 2))
    with BigAllocations(ALL_EXPERTS // 2, *held.values()) as forward:
        y = moe_mlp(x, experts, torch.rand(24, 2), weights())
    with BigAllocations(ALL_EXPERTS // 2, *held.values()) as backward:
        y.sum().backward()
    assert forward.found == backward.found == []
    for name, tensor in held.items():
        assert tensor.grad.is_contiguous(), name
        assert tensor.grad.abs().sum() > 0, name
    with BigAllocations(ALL_EXPERTS // 2, *held.values()) as counted:
        held["w2"].view(EXPERTS, WIDTH, HIDDEN).mT.contiguous()
    assert counted.found == ["aten.clone.default"]


@pytest.mark.skipif(not compiled or not peaks_can_be_read(), reason="needs the compiled operation and Linux's /proc")
@pytest.mark.parametrize("option", ["plain", "deferred"])
def test_memory_of_a_call_does_not_grow_by_all_experts(option):
    """What the compiled operation takes beyond its results; the deferred half is made of PyTorch's operations."""
    held, weights = as_megablocks()
    x, experts, gates = torch.randn(24, HIDDEN, requires_grad=True), torch.randint(EXPERTS, (24, 2)), torch.rand(24, 2)

    def run():
        at_work = weights()
        return moe_mlp(x, experts, gates, at_work.deferred() if option == "deferred" else at_work)

    run().sum().backward()  # threads, scratch and what PyTorch loads on first use
    for tensor in held.values():
        tensor.grad = None
    with Peak() as forward:
        y = run()
    with Peak() as backward:
        y.sum().backward()
    assert forward.bytes < ALL_EXPERTS // 2
    assert backward.bytes < 3.5 * ALL_EXPERTS  # three gradients
    with Peak() as counted:
        copy = held["w2"].clone()
    assert counted.bytes >= ALL_EXPERTS * 0.9
    del copy


# ------------------------------------------------------------------------------------------------------ small pieces


def test_which_strides_are_read_in_place():
    plain = torch.zeros(3, 4, 5)
    for weight in (plain, plain.mT, plain[:, 1:3], plain[..., 1:3], plain.mT[:, 1:], plain[:1].expand(7, 4, 5)):
        assert readable(weight) is weight
    assert is_transposed(plain.mT)
    assert not any(is_transposed(weight) for weight in (plain, plain[:, :1], plain[..., 1:2].contiguous()))
    for weight in (plain[..., ::2], plain.permute(2, 1, 0), plain.as_strided((3, 2, 5), (11, 5, 1))):
        assert not weight.is_contiguous()
        assert readable(weight).is_contiguous()
    assert readable(packed := torch.zeros(6, 2, 8).permute(1, 2, 0), packed=True) is packed  # one matrix of both halves


def test_a_gradient_moves_only_where_its_order_differs():
    grad, weight = torch.randn(3, 4, 5), torch.zeros(3, 5, 4).mT
    assert in_layout_of(torch.zeros(3, 4, 5), grad) is grad
    assert in_layout_of(torch.zeros(3, 9, 5)[:, :4], grad) is grad  # a part of a weight is contiguous on its own
    moved = in_layout_of(weight, grad)
    assert moved.stride() == weight.stride()
    assert torch.equal(moved, grad)


@pytest.mark.parametrize("layout", ["odd strides", "a part of a larger tensor", "one matrix for all experts"])
def test_other_strides_give_the_same(layout):
    x, plan, gates, weights, grad = problem("plain", bias=False)
    down = weights.down_proj.detach()
    if layout == "odd strides":
        other = down.repeat_interleave(2, -1)[..., ::2]
    elif layout == "one matrix for all experts":
        other = down = down[:1].expand(3, 6, 5)
    else:
        other = torch.cat([down, down, down], 2)[..., 5:10]
    results = []
    for one in (down.contiguous(), other):
        leaf = one.detach().requires_grad_()
        y = run_experts(x, plan, gates, ExpertWeights(weights.up_proj, leaf))
        results.append((y, *torch.autograd.grad(y, (x, leaf, weights.up_proj), grad)))
    for expected, got in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def test_a_compiled_call_takes_the_layouts():
    x, plan, gates, weights, grad = problem("apart, transposed", torch.float32)

    @torch.compile(backend="aot_eager", fullgraph=True)
    def run(x, gates, up, down, gate):
        return run_experts(x, plan, gates, ExpertWeights(up, down, gate_proj=gate))

    leaves = (x, gates, weights.up_proj, weights.down_proj, weights.gate_proj)
    y = run(*leaves)
    expected = run_experts(
        x, plan, gates, ExpertWeights(weights.up_proj, weights.down_proj, gate_proj=weights.gate_proj)
    )
    pairs = zip(torch.autograd.grad(y, leaves, grad), torch.autograd.grad(expected, leaves, grad), strict=True)
    for got, right in ((y, expected), *pairs):
        torch.testing.assert_close(got, right)


def test_autocast_keeps_the_order():
    x, plan, gates, weights, grad = problem("apart, transposed", torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = run_experts(x, plan, gates, weights)
    assert y.dtype == torch.bfloat16
    y.backward(grad.bfloat16())
    assert weights.gate_proj.grad.dtype == torch.float32
    plain_x, plan, plain_gates, plain, grad = problem("plain", torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        run_experts(plain_x, plan, plain_gates, plain).backward(grad.bfloat16())
    pairs = zip(*(joined(w, lambda tensor: tensor.grad) for w in (weights, plain)), strict=True)
    for got, expected in ((x.grad, plain_x.grad), *pairs):
        torch.testing.assert_close(got, expected, rtol=3e-2, atol=3e-2)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"gated": False}, ValueError, r"gate_proj: expected None with gated=False, got shape \(3, 5, 6\)"),
        ({"gate_proj": torch.ones(3, 4, 6)}, ValueError, r"gate_proj: expected shape \(3, 5, 6\).*got \(3, 4, 6\)"),
        ({"up_proj": torch.ones(3, 2, 5, 6)}, ValueError, r"up_proj: expected shape \(3, 5, 6\).*got \(3, 2, 5, 6\)"),
        ({"gate_proj": torch.ones(3, 5, 6).half()}, ValueError, "gate_proj: expected torch.float32 on cpu as up_proj"),
        ({"gate_proj": [1.0]}, TypeError, "gate_proj: expected a tensor, got list"),
    ],
    ids=str,
)
def test_bad_weights_are_named(change, error, message):
    good = {"up_proj": torch.ones(3, 5, 6), "down_proj": torch.ones(3, 6, 5), "gate_proj": torch.ones(3, 5, 6)}
    assert ExpertWeights(**good).hidden_size == 6
    with pytest.raises(error, match="^ExpertWeights: " + message):
        ExpertWeights(**{**good, **change})


@pytest.mark.parametrize(
    ("buffers", "error", "message"),
    [
        (lambda w: (w.up_proj, w.down_proj), TypeError, "expected three buffers, for up_proj and down_proj and gate"),
        (
            lambda w: (w.up_proj, w.down_proj, w.gate_proj[:, :, ::2].repeat_interleave(2, 2).mT.contiguous().mT),
            ValueError,
            r"gate_proj: expected contiguous float32 \(3, 5, 6\) .* with strides",
        ),
    ],
    ids=["two", "strides"],
)
def test_bad_main_grads_are_named(buffers, error, message):
    x, plan, gates, weights, _ = problem("apart", torch.float32)
    with pytest.raises(error, match="moe_mlp: main_grads: " + message):
        run_experts(x, plan, gates, weights, main_grads=buffers(weights))


def test_the_compiled_operation_names_wrong_shapes():
    if not compiled:
        pytest.skip("checks of the compiled kernels, which are not built here")
    call = Call(*build({**CASE, "weights": "apart"}, torch.float32)[0])
    for change, message in (
        ({"gate_proj": call.gate_proj.mT}, r"gate_proj: expected shape \(3, 5, 6\), got \(3, 6, 5\)"),
        ({"gated": False, "up_bias": None}, r"gate_proj: expected None without a gate, got shape \(3, 5, 6\)"),
        ({"down_proj": call.down_proj.mT.reshape(3, 5, 6)}, "expected shape"),
        ({"gate_proj": call.gate_proj.double()}, "gate_proj: expected dtype Float, got Double"),
    ):
        with pytest.raises(RuntimeError, match="dmoe::moe_mlp: .*" + message):
            OPS.moe_mlp(*call._replace(**change))


@interpreted
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("change", [{}, {"gate_on": "input"}, {"gated": False, "hidden": 32, "sizes": 32}], ids=str)
def test_kernels_read_and_write_every_layout(layout, change):
    """Several tiles of each weight, with and without an overhang, against the reference; main gradients as well."""
    arguments, grad, _, _ = build({**CASE, "hidden": 33, "sizes": 20, **change, "weights": layout}, torch.float32)
    call = Call(*arguments)
    assert _served(call)
    projections = (call.up_proj, call.down_proj, call.gate_proj)
    buffers = [None if weight is None else torch.full(weight.shape, 2.0) for weight in projections]
    with small_blocks(16, 16, 1, 16, 2):
        y, pre = moe_mlp_cuda(*call)
        ours = [y, *moe_mlp_backward_cuda(grad, pre, True, *call)]
        moe_mlp_backward_cuda(grad, pre, True, *call.with_buffers(buffers))
    y, pre = moe_mlp_ref(*call)
    theirs = [y, *moe_mlp_backward_ref(grad, pre, True, *call)]
    for name, got, expected in zip(("y", *GRADS), ours, theirs, strict=True):
        assert got.stride() == expected.stride(), name
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}")
    for buffer, name in zip(buffers, PROJECTIONS, strict=True):
        if buffer is not None:
            torch.testing.assert_close(buffer - 2, theirs[1 + GRADS.index(name)], rtol=1e-4, atol=1e-4)
