"""What the oracle does not see: dtypes, autocast, compile, determinism, randomness, bias updates, bad input."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import dmoe
from dmoe import ExpertWeights, MoE
from dmoe.functional import moe_mlp
from dmoe.ops.philox import dropout_scale, jitter_scale, random_bits

pytestmark = pytest.mark.filterwarnings("ignore:dmoe. a MoE layer ran a second training forward")
SIZES = {"hidden_size": 16, "ffn_hidden_size": 12, "num_experts": 4, "top_k": 2}


def step(layer, x, **kwargs):
    layer.zero_grad()
    x = x.detach().clone().requires_grad_()
    y = layer(x, **kwargs)
    (y.float().square().sum() + dmoe.aux_loss(layer)).backward()
    return [y.detach(), x.grad, *(p.grad for p in layer.parameters() if p.grad is not None)]


# ------------------------------------------------------------------------------------------------ dtypes and autocast


def test_autocast_keeps_the_router_in_float32_and_returns_bfloat16():
    torch.manual_seed(0)
    layer, x = MoE(**SIZES), torch.randn(9, 16)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
        routing = layer.router(x)
    assert y.dtype == torch.bfloat16
    assert routing.router_probs.dtype == routing.gate_weights.dtype == torch.float32
    expected = (x @ layer.router.weight.t()).softmax(-1)
    torch.testing.assert_close(routing.router_probs, expected)

    halved = MoE(**SIZES, dtype=torch.bfloat16)
    halved.load_state_dict(layer.state_dict())
    same = moe_mlp(x.bfloat16(), routing.expert_indices, routing.gate_weights, halved.experts.weights())
    assert torch.equal(y, same)


def test_autocast_gradients_are_float32_and_close():
    torch.manual_seed(0)
    layer, x = MoE(**SIZES), torch.randn(9, 16)
    exact = step(layer, x)
    with torch.autocast("cpu", torch.bfloat16):
        rough = step(layer, x)
    for a, b in zip(rough[1:], exact[1:], strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a, b, rtol=0.1, atol=0.02 * b.abs().max().item() + 1e-3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_output_keeps_the_dtype(dtype):
    layer = MoE(**SIZES, dtype=dtype, shared_ffn_hidden_size=4, shared_expert_gate=True, bias="output")
    assert layer(torch.randn(5, 16, dtype=dtype)).dtype == dtype


# ------------------------------------------------------------------------------------------------------------ compile

VARIANTS = {
    "default": {},
    "attached": {"aux_loss": "attached", "router_z_loss_coefficient": 0.1},
    "bias_and_groups": {
        "selection_bias": True,
        "score_function": "sigmoid",
        "gate_normalization": 1.0,
        "num_groups": 2,
        "top_k_groups": 1,
    },
    "capacity": {"capacity_factor": 1.0, "drop_order": "batch_prioritized", "normalize_when": "after_drop"},
    "expert_choice": {"router": "expert_choice", "causal": False},
    "dropout": {"activation_dropout": 0.1, "expert_dropout": 0.1, "input_jitter": 0.1},
    "shared": {"shared_ffn_hidden_size": 8, "shared_expert_gate": True, "bias": "output"},
    "widths": {"ffn_hidden_size": [8, 4, 4, 12], "bias": "expert"},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_compile_is_one_graph_that_new_routing_does_not_recompile(name):
    torch.manual_seed(0)
    eager = MoE(**{**SIZES, **VARIANTS[name]})
    traced = MoE(eager.config)
    traced.load_state_dict(eager.state_dict())
    # inductor draws random numbers of its own, so variants with dropout are compared without it
    backend = "inductor" if name == "default" else "aot_eager"
    compiled = torch.compile(traced, fullgraph=True, backend=backend)
    for seed in range(3):
        x = torch.randn(11, 16)
        torch.manual_seed(seed)
        expected = step(eager, x)
        torch.manual_seed(seed)
        traced.zero_grad()
        leaf = x.clone().requires_grad_()
        y = compiled(leaf)
        (y.square().sum() + dmoe.aux_loss(traced)).backward()
        actual = [y.detach(), leaf.grad, *(p.grad for p in traced.parameters() if p.grad is not None)]
        for a, b in zip(actual, expected, strict=True):
            torch.testing.assert_close(a, b)
        torch.testing.assert_close(traced.last_metrics.tokens_per_expert, eager.last_metrics.tokens_per_expert)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    if name == "bias_and_groups":
        assert torch.equal(traced.router.load_since_update, eager.router.load_since_update)
        assert traced.router.load_since_update.sum() == 3 * 11 * 2


def test_blocks_compiled_one_by_one_are_compiled_once():
    """PyTorch makes eight graphs of a function and no more, and models have more blocks than that."""
    blocks = torch.nn.Sequential(*(MoE(**SIZES, load_balancing_coefficient=0.0) for _ in range(12)))
    x = torch.randn(11, 16, requires_grad=True)  # as what the other blocks are given
    expected = blocks(x)
    for block in blocks:
        block.compile(fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(blocks(x), expected)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


# -------------------------------------------------------------------------------------------------------- determinism


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_same_input_same_bits(dtype):
    torch.manual_seed(0)
    layer = MoE(hidden_size=48, ffn_hidden_size=40, num_experts=6, top_k=3, dtype=dtype)
    x = torch.randn(700, 48).to(dtype)
    first = step(layer, x)
    for _ in range(5):
        for a, b in zip(step(layer, x), first, strict=True):
            assert torch.equal(a, b)


def test_bits_do_not_depend_on_the_other_tokens_of_the_batch():
    """A token's float64 output is a function of the token: alone, in a batch, or in another order."""
    torch.manual_seed(0)
    layer = MoE(**SIZES, dtype=torch.float64).eval()
    x = torch.randn(40, 16, dtype=torch.float64)
    whole, order = layer(x), torch.randperm(40)
    torch.testing.assert_close(layer(x[order]), whole[order], rtol=1e-13, atol=1e-14)
    torch.testing.assert_close(layer(x[7:8]), whole[7:8], rtol=1e-13, atol=1e-14)


def test_initial_values_of_an_expert_do_not_depend_on_how_many_there_are():
    torch.manual_seed(0)
    small = MoE(**{**SIZES, "num_experts": 3})
    torch.manual_seed(0)
    small_again, rng = MoE(**{**SIZES, "num_experts": 3}), torch.get_rng_state()
    for a, b in zip(small.parameters(), small_again.parameters(), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(small.experts.down_proj[0], small.experts.down_proj[1])
    bound = 1 / 16**0.5
    assert small.experts.gate_up_proj.abs().max() <= bound
    assert small.experts.gate_up_proj.abs().max() > 0.95 * bound
    assert small.experts.down_proj.abs().max() <= 1 / 12**0.5
    normal = MoE(**SIZES, init_std=0.02, bias="expert")
    assert normal.experts.gate_up_proj.std().item() == pytest.approx(0.02, rel=0.1)
    assert normal.experts.gate_up_bias.abs().max() == normal.experts.down_bias.abs().max() == 0
    torch.set_rng_state(rng)


# --------------------------------------------------------------------------------------------------------- randomness


def test_philox_known_answers():
    """Random123's published vectors for philox4x32-10: counter and key all zero, and all ones."""
    bits = random_bits(torch.tensor(0), torch.tensor([0]), 4, 0)
    assert [f"{v:08x}" for v in bits[0].tolist()] == ["6627e8d5", "e169c58d", "bc57ac4c", "9b00dbd8"]


@given(st.integers(-(2**63), 2**63 - 1), st.integers(1, 40), st.sampled_from([0.1, 0.5, 0.9]))
@settings(max_examples=30)
def test_dropout_masks_are_a_function_of_seed_and_row(seed, width, p):
    seed = torch.tensor(seed)
    rows = torch.tensor([5, 0, 2**31, 5])
    scale = dropout_scale(seed, rows, width, 0, p, torch.float32)
    assert torch.equal(scale[0], scale[3])
    for row in range(4):
        assert torch.equal(dropout_scale(seed, rows[row : row + 1], width, 0, p, torch.float32)[0], scale[row])
    assert set(scale.unique().tolist()) <= {0.0, torch.tensor(1 / (1 - p)).item()}


def test_dropout_keeps_the_mean_and_the_right_share():
    scale = dropout_scale(torch.tensor(1), torch.arange(400), 500, 1, 0.3, torch.float64)
    assert (scale == 0).double().mean().item() == pytest.approx(0.3, abs=0.004)
    assert scale.mean().item() == pytest.approx(1, abs=0.006)
    other = dropout_scale(torch.tensor(1), torch.arange(400), 500, 0, 0.3, torch.float64)
    agree = ((scale == 0) == (other == 0)).double().mean().item()
    assert agree == pytest.approx(0.3**2 + 0.7**2, abs=0.01)  # the streams are independent


@pytest.mark.parametrize("gate_on", ["output", "activation", "input"])
@pytest.mark.parametrize(("p_hidden", "p_out"), [(0.4, 0.0), (0.0, 0.4), (0.3, 0.3)])
def test_dropout_forward_and_backward_use_one_mask(gate_on, p_hidden, p_out):
    """With a fixed seed the layer is a smooth function, so gradcheck sees whether backward made the same mask."""
    torch.manual_seed(0)
    weights = [
        torch.randn(3, 2, 5, 4, dtype=torch.float64, requires_grad=True),
        torch.randn(3, 4, 5, dtype=torch.float64, requires_grad=True),
        torch.randn(3, 2, 5, dtype=torch.float64, requires_grad=True),
        torch.randn(3, 4, dtype=torch.float64, requires_grad=True),
    ]
    x = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    gates = torch.rand(6, 2, dtype=torch.float64, requires_grad=True)
    indices = torch.stack([torch.randperm(3)[:2] for _ in range(6)])

    def run(x, gates, *values):
        torch.manual_seed(7)
        return moe_mlp(
            x,
            indices,
            gates,
            ExpertWeights(*values),
            activation_dropout=p_hidden,
            expert_dropout=p_out,
            gate_weight_on=gate_on,
        )

    assert torch.autograd.gradcheck(run, (x, gates, *weights), fast_mode=True)
    torch.manual_seed(8)
    other = moe_mlp(x, indices, gates, ExpertWeights(*weights), activation_dropout=p_hidden, expert_dropout=p_out)
    assert not torch.allclose(run(x, gates, *weights), other)


def test_dropout_and_jitter_act_in_training_only():
    torch.manual_seed(0)
    layer = MoE(**SIZES, activation_dropout=0.3, expert_dropout=0.3, input_jitter=0.3)
    x = torch.randn(9, 16)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))


def test_jitter_gradient_and_range():
    scale = jitter_scale(torch.tensor(3), 50, 60, 0.2, torch.float64)
    assert 0.8 <= scale.min() < 0.81
    assert 1.19 < scale.max() < 1.2
    torch.manual_seed(0)
    layer = MoE(**SIZES, input_jitter=0.5, dtype=torch.float64)
    x = torch.randn(3, 16, dtype=torch.float64, requires_grad=True)

    def logits(x, weight):
        torch.manual_seed(1)
        return torch.func.functional_call(layer.router, {"weight": weight}, (x,)).router_probs

    assert torch.autograd.gradcheck(logits, (x, layer.router.weight))


# ------------------------------------------------------------------------------------------- selection bias, load, mask


def test_selection_bias_counts_in_backward_once_per_micro_batch():
    torch.manual_seed(0)
    layer = MoE(**SIZES, selection_bias=True, score_function="sigmoid", selection_bias_update_rate=0.25)
    x = torch.randn(9, 16)
    expected = torch.zeros(4)
    for _ in range(3):
        y = torch.utils.checkpoint.checkpoint(layer, x.requires_grad_(), use_reentrant=False)
        expected += layer.last_metrics.tokens_per_expert
        (y.sum() + dmoe.aux_loss(layer)).backward()
    layer.eval()(x)
    with torch.no_grad():
        layer.train()(x)
    assert torch.equal(layer.router.load_since_update, expected)
    dmoe.update_selection_bias(layer)
    assert torch.equal(layer.router.selection_bias, 0.25 * torch.sign(expected.mean() - expected))
    assert layer.router.load_since_update.abs().max() == 0


def test_selection_bias_moves_choices_but_not_weights():
    torch.manual_seed(0)
    layer = MoE(**SIZES, selection_bias=True, score_function="sigmoid", dtype=torch.float64)
    logits = torch.randn(20, 4, dtype=torch.float64)
    with torch.no_grad():
        layer.router.selection_bias[3] = 10.0
    routing = layer.router.route(logits)
    assert (routing.expert_indices[:, 0] == 3).all()
    expected = torch.sigmoid(logits).gather(1, routing.expert_indices)
    torch.testing.assert_close(routing.gate_weights, expected)


def test_selection_bias_stays_float32_and_is_saved():
    layer = MoE(**SIZES, selection_bias=True).to(torch.bfloat16)
    assert layer.router.selection_bias.dtype == layer.router.load_since_update.dtype == torch.float32
    assert layer.router.weight.dtype == torch.bfloat16
    assert "router.selection_bias" in layer.state_dict()
    layer(torch.randn(3, 16, dtype=torch.bfloat16)).sum().backward()


@settings(max_examples=40)
@given(
    groups=st.sampled_from([1, 2, 3, 6]),
    kept=st.integers(1, 6),
    rank=st.sampled_from(["top2_sum", "max"]),
    seed=st.integers(0, 2**20),
)
def test_group_limited_selection(groups, kept, rank, seed):
    import oracle

    from dmoe.ops.router_top_k import select_experts

    torch.manual_seed(seed)
    kept = min(kept, groups)
    top_k = min(2, 6 // groups * kept)
    layer = MoE(
        hidden_size=4, ffn_hidden_size=2, num_experts=6, top_k=top_k, num_groups=groups, top_k_groups=kept,
        group_score=rank, score_function="sigmoid", selection_bias=True, dtype=torch.float64,
    )  # fmt: skip
    bias = torch.randint(-2, 3, (6,)).float() / 4
    layer.router.selection_bias.copy_(bias)
    scores = torch.randint(0, 5, (8, 6)).double() / 4  # quarters: sums are exact, and there are many ties
    expected = oracle.best_experts(
        scores.tolist(), top_k, bias=bias.tolist(), num_groups=groups, top_groups=kept, group_score=rank
    )
    assert select_experts(scores, layer.router.rule, layer.router.selection_bias).tolist() == expected


def test_masked_tokens_take_no_expert_and_give_zero():
    torch.manual_seed(0)
    layer = MoE(**SIZES, router_z_loss_coefficient=0.1)
    x = torch.randn(2, 5, 16)
    mask = torch.tensor([[1, 1, 0, 1, 0], [0, 0, 0, 0, 1]]).bool()
    y = layer(x, token_mask=mask)
    loss = dmoe.aux_loss(layer)
    assert (y[~mask] == 0).all()
    torch.testing.assert_close(y[mask], layer(x[mask]))
    torch.testing.assert_close(loss, dmoe.aux_loss(layer))
    assert layer.last_metrics.tokens_per_expert.sum() == 4 * 2
    x[~mask] = float("nan")
    torch.testing.assert_close(layer(x, token_mask=mask)[mask], y[mask])
    with_nan = dmoe.aux_loss(layer)
    torch.testing.assert_close(with_nan, loss)
    (layer(x, token_mask=mask).sum() + with_nan).backward()
    assert all(torch.isfinite(p.grad).all() for p in layer.parameters())
    nobody = layer(x, token_mask=torch.zeros_like(mask))
    assert (nobody == 0).all()
    assert dmoe.aux_loss(layer).item() == 0


def test_uniform_router_is_round_robin():
    layer = MoE(**SIZES, router="uniform")
    layer(torch.randn(6, 16))
    assert layer.last_metrics.tokens_per_expert.tolist() == [3, 3, 3, 3]
    assert layer.last_metrics.entropy.item() == pytest.approx(torch.tensor(4.0).log().item())


def test_metrics_tell_what_happened():
    layer = MoE(hidden_size=4, ffn_hidden_size=4, num_experts=4, top_k=1, capacity=3)
    with torch.no_grad():
        layer.router.weight.zero_()[2, 0] = 50.0
    layer(torch.ones(8, 4))
    metrics = layer.last_metrics
    assert metrics.tokens_per_expert.tolist() == [0, 0, 8, 0]
    assert metrics.kept_per_expert.tolist() == [0, 0, 3, 0]
    assert metrics.dropped_share.item() == pytest.approx(5 / 8)
    assert metrics.dead_experts.item() == 3
    assert metrics.load.tolist() == [0, 0, 1, 0]
    assert metrics.entropy.item() == pytest.approx(0, abs=1e-6)


def test_shared_output_bias_is_added_or_returned():
    torch.manual_seed(0)
    added = MoE(**SIZES, bias="output")
    torch.nn.init.normal_(added.output_bias)
    returned = MoE(**SIZES, bias="output", return_bias=True)
    returned.load_state_dict(added.state_dict())
    x = torch.randn(3, 16)
    y, bias = returned(x)
    assert bias is returned.output_bias
    assert torch.equal(added(x), y + bias)


@pytest.mark.parametrize("fields", [{}, {"router": "cosine"}, {"router": "expert_choice", "causal": False}], ids=str)
def test_softcapped_logits(fields):
    torch.manual_seed(0)
    plain, capped = MoE(**SIZES, **fields).eval(), MoE(**SIZES, **fields, router_logit_softcap=0.5).eval()
    capped.load_state_dict(plain.state_dict())
    x = torch.randn(7, 16)
    logits = plain(x, return_routing=True)[1].router_logits
    found = capped(x, return_routing=True)[1]
    assert found.router_logits.abs().max() < 0.5
    torch.testing.assert_close(found.router_logits, torch.tanh(logits * 2) / 2)
    assert torch.equal(found.router_probs, plain.router.route(found.router_logits).router_probs)


def test_a_selection_bias_on_logits_chooses_by_them_and_weighs_without():
    torch.manual_seed(0)
    fields = {"score_function": "sigmoid", "gate_normalization": 1.0, "selection_bias": True}
    layer, x = MoE(**SIZES, **fields, selection_bias_on="logits"), torch.randn(40, 16) * 4
    layer.router.selection_bias.copy_(torch.tensor([0.0, 3.0, -3.0, 1.0]))
    _, routing = layer(x, return_routing=True)
    logits = layer.router.logits(x)
    chosen = (logits + layer.router.selection_bias).topk(2).indices
    assert torch.equal(routing.expert_indices, chosen)
    assert not torch.equal(chosen, (logits.sigmoid() + layer.router.selection_bias).topk(2).indices)
    weights = logits.sigmoid().gather(1, chosen)
    torch.testing.assert_close(routing.gate_weights, weights / weights.sum(1, keepdim=True))
    before = layer.router.selection_bias.clone()
    layer(x).sum().backward()
    layer.update_selection_bias()
    moved = (layer.router.selection_bias - before).sign()
    assert torch.equal(moved, (20 - torch.bincount(chosen.flatten(), minlength=4)).sign().float())


@pytest.mark.parametrize("on", ["router", "layer"])
def test_jitter_on_the_layer_reaches_the_experts(on):
    torch.manual_seed(0)
    layer = MoE(**SIZES, input_jitter=0.3, input_jitter_on=on)
    x = torch.ones(5, 16)
    indices = torch.tensor([[0, 1]]).expand(5, 2)
    torch.nn.init.zeros_(layer.router.weight)  # weights of 1/4, whatever the router sees
    y = layer(x, expert_indices=indices)
    same = torch.equal(y, y[:1].expand(5, -1))
    assert same == (on == "router")
    layer.eval()
    assert torch.equal(layer(x, expert_indices=indices), layer(x, expert_indices=indices)[:1].expand(5, -1))
    if on == "layer":  # the router sees the same numbers as the experts, and no second jitter
        layer.train()
        torch.nn.init.normal_(layer.router.weight)
        drawn = torch.get_rng_state()
        _, routing = layer(x, return_routing=True)
        torch.set_rng_state(drawn)
        seen = x * torch.empty_like(x).uniform_(0.7, 1.3)
        torch.testing.assert_close(routing.router_logits, seen @ layer.router.weight.mT)


@pytest.mark.parametrize("fields", [{}, {"router": "expert_choice", "causal": False}, {"router": "cosine"}], ids=str)
def test_routing_is_returned_with_logits_that_carry_their_gradient(fields):
    torch.manual_seed(0)
    layer, x = MoE(**SIZES, **fields).eval(), torch.randn(2, 3, 16)
    y, routing = layer(x, return_routing=True)
    assert torch.equal(y, layer(x))
    tokens = x.flatten(0, 1)
    assert torch.equal(routing.router_logits, layer.router.logits(tokens))
    assert torch.equal(routing.gate_weights, layer.router(tokens).gate_weights)
    (expected,) = torch.autograd.grad(layer.router.logits(tokens).square().sum(), layer.router.weight)
    (grad,) = torch.autograd.grad(routing.router_logits.square().sum(), layer.router.weight)
    torch.testing.assert_close(grad, expected)


def test_routing_comes_behind_the_bias():
    layer = MoE(**SIZES, bias="output", return_bias=True)
    y, bias, routing = layer(torch.randn(0, 3, 16), return_routing=True)
    assert (y.shape, bias.shape, routing.router_logits.shape) == ((0, 3, 16), (16,), (0, 4))
    unlearned = MoE(**SIZES, router="uniform", load_balancing_coefficient=0.0)
    assert unlearned(y, return_routing=True)[1].router_logits is None


# ---------------------------------------------------------------------------------------------- shapes and bad input


@pytest.mark.parametrize("shape", [(16,), (0, 16), (3, 0, 16), (1, 16), (2, 3, 4, 16)], ids=str)
def test_any_leading_dimensions_and_empty_batches(shape):
    torch.manual_seed(0)
    layer = MoE(**SIZES)
    x = torch.randn(shape, requires_grad=True)
    y = layer(x)
    assert y.shape == x.shape
    (y.sum() + dmoe.aux_loss(layer)).backward()
    assert x.grad.shape == x.shape
    assert all(torch.isfinite(p.grad).all() for p in layer.parameters())


def test_strided_input_equals_contiguous():
    torch.manual_seed(0)
    layer = MoE(**SIZES)
    base = torch.randn(16, 7, 4)
    for view in (base.permute(1, 2, 0), base.permute(2, 1, 0)[::2], base.permute(1, 2, 0)[:, ::3]):
        assert torch.equal(layer(view), layer(view.contiguous()))
    expanded = torch.randn(1, 16).expand(5, 16)
    assert torch.equal(layer(expanded), layer(expanded.contiguous()))


def test_all_tokens_on_one_expert_and_fewer_tokens_than_experts():
    torch.manual_seed(0)
    layer = MoE(hidden_size=16, ffn_hidden_size=12, num_experts=64, top_k=2)
    assert all(torch.isfinite(t).all() for t in step(layer, torch.randn(3, 16)))
    hot = torch.tensor([5, 9]).expand(300, 2)
    x = torch.randn(300, 16)
    y = layer(x, expert_indices=hot)
    rows = [layer(x[i : i + 1], expert_indices=hot[:1]) for i in (0, 150, 299)]
    torch.testing.assert_close(torch.cat(rows), y[[0, 150, 299]])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_bad_token_spoils_its_own_output_only(value):
    """The documented outcome: NaN there, the right result everywhere else, ids in range."""
    torch.manual_seed(0)
    layer = MoE(**SIZES).eval()
    x = torch.randn(6, 16)
    clean = layer(x)
    x[2, 3] = value
    y = layer(x)
    others = [0, 1, 3, 4, 5]
    assert torch.isnan(y[2]).any()
    torch.testing.assert_close(y[others], clean[others])
    assert layer.last_metrics.tokens_per_expert.sum() == 12


def test_logits_of_minus_infinity_are_never_needed():
    layer = MoE(**SIZES)
    logits = torch.tensor([[-torch.inf, 1.0, -torch.inf, 0.0]])
    routing = layer.router.route(logits)
    assert routing.expert_indices.tolist() == [[1, 3]]
    assert torch.isfinite(routing.gate_weights).all()
    alone = layer.router.route(torch.tensor([[-torch.inf, -torch.inf, 2.0, -torch.inf]]))
    assert alone.expert_indices.tolist() == [[2, 0]]
    assert alone.gate_weights.tolist() == [[1.0, 0.0]]


def bad_calls():
    x, layer = torch.randn(5, 16), MoE(**SIZES)
    good = torch.zeros(5, 2, dtype=torch.int64)
    meta = torch.empty(5, 16, device="meta")
    yield (
        "last dimension",
        lambda: layer(torch.randn(5, 15)),
        ValueError,
        r"MoE: x: expected shape \(\.\.\., hidden_size = 16\), got \(5, 15\)",
    )
    yield "no dimension", lambda: layer(torch.tensor(1.0)), ValueError, r"MoE: x: expected shape .* got \(\)"
    yield "integers", lambda: layer(x.long()), TypeError, "MoE: x: expected a floating-point tensor, got torch.int64"
    yield "no tensor", lambda: layer([1.0]), TypeError, "MoE: x: expected a floating-point tensor, got list"
    yield "device", lambda: layer(meta), ValueError, "MoE: expected x on the weights' device cpu, got meta"
    yield (
        "dtype",
        lambda: layer(x.double()),
        ValueError,
        "expected x and weights of one dtype, got torch.float64 and torch.float32",
    )
    yield (
        "mask shape",
        lambda: layer(x, token_mask=torch.ones(4, dtype=torch.bool)),
        ValueError,
        r"MoE: token_mask: expected shape \(5,\)",
    )
    yield (
        "mask dtype",
        lambda: layer(x, token_mask=torch.ones(5)),
        TypeError,
        "MoE: token_mask: expected torch.bool, got torch.float32",
    )
    yield (
        "index shape",
        lambda: layer(x, expert_indices=good[:, :1]),
        ValueError,
        r"MoE: expert_indices: expected shape \(5, 2\)",
    )
    yield (
        "index dtype",
        lambda: layer(x, expert_indices=good.float()),
        TypeError,
        "MoE: expert_indices: expected torch.int32 or torch.int64, got torch.float32",
    )
    yield "index too large", lambda: layer(x, expert_indices=good + 9), RuntimeError, "routing_plan: .*9"
    yield "index negative", lambda: layer(x, expert_indices=good - 1), RuntimeError, "routing_plan: .*-1"
    yield (
        "logits",
        lambda: layer.router.route(torch.randn(5, 3)),
        ValueError,
        r"route: router_logits: expected shape \(T, num_experts = 4\), got \(5, 3\)",
    )
    w = layer.experts.weights()
    gates = torch.ones(5, 2)
    yield (
        "weights",
        lambda: ExpertWeights(w.up_proj, w.down_proj[:3]),
        ValueError,
        r"ExpertWeights: up_proj: expected shape \(3, 2, 12, 16\)",
    )
    yield (
        "weights dtype",
        lambda: ExpertWeights(w.up_proj, w.down_proj.double()),
        ValueError,
        "ExpertWeights: down_proj: expected torch.float32",
    )
    yield (
        "gates",
        lambda: moe_mlp(x, good, gates[:, :1], w),
        ValueError,
        r"moe_mlp: expected x \(\.\.\., H\), expert_indices",
    )
    yield (
        "activation",
        lambda: moe_mlp(x, good, gates, w, activation="tanh"),
        ValueError,
        "moe_mlp: activation: expected gelu.*'tanh'",
    )
    yield (
        "gate on",
        lambda: moe_mlp(x, good, gates, w, gate_weight_on="y"),
        ValueError,
        "moe_mlp: gate_weight_on: expected output",
    )
    yield (
        "dropout",
        lambda: moe_mlp(x, good, gates, w, expert_dropout=1.0),
        ValueError,
        "moe_mlp: expert_dropout: expected 0 <= p < 1, got 1.0",
    )
    yield "hidden", lambda: moe_mlp(x[:, :8], good, gates, w), ValueError, r"moe_mlp: x: expected shape \(5, 16\)"


@pytest.mark.parametrize("case", list(bad_calls()), ids=lambda case: case[0])
def test_bad_input_gets_one_clear_sentence(case):
    _, call, error, message = case
    with pytest.raises(error, match=message):
        call()


def test_half_precision_router_and_any_floating_gates():
    torch.manual_seed(0)
    for dtype in (torch.bfloat16, torch.float16):
        layer = MoE(**SIZES, router_dtype="input", gate_normalization=2.0, dtype=dtype)
        assert all(torch.isfinite(t).all() for t in step(layer, torch.randn(9, 16, dtype=dtype)))
    layer = MoE(**SIZES)
    x, ids = torch.randn(3, 16), torch.tensor([[0, 1], [2, 3], [1, 2]])
    expected = moe_mlp(x, ids, torch.full((3, 2), 0.5), layer.experts.weights())
    for dtype in (torch.float64, torch.bfloat16):
        assert torch.equal(moe_mlp(x, ids, torch.full((3, 2), 0.5, dtype=dtype), layer.experts.weights()), expected)


def test_expert_choice_of_an_empty_batch():
    layer = MoE(**SIZES, router="expert_choice", causal=False)
    x = torch.randn(0, 16, requires_grad=True)
    (layer(x).sum() + dmoe.aux_loss(layer)).backward()
    assert x.grad.shape == (0, 16)


def test_meta_then_to_empty_then_reset_is_a_fresh_layer():
    fields = {"selection_bias": True, "aux_loss": "attached", "bias": "output"}
    layer = MoE(**SIZES, **fields, device="meta").to_empty(device="cpu")
    for module in layer.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    assert layer.aux_loss_scale == 1
    assert layer.router.selection_bias.abs().max() == layer.router.load_since_update.abs().max() == 0
    assert layer.output_bias.abs().max() == 0
    with torch.device("meta"):
        assert MoE(**SIZES, device="cpu").experts.down_proj.abs().max() > 0


def test_scale_and_bias_stay_float32():
    layer = MoE(**SIZES, aux_loss="attached", selection_bias=True).half()
    dmoe.set_aux_loss_scale(layer, torch.tensor(65536.0))
    assert layer.aux_loss_scale == 65536
    state = {name: value.bfloat16() for name, value in layer.state_dict().items()}
    layer.load_state_dict(state, assign=True)
    assert layer.router.selection_bias.dtype == torch.float32
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert MoE(**SIZES, selection_bias=True).router.selection_bias.dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)


def test_copies_carry_no_graph():
    layer = MoE(**SIZES)
    layer(torch.randn(3, 16))
    twin = copy.deepcopy(layer)
    assert twin.take_aux_loss() is None
    assert twin.last_metrics is None
    assert layer.take_aux_loss() is not None


def test_frozen_experts_get_no_gradient_and_pass_it_on():
    torch.manual_seed(0)
    layer, x = MoE(**SIZES, bias="expert"), torch.randn(9, 16)
    whole = step(layer, x)
    layer.experts.requires_grad_(False)
    layer.zero_grad(set_to_none=True)
    frozen = step(layer, x)
    for a, b in zip(frozen[:3], whole[:3], strict=True):  # y, x, router weight
        assert torch.equal(a, b)
    assert all(p.grad is None for p in layer.experts.parameters())


def test_forward_mode_is_refused():
    layer = MoE(**SIZES).eval()
    x = torch.randn(3, 16)
    with pytest.raises(RuntimeError, match="forward-mode differentiation"):
        torch.func.jvp(layer, (x,), (x,))


def test_weights_in_any_memory_format():
    torch.manual_seed(0)
    layer, x = MoE(**SIZES), torch.randn(3, 16)
    expected = layer(x)
    assert torch.equal(layer.to(memory_format=torch.channels_last)(x), expected)


def test_small_scores_are_normalised_without_underflow():
    from dmoe.ops import gate_weights

    ids = torch.tensor([[0, 1]])
    for backend in (None, "reference"):
        weights = gate_weights(torch.tensor([[1e-25, 2e-25]]), ids, normalization=2.0, backend=backend)
        torch.testing.assert_close(weights, torch.tensor([[0.2**0.5, 0.8**0.5]]))
        assert gate_weights(torch.rand(1, 2), ids - 5, backend=backend).tolist() == [[0, 0]]


def test_balance_loss_counts_past_float16():
    loss = dmoe.losses.load_balancing_loss(torch.full((70000, 2), 0.5).half(), torch.tensor([35000, 35000]))
    assert loss.item() == pytest.approx(1)


def test_reference_backend_under_autocast_returns_autocasts_dtype():
    with torch.autocast("cpu", torch.bfloat16):
        assert MoE(**SIZES, backend="reference")(torch.randn(3, 16)).dtype == torch.bfloat16


@pytest.mark.parametrize(("name", "value"), [("drop_order", "choice-major"), ("backend", "refrence")])
def test_functional_names_a_typo(name, value):
    layer = MoE(**SIZES)
    x, ids = torch.randn(3, 16), torch.zeros(3, 2, dtype=torch.int64)
    with pytest.raises(ValueError, match=f"{name}: expected .* got '{value}'"):
        moe_mlp(x, ids, torch.ones(3, 2), layer.experts.weights(), capacity=2, **{name: value})


def test_ids_equal_to_the_number_of_experts_take_no_row():
    torch.manual_seed(0)
    layer = MoE(**SIZES)
    x = torch.randn(3, 16)
    indices = torch.tensor([[4, 4], [1, 4], [2, 3]])
    y = layer(x, expert_indices=indices)
    assert (y[0] == 0).all()
    assert layer.last_metrics.tokens_per_expert.tolist() == [0, 1, 1, 1]


def test_options_together_do_not_interfere():
    """Pairs of options that meet in the code run and give finite gradients."""
    options = [
        {"capacity_factor": 0.7, "drop_order": "gate_weight"},
        {"bias": "expert"},
        {"shared_ffn_hidden_size": 5, "shared_expert_gate": True},
        {"expert_dropout": 0.2},
        {"gate_weight_on": "input"},
        {"ffn_hidden_size": [3, 9, 1, 6]},
        {"selection_bias": True, "score_function": "sigmoid"},
        {"aux_loss": "attached"},
    ]
    for a, b in itertools.combinations(options, 2):
        layer = MoE(**{**SIZES, **a, **b})
        assert all(torch.isfinite(t).all() for t in step(layer, torch.randn(9, 16))), (a, b)
