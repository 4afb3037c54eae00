"""The gate that fairseq's flags describe, against recorded cases of the branch and a loop over tokens."""

from __future__ import annotations

import json
import math
from pathlib import Path

import fairseq_jobs as jobs
import fairseq_oracle
import pytest
import torch
from fairseq_pool import in_fairseq, needs_fairseq

pytestmark = needs_fairseq

GOLDENS = json.loads((Path(__file__).resolve().parents[1] / "support" / "gating_goldens.json").read_text())
GOLDEN_FLAGS = {
    "fs_top2_all": {"moe_second_expert_policy": "all"},
    "fs_top2_bpr": {"moe_second_expert_policy": "all", "moe_batch_prioritized_routing": True},
    "fs_top1_cf1": {"moe_top1_expert": True},
}
LOGGED = {
    "l_aux": "gate_loss",
    "overflow1": "overflow_expert1",
    "overflow2": "overflow_expert2",
    "entropy": "entropy_gating",
    "unused1": "unused_expert1_count",
    "bal1_top": "expert1_balance_top",
    "bal1_bot": "expert1_balance_bottom",
}


@pytest.mark.parametrize("fp32", [False, True])
@pytest.mark.parametrize("name", GOLDEN_FLAGS)
def test_cases_recorded_from_the_branch(name, fp32):
    golden, logits = GOLDENS[name], torch.tensor(GOLDENS["logits"]).unsqueeze(0)
    flags = GOLDEN_FLAGS[name] | ({"moe_gating_use_fp32": True} if fp32 else {})
    kept, weights, figures, _, _ = in_fairseq(jobs.route, flags, logits, None, True, 0, True)
    assert kept == golden["kept"]
    assert max(map(len, kept)) <= golden["capacity"]
    torch.testing.assert_close(weights, torch.tensor(golden["weights"]), rtol=0, atol=2e-6)
    for recorded, logged in LOGGED.items():
        if recorded in golden:
            assert figures[logged] == pytest.approx(golden[recorded], abs=1e-4), logged


def test_every_recorded_case_of_fairseq_is_covered():
    assert {name for name in GOLDENS if name.startswith("fs_")} == set(GOLDEN_FLAGS)


B, S, E = 3, 7, 5
T = B * S
CASES = {
    "defaults, but for the policy": {},
    "before the drop": {"moe_normalize_gate_prob_before_dropping": True},
    "by gate": {"moe_batch_prioritized_routing": True},
    "padding": {"use_moe_pad_mask": True},
    "padding by gate, before": {
        "use_moe_pad_mask": True,
        "moe_batch_prioritized_routing": True,
        "moe_normalize_gate_prob_before_dropping": True,
    },
    "padding that is not masked": {"use_moe_pad_mask": False},
    "random": {"moe_second_expert_policy": "random"},
    "random before": {"moe_second_expert_policy": "random", "moe_normalize_gate_prob_before_dropping": True},
    "random dropless": {"moe_second_expert_policy": "random", "moe_dropless": True},
    "top 1": {"moe_top1_expert": True},
    "top 1 padding": {"moe_top1_expert": True, "use_moe_pad_mask": True},
    "top 1 dropless": {"moe_top1_expert": True, "moe_dropless": True},
    "dropless": {"moe_dropless": True},
    "dropless padding": {"moe_dropless": True, "use_moe_pad_mask": True},
    "evaluation": {"training": False},
    "evaluation, as training": {"training": False, "moe_eval_capacity_token_fraction": -1.0},
    "evaluation, tight": {"training": False, "moe_eval_capacity_token_fraction": 0.05},
    "evaluation, dropless": {"training": False, "moe_dropless": True, "moe_eval_capacity_token_fraction": 0.05},
    "evaluation without luck": {"training": False, "moe_second_expert_policy": "random"},
    "evaluation with luck": {
        "training": False,
        "moe_second_expert_policy": "random",
        "moe_random_second_expert_in_eval": True,
    },
}


def capacity_of(flags, training):
    """What the branch's page says: 2 ceil(T / E), ceil(T / E) for top 1; in evaluation ceil(fraction * T)."""
    fraction = flags.get("moe_eval_capacity_token_fraction", 0.25)
    if flags.get("moe_dropless"):
        return None
    if not training and fraction > 0:
        return math.ceil(fraction * T)
    return (1 if flags.get("moe_top1_expert") else 2) * math.ceil(T / E)


@pytest.mark.parametrize("name", CASES)
def test_flags_against_a_loop_over_tokens(name):
    flags = {"moe_second_expert_policy": "all", **CASES[name]}
    training = flags.pop("training", True)
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(B, S, E, dtype=torch.float64, generator=generator)
    logits[..., 0] += 1.5  # a favourite, so that capacities bind
    padding = torch.zeros(B, S, dtype=torch.bool)
    if "padding" in name:
        padding[1, 4:], padding[2, 1:] = True, True
    kept, weights, figures, y, experts = in_fairseq(jobs.route, flags, logits, padding, training, 5)

    if flags.get("moe_dropless"):  # nothing depends on the order of tokens, and the layer leaves it time first
        order = torch.arange(T).view(B, S).t().reshape(T)
        logits, padding, y = (each.reshape(T, -1)[order] for each in (logits, padding, y))
    lucky = flags["moe_second_expert_policy"] == "random" and (training or "with luck" in name)
    torch.manual_seed(5)
    expected_kept, expected_weights, expected = fairseq_oracle.gate(
        logits.view(T, E).tolist(),
        capacity_of(flags, training),
        top_k=1 if flags.get("moe_top1_expert") else 2,
        before=flags.get("moe_normalize_gate_prob_before_dropping", False),
        by_gate=flags.get("moe_batch_prioritized_routing", False),
        padding=padding.reshape(T).tolist() if flags.get("use_moe_pad_mask") else None,
        uniform=torch.rand(T, dtype=torch.float64).tolist() if lucky else None,
    )
    asked = [2 * T, T][bool(flags.get("moe_top1_expert"))]
    if flags.get("moe_dropless") or lucky or "padding" in name or name == "evaluation":
        assert sum(map(len, expected_kept)) > asked * 0.25
    else:
        assert sum(map(len, expected_kept)) < asked  # the capacity was at work
    assert kept == expected_kept
    torch.testing.assert_close(weights, torch.tensor(expected_weights, dtype=torch.float64), rtol=0, atol=1e-12)
    loss = expected.pop("gate_loss")
    assert figures.pop("gate_loss") == pytest.approx(loss, abs=1e-12)
    assert {**expected, "all_to_all_cpu_time_ms": 0, "all_to_all_cuda_time_ms": 0} == pytest.approx(figures, abs=1e-5)

    by_hand = torch.zeros(T, E, dtype=torch.float64)
    for token, row in enumerate(logits.view(T, E)):
        for expert in range(E):
            fc1, b1, fc2, b2 = (experts[f"experts.{expert}.{part}"] for part in PARTS)
            by_hand[token] += expected_weights[token][expert] * (fc2 @ (fc1 @ row + b1).relu() + b2)
    torch.testing.assert_close(y, by_hand, rtol=0, atol=1e-12)


def test_precision_of_a_gate_in_float16():
    """The matmul stays in the model's dtype; the softmax is float32 when the flag says so."""
    torch.manual_seed(0)
    x, weight = torch.randn(9, 40).half(), torch.randn(6, 40).half()
    logits = x @ weight.t()
    wide = in_fairseq(jobs.gate_in_half, True, x, weight)
    assert wide.dtype == torch.float32
    torch.testing.assert_close(wide, logits.float().softmax(-1), rtol=1e-6, atol=1e-7)
    assert (wide - (x.float() @ weight.float().t()).softmax(-1)).abs().max() > 1e-5  # which a float32 matmul is not
    half = in_fairseq(jobs.gate_in_half, False, x, weight)
    torch.testing.assert_close(half.float(), logits.softmax(-1).float(), rtol=2e-3, atol=1e-4)


PARTS = ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias")


def test_sampling_draws_the_second_expert_from_the_softmax_without_the_first():
    row = torch.tensor([0.3, 2.0, -0.5, 1.0, 0.0])
    copies = 40_000
    first, second = in_fairseq(
        jobs.drawn_seconds, row.expand(copies, 5).contiguous(), True, {"moe_second_expert_policy": "sampling"}
    )
    assert first[1] == copies
    others = row.clone()
    others[1] = -math.inf
    share = others.softmax(0)
    sigma = (share * (1 - share) / copies).sqrt()
    assert second[1] == 0
    assert ((second[:5] / copies - share).abs() <= 4.5 * sigma).all()


@pytest.mark.parametrize(("flags", "drawn"), [({}, False), ({"moe_random_second_expert_in_eval": True}, True)])
def test_the_drawing_policies_rest_in_evaluation_unless_told(flags, drawn):
    logits = torch.tensor([0.3, 2.0, -0.5, 1.0, 0.0]).expand(500, 5).contiguous()
    _, second = in_fairseq(jobs.drawn_seconds, logits, False, {"moe_second_expert_policy": "sampling", **flags})
    assert (second[3] < 500) == drawn
    _, second = in_fairseq(jobs.drawn_seconds, logits, False, {"moe_second_expert_policy": "random", **flags})
    assert (second[5] > 0) == drawn  # those that were not kept
