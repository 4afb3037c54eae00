"""What the expert MLP takes besides its core: a residual, main gradients, recomputation."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from helpers import saved_bytes, small_config
from moe_mlp_cases import CASE, build, leaves
from torch.utils._python_dispatch import TorchDispatchMode

import dmoe
from dmoe import ExpertWeights, MoE
from dmoe.functional import moe_mlp, run_experts
from dmoe.ops._moe_mlp_call import Call
from dmoe.ops.moe_mlp_cuda import moe_mlp_backward_cuda, moe_mlp_cuda, moe_mlp_pre_activation_cuda


@pytest.mark.parametrize("backend", [None, "torch", "reference", "block_sparse"])
def test_a_residual_is_added_and_gets_the_gradient_of_y(backend):
    x, plan, gates, weights, grad = leaves(sizes=16)
    residual = torch.randn_like(x).requires_grad_()
    y = run_experts(x, plan, gates, weights, residual=residual, backend=backend)
    alone = run_experts(x, plan, gates, weights, backend=backend)
    torch.testing.assert_close(y, alone + residual, rtol=1e-12, atol=1e-12)
    ours = torch.autograd.grad(y, (residual, x, gates, weights.up_proj), grad)
    assert torch.equal(ours[0], grad)
    for a, b in zip(ours[1:], torch.autograd.grad(alone, (x, gates, weights.up_proj), grad), strict=True):
        torch.testing.assert_close(a, b)


def test_a_residual_is_added_before_the_sum_is_rounded():
    x, plan, gates, weights, _ = leaves(torch.bfloat16)
    residual = torch.randn_like(x) * 64
    with torch.no_grad():
        y = run_experts(x, plan, gates, weights, residual=residual)
        wide = ExpertWeights(
            *(t.double() for t in (weights.up_proj, weights.down_proj, weights.up_bias, weights.down_bias))
        )
        exact = run_experts(x.double(), plan, gates.double(), wide) + residual.double()
    own = (exact.to(torch.bfloat16).double() - exact).abs()  # rounding once
    slack = 0.02 * run_experts(x, plan, gates, weights).double().abs().max()  # the products' own error
    assert ((y.double() - exact).abs() <= own + slack).all()


@pytest.mark.parametrize("backend", [None, "torch"])
@pytest.mark.parametrize("sizes", [5, [3, 1, 4]], ids=str)
def test_recomputing_changes_no_bit_and_saves_only_x(sizes, backend):
    x, plan, gates, weights, grad = leaves(torch.float32, sizes=sizes)
    wanted = (x, gates, weights.up_proj, weights.down_proj, weights.up_bias, weights.down_bias)
    indices = (plan.expert_offsets, plan.row_to_token, plan.row_to_slot, plan.token_offsets, plan.token_rows)
    results = []
    for recompute in (False, True):
        with saved_bytes(exclude=(*wanted, *indices)) as saved:
            y = run_experts(x, plan, gates, weights, recompute=recompute, backend=backend)
        results.append((y, torch.autograd.grad(y, wanted, grad), saved.total))
    for a, b in zip(results[0][1], results[1][1], strict=True):
        assert torch.equal(a, b)
    assert torch.equal(results[0][0], results[1][0])
    widest = max(sizes) if isinstance(sizes, list) else sizes
    assert results[0][2] == plan.num_rows * 2 * widest * 4
    assert results[1][2] == 0


@pytest.mark.parametrize("sizes", [5, [3, 1, 4]], ids=str)
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("backend", [None, "torch"])
def test_main_grads_are_added_to_and_weights_get_none(sizes, recompute, backend):
    x, plan, gates, weights, grad = leaves(torch.bfloat16, sizes=sizes)
    others = (x, gates, weights.up_bias, weights.down_bias)
    expected = torch.autograd.grad(
        run_experts(x, plan, gates, weights, backend=backend), (*others, weights.up_proj, weights.down_proj), grad
    )
    buffers = tuple(torch.full_like(w, 2.0, dtype=torch.float32) for w in (weights.up_proj, weights.down_proj))
    for micro_batch in (1, 2):
        y = run_experts(x, plan, gates, weights, main_grads=buffers, recompute=recompute, backend=backend)
        y.backward(grad)
        assert weights.up_proj.grad is None
        assert weights.down_proj.grad is None
        for leaf, gradient in zip(others, expected, strict=False):
            torch.testing.assert_close(leaf.grad, gradient * micro_batch)
        for buffer, gradient in zip(buffers, expected[4:], strict=True):
            torch.testing.assert_close(buffer, 2 + micro_batch * gradient.float())


def test_two_forwards_before_their_backwards_share_the_buffers():
    """Pipelines do so; and a buffer that changed in between is no stale saved tensor."""
    x, plan, gates, weights, grad = leaves(torch.float32)
    buffers = tuple(torch.zeros_like(w) for w in (weights.up_proj, weights.down_proj))
    first = run_experts(x, plan, gates, weights, main_grads=buffers)
    second = run_experts(x, plan, gates, weights, main_grads=buffers)
    second.backward(grad)
    once = [b.clone() for b in buffers]
    first.backward(grad)
    for buffer, half in zip(buffers, once, strict=True):
        torch.testing.assert_close(buffer, 2 * half)


@pytest.mark.parametrize("name", ["moe_mlp", "moe_mlp_torch"])
def test_opcheck_of_the_variants(name):
    def operation(variant=""):
        return getattr(torch.ops.dmoe, name + variant).default

    arguments, grad, _, _ = build(CASE, torch.float32)
    for tensor in arguments[:6]:
        tensor.requires_grad_()
    residual = torch.randn(9, 6, requires_grad=True)
    torch.library.opcheck(operation(), [*arguments, residual])
    torch.library.opcheck(operation("_lean"), [*arguments, residual])
    detached = [a.detach() if isinstance(a, torch.Tensor) else a for a in arguments]
    _, pre = operation()(*detached)
    assert torch.equal(operation("_pre_activation")(*detached), pre)
    torch.library.opcheck(operation("_pre_activation"), detached)
    half = [a.detach() for a in build(CASE, torch.bfloat16)[0][:6]]  # gate weights stay float32
    halves = [grad.bfloat16(), pre.bfloat16(), True, *half, *detached[6:]]
    torch.library.opcheck(operation("_backward"), halves)
    buffers = {"up_main_grad": torch.zeros_like(detached[2]), "down_main_grad": torch.zeros_like(detached[3])}
    torch.library.opcheck(operation("_backward_into"), [grad, pre, *detached], buffers)


def test_layer_options():
    torch.manual_seed(0)
    config = {"shared_ffn_hidden_size": 7, "aux_loss": "attached", "load_balancing_coefficient": 0.0}
    plain = MoE(small_config(**config))
    lean = MoE(small_config(**config, recompute_pre_activation=True))
    fused = MoE(small_config(**config, accumulate_main_grad=True))
    x, grad = torch.randn(5, 8), torch.randn(5, 8)
    for other in (lean, fused):
        other.load_state_dict(plain.state_dict())
    with pytest.raises(RuntimeError, match=r"gate_up_proj.main_grad: expected a float32 buffer.*got none"):
        fused(x)
    projections = [p for name, p in fused.named_parameters() if name.endswith(("up_proj", "down_proj"))]
    assert len(projections) == 4
    for parameter in projections:
        parameter.main_grad = torch.zeros_like(parameter)
    for layer in (plain, lean, fused):
        layer(x).backward(grad)
    with torch.no_grad():
        fused(x)  # evaluation needs no buffers and changes none
    for (name, a), b, c in zip(plain.named_parameters(), lean.parameters(), fused.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad), name
        torch.testing.assert_close(getattr(c, "main_grad", c.grad), a.grad, msg=name)
    assert all(p.grad is None for p in projections)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("frozen", [("gate_up_proj",), ("down_proj",), ("gate_up_proj", "down_proj")], ids=str)
def test_a_frozen_projection_gets_no_main_grad(frozen, recompute):
    torch.manual_seed(0)
    plain = MoE(small_config(bias="expert", load_balancing_coefficient=0.0))
    fused = MoE(small_config(bias="expert", load_balancing_coefficient=0.0, accumulate_main_grad=True,
                             recompute_pre_activation=recompute))  # fmt: skip
    fused.load_state_dict(plain.state_dict())
    for name in ("gate_up_proj", "down_proj"):
        parameter = getattr(fused.experts, name)
        for layer in (plain, fused):
            getattr(layer.experts, name).requires_grad_(name not in frozen)
        if name != frozen[-1]:  # the last one has no buffer at all, and needs none
            parameter.main_grad = torch.full_like(parameter, 2.0)
    x, grad = torch.randn(5, 8), torch.randn(5, 8)
    for layer in (plain, fused):
        layer(x).backward(grad)
    for (name, a), b in zip(plain.named_parameters(), fused.parameters(), strict=True):
        if hasattr(b, "main_grad"):
            assert b.grad is None, name
            torch.testing.assert_close(b.main_grad - 2, torch.zeros_like(a) if a.grad is None else a.grad, msg=name)
        elif b.requires_grad:
            torch.testing.assert_close(b.grad, a.grad, msg=name)


@pytest.mark.parametrize("frozen", ["up_proj", "down_proj", "both"])
def test_a_frozen_weight_leaves_its_buffer_alone(frozen):
    x, plan, gates, weights, grad = leaves(torch.float32)
    trained = {"up_proj": weights.up_proj, "down_proj": weights.down_proj}
    for name in trained if frozen == "both" else [frozen]:
        trained[name].requires_grad_(False)
    others = (x, gates, weights.up_bias, weights.down_bias)
    wanted = (*others, *(w for w in trained.values() if w.requires_grad))
    expected = torch.autograd.grad(run_experts(x, plan, gates, weights), wanted, grad)
    buffers = {name: torch.zeros(w.shape) for name, w in trained.items()}
    y = run_experts(x, plan, gates, weights, main_grads=tuple(buffers.values()))
    y.backward(grad)
    for leaf, gradient in zip(others, expected, strict=False):
        torch.testing.assert_close(leaf.grad, gradient)
    gradients = iter(expected[4:])
    for name, weight in trained.items():
        assert weight.grad is None
        gradient = next(gradients) if weight.requires_grad else torch.zeros_like(weight)
        torch.testing.assert_close(buffers[name], gradient)


class Called(TorchDispatchMode):
    """Which of the experts' operations run, and on what."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        if function.namespace == "dmoe":
            self.calls.append((function._opname, arguments))
        return function(*arguments, **(options or {}))


@pytest.mark.parametrize(("backend", "name"), [(None, "moe_mlp"), ("torch", "moe_mlp_torch")])
def test_no_more_is_computed_than_is_asked_for(backend, name):
    """No weight gradients for frozen experts, and no pre-activation where no gradient is wanted."""
    x, plan, gates, weights, grad = leaves(torch.float32)
    frozen = ExpertWeights(*(t.detach() for t in (weights.up_proj, weights.down_proj)))
    with Called() as called:
        with torch.no_grad():
            run_experts(x, plan, gates, weights, backend=backend)
            run_experts(x, plan, gates, weights, recompute=True, backend=backend)
        run_experts(x.detach(), plan, gates.detach(), frozen, backend=backend)
    assert [call for call, _ in called.calls] == [name + "_inference"] * 3
    for held, of_weights in ((frozen, False), (weights, True)):
        with Called() as called:
            run_experts(x, plan, gates, held, backend=backend).backward(grad)
        assert [call for call, _ in called.calls] == [name, name + "_backward"]
        assert called.calls[1][1][2] is of_weights


def test_a_y_that_nobody_uses_gives_no_gradients():
    arguments, _, _, _ = build(CASE, torch.float32)
    arguments[0].requires_grad_()
    _, pre = torch.ops.dmoe.moe_mlp(*arguments)
    assert torch.autograd.grad(pre.sum(), arguments[0], allow_unused=True) == (None,)


@pytest.mark.parametrize("backend", [None, "torch", "reference", "block_sparse"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_casts_the_residual_too(backend, dtype):
    x, plan, gates, weights, grad = leaves(torch.float32, sizes=16)
    residual = torch.randn(x.shape, dtype=dtype).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = run_experts(x, plan, gates, weights, residual=residual, backend=backend)
        alone = run_experts(x, plan, gates, weights, backend=backend)
    assert y.dtype == alone.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), alone.float() + residual.float(), rtol=2**-6, atol=2**-6)
    y.backward(grad.bfloat16())
    assert residual.grad.dtype == dtype
    assert torch.equal(residual.grad.float(), grad.bfloat16().float())


@pytest.mark.parametrize("recompute", [False, True])
def test_main_grads_under_autocast(recompute):
    x, plan, gates, weights, grad = leaves(torch.float32)
    grad = grad.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        expected = run_experts(x, plan, gates, weights)
    expected = torch.autograd.grad(expected, (weights.up_proj, weights.down_proj), grad)
    buffers = tuple(torch.zeros_like(w, requires_grad=False) for w in (weights.up_proj, weights.down_proj))
    with torch.autocast("cpu", torch.bfloat16):
        y = run_experts(x, plan, gates, weights, main_grads=buffers, recompute=recompute)
    y.backward(grad)
    for buffer, gradient in zip(buffers, expected, strict=True):
        torch.testing.assert_close(buffer, gradient)
    assert weights.up_proj.grad is None


@pytest.mark.parametrize("recompute", [False, True])
def test_autocast_without_gradients_and_with_float64(recompute):
    """Inference is another operation than training, and casts as well; float64 stays as it is."""
    x, plan, gates, weights, _ = leaves(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = run_experts(x, plan, gates, weights, recompute=recompute)
        with torch.no_grad():
            inference = run_experts(x, plan, gates, weights, recompute=recompute)
    assert y.dtype == torch.bfloat16
    assert torch.equal(inference, y)
    x, plan, gates, weights, _ = leaves(torch.float64)
    exact = run_experts(x, plan, gates, weights)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(run_experts(x, plan, gates, weights, recompute=recompute), exact)


@pytest.mark.parametrize("recompute", [False, True])
def test_a_residual_is_not_kept_for_backward(recompute):
    x, plan, gates, weights, grad = leaves(torch.float32)
    residual = torch.randn_like(x)
    expected = torch.autograd.grad(run_experts(x, plan, gates, weights), x, grad)[0]
    y = run_experts(x, plan, gates, weights, residual=residual, recompute=recompute)
    residual.zero_()  # would be an error if it had been
    assert torch.equal(torch.autograd.grad(y, x, grad)[0], expected)


def test_what_the_kernels_do_not_serve_reaches_main_grads_too():
    arguments, grad, _, _ = build(CASE, torch.float64)
    _, pre = moe_mlp_cuda(*arguments)
    assert torch.equal(moe_mlp_pre_activation_cuda(*arguments), pre)
    expected = moe_mlp_backward_cuda(grad, pre, True, *arguments)
    buffers = [torch.full_like(arguments[i], 2.0, dtype=torch.float32) for i in (2, 3)]
    into = Call(*arguments)._replace(up_main_grad=buffers[0], down_main_grad=buffers[1])
    grads = moe_mlp_backward_cuda(grad, pre, True, *into)
    for buffer, gradient in zip(buffers, expected[2:4], strict=True):
        torch.testing.assert_close(buffer, 2 + gradient.float())
    assert [tensor.numel() > 0 for tensor in grads] == [True, True, False, False, True, True, False]  # no gate apart


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputing_inside_a_checkpoint(reentrant):
    config = {"shared_ffn_hidden_size": 7, "load_balancing_coefficient": 0.0, "activation_dropout": 0.3}
    plain, lean = MoE(small_config(**config)), MoE(small_config(**config, recompute_pre_activation=True))
    lean.load_state_dict(plain.state_dict())
    x, grad = torch.randn(5, 8, requires_grad=True), torch.randn(5, 8)
    torch.manual_seed(1)
    plain(x).backward(grad)
    other = x.detach().clone().requires_grad_()
    torch.manual_seed(1)
    torch.utils.checkpoint.checkpoint(lean, other, use_reentrant=reentrant).backward(grad)
    assert torch.equal(other.grad, x.grad)
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(plain.parameters(), lean.parameters(), strict=True))


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))], ids=["copy", "pickle"]
)
def test_copies_and_assigned_parameters_know_whose_they_are(copied):
    layer = MoE(small_config(shared_ffn_hidden_size=7, load_balancing_coefficient=0.0))
    layer(torch.randn(3, 8))
    other = copied(layer)
    assigned = MoE(small_config(shared_ffn_hidden_size=7), device="meta")
    assigned.load_state_dict(layer.state_dict(), assign=True)
    whose = {name: dmoe.is_expert_param(parameter) for name, parameter in layer.named_parameters()}
    assert {name.split(".")[0] for name, routed in whose.items() if routed} == {"experts"}
    assert all(routed for name, routed in whose.items() if name.startswith("experts."))
    for one in (other, assigned):
        assert {name: dmoe.is_expert_param(parameter) for name, parameter in one.named_parameters()} == whose
    x = torch.randn(3, 8)
    assert torch.equal(other(x), layer(x))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"residual": torch.ones(2, 6)}, ValueError, r"residual: expected x's shape \(9, 6\) on cpu, got \(2, 6\)"),
        (
            {"residual": torch.ones(9, 6).int()},
            ValueError,
            r"residual: expected x's dtype torch.float32, got .*int32",
        ),
        ({"residual": 1.0}, TypeError, r"residual: expected a tensor, got float"),
        (
            {"main_grads": (torch.ones(3), torch.ones(3))},
            ValueError,
            r"main_grads: up_proj: expected contiguous float32 \(3, 2, 5, 6\)",
        ),
        (
            {"main_grads": (torch.ones(3, 2, 6, 5).mT, torch.ones(3, 6, 5))},
            ValueError,
            r"main_grads: up_proj: expected contiguous float32 \(3, 2, 5, 6\) .* with strides \(60, 30, 1, 5\)",
        ),
        (
            {"main_grads": (torch.ones(3, 2, 5, 6), torch.ones(3, 6, 5).bfloat16())},
            ValueError,
            r"main_grads: down_proj: expected contiguous float32 \(3, 6, 5\) on cpu, got torch.bfloat16",
        ),
        ({"main_grads": (None, None)}, TypeError, r"main_grads: up_proj: expected a tensor, got NoneType"),
        ({"main_grads": torch.ones(2)}, TypeError, r"main_grads: expected a pair of buffers, .*, got Tensor"),
        ({"main_grads": (torch.ones(1),)}, TypeError, r"main_grads: expected a pair of buffers, .*, got 1 of them"),
        (
            {"recompute": True, "backend": "reference"},
            ValueError,
            r"recompute: expected False with backend=",
        ),
        (
            {"main_grads": (torch.ones(3), torch.ones(3)), "backend": "block_sparse"},
            ValueError,
            r"main_grads: expected None with backend='block_sparse'",
        ),
        ({"recompute": "yes"}, TypeError, r"recompute: expected True or False, got 'yes'"),
        (
            {"backend": "triton"},
            ValueError,
            r"backend: expected None or one of grouped, .* got 'triton'",
        ),
    ],
    ids=lambda value: str(value)[:30],
)
def test_bad_input_is_named(options, error, message):
    x, plan, gates, weights, _ = leaves(torch.float32)
    with pytest.raises(error, match="^moe_mlp: " + message):
        run_experts(x, plan, gates, weights, **options)


GOOD = {"x": torch.ones(2, 3, 6), "expert_indices": torch.zeros(2, 3, 1, dtype=torch.int64),
        "gate_weights": torch.ones(2, 3, 1),
        "weights": ExpertWeights(torch.ones(3, 2, 5, 6), torch.ones(3, 6, 5))}  # fmt: skip


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"x": [1.0]}, TypeError, "x: expected a tensor, got list"),
        ({"x": GOOD["x"].int()}, TypeError, "x: expected a floating-point tensor, got torch.int32"),
        ({"expert_indices": None}, TypeError, "expert_indices: expected a tensor, got NoneType"),
        ({"gate_weights": 1.0}, TypeError, "gate_weights: expected a tensor, got float"),
        ({"weights": torch.ones(1)}, TypeError, "weights: expected ExpertWeights, got Tensor"),
        (
            {"expert_indices": torch.zeros(2, 3, 0, dtype=torch.int64), "gate_weights": torch.ones(2, 3, 0)},
            ValueError,
            r"expert_indices: expected shape \(..., K\) with K >= 1, got \(2, 3, 0\)",
        ),
        (
            {"residual": torch.ones(3, 2, 6)},
            ValueError,
            r"residual: expected x's shape \(2, 3, 6\) on cpu, got \(3, 2, 6\)",
        ),
        ({"activation_dropout": "a"}, ValueError, "activation_dropout: expected 0 <= p < 1, got 'a'"),
        ({"capacity": 1.5}, ValueError, "capacity: expected an integer of at least 0 or None, got 1.5"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_the_function_names_bad_input(options, error, message):
    assert moe_mlp(**GOOD).shape == (2, 3, 6)
    with pytest.raises(error, match=message):
        moe_mlp(**{**GOOD, **options})


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"up_proj": None}, TypeError, "up_proj: expected a tensor, got NoneType"),
        (
            {"up_proj": torch.ones(2, 8, 6).int()},
            TypeError,
            "up_proj: expected a floating-point tensor, got",
        ),
        (
            {"down_proj": torch.ones(3, 6, 5)},
            ValueError,
            r"down_proj: expected \(H, sum F\) with ffn_sizes=\(3, 5\)",
        ),
        ({"up_bias": 1.0}, TypeError, "up_bias: expected a tensor, got float"),
        ({"ffn_sizes": (9, -1)}, ValueError, r"ffn_sizes: expected integers of at least 1, .* got \(9, -1\)"),
        ({"ffn_sizes": (4.0, 4.0)}, ValueError, r"ffn_sizes: expected integers of at least 1, .* got \(4.0, 4.0\)"),
        ({"up_proj": torch.ones(())}, ValueError, r"up_proj: expected H as the last dimension, got shape \(\)"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_weights_name_bad_input(fields, error, message):
    good = {"up_proj": torch.ones(2, 8, 6), "down_proj": torch.ones(6, 8), "ffn_sizes": (3, 5)}
    assert ExpertWeights(**good).num_experts == 2
    with pytest.raises(error, match="^ExpertWeights: " + message):
        ExpertWeights(**{**good, **fields})


@pytest.mark.parametrize("name", ["recompute_pre_activation", "accumulate_main_grad"])
@pytest.mark.parametrize("backend", ["reference", "block_sparse"])
def test_backends_without_the_option_refuse_it(name, backend):
    with pytest.raises(ValueError, match=f"MoEConfig: {name}: expected False with backend={backend!r}"):
        small_config(ffn_hidden_size=16, backend=backend, **{name: True})


@pytest.mark.parametrize("fields", [{}, {"recompute_pre_activation": True}, {"shared_ffn_hidden_size": 4}], ids=str)
def test_variants_compile_whole(fields):
    layer = MoE(small_config(load_balancing_coefficient=0.0, **fields))
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(5, 8)
    y = compiled(x)
    y.sum().backward()
    torch.testing.assert_close(y, layer(x))
