"""Experts that compute in fp8, and save fp8: against a loop in float64 that rounds by itself; bytes; edges."""

from __future__ import annotations

import dataclasses

import fp8_cases
import hypothesis.strategies as st
import pytest
import torch
from helpers import saved_bytes, small_config
from hypothesis import given, settings

import dmoe
from dmoe.config_json import config_from_json, config_to_json
from dmoe.functional import moe_mlp

HOWS = [{"expert_compute": "fp8"}, {"saved_activations": "fp8"}, {"expert_compute": "fp8", "saved_activations": "fp8"}]


@dataclasses.dataclass
class Case:
    """Experts one by one, as wide as the widest: up (C, H), gate rows then up rows, and down (H, F)."""

    x: torch.Tensor
    indices: torch.Tensor
    gates: torch.Tensor
    grad_y: torch.Tensor
    widths: list[int]
    gated: bool
    apart: bool
    up: list[torch.Tensor]
    down: list[torch.Tensor]
    biases: list[tuple[torch.Tensor, torch.Tensor]] | None
    factors: dict | None
    scale: float
    activation: str
    gate_on: str


@st.composite
def cases(draw):
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    experts, tokens, top_k = draw(st.integers(1, 4)), draw(st.integers(0, 6)), draw(st.integers(1, 3))
    hidden, widest = draw(st.sampled_from([1, 5, 130])), draw(st.sampled_from([1, 4, 70, 131]))
    lists = draw(st.booleans()) and experts > 1
    widths = [draw(st.integers(1, widest)) for _ in range(experts)] if lists else [widest] * experts
    gated = draw(st.booleans())
    halves, most = 2 if gated else 1, max(widths)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64) * 10.0 ** draw(st.integers(-2, 1))

    inside = [(torch.arange(most) < width).double() for width in widths]  # behind a narrower one's width are zeros
    up = [normal(halves * most, hidden) * mask.repeat(halves).unsqueeze(1) for mask in inside]
    down = [normal(hidden, most) * mask for mask in inside]
    biases = None
    if draw(st.booleans()):
        biases = [(normal(halves * most) * mask.repeat(halves), normal(hidden)) for mask in inside]
    factors = None
    if not lists and draw(st.booleans()):
        shapes = {"a_up": (2, hidden), "b_up": (halves * most, 2), "a_down": (3, most), "b_down": (hidden, 3)}
        factors = {name: normal(experts, *shape) for name, shape in shapes.items()}
    return Case(
        x=normal(tokens, hidden),
        indices=torch.randint(0, experts + 1, (tokens, top_k), generator=g),
        gates=torch.rand(tokens, top_k, generator=g, dtype=torch.float64),
        grad_y=normal(tokens, hidden),
        widths=widths,
        gated=gated,
        apart=gated and draw(st.booleans()),
        up=up,
        down=down,
        biases=biases,
        factors=factors,
        scale=0.5,
        activation=draw(st.sampled_from(sorted(fp8_cases.ACTS))),
        gate_on=draw(st.sampled_from(["output", "activation", "input"])),
    )


def packed(case, parts, dim):
    """What belongs to each expert, cut to its width along ``dim`` and put together as ExpertWeights has it."""
    if len(set(case.widths)) == 1:
        return torch.stack(parts)
    return torch.cat([part.narrow(dim, 0, width) for part, width in zip(parts, case.widths, strict=True)], dim)


def by_dmoe(case, backend, how):
    """The same results from moe_mlp."""
    c, lists = case, len(set(case.widths)) > 1
    halved = [w.unflatten(0, (2, -1)) if c.gated else w for w in c.up]
    tensors = {"down": packed(c, c.down, -1)}
    if c.apart:
        tensors |= {"gate": packed(c, [w[0] for w in halved], -2), "up": packed(c, [w[1] for w in halved], -2)}
    else:
        tensors["up"] = packed(c, halved, -2)
    if c.biases is not None:
        first = [b.unflatten(0, (2, -1)) if c.gated else b for b, _ in c.biases]
        tensors |= {"up_bias": packed(c, first, -1), "down_bias": torch.stack([b for _, b in c.biases])}
    if c.factors is not None:
        f = c.factors
        b_up = f["b_up"].unflatten(1, (2, -1)) if c.gated else f["b_up"]
        tensors |= {"a_up": f["a_up"], "b_up": b_up, "a_down": f["a_down"], "b_down": f["b_down"]}
    tensors |= {"x": c.x, "gates": c.gates}
    leaf = {name: tensor.clone().requires_grad_() for name, tensor in tensors.items()}
    weights = dmoe.ExpertWeights(
        leaf["up"],
        leaf["down"],
        leaf.get("up_bias"),
        leaf.get("down_bias"),
        gated=c.gated,
        ffn_sizes=tuple(c.widths) if lists else (),
        gate_proj=leaf.get("gate"),
    )
    extra = dict(how)
    if c.factors is not None:
        low = (dmoe.LowRank(leaf["a_" + n], leaf["b_" + n], scale=c.scale) for n in ("up", "down"))
        extra["adapters"] = dmoe.Adapters(*low)
    y = moe_mlp(
        leaf["x"],
        c.indices,
        leaf["gates"],
        weights,
        activation=c.activation,
        gate_weight_on=c.gate_on,
        backend=backend,
        **extra,
    )
    grads = torch.autograd.grad(y, list(leaf.values()), c.grad_y)
    return y, dict(zip(leaf, grads, strict=True))


def expected_by_name(case, grads):
    """The oracle's gradients as dmoe has them."""
    c = case
    up = [w.unflatten(0, (2, -1)) if c.gated else w for w in grads["up"]]
    found = {"x": grads["x"], "gates": grads["gates"], "down": packed(c, grads["down"], -1)}
    if c.apart:
        found |= {"gate": packed(c, [w[0] for w in up], -2), "up": packed(c, [w[1] for w in up], -2)}
    else:
        found["up"] = packed(c, up, -2)
    if c.biases is not None:
        first = [b.unflatten(0, (2, -1)) if c.gated else b for b in grads["up_bias"]]
        found |= {"up_bias": packed(c, first, -1), "down_bias": torch.stack(grads["down_bias"])}
    if c.factors is not None:
        found |= {name: grads[name] for name in ("a_up", "a_down", "b_down")}
        found["b_up"] = grads["b_up"].unflatten(1, (2, -1)) if c.gated else grads["b_up"]
    return found


@settings(deadline=None)
@given(cases(), st.sampled_from(HOWS), st.sampled_from([None, "grouped", "torch"]), st.booleans())
def test_results_are_those_of_decoded_numbers(case, how, backend, recompute):
    """To float64's rounding: nothing but the operands named in the documentation is rounded to fp8."""
    y, grads = by_dmoe(case, backend, {**how, "recompute": recompute})
    both = {"compute": "expert_compute" in how, "saved": "saved_activations" in how}
    expected_y, expected = fp8_cases.run(case, **both, recompute=recompute)

    def close(name, ours, theirs):
        size = theirs.abs().max().item() if theirs.numel() else 0.0
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10 * max(size, 1e-3), msg=lambda m: f"{name}: {m}")

    close("y", y, expected_y)
    for name, theirs in expected_by_name(case, expected).items():
        close(name, grads[name], theirs)


def small(dtype=torch.bfloat16, tokens=40, hidden=64, width=96, experts=4, **fields):
    """A layer's experts' tensors: x, indices, gates, weights."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, hidden, generator=g).to(dtype).requires_grad_()
    indices = torch.stack([torch.randperm(experts, generator=g)[:2] for _ in range(tokens)])
    gates = torch.rand(tokens, 2, generator=g).requires_grad_()
    up = (torch.randn(experts, 2, width, hidden, generator=g) / hidden**0.5).to(dtype).requires_grad_()
    down = (torch.randn(experts, hidden, width, generator=g) / width**0.5).to(dtype).requires_grad_()
    return x, indices, gates, dmoe.ExpertWeights(up, down, **fields)


def step(given, **how):
    x, indices, gates, weights = given
    y = moe_mlp(x, indices, gates, weights, **how)
    leaves = [t for t in (x, gates, weights.up_proj, weights.down_proj) if t.requires_grad]
    return [y, *torch.autograd.grad(y.float().square().sum(), leaves)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("backend", [None, "torch"])
def test_narrow_types_lose_what_fp8_loses_and_no_more(dtype, how, backend):
    """Another order of sums may round a number to another code; what is lost altogether is as in float64."""
    given = small(dtype)
    x, indices, gates, weights = given
    wide = dmoe.ExpertWeights(*(w.detach().double().requires_grad_() for w in (weights.up_proj, weights.down_proj)))
    exact_given = (x.detach().double().requires_grad_(), indices, gates.detach().double().requires_grad_(), wide)
    exact, rounded = step(exact_given), step(exact_given, **how)
    own = step(given)
    for plain, ours, truth, lost in zip(own, step(given, backend=backend, **how), exact, rounded, strict=True):
        error, of_dtype, of_fp8 = ((t.double() - truth).norm() / truth.norm() for t in (ours, plain, lost))
        assert error <= 1.15 * (of_fp8**2 + 4 * of_dtype**2).sqrt() + 1e-6
        assert error < 0.12


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("backend", [None, "torch"])
def test_dropout_draws_the_same_masks(how, backend):
    given = small(torch.float32)
    drops = {"activation_dropout": 0.3, "expert_dropout": 0.2, "backend": backend}
    results = []
    for extra in ({}, how):
        torch.manual_seed(3)
        results.append(step(given, **drops, **extra))
    for exact, ours in zip(*results, strict=True):
        assert (ours - exact).norm() < 0.12 * exact.norm()


def test_saved_alone_leaves_the_output_as_it_is():
    given = small(torch.float32)
    exact = moe_mlp(*given, backend="torch")
    assert torch.equal(moe_mlp(*given, backend="torch", saved_activations="fp8"), exact)
    with torch.no_grad():
        assert torch.equal(
            moe_mlp(*given, saved_activations="fp8"), moe_mlp(*given, saved_activations="fp8", recompute=True)
        )
        assert torch.equal(
            moe_mlp(*given, saved_activations="fp8", expert_compute="fp8"), moe_mlp(*given, expert_compute="fp8")
        )


def test_bytes_that_are_saved():
    tokens, hidden, width = 512, 64, 96
    given = small(tokens=tokens)
    x, indices, gates, weights = given
    held = (gates, weights.up_proj, weights.down_proj)
    rows = 2 * tokens

    def bytes_of(**how):
        with saved_bytes(exclude=held) as count:
            moe_mlp(x, indices, gates, weights, **how)
        return count.total

    of_x, of_pre = tokens * (hidden + 4), rows * (2 * width + 4)
    plain = bytes_of(expert_compute="fp8")
    index = plain - 2 * (tokens * hidden + rows * 2 * width)  # of the plan, the same in all of them
    assert bytes_of(saved_activations="fp8") == index + of_x + of_pre
    assert bytes_of(saved_activations="fp8", expert_compute="fp8") == index + of_x + of_pre
    assert bytes_of(saved_activations="fp8", expert_compute="fp8", recompute=True) == index + of_x
    assert 0 <= index < 20 * rows
    with saved_bytes(exclude=(x, *held)) as count:
        moe_mlp(x, indices, gates, weights)
    assert abs(count.total + 2 * tokens * hidden - plain) < 256


@pytest.mark.parametrize("how", HOWS)
def test_nothing_becomes_infinite_that_was_finite(how):
    x, indices, gates, weights = small(torch.float32)
    rows = x.detach().clone()
    rows[0] = 0
    rows[1] *= 1e-38
    rows[2] *= 1e-42  # subnormal
    rows[3] *= 1e6
    rows[4, 1:] = 0
    rows[5] = torch.nan
    rows[6, 3] = torch.inf
    rows.requires_grad_()
    y, grad_x, grad_gates, *_ = step((rows, indices, gates, weights), **how)
    spoilt = torch.zeros(len(rows), dtype=torch.bool)
    spoilt[5:7] = True
    assert (~y.isfinite()).any(1).equal(spoilt)
    assert grad_x[~spoilt].isfinite().all()
    assert grad_gates[~spoilt].isfinite().all()
    assert grad_x[5].isnan().all()
    gone = moe_mlp(x * 0, indices, gates, weights, **how)
    grads = torch.autograd.grad(gone.sum(), [x, gates, weights.up_proj, weights.down_proj])
    assert not gone.any()
    assert all(grad.isfinite().all() for grad in grads)


def test_a_row_that_is_no_number_spoils_its_experts_gradients_alone():
    x, indices, gates, weights = small(torch.float32)
    rows = x.detach().clone()
    rows[0] = torch.nan
    *_, grad_up, grad_down = step(
        (rows.requires_grad_(), indices, gates, weights), expert_compute="fp8", saved_activations="fp8"
    )
    met = set(indices[0].tolist())
    for e in range(weights.num_experts):
        assert grad_up[e].isfinite().all().item() is (e not in met)
        assert grad_down[e].isfinite().all().item() is (e not in met)


@pytest.mark.parametrize("how", HOWS)
def test_weights_as_they_lie_in_memory(how):
    """Transposed, and with rows of gate and up in turns: the same numbers, where one block holds a matrix."""
    x, indices, gates, weights = small(torch.float64, width=48)
    y, *grads = step((x, indices, gates, weights), **how)
    up, down = weights.up_proj.detach(), weights.down_proj.detach()
    turned = up.flatten(1, 2).mT.contiguous().mT.unflatten(1, (2, -1)), down.mT.contiguous().mT
    in_turns = up.permute(0, 3, 2, 1).contiguous().permute(0, 3, 2, 1), down
    for pair in (turned, in_turns):
        other = dmoe.ExpertWeights(*(w.requires_grad_() for w in pair))
        for ours, theirs in zip(step((x, indices, gates, other), **how), (y, *grads), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    masters = [w.detach().clone() for w in (weights.up_proj, weights.down_proj)]
    step((x, indices, gates, weights), **how)
    assert all(torch.equal(a, b) for a, b in zip(masters, (weights.up_proj, weights.down_proj), strict=True))


@pytest.mark.parametrize("how", HOWS)
def test_it_compiles_in_one_graph(how):
    x, indices, gates, weights = small(torch.float32)

    def run(x, gates, up, down):
        return moe_mlp(x, indices, gates, dmoe.ExpertWeights(up, down), **how)

    leaves = (x, gates, weights.up_proj, weights.down_proj)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for ours, theirs in zip(*((y, *torch.autograd.grad(y.sum(), leaves)) for y in (compiled(*leaves), run(*leaves))),
                            strict=True):  # fmt: skip
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("fields", [{}, {"shared_ffn_hidden_size": 8, "bias": "expert", "capacity_factor": 1.0}])
@pytest.mark.parametrize("how", [{"expert_compute": "fp8"}, {"expert_compute": "fp8", "saved_activations": "fp8"}])
def test_a_layer_trains_under_autocast(how, fields):
    sizes = {"hidden_size": 32, "ffn_hidden_size": 48, "num_experts": 4, "top_k": 2, **fields}
    torch.manual_seed(0)
    plain = dmoe.MoE(**sizes)
    layer = dmoe.MoE(**sizes, **how)
    layer.load_state_dict(plain.state_dict())
    x = torch.randn(3, 20, 32, requires_grad=True)
    results = []
    for each in (plain, layer):
        with torch.autocast("cpu", torch.bfloat16):
            y = each(x)
        loss = y.float().square().sum() + dmoe.aux_loss(each)
        results.append([y, *torch.autograd.grad(loss, [x, *each.parameters()])])
    exact, ours = results
    assert ours[0].dtype == torch.bfloat16
    for a, b in zip(ours, exact, strict=True):
        assert a.dtype == b.dtype
        assert (a - b).norm() <= 0.15 * b.norm()
    assert not torch.equal(ours[0], exact[0])
    layer.eval()
    assert layer(x).isfinite().all()


def test_adapters_of_a_model_train_over_experts_in_fp8():
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        dmoe.MoE(small_config(expert_compute="fp8", saved_activations="fp8", load_balancing_coefficient=0.0))
    )
    x = torch.randn(9, 8)
    before = model(x).detach()
    dmoe.lora.add(model, rank=2)
    assert torch.equal(model(x), before)  # b begins at zero
    model(x).square().sum().backward()
    trained = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert all(".lora." in name for name in trained)
    assert any(grad.abs().max() > 0 for name, grad in trained.items() if name.endswith(".b"))
    assert model[0].experts.down_proj.grad is None
    dmoe.quant.quantize(model, "int8")
    with pytest.raises(ValueError, match="compute: expected None beside weights that are codes, got 'fp8'"):
        model(x)


def test_the_shared_expert_computes_likewise():
    layer = dmoe.MoE(small_config(shared_ffn_hidden_size=8, expert_compute="fp8", saved_activations="fp8"))
    assert layer.shared_expert.mlp.config.expert_compute == "fp8"
    assert layer.shared_expert.mlp.config.saved_activations == "fp8"


def test_the_config():
    config = small_config(expert_compute="fp8", saved_activations="fp8")
    assert config_from_json(config_to_json(config)) == config
    assert config_to_json(config)["expert_compute"] == "fp8"
    assert "saved_activations" not in config_to_json(small_config())
    for name in ("expert_compute", "saved_activations"):
        with pytest.raises(ValueError, match=f"MoEConfig: {name}: expected .*'fp8'.*, got 'int8'"):
            small_config(**{name: "int8"})
        for backend in ("reference", "block_sparse"):
            with pytest.raises(ValueError, match=f"MoEConfig: {name}: expected None with backend='{backend}'"):
                small_config(ffn_hidden_size=16, backend=backend, **{name: "fp8"})
        with pytest.raises(ValueError, match=f"accumulate_main_grad: expected False with {name}='fp8'"):
            small_config(accumulate_main_grad=True, **{name: "fp8"})


def test_what_does_not_go_together():
    x, indices, gates, weights = small(torch.float32)
    for name in ("expert_compute", "saved_activations"):
        with pytest.raises(ValueError, match=f"moe_mlp: {name}: expected None or 'fp8', got 'e5m2'"):
            moe_mlp(x, indices, gates, weights, **{name: "e5m2"})
        with pytest.raises(ValueError, match=f"backend: expected None, grouped or torch beside {name}='fp8', got 'ref"):
            moe_mlp(x, indices, gates, weights, backend="reference", **{name: "fp8"})
        with pytest.raises(ValueError, match=f"main_grads: expected None beside {name}='fp8', got buffers"):
            moe_mlp(x, indices, gates, weights, main_grads=[None, None], **{name: "fp8"})
    up = weights.up_proj.detach()
    codes = torch.randint(-127, 128, (4, 192, 64), dtype=torch.int8)
    scales = up.flatten(1, 2).std(2, keepdim=True) / 74
    held = dmoe.QuantizedWeight(codes, scales, "int8", tuple(up.shape), (1, 64))
    mixed = dmoe.ExpertWeights(held, weights.down_proj.detach())
    with pytest.raises(ValueError, match="compute: expected None beside weights that are codes, got 'fp8'"):
        moe_mlp(x, indices, gates, mixed, expert_compute="fp8")
    y = moe_mlp(x, indices, gates, mixed, saved_activations="fp8")
    assert torch.equal(y, moe_mlp(x, indices, gates, mixed))
    exact = torch.autograd.grad(moe_mlp(x, indices, gates, mixed).square().sum(), x)[0]
    assert 0 < (torch.autograd.grad(y.square().sum(), x)[0] - exact).norm() < 0.1 * exact.norm()
