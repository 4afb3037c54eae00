"""The layer against the oracle: every router, activation and option, forward and every gradient."""

from __future__ import annotations

import dataclasses

import oracle
import pytest
import torch
from helpers import assert_as_accurate, nudged, without_generated_products
from hypothesis import given, settings
from hypothesis import strategies as st
from layer_cases import Reference, routing_of, run_layer

import dmoe
from dmoe import MoE, MoEConfig, aux_loss


@st.composite
def layer_cases(draw):
    """A config over every option that changes the arithmetic, a number of tokens and a seed."""
    experts = draw(st.integers(1, 6))
    gated = draw(st.booleans())
    score = draw(st.sampled_from(["softmax", "sigmoid"]))
    sizes = draw(st.integers(1, 19) | st.lists(st.integers(1, 9), min_size=experts, max_size=experts))
    fields = {
        "hidden_size": draw(st.integers(1, 21)),
        "ffn_hidden_size": sizes,
        "num_experts": experts,
        "top_k": draw(st.integers(1, experts)),
        "activation": draw(st.sampled_from(["silu", "gelu", "gelu_tanh", "relu", "relu_squared", "sigmoid"])),
        "gated": gated,
        "bias": draw(st.sampled_from(["none", "expert", "output"])),
        "gate_weight_on": draw(st.sampled_from(["output", "activation", "input"])),
        "score_function": score,
        "softmax_order": draw(st.sampled_from(["before_topk", "after_topk"])) if score == "softmax" else "before_topk",
        "gate_normalization": draw(st.sampled_from([None, 1.0, 2.0, 3.5])),
        "normalize_when": draw(st.sampled_from(["before_drop", "after_drop"])),
        "gate_scale": draw(st.sampled_from([1.0, 2.5])),
        "router_bias": draw(st.booleans()),
        "router_z_loss_coefficient": draw(st.sampled_from([0.0, 0.1])),
        "load_balancing_coefficient": draw(st.sampled_from([0.0, 0.3])),
        "load_balancing_choices": draw(st.sampled_from(["all", "first"])),
        "num_moe_layers": draw(st.sampled_from([1, 3])),
        "capacity": draw(st.none() | st.integers(0, 4)),
        "drop_order": draw(st.sampled_from(["token_major", "choice_major", "batch_prioritized", "gate_weight"])),
        "shared_ffn_hidden_size": draw(st.none() | st.integers(1, 7)),
    }
    fields["shared_expert_gate"] = fields["shared_ffn_hidden_size"] is not None and draw(st.booleans())
    return MoEConfig(**fields), draw(st.integers(0, 9)), draw(st.booleans()), draw(st.integers(0, 2**20))


@without_generated_products
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@settings(max_examples=30)
@given(case=layer_cases())
def test_layer_equals_the_oracle(dtype, case):
    config, num_tokens, masked, seed = case
    torch.manual_seed(seed)
    layer = MoE(config, dtype=dtype)
    x = torch.randn(num_tokens, config.hidden_size).to(dtype)
    grad = torch.randn(num_tokens, config.hidden_size).to(dtype)
    mask = torch.rand(num_tokens) < 0.7 if masked else None
    counted = mask if masked else torch.ones(num_tokens, dtype=torch.bool)
    indices, kept = routing_of(layer, x, mask)

    def reference(layer, x, grad, dtype, router_dtype):
        return Reference(layer, x, grad, counted, dtype, router_dtype).run(indices, kept)

    exact = reference(layer, x, grad, torch.float64, torch.float64)
    pairs = [(reference(layer, x, grad, dtype, torch.float32), exact)]
    for _ in range(2 if x.numel() >= 16 else 8):
        moved = MoE(config, dtype=dtype)
        moved.load_state_dict({name: nudged(p.detach()) for name, p in layer.named_parameters()})
        case = moved, nudged(x), nudged(grad)
        pairs.append((reference(*case, dtype, torch.float32), reference(*case, torch.float64, torch.float64)))

    actual = run_layer(layer, x, grad, mask)
    assert actual.keys() == exact.keys()
    # A normalised gate of one choice is 1 whatever the score: its gradient is 0, and what is left of it float32 noise.
    noise = 16 * torch.finfo(torch.float32).eps * max(t.abs().max().item() for t in exact.values() if t.numel())
    # Where the experts add nothing to x's gradient (relu, one column), it is that noise times the router's weight.
    noises = {name: noise if name.startswith("grad router") else 0.0 for name in actual} | {"grad x": noise / 16}
    for name, value in actual.items():
        own = [(plain[name], true[name]) for plain, true in pairs]
        assert_as_accurate(f"{name} [{config}]", value, exact[name], own, noise=noises[name])


@settings(max_examples=60)
@given(case=layer_cases())
def test_layer_in_float64(case):
    config, num_tokens, masked, seed = case
    torch.manual_seed(seed)
    layer = MoE(config, dtype=torch.float64)
    x = torch.randn(num_tokens, config.hidden_size, dtype=torch.float64)
    grad = torch.randn_like(x)
    mask = torch.rand(num_tokens) < 0.7 if masked else None
    counted = mask if masked else torch.ones(num_tokens, dtype=torch.bool)
    exact = Reference(layer, x, grad, counted, torch.float64, torch.float64).run(*routing_of(layer, x, mask))
    for name, value in run_layer(layer, x, grad, mask).items():
        same = name != "aux_loss"  # a layer without losses reports a float32 zero
        torch.testing.assert_close(value, exact[name], rtol=1e-10, atol=1e-12, check_dtype=same)


@settings(max_examples=40)
@given(case=layer_cases())
def test_selection_and_drops_equal_plain_sorting(case):
    """Which experts, and who is dropped: the oracle decides from the scores alone."""
    config, num_tokens, masked, seed = case
    torch.manual_seed(seed)
    layer = MoE(config, dtype=torch.float64)
    logits = torch.randint(-3, 4, (num_tokens, config.num_experts)).double()  # many exact ties
    mask = torch.rand(num_tokens) < 0.7 if masked else None
    with torch.no_grad():
        routing = layer.router.route(logits, token_mask=mask)
    scores = (torch.softmax(logits, -1) if config.score_function == "softmax" else torch.sigmoid(logits)).tolist()
    expected = oracle.best_experts(scores, config.top_k)
    if mask is not None:
        expected = [row if m else [config.num_experts] * config.top_k for row, m in zip(expected, mask, strict=True)]
    assert routing.expert_indices.tolist() == expected
    priority = [
        [0.0 if e == config.num_experts else s[e] for e in row] for row, s in zip(expected, scores, strict=True)
    ]
    kept = oracle.keep_by_capacity(expected, config.num_experts, config.capacity, config.drop_order, priority)
    assert (routing.plan.token_to_rows >= 0).tolist() == [[bool(flag) for flag in row] for row in kept]


@pytest.mark.parametrize("router", ["top_k", "expert_choice", "uniform"])
@pytest.mark.parametrize(
    "options", [{}, {"bias": "expert", "gated": False, "activation": "gelu"}], ids=["gated", "mlp"]
)
def test_gradcheck_on_the_whole_layer(router, options):
    torch.manual_seed(3)
    fields = {
        "shared_ffn_hidden_size": 3,
        "router_z_loss_coefficient": 0.1,
        "load_balancing_coefficient": 0.5,
        **options,
    }
    config = MoEConfig(hidden_size=5, ffn_hidden_size=4, num_experts=3, router=router, causal=False, **fields)
    layer = MoE(config, dtype=torch.float64)
    x = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    names, parameters = zip(*layer.named_parameters(), strict=True)

    def run(x, *values):
        y = torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x,))
        return y, aux_loss(layer) + 0 * y.sum()

    assert torch.autograd.gradcheck(run, (x, *parameters), fast_mode=True)


@settings(max_examples=40)
@given(
    tokens=st.integers(1, 12),
    experts=st.integers(1, 6),
    factor=st.sampled_from([0.5, 1.0, 2.0]),
    masked=st.booleans(),
    seed=st.integers(0, 2**20),
)
def test_expert_choice_equals_the_oracle(tokens, experts, factor, masked, seed):
    torch.manual_seed(seed)
    config = MoEConfig(
        hidden_size=7, ffn_hidden_size=5, num_experts=experts, top_k=1, router="expert_choice", causal=False,
        capacity_factor=factor, load_balancing_coefficient=0.0,
    )  # fmt: skip
    layer = MoE(config, dtype=torch.float64)
    x = torch.randn(tokens, 7, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(tokens, 7, dtype=torch.float64)
    mask = torch.rand(tokens) < 0.7 if masked else None

    leaves = {n: p.detach().clone().requires_grad_() for n, p in layer.named_parameters()}
    x64 = x.detach().clone().requires_grad_()
    scores = torch.softmax(x64 @ leaves["router.weight"].t(), -1)
    take = min(-(-int(factor * tokens * 2) // (2 * experts)), tokens)
    chosen = [[] for _ in range(tokens)]
    for e in range(experts):
        able = [t for t in range(tokens) if mask is None or mask[t]]
        for t in sorted(able, key=lambda t: (-scores[t, e].item(), t))[:take]:
            chosen[t].append(e)
    weights = leaves["experts.gate_up_proj"], leaves["experts.down_proj"], None, None
    rows = []
    for t in range(tokens):
        total = x64[t] * 0
        for e in chosen[t]:
            total = total + scores[t, e] * oracle.expert_forward(
                x64[t], *oracle.pick_expert(weights, e, ()), activation="silu", gated=True
            )
        rows.append(total)
    expected = torch.stack(rows)
    (expected * grad).sum().backward()

    y = layer(x, token_mask=mask)
    (y * grad).sum().backward()
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(x.grad, x64.grad, rtol=1e-10, atol=1e-12)
    for name, p in layer.named_parameters():
        want = torch.zeros_like(p) if leaves[name].grad is None else leaves[name].grad
        torch.testing.assert_close(p.grad, want, rtol=1e-10, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")
    assert layer.last_metrics.tokens_per_expert.tolist() == [sum(e in row for row in chosen) for e in range(experts)]


def test_replay_takes_the_given_experts_with_live_weights():
    torch.manual_seed(0)
    layer = MoE(hidden_size=6, ffn_hidden_size=4, num_experts=5, top_k=2, dtype=torch.float64)
    x = torch.randn(2, 3, 6, dtype=torch.float64)
    indices = torch.tensor([[[4, 0], [1, 2], [0, 3]], [[2, 4], [3, 1], [1, 0]]])
    flat, every = indices.view(-1, 2).tolist(), [[True, True]] * 6
    reference = Reference(layer, x.view(-1, 6), x.view(-1, 6), torch.ones(6), torch.float64, torch.float64)
    expected = reference.run(flat, every)["y"]
    torch.testing.assert_close(layer(x, expert_indices=indices).view(-1, 6), expected)
    torch.testing.assert_close(layer(x, expert_indices=indices.int()).view(-1, 6), expected)


def test_reference_backend_agrees_and_is_differentiable_twice():
    torch.manual_seed(0)
    config = MoEConfig(hidden_size=4, ffn_hidden_size=3, num_experts=3, backend="reference")
    plain, fast = MoE(config, dtype=torch.float64), MoE(dataclasses.replace(config, backend=None), dtype=torch.float64)
    fast.load_state_dict(plain.state_dict())
    x = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(plain(x), fast(x))
    router_and_experts = lambda x: plain(x) * 3  # noqa: E731
    assert torch.autograd.gradgradcheck(router_and_experts, (x,))
    (first,) = torch.autograd.grad(fast(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward is not supported"):
        first.sum().backward()


class _TheLastOnes(dmoe.routing.LinearRouter):
    """A router from outside: every token takes the last two experts, with weights 2 and its logit for the last."""

    def forward(self, x, *, token_mask=None, token_ids=None, expert_indices=None):
        experts = self.config.num_experts
        chosen = torch.tensor([experts - 2, experts - 1]).expand(len(x), 2)
        logits = self.logits(x)
        weights = torch.stack([torch.full_like(logits[:, 0], 2), logits[:, -1]], 1)
        tile_rows = dmoe.device_tile_rows(x.device, chosen.numel(), experts)
        plan = dmoe.plan_token_choice(chosen.contiguous(), experts, tile_rows=tile_rows)
        return dmoe.routing.Routing(plan, weights, expert_indices=chosen)


def test_a_router_of_ones_own():
    torch.manual_seed(0)
    config = MoEConfig(hidden_size=6, ffn_hidden_size=4, num_experts=5, load_balancing_coefficient=0.0)
    layer = MoE(config, router_module=_TheLastOnes(config, dtype=torch.float64), dtype=torch.float64)
    x = torch.randn(2, 3, 6, dtype=torch.float64)
    y = layer(x)
    y.square().sum().backward()
    assert layer.router.weight.grad[-1].abs().sum() > 0
    assert layer.last_metrics.tokens_per_expert.tolist() == [0, 0, 0, 6, 6]
    indices = torch.tensor([3, 4]).expand(2, 3, 2)
    weights = torch.stack([torch.full((2, 3), 2.0), (x @ layer.router.weight[-1]).detach()], -1)
    expected = dmoe.functional.moe_mlp(x, indices.contiguous(), weights, layer.experts.weights())
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("router", [torch.nn.Linear(6, 5), lambda x: x])
def test_a_router_that_is_none_is_told(router):
    with pytest.raises(TypeError, match=r"MoE: router_module: expected a module with dmoe.routing.Router's methods"):
        MoE(hidden_size=6, ffn_hidden_size=4, num_experts=5, router_module=router)
