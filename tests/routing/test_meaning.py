"""What families and options mean, against loops over tokens that share no code with them."""

from __future__ import annotations

import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from router_cases import SIZES, inputs, layer_of

import dmoe
from dmoe import MoE, MoEConfig, losses
from dmoe.ops.sinkhorn import sinkhorn
from dmoe.routing import Hash, TopK, noise

few = settings(max_examples=25, deadline=None)


def router_of(**fields):
    return MoE(**{**SIZES, "ffn_hidden_size": 4, **fields}).router


def kept_pairs(routing):
    """(token, expert) of every row."""
    plan = routing.plan
    starts = plan.expert_offsets.tolist()
    rows = plan.row_to_token.tolist()
    return {(rows[r], e) for e in range(plan.num_experts) for r in range(starts[e], starts[e + 1])}


def keep_in_order(order, chosen, capacity, group_size):
    """Assignments that find room, visited in an order; each group has its own room."""
    room, kept = {}, set()
    for token, expert in order:
        key = (token // group_size, expert)
        room[key] = room.get(key, 0) + 1
        if room[key] <= capacity:
            kept.add((token, expert))
    return kept


@few
@given(
    groups=st.sampled_from([1, 2, 3, 4]),
    order=st.sampled_from(["token_major", "choice_major", "batch_prioritized", "gate_weight", "random"]),
    capacity=st.integers(0, 4),
    seed=st.integers(0, 9),
)
def test_each_group_has_a_capacity_of_its_own(groups, order, capacity, seed):
    torch.manual_seed(seed)
    logits = torch.randn(12, 4)
    router = router_of(capacity=capacity, token_groups=groups, drop_order=order, router=TopK())
    torch.manual_seed(seed)
    drawn = torch.rand(12, 4)
    torch.manual_seed(seed)
    routing = router.route(logits)
    probs = logits.softmax(1)
    chosen = probs.topk(2).indices.tolist()
    pairs = [(t, e) for t in range(12) for e in chosen[t]]
    if order == "choice_major":
        pairs = [(t, chosen[t][k]) for k in range(2) for t in range(12)]
    elif order == "batch_prioritized":
        by_score = sorted(range(12), key=lambda t: -probs[t].max().item())
        pairs = [(t, chosen[t][k]) for k in range(2) for t in by_score]
    elif order in ("gate_weight", "random"):
        value = probs if order == "gate_weight" else drawn
        pairs = sorted(pairs, key=lambda pair: -value[pair].item())
    assert kept_pairs(routing) == keep_in_order(pairs, chosen, capacity, 12 // groups)
    counts = [sum(e == each for _, e in pairs) for each in range(4)]
    assert routing.plan.tokens_per_expert.tolist() == counts
    assert routing.plan.kept_per_expert.sum() == len(kept_pairs(routing))
    weights = routing.gate_weights
    for token in range(12):
        for k, expert in enumerate(chosen[token]):
            expected = probs[token, expert] if (token, expert) in kept_pairs(routing) else torch.zeros(())
            torch.testing.assert_close(weights[token, k], expected)


def test_losses_of_groups_are_the_mean_of_each_ones():
    torch.manual_seed(0)
    layer = MoE(**SIZES, token_groups=3, router=TopK(logit_noise="gaussian"),
                losses={"load_balancing": 1.0, "importance": 2.0, "load": 3.0})  # fmt: skip
    logits = torch.randn(12, 4)
    torch.manual_seed(1)
    routing = layer.router.route(logits)
    whole = layer.router_losses(routing)
    torch.manual_seed(1)
    noisy = logits + torch.randn_like(logits) / 4
    parts = []
    for part in range(3):
        clean, loud = logits[part * 4 : part * 4 + 4], noisy[part * 4 : part * 4 + 4]
        chosen = loud.topk(2).indices
        counts = torch.bincount(chosen.flatten(), minlength=4)
        parts.append(
            losses.load_balancing_loss(loud.softmax(1), counts)
            + 2 * losses.importance_loss(clean.softmax(1))
            + 3 * losses.load_loss(clean, loud, 2, 1.0)
        )
    torch.testing.assert_close(whole, torch.stack(parts).mean())


@few
@given(seed=st.integers(0, 99), k=st.integers(1, 3), std=st.sampled_from([0.5, 1.0, 2.0]))
def test_losses_of_noise_against_loops(seed, k, std):
    torch.manual_seed(seed)
    clean = torch.randn(7, 5, dtype=torch.float64).requires_grad_()
    noisy = (clean + torch.randn(7, 5, dtype=torch.float64) * std / 5).requires_grad_()
    probs, normal = clean.softmax(1), torch.distributions.Normal(*torch.tensor([0, 1], dtype=torch.float64))

    def squared_variation(values, unbiased=False):
        mean = sum(values) / len(values)
        return sum((v - mean) ** 2 for v in values) / (len(values) - unbiased) / (mean**2 + 1e-10 * unbiased)

    importance = squared_variation([sum(probs[t, e] for t in range(7)) for e in range(5)])
    sharp = 5 / std

    def loads(values):
        totals = []
        for e in range(5):
            terms = [
                normal.cdf((values[t, e] - noisy[t].sort(descending=True).values[k - 1]) * sharp) for t in range(7)
            ]
            totals.append(sum(terms))
        return totals

    load = squared_variation(loads(clean))
    tutel = (
        squared_variation([sum(probs[t, e] for t in range(7)) for e in range(5)], True)
        + squared_variation(loads(probs), True)
    ) / 2
    found = [
        losses.importance_loss(probs),
        losses.load_loss(clean, noisy, k, std),
        losses.load_importance_loss(clean, noisy, k, std),
    ]
    for mine, loop in zip(found, (importance, load, tutel), strict=True):
        torch.testing.assert_close(mine, loop, rtol=1e-6, atol=1e-9)
        for a, b in zip(
            torch.autograd.grad(mine, (clean, noisy), retain_graph=True, allow_unused=True),
            torch.autograd.grad(loop, (clean, noisy), retain_graph=True, allow_unused=True),
            strict=True,
        ):
            if a is not None or b is not None:
                torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)


def test_losses_of_noise_skip_masked_tokens_and_take_none():
    torch.manual_seed(0)
    clean, noisy, mask = torch.randn(8, 4), torch.randn(8, 4), torch.arange(8) < 5
    for term in (
        lambda c, n, m: losses.importance_loss(c.softmax(1), 1, m),
        lambda c, n, m: losses.load_loss(c, n, 2, 1.0, 1, m),
    ):
        torch.testing.assert_close(term(clean, noisy, mask), term(clean[:5], noisy[:5], None))
        assert term(clean[:0], noisy[:0], None) == 0
        assert term(clean, noisy, mask & False) == 0


def test_noise_has_the_deviation_it_says_in_training_alone():
    seen = {}
    router = router_of(router=TopK(logit_noise="gaussian", noise_std=2.0), top_k=1)
    logits = torch.zeros(20000, 4)
    torch.manual_seed(0)
    seen["train"] = router.route(logits).router_probs
    # The log of a ratio of two probabilities is the difference of two noises: variance 2 (2 / 4)^2.
    ratio = (seen["train"][:, 0] / seen["train"][:, 1]).log()
    assert abs(ratio.std().item() - math.sqrt(2) * 2.0 / 4) < 0.02
    router.eval()
    assert torch.equal(router.route(logits).router_probs, torch.full((20000, 4), 0.25))
    loud = router_of(router=TopK(logit_noise="gaussian", noise_in_eval=True), top_k=1).eval()
    assert not torch.equal(loud.route(logits).router_probs, torch.full((20000, 4), 0.25))


def test_gumbel_draws_from_the_softmax_and_weighs_without_noise():
    torch.manual_seed(0)
    logits = torch.tensor([[0.0, 1.0, -1.0, 0.5]]).expand(20000, 4)
    router = router_of(router=TopK(logit_noise="gumbel"), top_k=1)
    routing = router.route(logits)
    share = torch.bincount(routing.expert_indices[:, 0], minlength=4) / 20000
    assert (share - logits[0].softmax(0)).abs().max() < 0.02
    assert torch.equal(routing.gate_weights, routing.router_probs.gather(1, routing.expert_indices))


@pytest.mark.parametrize("policy", ["sampling", "random", "random_raw"])
def test_second_experts_come_as_often_as_the_policy_says(policy):
    torch.manual_seed(0)
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]]).expand(20000, 4)
    probs = logits[0].softmax(0)
    router = router_of(router=TopK(second_expert=policy), gate_normalization=1.0)
    routing = router.route(logits)
    first, second = routing.expert_indices.unbind(1)
    assert (first == 0).all()
    share = torch.bincount(second, minlength=5)[:5] / 20000
    if policy == "sampling":
        expected = torch.cat([torch.zeros(1), probs[1:] / probs[1:].sum(), torch.zeros(1)])
    else:
        kept = min(1.0, 2 * (probs[1] / (probs[0] + probs[1]) if policy == "random" else probs[1]).item())
        expected = torch.tensor([0, kept, 0, 0, 1 - kept])
    assert (share - expected).abs().max() < 0.02
    assert torch.equal(router.eval().route(logits).expert_indices[:, 1], torch.ones(20000, dtype=torch.int64))


@few
@given(seed=st.integers(0, 99), fields=st.sampled_from([
    {"capacity_factor": 0.0}, {"capacity_factor": -0.5}, {"capacity_factor": 1.0, "eval_capacity_factor": 2.0},
    {"capacity": 2, "eval_capacity_fraction": 0.5}, {"eval_capacity_factor": 0.5}, {"eval_capacity_fraction": 0.25},
    {"capacity_factor": 0.3, "capacity_multiple_of": 4}, {"capacity_factor": 0.3, "min_capacity": 3},
]))  # fmt: skip
def test_capacities_of_training_and_evaluation(seed, fields):
    torch.manual_seed(seed)
    router, logits = router_of(**fields), torch.randn(16, 4)
    for training in (True, False):
        router.train(training)
        share = 16 * 2 / 4
        factor = fields.get("capacity_factor")
        if not training and "eval_capacity_factor" in fields:
            factor = fields["eval_capacity_factor"]
        rows = fields.get("capacity")
        if factor:
            rows = max(math.ceil(abs(factor) * share), fields.get("min_capacity", 0))
            rows = -(-rows // fields.get("capacity_multiple_of", 1)) * fields.get("capacity_multiple_of", 1)
        if not training and "eval_capacity_fraction" in fields:
            rows = math.ceil(fields["eval_capacity_fraction"] * 16)
        counts = torch.bincount(logits.topk(2).indices.flatten(), minlength=4)
        kept = counts if rows is None else counts.clamp(max=rows)
        plan = router.route(logits).plan
        assert plan.kept_per_expert.tolist() == kept.tolist()
        assert plan.expert_offsets.diff().tolist() == kept.tolist()


def test_a_quantile_update_balances_the_batch_it_saw():
    torch.manual_seed(0)
    layer = MoE(**SIZES, selection_bias=True, selection_bias_rule="quantile", load_balancing_coefficient=0.0)
    logits = (torch.randn(64, 4) + torch.tensor([3.0, 0.0, 0.0, -2.0])).requires_grad_()
    router = layer.router

    def load():
        routing = router.route(logits)
        routing.gate_weights.sum().backward()
        return routing.plan.tokens_per_expert.tolist()

    before = load()
    biased = logits.detach() + router.selection_bias
    cutoff = biased.sort(1, descending=True).values[:, 2]
    wanted = [-(logits.detach()[:, e] - cutoff).sort(descending=True).values[64 * 2 // 4] for e in range(4)]
    wanted = torch.stack(wanted)
    layer.update_selection_bias()
    torch.testing.assert_close(router.selection_bias, wanted - wanted.mean())
    for _ in range(20):
        after = load()
        layer.update_selection_bias()
    assert max(before) - min(before) > 40
    assert max(after) - min(after) <= 4
    kept = router.selection_bias.clone()
    layer.update_selection_bias()  # nothing was counted: nothing moves
    assert torch.equal(router.selection_bias, kept)
    with torch.no_grad():
        router.route(logits)
    router.route(
        logits, expert_indices=torch.zeros(64, 2, dtype=torch.int64) + torch.arange(2)
    ).gate_weights.sum().backward()
    assert not router.load_since_update.any()


def test_a_quantile_update_leaves_out_masked_tokens_and_keeps_its_share_of_the_old():
    torch.manual_seed(0)
    fields = {"selection_bias": True, "selection_bias_rule": "quantile"}
    logits, mask = torch.randn(32, 4).requires_grad_(), torch.arange(32) < 20
    one, two = router_of(**fields), router_of(**fields, selection_bias_decay=0.5)
    one.route(logits, token_mask=mask).gate_weights.sum().backward()
    two.route(logits[:20]).gate_weights.sum().backward()
    torch.testing.assert_close(one.load_since_update, two.load_since_update)
    one.update_selection_bias()
    two.update_selection_bias()
    torch.testing.assert_close(one.selection_bias / 2, two.selection_bias)
    one.route(logits, token_mask=mask & False).gate_weights.sum().backward()
    assert not one.load_since_update.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_sqrt_softplus_from_end_to_end(dtype):
    x = torch.tensor([[-1e4, -200, -90.0, -40, -20, -9, -1, 0, 1, 9, 30, 90, 1e4]], dtype=dtype).requires_grad_()
    scores, _ = dmoe.ops.router_scores(x, "sqrt_softplus")
    scores.sum().backward()
    exact = x.detach().double().requires_grad_()
    # ln(1 + e^x) is e^x where that is lost beside 1
    y = torch.where(
        exact < -30, (exact.clamp(max=0) / 2).exp(), torch.nn.functional.softplus(exact, threshold=700).sqrt()
    )
    slope = torch.where(exact < -30, y / 2, torch.sigmoid(exact) / (2 * y.clamp(min=1e-300)))
    tolerance = {torch.float32: 2e-6, torch.float64: 1e-12, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(scores.double(), y, rtol=tolerance, atol=1e-38)
    torch.testing.assert_close(x.grad.double(), slope, rtol=tolerance, atol=1e-38)
    nan, _ = dmoe.ops.router_scores(torch.tensor([[math.nan, 1.0], [-math.inf, 2.0]]), "sqrt_softplus")
    assert nan[0, 0].isnan()
    assert nan[1, 0] == 0


@few
@given(tokens=st.integers(1, 20), experts=st.integers(1, 6), seed=st.integers(0, 99), shift=st.sampled_from([0, 500.0]))
def test_sinkhorn_gives_every_expert_its_share(tokens, experts, seed, shift):
    torch.manual_seed(seed)
    logits = torch.randn(tokens, experts, dtype=torch.float64)
    matrix = sinkhorn(logits + shift, 1e-9, 2000)
    torch.testing.assert_close(
        matrix.sum(0), torch.full((experts,), 1 / experts, dtype=torch.float64), rtol=1e-4, atol=1e-6
    )
    torch.testing.assert_close(
        matrix.sum(1), torch.full((tokens,), 1 / tokens, dtype=torch.float64), rtol=1e-4, atol=1e-6
    )
    # diag(d0) exp(logits) diag(d1): its log minus the logits is a sum of a row's and a column's number
    rest = matrix.log() - logits
    rest = rest - rest[:, :1] - rest[:1] + rest[0, 0]
    torch.testing.assert_close(rest, torch.zeros_like(rest), rtol=0, atol=1e-6)
    torch.library.opcheck(torch.ops.dmoe.sinkhorn.default, (logits, 1e-4, 20))


def test_sinkhorn_refuses_what_it_cannot_take():
    with pytest.raises(ValueError, match=r"sinkhorn: logits: expected \(T, E\) floating point, got \(3,\)"):
        sinkhorn(torch.zeros(3))
    assert sinkhorn(torch.zeros(0, 4)).shape == (0, 4)


def test_tables_of_hash_layers():
    def table(**how):
        return MoE(**SIZES, top_k=1, router=Hash(**how)).router.table.experts[:, 0].tolist()

    draw = random.Random(42)
    assert table(vocab_size=40) == [draw.randrange(4) for _ in range(40)]
    assert table(vocab_size=40, seed=1) != table(vocab_size=40)
    assert table(table=torch.tensor([3, 0, 1])) == [3, 0, 1]
    frequencies = [5, 1, 9, 9, 2, 0, 7]
    load, expected = [0] * 4, {}
    for token in (2, 3, 6, 0, 4, 1):  # by frequency, equals by id
        expected[token] = load.index(min(load))
        load[expected[token]] += frequencies[token]
    assert {token: e for token, e in enumerate(table(frequencies=frequencies)) if token != 5} == expected
    layer = layer_of("hash")
    x, ids = inputs()
    layer(x, token_ids=ids)
    assert "router" not in {name.split(".")[0] for name in layer.state_dict()}
    assert Hash(table=[0, 1]) != Hash(table=[1, 0])
    assert repr(Hash(table=[0, 1])) != repr(Hash(table=[1, 0]))


def test_losses_by_name_replace_the_two_coefficients():
    plain = MoEConfig(**SIZES)
    assert plain.coefficients == (("load_balancing", 0.01),)
    both = MoEConfig(**SIZES, load_balancing_over="sequence", router_z_loss_coefficient=0.5)
    assert both.coefficients == (("sequence", 0.01), ("z", 0.5))
    named = MoEConfig(**SIZES, losses={"load_balancing": 0.01, "sequence": 0.02, "z": 0.0})
    assert named.coefficients == (("load_balancing", 0.01), ("sequence", 0.02))
    x, _ = inputs()
    torch.manual_seed(0)
    layer = MoE(named)
    layer(x)
    routing = layer.router(x.reshape(16, 6))
    counts = routing.plan.tokens_per_expert
    expected = 0.01 * losses.load_balancing_loss(routing.router_probs, counts)
    expected = expected + 0.02 * losses.sequence_load_balancing_loss(routing.router_probs, routing.expert_indices, 2)
    torch.testing.assert_close(dmoe.aux_loss(layer), expected)


@pytest.mark.parametrize("init", ["switch", "vmoe", "gmoe", "swin_moe", "xavier"])
def test_initial_values_by_name(init):
    torch.manual_seed(0)
    layer = MoE(hidden_size=64, ffn_hidden_size=256, num_experts=4, init=init, gated=False, bias="expert",
                frozen_down_bias=init == "swin_moe")  # fmt: skip
    up, down, router = layer.experts.up_proj, layer.experts.down_proj, layer.router.weight
    std = {
        "switch": (0.88 * math.sqrt(0.1 / 64), 0.88 * math.sqrt(0.1 / 256), 0.88 * math.sqrt(0.1 / 64)),
        "vmoe": (math.sqrt(2 / 320), math.sqrt(2 / 320), math.sqrt(1 / 64)),
        "gmoe": (1 / math.sqrt(3 * 64), 1 / math.sqrt(3 * 256), 0.02),
        "swin_moe": (0.005, 0.005, 0.005),
        "xavier": (math.sqrt(2 / 320), math.sqrt(2 / 320), math.sqrt(2 / 68)),
    }[init]
    for weight, expected in zip((up, down, router), std, strict=True):
        assert abs(weight.std().item() / expected - 1) < 0.1, (weight.std(), expected)
    if init == "switch":
        assert up.abs().max() <= 2 * math.sqrt(0.1 / 64)
        assert not layer.experts.down_bias.any()
    if init == "swin_moe":
        (layer(torch.randn(9, 64)).sum() + dmoe.aux_loss(layer)).backward()
        assert layer.experts.down_bias.grad is None
        assert not layer.experts.down_bias.any()
        assert layer.experts.up_bias.grad.any()
        assert not layer.double().experts.down_bias.requires_grad


def test_distillation_is_a_divergence_that_stops():
    torch.manual_seed(0)
    student = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(2, 3, 5, dtype=torch.float64)
    loss = losses.distillation_loss(student, teacher, temperature=2.0, coefficient=0.5)
    p, q = (teacher / 2).softmax(-1), (student / 2).softmax(-1)
    torch.testing.assert_close(loss, 0.5 * 4 * (p * (p / q).log()).sum() / 6)
    assert torch.autograd.gradcheck(lambda s: losses.distillation_loss(s, teacher, temperature=2.0), (student,))
    assert losses.distillation_loss(teacher, teacher) == 0
    assert losses.distillation_loss(student, teacher, step=9, stop_step=10) > 0
    stopped = losses.distillation_loss(student, teacher, step=10, stop_step=10)
    assert stopped == 0
    stopped.backward()
    for bad, message in (
        ({"temperature": 0.0}, "temperature: expected a positive number, got 0.0"),
        ({"coefficient": -1.0}, "coefficient: expected at least 0, got -1.0"),
        ({"seq_length": 0}, "seq_length: expected at least 1"),
    ):
        with pytest.raises(ValueError, match=f"distillation_loss: {message}"):
            losses.distillation_loss(student, teacher, **bad)
    with pytest.raises(ValueError, match="distillation_loss: teacher_logits: expected the student's shape"):
        losses.distillation_loss(student, teacher[:1])


def test_noise_is_drawn_where_the_logits_are():
    like = torch.zeros(1000, 4, dtype=torch.float64)
    torch.manual_seed(0)
    assert abs(noise.gaussian(like).std() - 1) < 0.05
    assert abs(noise.gumbel(like).mean() - 0.5772) < 0.05
    assert abs(noise.uniform(like).mean() - 0.5) < 0.05
    assert noise.gumbel(like.to("meta")).device.type == "meta"


def test_half_precision_draws_no_ties():
    """Whose winner would be the lowest id: of 64 experts the first came 5% more often than the last."""
    like = torch.zeros(1000, dtype=torch.bfloat16)
    for draw in (noise.gumbel, noise.uniform):
        assert draw(like).unique().numel() > 990
    router = router_of(router=TopK(logit_noise="gumbel", second_expert="sampling"))
    assert router.route(like.view(250, 4)).gate_weights.dtype == torch.bfloat16


def test_a_loss_of_ones_own_gets_the_gradient_of_the_probabilities():
    for name, trains in (("entropy", True), ("z", False)):
        router = router_of(score_function="sigmoid", losses={name: 1.0})
        assert router.route(torch.randn(8, 4).requires_grad_()).router_probs.requires_grad is trains


def test_a_quantile_update_survives_logits_that_are_no_numbers():
    torch.manual_seed(0)
    router = router_of(selection_bias=True, selection_bias_rule="quantile")
    router.selection_bias.copy_(torch.tensor([1.0, -1.0, 0.5, -0.5]))
    router.route(torch.full((8, 4), math.nan).requires_grad_()).gate_weights.sum().backward()
    router.update_selection_bias()
    assert router.selection_bias.tolist() == [1.0, -1.0, 0.5, -0.5]
    logits = torch.randn(8, 4).index_fill_(1, torch.tensor(2), -math.inf).requires_grad_()
    router.route(logits).gate_weights.sum().backward()
    counted = router.load_since_update.clone()
    router.update_selection_bias()
    expected = counted[:4].index_fill(0, torch.tensor(2), 0.5)
    torch.testing.assert_close(router.selection_bias, expected - expected.mean())


def test_a_single_expert_has_no_loss_of_importance():
    logits = torch.randn(8, 1).requires_grad_()
    loss = losses.load_importance_loss(logits, logits + torch.randn(8, 1), 1, 1.0)
    assert loss == 0
    loss.backward()
