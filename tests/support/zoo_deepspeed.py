"""DeepSpeed's cases: its three gates, their capacities and jitter, layers with a residual expert, and MoS's loss."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from zoo import Case, config_of, copy_mlps, kept_of, numbers, sizes_of

import dmoe
from dmoe import MoE, MoEConfig, Routing
from dmoe.losses import distillation_loss, gshard_loss
from dmoe.routing import TopK

OF_ITS_OBJECTS = {
    "experts_identical_at_construction": "DeepSpeed copies one expert; dmoe draws each one's own values",
    "mlp_is_one_of_the_expert_objects": "the residual expert is a module of the caller's here",
}


def run(case: Case) -> None:
    """A case of DeepSpeed's gates or of its MoE layer."""
    if "rows" in case.outputs:
        _table(case)
    elif "experts" in case.inputs:
        _layer(case)
    else:
        _gate(case)


def run_mos(case: Case) -> None:
    """A case of Megatron-DeepSpeed's staged distillation."""
    settings, outputs = case.settings, case.outputs
    student, teacher = case.given("student_logits").requires_grad_(), case.given("teacher_logits")
    temperature, cut = settings["kd_temp"], settings["curriculum_seqlen"]
    assert student.shape[1] == (settings["seq_length"] if cut is None else cut)
    loss = distillation_loss(
        student,
        teacher,
        temperature=temperature,
        coefficient=settings["kd_beta_ce"],
        seq_length=settings["seq_length"],
    )
    outputs.matches("mos_loss", loss)
    loss.backward()
    outputs.matches("grad_student_logits", student.grad)
    tokens = zip(student.detach().flatten(0, 1), teacher.flatten(0, 1), strict=True)
    each = [distillation_loss(of_student, of_teacher, temperature=temperature) for of_student, of_teacher in tokens]
    outputs.matches("kl_per_token", torch.stack(each).view(student.shape[:2]) / temperature**2)
    settings.leave_out({"kd_alpha_ce": "DeepSpeed reads it and never uses it"})


def _config(case: Case) -> MoEConfig:
    """The settings in dmoe's terms: of the top-1 gate, of the top-2 gate, or of ``topkgating``.

    Only the first two have options of their own, and the layer calls them for its k of 1 and 2.
    """
    settings = case.settings
    sampling, by_chance = settings.get("top2_2nd_expert_sampling"), settings.get("use_rts")
    k = settings.get("k", 1 if sampling is None else 2)
    named = k <= 2 and (sampling is not None or by_chance is not None)
    logits = case.given("logits")
    experts = len(case.given("weight" if "weight" in case.inputs else "gate_weight")) if logits is None else None
    fields: dict[str, Any] = {
        "top_k": k,
        "capacity_formula": "ceil_float32",
        "min_capacity": settings["min_capacity"],
        "load_balancing_choices": "first" if named else "all",
        "losses": {"load_balancing": 1.0},
        **_order(case, k, named, sampling, by_chance),
    }
    factor, of_evaluation = settings["capacity_factor"], settings.get("eval_capacity_factor")
    if settings.get("drop_tokens", True):
        fields |= {"capacity_factor": factor, "eval_capacity_factor": of_evaluation}
    if not named or k > 1:  # by what is left after the drop, also where k = 1
        fields |= {"gate_normalization": 1.0, "normalize_when": "after_drop"}
    return config_of(logits.shape[1] if experts is None else experts, **fields)


def _order(case: Case, k: int, named: bool, sampling: bool | None, by_chance: bool | None) -> dict[str, Any]:
    """Who is dropped, and what is drawn."""
    policy = case.settings.get("noisy_gate_policy")
    assert policy in (None, "Jitter", "RSample")
    if not named:
        by_weight = case.settings.get("drop_policy", "probs") == "probs"
        return {"drop_order": "gate_weight" if by_weight else "token_major"}
    if k == 2:  # the second expert is drawn in evaluation, too
        family = TopK(second_expert="sampling", noise_in_eval=True) if sampling else TopK()
        return {"drop_order": "choice_major", "router": family}
    family = TopK(logit_noise="gumbel") if policy == "RSample" else TopK()
    return {"drop_order": "random" if by_chance else "token_major", "router": family}


def _feed(case: Case, config: MoEConfig) -> None:
    case.feed("gumbel", case.given("gumbel"))
    uniform = case.given("rts_uniform")
    if config.dropless or config.drop_order != "random":  # DeepSpeed draws all the same
        return
    assert case.feed("uniform", uniform)


def _gate(case: Case) -> None:
    settings, outputs = case.settings, case.outputs
    config, training = _config(case), settings.get("training", True)
    _feed(case, config)
    x, mask, jitter = case.given("x"), case.given("used_token"), case.given("jitter")
    most = settings.get("jitter_epsilon", 0)
    if x is None:
        logits = case.given("logits")
        layer = MoE(config).train(training)
    else:
        # dmoe draws its jitter inside the operation; what it multiplies is the same, and the gate's alone.
        assert (jitter is not None) == (training and most > 0)
        assert jitter is None or ((jitter - 1).abs() <= most).all()
        layer = MoE(replace(config, hidden_size=x.shape[1])).train(training)
        with torch.no_grad():
            layer.router.weight.copy_(case.given("weight"))
        logits = layer.router.logits(x if jitter is None else x * jitter)
    routing = layer.router.route(logits, token_mask=None if mask is None else mask.bool())
    outputs.matches("logits", logits)
    outputs.matches("l_aux", _loss(layer, routing, mask))
    outputs.matches("exp_counts", routing.plan.tokens_per_expert)
    if "expert" in outputs:
        outputs.matches("expert", routing.expert_indices.squeeze(1))
    if "capacity" in outputs:
        counts, most = routing.plan.tokens_per_expert, config.capacity_for(len(logits), training)
        busiest = int(counts.max())  # where nothing is dropped
        assert (busiest if most is None else most) == min(outputs["capacity"], len(logits) * config.top_k)
    if _keeps_any(case, config):
        outputs.differs("kept", "deepspeed without RTS keeps any tokens")
        outputs.differs("combine_weights", "deepspeed without RTS keeps any tokens")
        _keeps_first(config, routing)
    else:
        outputs.matches("kept", kept_of(routing).tokens()[0])
        outputs.matches("combine_weights", kept_of(routing).dense())


def _keeps_any(case: Case, config: MoEConfig) -> bool:
    return case.settings.get("use_rts") is False and config.top_k == 1 and not config.dropless


def _keeps_first(config: MoEConfig, routing: Routing) -> None:
    for expert, tokens in enumerate(kept_of(routing).tokens()[0]):
        wanted = (routing.expert_indices[:, 0] == expert).nonzero().flatten().tolist()
        assert tokens == wanted[: routing.plan.capacity]


def _loss(layer: MoE, routing: Routing, mask: Tensor | None) -> Tensor:
    """A layer's; where tokens are left out DeepSpeed still counts them in both shares, as GShard's loss does."""
    if mask is not None:
        return gshard_loss(routing.router_probs, routing.plan.tokens_per_expert)
    found = layer.router_losses(routing)
    assert found is not None
    return found


class _Mlp(nn.Module):
    """The residual expert: a dense MLP of the caller's."""

    def __init__(self, weights: Mapping[str, Any]) -> None:
        super().__init__()
        self.fc1, self.fc2 = (_linear(numbers(weights[f"{name}_weight"])) for name in ("fc1", "fc2"))
        with torch.no_grad():
            self.fc1.bias.copy_(numbers(weights["fc1_bias"]))
            self.fc2.bias.copy_(numbers(weights["fc2_bias"]))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(torch.relu(self.fc1(x)))


def _linear(weight: Tensor) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0])
    with torch.no_grad():
        linear.weight.copy_(weight)
    return linear


def _layer(case: Case) -> None:
    settings, inputs, outputs = case.settings, case.inputs, case.outputs
    experts, training = inputs["experts"], settings["training"]
    assert settings["expert"] == "fc2(relu(fc1(x)))"
    config = replace(_config(case), bias="expert", **sizes_of(experts))
    _feed(case, config)
    moe = MoE(config)
    copy_mlps(moe, experts)
    with torch.no_grad():
        moe.router.weight.copy_(case.given("gate_weight"))
    layer: Any = moe
    x = case.given("x").requires_grad_()
    if settings["use_residual"]:
        layer = dmoe.ResidualMoE(moe, _Mlp(inputs["mlp"]))
        with torch.no_grad():
            layer.coefficient.weight.copy_(case.given("coefficient_weight"))
            layer.coefficient.bias.copy_(case.given("coefficient_bias"))
        outputs.matches("coefficients", torch.softmax(layer.coefficient(x.detach()), -1))
    layer.train(training)
    y = layer(x)
    routing = moe.router(x.flatten(0, -2))
    loss = moe.take_aux_loss() if training else moe.router_losses(routing)  # DeepSpeed's is there in evaluation, too
    assert loss is not None
    outputs.matches("y", y)
    outputs.matches("l_aux", loss)
    outputs.matches("exp_counts", routing.plan.tokens_per_expert)
    (y.sum() + loss).backward()
    outputs.matches("grad_x_of_ysum_plus_laux", x.grad)
    outputs.leave_out(OF_ITS_OBJECTS)


def _table(case: Case) -> None:
    assert len(case.inputs["columns"]) == 6
    for tokens, experts, factor, least, capacity, in_double in case.outputs["rows"]:
        config = config_of(experts, top_k=1, capacity_factor=factor, min_capacity=least)
        for formula, expected in (("ceil_float32", capacity), ("ceil_of_share", in_double)):
            found = replace(config, capacity_formula=formula).capacity_for(tokens)
            assert found == min(expected, tokens), (tokens, experts, factor, least, formula)
    case.settings.leave_out({"capacity_factor_passed": "a remark: k is 1 in the table"})
