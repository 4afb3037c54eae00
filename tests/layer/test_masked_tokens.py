"""Tokens that a mask leaves out: absent in everything, or only without an expert."""

from __future__ import annotations

import pytest
import torch
from helpers import small_config

from dmoe import MoE, MoEConfig
from dmoe.routing import Sinkhorn, SinkhornRouter, TopK, TopKRouter

T, E = 12, 4
MASK = torch.tensor([True] * 7 + [False] * 3 + [True] * 2)
UNROUTED = {"load_balancing_choices": "first", "load_balancing_coefficient": 1.0}
POLICIES = ("all", "sampling", "random")


def _logits(seed=0):
    return torch.randn(T, E, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def _router(policy="all", **fields):
    family = TopK(second_expert=policy, masked_tokens="unrouted")
    config = small_config(router=family, router_dtype="input", **UNROUTED, **fields)
    return TopKRouter(config, dtype=torch.float64)


@pytest.mark.parametrize("capacity", [None, 2])
@pytest.mark.parametrize("policy", POLICIES)
def test_unrouted_tokens_take_no_expert_and_no_place(policy, capacity):
    """The others are routed as if these were not there, and draw what they would have drawn."""
    router, logits = _router(policy, capacity=capacity, drop_order="choice_major", gate_normalization=1.0), _logits()
    torch.manual_seed(4)
    routing = router.route(logits, token_mask=MASK)
    torch.manual_seed(4)
    without = router.route(logits)
    assert (routing.expert_indices[~MASK] == E).all()
    assert torch.equal(routing.expert_indices[MASK], without.expert_indices[MASK])
    assert (routing.plan.token_to_rows[~MASK] == -1).all()
    assert not routing.gate_weights[~MASK].any()
    chosen = without.expert_indices if without.chosen_indices is None else without.chosen_indices
    assert torch.equal(routing.chosen_indices, chosen)
    assert (chosen < E).all()
    kept = [0] * E
    for k in range(2):
        for token in MASK.nonzero().flatten().tolist():
            expert = int(routing.expert_indices[token, k])
            if expert < E:
                kept[expert] += capacity is None or kept[expert] < capacity
    assert routing.plan.kept_per_expert.tolist() == kept


def test_unrouted_tokens_count_in_the_loss():
    """``E * sum_e(c_e / T * mean of p_e)``: c without them, T and the mean with them."""
    router, logits = _router(), _logits().requires_grad_()
    routing = router.route(logits, token_mask=MASK)
    loss = MoE(router.config, router_module=router).router_losses(routing)
    probs = logits.softmax(-1)
    first = [sum(int(probs[t].argmax()) == e for t in range(T) if MASK[t]) for e in range(E)]
    expected = E * sum(first[e] / T * probs[:, e].sum() / T for e in range(E))
    torch.testing.assert_close(loss, expected)
    assert routing.first_choices_per_expert.tolist() == first
    (found,) = torch.autograd.grad(loss, logits, retain_graph=True)
    torch.testing.assert_close(found, torch.autograd.grad(expected, logits)[0])
    assert found[~MASK].any(1).all()


def test_a_layer_reads_unrouted_tokens_as_they_are():
    fields = {"hidden_size": 8, "ffn_hidden_size": 12, "num_experts": E, **UNROUTED}
    x = torch.randn(T, 8, generator=torch.Generator().manual_seed(1))
    losses = {}
    for masked in ("absent", "unrouted"):
        torch.manual_seed(0)
        moe = MoE(MoEConfig(**fields, router=TopK(masked_tokens=masked)))
        given = x.clone().requires_grad_()
        y = moe(given, token_mask=MASK)
        assert not y[~MASK].any()
        assert torch.equal(moe.last_metrics.tokens_per_expert.sum(), MASK.sum() * 2)
        losses[masked] = moe.take_aux_loss()
        losses[masked].backward()
        assert given.grad[~MASK].any() == (masked == "unrouted")
        if masked == "unrouted":
            moe.eval()
            torch.testing.assert_close(moe(given), moe(given, token_mask=torch.ones(T, dtype=torch.bool)))
    assert abs(losses["absent"] - losses["unrouted"]) > 1e-3


@pytest.mark.parametrize(
    "fields",
    [
        {"load_balancing_choices": "all"},
        {"load_balancing_choices": "first", "token_groups": 2},
        {"load_balancing_choices": "first", "load_balancing_over": "sequence"},
    ],
)
def test_losses_that_have_no_such_form(fields):
    unrouted = TopK(masked_tokens="unrouted")
    with pytest.raises(ValueError, match="TopK: masked_tokens: expected 'absent' with a balance loss over anything"):
        small_config(router=unrouted, **fields)
    small_config(router=unrouted, load_balancing_coefficient=0.0, **fields)


@pytest.mark.parametrize("left", [0.0, 50.0])
def test_sinkhorn_balances_the_tokens_that_count(left):
    """With as many masked ones beside them the others choose as they do alone."""
    config = small_config(router=Sinkhorn(), allow_future_leak=True, top_k=1, load_balancing_coefficient=0.0)
    router = SinkhornRouter(config, Sinkhorn())
    logits = torch.randn(40, E, generator=torch.Generator().manual_seed(2)) * 2
    logits[:, 0] += 2
    mask = torch.arange(160) % 4 == 0
    whole = torch.full((160, E), left)
    whole[mask] = logits
    alone, among = router.route(logits), router.route(whole, token_mask=mask)
    assert torch.equal(among.expert_indices[mask], alone.expert_indices)
    assert (among.expert_indices[~mask] == E).all()
    counts = alone.plan.tokens_per_expert
    assert counts.max() <= 12 < logits.argmax(1).bincount().max()
