"""Low-rank adapters: equal to experts whose weights have the product added, in every option; lean; clear when wrong."""

from __future__ import annotations

import pytest
import torch
from helpers import saved_bytes

import dmoe
from dmoe.functional import moe_mlp

E, H, F, R, T, K = 5, 12, 9, 3, 23, 2


def case(
    dtype=torch.float64, *, gated=True, bias=False, transposed=False, interleaved=False, seed=0, trained=False, tokens=T
):
    """Tokens, routing, frozen (or trained) weights, and adapters of both projections."""
    g = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

    halves = (2,) if gated else ()
    up, down = draw(E, *halves, F, H) / 3, draw(E, H, F) / 3
    if interleaved:
        up = up.permute(0, 3, 2, 1).contiguous().permute(0, 3, 2, 1)  # (E, H, F, 2), as GPT-OSS has it
    elif transposed:
        up = up.flatten(1, -2).mT.contiguous().mT.unflatten(1, (*halves, F))
        down = down.mT.contiguous().mT
    biases = {"up_bias": draw(E, *halves, F), "down_bias": draw(E, H)} if bias else {}
    tensors = {"up_proj": up, "down_proj": down, **biases}
    for tensor in tensors.values():
        tensor.requires_grad_(trained)
    weights = dmoe.ExpertWeights(**tensors, gated=gated)
    factors = [draw(E, R, H), draw(E, *halves, F, R), draw(E, R, F), draw(E, H, R)]
    for factor in factors:
        factor.requires_grad_()
    adapters = dmoe.Adapters(dmoe.LowRank(*factors[:2], scale=0.7), dmoe.LowRank(*factors[2:], scale=-0.3))
    x = draw(tokens, H).requires_grad_()
    indices = torch.randint(0, E + 1, (tokens, K), generator=g)  # E: no expert
    gates = torch.rand(tokens, K, generator=g, dtype=torch.float64)
    gates = (gates if dtype == torch.float64 else gates.float()).requires_grad_()
    return x, indices, gates, weights, adapters


def added(weights, adapters):
    """The same experts as dense ones: by an einsum that shares nothing with the factored computation."""
    up, down = adapters.up, adapters.down
    return dmoe.ExpertWeights(
        weights.up_proj + up.scale * torch.einsum("e...r,eri->e...i", up.b, up.a),
        weights.down_proj + down.scale * torch.einsum("eor,eri->eoi", down.b, down.a),
        weights.up_bias,
        weights.down_bias,
        weights.gated,
    )


def leaves(x, gates, weights, adapters):
    own = (weights.up_proj, weights.down_proj, weights.up_bias, weights.down_bias)
    factors = (adapters.up.a, adapters.up.b, adapters.down.a, adapters.down.b)
    return [t for t in (x, gates, *factors, *own) if t is not None and t.requires_grad]


def both(given, options, dtype=None):
    """y and all gradients, factored and dense; draws dropout masks from the same seed."""
    x, indices, gates, weights, adapters = given
    results = []
    for experts, extra in ((weights, {"adapters": adapters}), (added(weights, adapters), {})):
        torch.manual_seed(3)
        y = moe_mlp(x, indices, gates, experts, **options, **extra)
        weight = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view_as(y).to(y.dtype)
        results.append((y, *torch.autograd.grad((y * weight).sum(), leaves(x, gates, weights, adapters))))
    return results


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"activation": "gelu"},
        {"activation": dmoe.ClampedSwiGLU(1.0)},
        {"activation": "relu", "gate_weight_on": "input"},
        {"gate_weight_on": "activation"},
        {"activation_dropout": 0.3, "expert_dropout": 0.2},
    ],
)
@pytest.mark.parametrize(
    "form",
    [{}, {"gated": False, "bias": True}, {"bias": True, "transposed": True}, {"bias": True, "interleaved": True}],
)
def test_factors_equal_the_sum(options, form, trained):
    if not form.get("gated", True) and not isinstance(options.get("activation", ""), str):
        options = {"activation": "relu_squared"}
    factored, dense = both(case(**form, trained=trained), options)
    for ours, theirs in zip(factored, dense, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_narrow_types_are_as_accurate_as_the_sum(dtype):
    given = case(dtype, bias=True)
    factored, dense = both(given, {})
    x, indices, gates, weights, adapters = given
    wide = [t.detach().double() for t in (weights.up_proj, weights.down_proj, weights.up_bias, weights.down_bias)]
    of_up, of_down = (
        dmoe.LowRank(*(f.detach().double().requires_grad_() for f in (low.a, low.b)), scale=low.scale)
        for low in (adapters.up, adapters.down)
    )
    exact_given = (
        x.detach().double().requires_grad_(),
        indices,
        gates.detach().double().requires_grad_(),
        dmoe.ExpertWeights(*wide),
        dmoe.Adapters(of_up, of_down),
    )
    exact = both(exact_given, {})[1]
    for ours, theirs, truth in zip(factored, dense, exact, strict=True):
        error, own = ((t.double() - truth).abs().max() for t in (ours, theirs))
        assert error <= 2 * own + 4 * torch.finfo(dtype).eps * truth.abs().max()


def test_one_projection_alone_and_no_tokens():
    x, indices, gates, weights, adapters = case()
    nothing = dmoe.Adapters(adapters.up, dmoe.LowRank(adapters.down.a, adapters.down.b, scale=0.0))
    y = moe_mlp(x, indices, gates, weights, adapters=dmoe.Adapters(up=adapters.up))
    torch.testing.assert_close(y, moe_mlp(x, indices, gates, added(weights, nothing)))
    torch.testing.assert_close(
        moe_mlp(x, indices, gates, weights, adapters=dmoe.Adapters()), moe_mlp(x, indices, gates, weights)
    )
    x, indices, gates, weights, adapters = case(tokens=0)
    y = moe_mlp(x, indices, gates, weights, adapters=adapters)
    grads = torch.autograd.grad(y.sum(), leaves(x, gates, weights, adapters))
    assert y.shape == (0, H)
    assert all((grad == 0).all() for grad in grads)


def test_gradients_against_finite_differences():
    x, indices, gates, weights, adapters = case(bias=True, tokens=6)

    def run(x, gates, *factors):
        up, down = dmoe.LowRank(*factors[:2], scale=0.7), dmoe.LowRank(*factors[2:], scale=-0.3)
        return moe_mlp(x, indices, gates, weights, adapters=dmoe.Adapters(up, down))

    assert torch.autograd.gradcheck(run, tuple(leaves(x, gates, weights, adapters)))


def test_a_residual_and_autocast():
    x, indices, gates, weights, adapters = case(torch.float32)
    residual = torch.randn_like(x).requires_grad_()
    y = moe_mlp(x, indices, gates, weights, adapters=adapters, residual=residual)
    torch.testing.assert_close(y, moe_mlp(x, indices, gates, weights, adapters=adapters) + residual)
    assert torch.autograd.grad(y.sum(), residual)[0].eq(1).all()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = moe_mlp(x, indices, gates, weights, adapters=adapters)
        dense = moe_mlp(x, indices, gates, added(weights, adapters))
    assert y.dtype == torch.bfloat16
    exact = moe_mlp(x, indices, gates, weights, adapters=adapters)
    error, own = ((t.float() - exact).abs().max() for t in (y, dense))
    assert error <= 2 * own + 4 * torch.finfo(torch.bfloat16).eps * exact.abs().max()
    assert torch.autograd.grad(y.float().sum(), adapters.up.a)[0].dtype == torch.float32


def test_saved_is_what_the_formula_needs_and_frozen_weights_get_nothing():
    x, indices, gates, weights, adapters = case(torch.float32, tokens=400)
    frozen = (weights.up_proj, weights.down_proj, *leaves(x, gates, weights, adapters))
    with saved_bytes(exclude=frozen) as ours:
        y = moe_mlp(x, indices, gates, weights, adapters=adapters)
    with saved_bytes(exclude=frozen) as plain:
        moe_mlp(x, indices, gates, weights)
    inner = 2 * 400 * K * R * 4  # A x and A a
    assert ours.total <= plain.total + inner + 256
    y.sum().backward()
    assert weights.up_proj.grad is None
    assert adapters.up.a.grad is not None


def test_it_compiles_in_one_graph():
    x, indices, gates, weights, adapters = case(torch.float32)

    def step(x, gates):
        return moe_mlp(x, indices, gates, weights, adapters=adapters)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, gates), step(x, gates))


def test_what_does_not_fit_is_said():
    x, indices, gates, weights, adapters = case()
    up = adapters.up
    with pytest.raises(ValueError, match=r"LowRank: expected a \(E, r, in\) and b .* got shapes .*\(5, 4, 12\)"):
        dmoe.LowRank(torch.zeros(5, 4, 12, dtype=torch.float64), up.b)
    with pytest.raises(TypeError, match="LowRank: b: expected a tensor, got list"):
        dmoe.LowRank(up.a, [1.0])
    with pytest.raises(TypeError, match="Adapters: down: expected LowRank or None, got tuple"):
        dmoe.Adapters(up, (up.a, up.b))
    with pytest.raises(ValueError, match=r"adapters.down: expected a .* beside down_proj .*got"):
        moe_mlp(x, indices, gates, weights, adapters=dmoe.Adapters(down=up))
    with pytest.raises(TypeError, match=r"adapters: expected dmoe\.Adapters or None, got LowRank"):
        moe_mlp(x, indices, gates, weights, adapters=up)
    narrow = dmoe.LowRank(up.a.float(), up.b.float())
    with pytest.raises(TypeError, match=r"adapters.up: expected torch.float64 on cpu as up_proj, got torch.float32"):
        moe_mlp(x, indices, gates, weights, adapters=dmoe.Adapters(narrow))
    with pytest.raises(ValueError, match=r"backend: expected None, grouped or torch or reference .* 'block_sparse'"):
        moe_mlp(x, indices, gates, weights, adapters=adapters, backend="block_sparse")
    with pytest.raises(ValueError, match="main_grads: expected None beside adapters, got buffers"):
        moe_mlp(x, indices, gates, weights, adapters=adapters, main_grads=[None, None])
    with pytest.raises(ValueError, match=r"LowRank: dropout: expected 0 <= p < 1, got 1\.0"):
        dmoe.LowRank(up.a, up.b, dropout=1.0)
    with pytest.raises(ValueError, match=r"adapter_ids: expected shape \(23,\) beside a list of adapters, got None"):
        moe_mlp(x, indices, gates, weights, adapters=[adapters])
    with pytest.raises(ValueError, match="adapter_ids: expected a list of adapters beside them"):
        moe_mlp(x, indices, gates, weights, adapters=adapters, adapter_ids=torch.zeros(T, dtype=torch.long))
    with pytest.raises(ValueError, match="adapters: expected at least one of them, got an empty list"):
        moe_mlp(x, indices, gates, weights, adapters=[], adapter_ids=torch.zeros(T, dtype=torch.long))
    widths = dmoe.ExpertWeights(weights.up_proj[0, :, :5], weights.down_proj[0, :, :5], ffn_sizes=(2, 3))
    halves = dmoe.LowRank(up.a[:2], up.b[0, :1, :5])  # two experts, but that dimension is gate and up
    with pytest.raises(ValueError, match=r"adapters.up: expected a .* and b \(2, 5, 3\)"):
        moe_mlp(x, indices.clamp(max=1), gates, widths, adapters=dmoe.Adapters(halves))
    with pytest.raises(RuntimeError, match="adapter_ids: expected numbers of 1 adapters, or -1 for none, got 0 to 1"):
        moe_mlp(x, indices, gates, weights, adapters=[adapters], adapter_ids=torch.arange(T) % 2)
    with pytest.raises(TypeError, match=r"adapter_ids: expected dtype int32 or int64, got torch\.float32"):
        moe_mlp(x, indices, gates, weights, adapters=[adapters], adapter_ids=torch.zeros(T))
    with pytest.raises(ValueError, match=r"adapter_ids: expected one for each token, shape \(23,\) on cpu, got \(2,\)"):
        moe_mlp(x, indices, gates, weights, adapters=[adapters], adapter_ids=torch.zeros(2, dtype=torch.int32))
