"""Megatron-Core's cases: scores, groups, bias and Sinkhorn, drops, its losses over sequences, calls and ranks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from zoo import Case, config_of, kept_of, losses_of, route

from dmoe import MoE, MoEConfig
from dmoe.losses import load_balancing_loss, sequence_load_balancing_loss
from dmoe.ops import sinkhorn

LOSSES = {"aux_loss": "load_balancing", "seq_aux_loss": "sequence", "global_aux_loss": "global"}
LOGGED = {
    "load_balancing": "load_balancing_loss",
    "sequence": "seq_load_balancing_loss",
    "global": "global_load_balancing_loss",
    "z": "z_loss",
}


def run(case: Case) -> None:
    """A case of Megatron-Core's router."""
    if "rows" in case.outputs:
        _table(case)
    elif "matrix" in case.outputs:
        _sinkhorn_matrix(case)
    elif "logits_of_micro_batches" in case.inputs:
        _micro_batches(case)
    elif "logits_of_ranks" in case.inputs:
        _ranks(case)
    else:
        _routing(case)


def _routing(case: Case) -> None:
    """Token s of sequence b is token s * B + b; a router is told of sequences that stand one after the other."""
    settings, outputs, training = case.settings, case.outputs, case.settings["training"]
    logits = case.given("logits").requires_grad_()
    assert settings["num_experts"] == logits.shape[2]
    config = _config(case)
    layer, bias = MoE(config).train(training), case.given("expert_bias")
    assert (bias is not None) == config.selection_bias
    if bias is not None:
        layer.router.selection_bias.copy_(bias)
    routing = layer.router.route(logits.detach().flatten(0, 1))
    kept = kept_of(routing)
    outputs.matches("probs", kept.dense())
    outputs.matches("kept", kept.tokens()[0])
    outputs.matches("tokens_per_expert", routing.plan.kept_per_expert)  # Megatron's count those that are left

    by_sequence = logits.transpose(0, 1).flatten(0, 1)
    coefficients = _coefficients(case)
    logged = outputs.get("losses_logged_without_coeff", {})
    assert {LOGGED[name] for name in coefficients} == set(logged)
    sequences = logits.shape[1]

    def loss_of(losses: dict[str, float]) -> Tensor:
        layer = MoE(replace(config, losses=losses)).train(training)
        if bias is not None:
            layer.router.selection_bias.copy_(bias)
        found = layer.router_losses(layer.router.route(by_sequence), sequences)
        assert found is not None
        return found

    for name in coefficients:
        logged.matches(LOGGED[name], loss_of({name: 1.0}))
    if coefficients:
        loss_of(coefficients).backward()
        outputs.matches("grad_logits_of_weighted_losses_only", logits.grad.flatten(0, 1))


def _coefficients(case: Case) -> dict[str, float]:
    settings = case.settings
    kinds, given = settings["moe_router_load_balancing_type"], settings.get("moe_aux_loss_coeff", 0)
    kinds, given = ([each] if not isinstance(each, list) else each for each in (kinds, given))
    named = {LOSSES[kind]: value for kind, value in zip(kinds, given, strict=True) if kind in LOSSES}
    assert set(kinds) <= {*LOSSES, "none", "sinkhorn"}
    return {name: value for name, value in {**named, "z": settings.get("moe_z_loss_coeff", 0)}.items() if value}


def _config(case: Case) -> MoEConfig:
    settings = case.settings
    experts, top_k = settings["num_experts"], settings["moe_router_topk"]
    fields: dict[str, Any] = {
        "top_k": top_k,
        "load_balancing_choices": "plain",
        "gate_scale": settings.get("moe_router_topk_scaling_factor") or 1.0,
        **_capacity(settings.get("moe_expert_capacity_factor"), None),
    }
    if settings.get("moe_expert_capacity_factor") is not None:
        policy = settings.get("moe_token_drop_policy", "probs")
        fields["drop_order"] = {"probs": "normalized_gate_weight", "position": "token_major"}[policy]
    if settings["moe_router_load_balancing_type"] == "sinkhorn":
        return config_of(experts, router="sinkhorn", causal=False, **fields)
    score = settings.get("moe_router_score_function", "softmax")
    before = settings.get("moe_router_pre_softmax", False)
    if score == "sigmoid":
        fields |= {"score_function": "sigmoid", "gate_normalization": 1.0 if top_k > 1 else None}
    else:
        fields["softmax_order"] = "before_topk" if before else "after_topk"
    fields["selection_bias"] = settings.get("moe_router_enable_expert_bias", False)
    groups, best = settings.get("moe_router_num_groups"), settings.get("moe_router_group_topk")
    if best:
        # A group's rank is the sum of its best top_k / best; of two logits it is no sum of two scores.
        ranked_by = top_k // best
        assert ranked_by == 1 or (ranked_by == 2 and (before or score == "sigmoid")), "dmoe ranks by one or two scores"
        fields |= {"num_groups": groups, "top_k_groups": best, "group_score": ("max", "top2_sum")[ranked_by - 1]}
    return config_of(experts, **fields)


def _capacity(factor: float | None, least: int | None) -> dict[str, Any]:
    return {"capacity_factor": factor, "capacity_formula": "ceil_of_share", "min_capacity": least or 0}


def _sinkhorn_matrix(case: Case) -> None:
    matrix = sinkhorn(case.given("logits"), case.settings["tol"])
    case.outputs.matches("matrix", matrix)
    case.outputs.matches("row_sums", matrix.sum(1))
    case.outputs.matches("column_sums", matrix.sum(0))


def _micro_batches(case: Case) -> None:
    """Counts add up over the calls, so a call's f is that of all calls so far, and its P its own."""
    settings = case.settings
    assert settings["moe_router_load_balancing_type"] == "global_aux_loss"
    config = config_of(settings["num_experts"], top_k=settings["moe_router_topk"], softmax_order="after_topk")
    counts, losses = torch.zeros(config.num_experts, dtype=torch.int64), []
    for logits in case.given("logits_of_micro_batches"):
        _, routing = route(config, logits.flatten(0, 1))
        counts += routing.plan.tokens_per_expert
        losses.append(load_balancing_loss(routing.router_probs, counts))
    case.outputs.matches("loss_logged_per_call_without_coeff", torch.stack(losses))
    settings.leave_out({"moe_aux_loss_coeff": "the losses are recorded without"})
    case.outputs.leave_out({"note": "a remark"})


class _OfRanks:
    """Stands for :class:`dmoe.parallel.LoadOfRanks` where all ranks' counts are at hand."""

    def __init__(self, counts: Tensor, mean_tokens: float) -> None:
        self.counts, self.mean_tokens = counts, torch.tensor(mean_tokens)

    def sum(self, tokens_per_expert: Tensor, num_tokens: int) -> tuple[Tensor, Tensor]:
        return self.counts, self.mean_tokens


def _ranks(case: Case) -> None:
    """Each rank's share of the joined batch's loss: its own P, everybody's f, everybody's tokens.

    dmoe's global loss divides by the mean number of tokens of a rank, such that the ranks' mean is the joined loss:
    R times Megatron's, whose ranks add up.
    """
    settings, logits = case.settings, case.given("logits_of_ranks")
    ranks, length, sequences, experts = logits.shape
    assert settings["num_experts"] == experts
    config = config_of(experts, top_k=settings["moe_router_topk"], softmax_order="after_topk", losses={"global": 1.0})
    layer, _ = route(config, logits.flatten(0, 2))
    routings = [layer.router.route(of_rank.flatten(0, 1)) for of_rank in logits]
    counts = sum(routing.plan.tokens_per_expert for routing in routings)
    layer.auxiliary.ranks = _OfRanks(counts, length * sequences)
    over_ranks = [layer.router_losses(routing) / ranks for routing in routings]

    # Sequences go on from rank to rank; what is another rank's is 0 in a rank's own P.
    joined = logits.permute(2, 0, 1, 3).flatten(0, 2)
    routing = layer.router.route(joined)
    place = torch.arange(ranks).repeat_interleave(length).repeat(sequences).unsqueeze(1)
    by_sequence = [
        sequence_load_balancing_loss(routing.router_probs * (place == rank), routing.expert_indices, sequences)
        for rank in range(ranks)
    ]
    whole = losses_of(replace(config, token_groups=sequences), {"load_balancing": 1.0}, joined)
    torch.testing.assert_close(sum(by_sequence), whole)
    values = {"aux_loss": over_ranks, "seq_aux_loss": by_sequence, "global_aux_loss": over_ranks}
    logged = case.outputs["loss_logged_per_rank_without_coeff"]
    for label in logged:  # "aux_loss with the two ranks in tp_cp"
        logged.matches(label, torch.stack(values[label.split()[0]]))
    settings.leave_out({"moe_aux_loss_coeff": "the losses are recorded without"})


def _table(case: Case) -> None:
    assert len(case.inputs["columns"]) == 5
    for choices, experts, factor, least, capacity in case.outputs["rows"]:
        for top_k in (k for k in (1, 2) if choices % k == 0):
            config = config_of(experts, top_k=top_k, **_capacity(factor, least))
            assert config.capacity_for(choices // top_k) == min(capacity, choices), (choices, experts, factor, least)
