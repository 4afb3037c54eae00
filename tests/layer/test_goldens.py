"""Gating cases recorded from fairseq, DeepSpeed, V-MoE and Expert Choice (Zhou et al.) on one set of logits."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch

from dmoe import MoE
from dmoe.losses import load_balancing_loss
from dmoe.metrics import choice_dropped_share, routing_entropy

GOLDENS = json.loads((Path(__file__).resolve().parents[1] / "support" / "gating_goldens.json").read_text())
LOGITS = torch.tensor(GOLDENS["logits"])
TOKENS, EXPERTS = LOGITS.shape

FAIRSEQ = {
    "capacity_factor": 1.0,
    "capacity_formula": "ceil_per_choice",
    "load_balancing_choices": "first",
    "normalize_when": "after_drop",
    "gate_normalization": 1.0,
}
CASES = {
    "fs_top2_all": {"top_k": 2, "drop_order": "choice_major", **FAIRSEQ},
    "fs_top2_bpr": {"top_k": 2, "drop_order": "batch_prioritized", **FAIRSEQ},
    "fs_top1_cf1": {"top_k": 1, "drop_order": "token_major", **FAIRSEQ, "gate_normalization": None},
    "ds_top2_cf1": {
        "top_k": 2,
        "capacity_factor": 1.0,
        "drop_order": "choice_major",
        "load_balancing_choices": "first",
        "gate_normalization": 1.0,
        "normalize_when": "after_drop",
    },
    "ds_top3_probs": {"top_k": 3, "capacity_factor": 1.0, "drop_order": "gate_weight"},
    "vmoe_k2_C3_bpr1": {"top_k": 2, "capacity": 3, "drop_order": "batch_prioritized"},
    "expert_choice_c2": {"router": "expert_choice", "causal": False, "capacity_factor": 2.0},
}


def route(name, **extra):
    layer = MoE(hidden_size=4, ffn_hidden_size=4, num_experts=EXPERTS, **{**CASES[name], **extra})
    routing = layer.router.route(LOGITS.clone().requires_grad_())
    return layer, routing


def kept_tokens(plan):
    """Tokens that each expert computes, sorted, off the rows of the plan."""
    starts, tokens = plan.expert_offsets.tolist(), plan.row_to_token.tolist()
    return [sorted(t for t in tokens[a:b] if t >= 0) for a, b in itertools.pairwise(starts)]


@pytest.mark.parametrize("name", CASES)
def test_kept_tokens(name):
    _, routing = route(name)
    assert kept_tokens(routing.plan) == GOLDENS[name]["kept"]


@pytest.mark.parametrize("name", [name for name in CASES if "capacity" in GOLDENS[name]])
def test_capacity(name):
    layer, routing = route(name)
    assert layer.config.capacity_for(TOKENS) == GOLDENS[name]["capacity"] == routing.plan.capacity


@pytest.mark.parametrize("name", [name for name in CASES if "weights" in GOLDENS[name]])
def test_weights(name):
    _, routing = route(name)
    dense = torch.zeros(TOKENS, EXPERTS).scatter_add_(1, routing.expert_indices, routing.gate_weights.detach())
    torch.testing.assert_close(dense, torch.tensor(GOLDENS[name]["weights"]), rtol=0, atol=2e-6)


@pytest.mark.parametrize("name", [name for name in CASES if "l_aux" in GOLDENS[name]])
def test_balance_loss(name):
    layer, routing = route(name, load_balancing_coefficient=1.0)
    assert layer.router_losses(routing).item() == pytest.approx(GOLDENS[name]["l_aux"], abs=1e-6)


def test_statistics_of_fairseq():
    for name in ("fs_top2_all", "fs_top2_bpr"):
        golden, (_, routing) = GOLDENS[name], route(name)
        overflow = 100 * choice_dropped_share(routing.expert_indices, routing.plan.token_to_rows, EXPERTS)
        assert overflow.tolist() == pytest.approx([golden["overflow1"], golden["overflow2"]], abs=1e-4)
        assert routing_entropy(routing.router_probs).item() == pytest.approx(golden["entropy"], abs=1e-6)
        first = torch.bincount(routing.expert_indices[:, 0], minlength=EXPERTS)
        assert int((first == 0).sum()) == golden["unused1"]
        share = (100 * first / TOKENS).sort().values
        assert share[-1].item() == pytest.approx(golden["bal1_top"])
        assert share[0].item() == pytest.approx(golden["bal1_bot"])


def test_counts_before_the_drop():
    _, routing = route("ds_top2_cf1")
    assert routing.plan.tokens_per_expert.tolist() == GOLDENS["ds_top2_cf1"]["exp_counts"]


def test_combined_mass_of_v_moe():
    _, routing = route("vmoe_k2_C3_bpr1")
    assert routing.gate_weights.sum().item() == pytest.approx(GOLDENS["vmoe_k2_C3_bpr1"]["mass"], abs=1e-6)


def test_expert_choice_counts():
    golden, (_, routing) = GOLDENS["expert_choice_c2"], route("expert_choice_c2")
    assert routing.plan.tokens_per_expert.tolist() == golden["counts"] == [golden["k"]] * EXPERTS
    assert routing.plan.token_offsets.diff().tolist() == golden["tokens_per"]


def test_switch_loss():
    probs = LOGITS.softmax(-1)
    counts = torch.bincount(probs.argmax(-1), minlength=EXPERTS)
    assert load_balancing_loss(probs, counts).item() == pytest.approx(GOLDENS["switch_aux"], abs=1e-6)


def test_every_case_is_covered():
    assert set(CASES) | {"logits", "switch_aux"} == set(GOLDENS)
